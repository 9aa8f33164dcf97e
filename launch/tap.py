"""`quire tap`: what the processes of a running engine say to each other, one line a message."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import msgspec

from ..common.channel import Codec
from ..common.errors import ConfigError
from ..common.messages import (
    Abort,
    FromFrontend,
    FromWorker,
    Heartbeat,
    Hello,
    Message,
    Outputs,
    Stats,
    Status,
    StepPlan,
    StepResult,
    Submit,
    Tap,
    Tapped,
    ToFrontend,
    ToWorker,
    Welcome,
    unpack,
)
from ..common.observing import COPY_BYTES, Copied
from .arguments import Parser
from .component import told
from .engine import add_engine, engine, heard
from .observer import Observer

UNIONS: dict[tuple[str, bool], Any] = {
    ("frontends", True): FromFrontend,
    ("frontends", False): ToFrontend,
    ("workers", True): FromWorker,
    ("workers", False): ToWorker,
}
SHOWN_IDS = 8
LOST = "Lost"  # in place of a message

DESCRIPTION = """\
Show what the processes of a running engine say to each other, as its scheduler hears and says it: time, peer, direction
(<- to the scheduler, -> from it), kind, what matters of it. Nothing waits for this: what it cannot keep up with is
counted, not shown. Token ids are shown as zeros unless the engine runs with --reveal-prompts and you ask for them."""

EXAMPLES = """\
    quire tap                                  everything but signs of life
    quire tap --kind Submit --kind Outputs     two kinds of message
    quire tap --peer 'worker*' --count 20      twenty messages from and to workers
    quire tap --id 7 -v                        whatever names request 7, with all fields"""


def main(argv: Sequence[str] | None = None, *, prog: str = "quire tap") -> int:
    parser = Parser(prog, DESCRIPTION, EXAMPLES)
    parser.add_argument("-v", "--verbose", action="store_true", help="All fields, and signs of life.")
    parser.add_argument("--kind", metavar="KIND", action="append", default=[], help="Only this kind. May be repeated.")
    parser.add_argument("--peer", metavar="NAME", help="Only peers of this name; * stands for anything.")
    parser.add_argument("--id", metavar="N", type=int, help="Only messages that name this request of a frontend.")
    parser.add_argument("--count", metavar="N", type=int, help="Stop after so many.")
    parser.add_argument(
        "--reveal", action="store_true", help="Token ids as they are; the engine must run with --reveal-prompts."
    )
    add_engine(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        check_kinds(values.kind)
        with engine(values, "tap") as observer:
            return show(copies(observer, reveal=values.reveal), values)
    except ConfigError as error:
        return told(error)


def check_kinds(kinds: Iterable[str]) -> None:
    known = {kind.__name__ for union in UNIONS.values() for kind in union.__args__} | {LOST}
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ConfigError(f"--kind {unknown[0]}: there is no such message; there are {', '.join(sorted(known))}")


def copies(observer: Observer, *, reveal: bool) -> Iterator[Copied]:
    """What the scheduler copies, forever. Says on stderr what it could not copy."""
    received = dropped = 0
    observer.send(Tap(reveal))
    warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    while True:
        for message in heard(observer):
            if isinstance(message, Welcome):  # another scheduler, or it has lost the thread
                received = dropped = 0
                observer.send(Tap(reveal))
                warn("-- a new conversation: what was said in between was not copied --")
            if not isinstance(message, Tapped):
                continue
            if message.why:
                warn(f"-- {message.why} --")
            if message.dropped > dropped:
                warn(f"-- {message.dropped - dropped} messages were not copied: this reader is too slow --")
                dropped = message.dropped
            yield from message.copies
            received += sum(len(copied.body) + COPY_BYTES for copied in message.copies)
            observer.send(Tap(reveal, received))


def show(found: Iterable[Copied], values: argparse.Namespace) -> int:
    codecs: dict[tuple[str, bool], Codec[Any]] = {key: Codec(union) for key, union in UNIONS.items()}
    shown = 0
    for copied in found:
        message = codecs[copied.wire, copied.inbound].decode(copied.body) if copied.body else None
        if wanted(copied, message, values):
            print(line(copied, message, verbose=values.verbose), flush=True)
            shown += 1
            if shown == values.count:
                break
    return 0


def kind(message: Message | None) -> str:
    return LOST if message is None else type(message).__name__


def wanted(copied: Copied, message: Message | None, values: argparse.Namespace) -> bool:
    if values.kind and kind(message) not in values.kind:
        return False
    if values.peer is not None and not fnmatch(copied.peer, values.peer):
        return False
    if values.id is not None and values.id not in _ids(message):
        return False
    return bool(values.verbose or values.kind) or not isinstance(message, Heartbeat)


def _ids(message: Message | None) -> list[int]:
    match message:
        case Submit(id):
            return [id]
        case Abort(ids):
            return ids
        case Outputs(outputs):
            return [output.id for output in outputs]
        case _:
            return []


def line(copied: Copied, message: Message | None, *, verbose: bool) -> str:
    at = f"{time.strftime('%H:%M:%S', time.localtime(copied.at))}.{int(copied.at % 1 * 1e6):06}"
    arrow = "<-" if copied.inbound else "->"
    text = (
        "frames were lost, or it begins anew" if message is None else _all(message) if verbose else essentials(message)
    )
    return f"{at} {arrow} {copied.peer}  {kind(message)} {text}".rstrip()


def _all(message: Message) -> str:
    fields = ((name, getattr(message, name)) for name in message.__struct_fields__)
    return " ".join(f"{name}={_value(value)}" for name, value in fields)


def _value(value: object) -> str:
    if isinstance(value, bytes):
        return str(unpack(value)) if len(value) % 4 == 0 else repr(value)
    return str(msgspec.to_builtins(value)) if isinstance(value, msgspec.Struct) else str(value)


def essentials(message: Message) -> str:
    match message:
        case Submit():
            again = f", again with {len(message.output) // 4} ids" if message.output else ""
            tenant = f", tenant {message.tenant}" if message.tenant else ""
            return f"{message.id}: {len(message.prompt) // 4} ids, at most {message.sampling.max_tokens} more{again}{tenant}"
        case Abort(ids):
            return _few(ids)
        case Outputs(outputs):
            ends = Counter(output.finish for output in outputs if output.finish)
            whose = _few(output.id for output in outputs)
            return ", ".join(
                [f"{sum(len(o.tokens) for o in outputs)} ids for {whose}", *(f"{n} {e}" for e, n in ends.items())]
            )
        case StepPlan():
            counts = unpack(message.counts)
            parts = [f"step {message.epoch}/{message.step}: {len(counts)} rows, {sum(counts)} tokens"]
            parts += [f"{sum(message.samples)} samples"] if message.samples else []
            for name in ("admitted", "released", "new_blocks"):
                parts += [f"{name.replace('_', ' ')} {len(getattr(message, name))}"] if getattr(message, name) else []
            return ", ".join(parts + ([f"{len(message.copies) // 8} copies"] if message.copies else []))
        case StepResult():
            took = f" in {message.took_us / 1000:.1f} ms" if message.took_us else ""
            return f"step {message.epoch}/{message.step}: {len(message.tokens) // 4} ids{took}"
        case Status(phase, progress, detail):
            return f"{phase} {progress:.0%}{f', {detail}' if detail else ''}"
        case Hello(protocol, role, name):
            return f"{name}, {role}, protocol {protocol}"
        case Welcome(epoch, _, model):
            return f"epoch {epoch}, {model.model}"
        case Stats(text):
            return f"{len(text)} bytes"
        case _:
            return _all(message)


def _few(ids: Iterable[int]) -> str:
    found = list(ids)
    more = f" and {len(found) - SHOWN_IDS} more" if len(found) > SHOWN_IDS else ""
    return ", ".join(map(str, found[:SHOWN_IDS])) + more
