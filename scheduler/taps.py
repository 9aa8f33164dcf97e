"""Copies of what is said on the wires, for observers that ask (`quire tap`). No sockets here, but for the hub that tells.

Nobody who taps holds up anybody: what a tap has not acknowledged is bounded, and what comes beyond that is counted
instead of copied. While nobody taps, a frame costs a look at `active`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from ..common import curve
from ..common.channel import Codec, Event, Hub, T, encode
from ..common.messages import (
    Admitted,
    Message,
    Output,
    Outputs,
    StepPlan,
    StepResult,
    Submit,
    Tap,
    Tapped,
    ToFrontend,
    ToWorker,
)
from ..common.observing import COPY_BYTES, Copied

WINDOW_BYTES = 8 << 20
NOT_REVEALED = "token ids are shown as zeros: the engine runs without --reveal-prompts"


@dataclass(slots=True)
class _Tap:
    reveal: bool
    sent: int = 0  # bytes of bodies
    received: int = 0
    dropped: int = 0
    why: str = ""
    copies: list[Copied] = field(default_factory=list)  # not sent yet
    told: int = 0  # of the dropped


class Taps:
    """`name` says who a peer of a wire is, `clock` the time of day."""

    def __init__(
        self,
        name: Callable[[str, bytes], str],
        clock: Callable[[], float],
        *,
        may_reveal: bool,
        window: int = WINDOW_BYTES,
    ) -> None:
        self.active = False
        self._name, self._clock, self._may_reveal, self._window = name, clock, may_reveal, window
        self._taps: dict[bytes, _Tap] = {}
        self._codecs: dict[str, Codec[Any]] = {"frontends": Codec(ToFrontend), "workers": Codec(ToWorker)}

    def ask(self, observer: bytes, tap: Tap) -> None:
        """Begin, or acknowledge."""
        known = self._taps.get(observer)
        if known is None:
            refused = tap.reveal and not self._may_reveal
            self._taps[observer] = _Tap(tap.reveal and not refused, why=NOT_REVEALED if refused else "", told=-1)
            self.active = True
        else:
            known.received = min(max(known.received, tap.received), known.sent)

    def forget(self, observer: bytes) -> None:
        self._taps.pop(observer, None)
        self.active = bool(self._taps)

    def heard(self, wire: str, peer: bytes, message: Message | Event) -> None:
        if not isinstance(message, Tap):
            self._copy(wire, peer, None if isinstance(message, Event) else message, inbound=True)

    def said(self, wire: str, peer: bytes, frame: bytes) -> None:
        message = self._codecs[wire].decode(frame)
        if not isinstance(message, Tapped):
            self._copy(wire, peer, message, inbound=False)

    def take(self) -> list[tuple[bytes, Tapped]]:
        """What there is to send, one message for each tap."""
        found = []
        for observer, tap in self._taps.items():
            if tap.copies or tap.told != tap.dropped:
                found.append((observer, Tapped(tap.copies, tap.dropped, tap.why)))
                tap.copies, tap.told = [], tap.dropped
        return found

    def _copy(self, wire: str, peer: bytes, message: Message | None, *, inbound: bool) -> None:
        at, name = self._clock(), self._name(wire, peer)
        for reveal in (False, True):
            takers = [tap for tap in self._taps.values() if tap.reveal == reveal]
            if not takers:
                continue
            body = b"" if message is None else encode(message if reveal else blank(message))
            for tap in takers:
                size = len(body) + COPY_BYTES
                if tap.sent - tap.received + size > self._window:
                    tap.dropped += 1
                else:
                    tap.sent += size
                    tap.copies.append(Copied(at, wire, inbound, name, body))


def blank(message: Message) -> Message:
    """The same with zeros for token ids, as many as there are."""
    replace = msgspec.structs.replace
    match message:
        case Submit():
            sampling = replace(message.sampling, logit_bias={}, stop=[])
            salt = "salt" if message.salt else ""
            prompt, output = bytes(len(message.prompt)), bytes(len(message.output))
            return replace(message, prompt=prompt, output=output, sampling=sampling, salt=salt)
        case Outputs():
            return Outputs([_blank_output(output) for output in message.outputs])
        case StepPlan():
            return replace(message, admitted=[_blank_row(admitted) for admitted in message.admitted])
        case StepResult():
            return replace(message, tokens=bytes(len(message.tokens)), best_ids=bytes(len(message.best_ids)))
        case _:
            return message


def _blank_output(output: Output) -> Output:
    replace = msgspec.structs.replace
    found = [replace(hypothesis, tokens=[0] * len(hypothesis.tokens)) for hypothesis in output.hypotheses]
    return replace(output, tokens=[0] * len(output.tokens), hypotheses=found)


def _blank_row(admitted: Admitted) -> Admitted:
    sampling = msgspec.structs.replace(admitted.sampling, logit_bias={}, stop=[])
    return msgspec.structs.replace(admitted, tokens=bytes(len(admitted.tokens)), sampling=sampling)


class TappedHub(Hub[T]):
    """A hub that tells what it says."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        union: Any,
        keys: "curve.SchedulerKeys | None",
        wire: str,
        taps: Taps,
    ) -> None:
        super().__init__(context, address, union, keys)
        self._wire, self._taps = wire, taps

    def send_frame(self, peer: bytes, frame: bytes) -> bool:
        if self._taps.active:
            self._taps.said(self._wire, peer, frame)
        return super().send_frame(peer, frame)
