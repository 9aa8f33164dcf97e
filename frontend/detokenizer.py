"""Token ids to text, one sequence, as they come."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..common.sampling import SamplingParams
from .stop_strings import StopStrings

CONTEXT_TOKENS = 6  # of the prompt: enough that the first word of an output keeps the space before it
MAX_HELD_TOKENS = 64  # a character has at most 4 bytes; more held tokens than that are bytes that spell none
REPLACEMENT = "\ufffd"


@dataclass(slots=True)
class TextDelta:
    """What some new ids say."""

    text: str
    token_ids: list[int]  # those that count: none behind the end
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Detokenizer:
    """Turns the ids of one sequence into text, and ends it at a stop string.

    However the ids are cut into pushes, the texts join to the same whole; a character or a stop string that is not
    complete is held back until it is, or until the sequence ends.
    """

    def __init__(
        self, tokenizer: Tokenizer, special_ids: Container[int], prompt: Sequence[int], params: SamplingParams
    ) -> None:
        hidden = special_ids if params.skip_special_tokens else ()
        self._decoder = TextDecoder(tokenizer, hidden, prompt[-CONTEXT_TOKENS:])
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._params = params
        self._num_tokens = 0

    def push(self, ids: Sequence[int], finish: str | None) -> TextDelta:
        """The text of `ids`; `finish` is the engine's word on the sequence, which these ids complete.

        Once a delta carries a finish reason the sequence has ended, even if the engine still runs it.
        """
        stop_token = ids[-1] if finish == "stop" and ids else None
        shown: list[str] = []
        for count, token in enumerate(ids, start=1):
            self._num_tokens += 1
            is_end = stop_token is not None and count == len(ids)
            if is_end and not self._params.include_stop_str_in_output:
                break  # the token that ends a text is no part of it
            if (stop := self._show(self._decoder.push(token), shown)) is not None:
                return TextDelta("".join(shown), list(ids[:count]), "stop", stop)
        if finish is None:
            return TextDelta("".join(shown), list(ids))
        if (stop := self._show(self._decoder.flush(), shown)) is not None:
            return TextDelta("".join(shown), list(ids), "stop", stop)
        shown.append(self._stops.flush())
        stop_reason = stop_token if stop_token in self._params.stop_token_ids else None
        return TextDelta("".join(shown), list(ids), finish, stop_reason)

    def _show(self, text: str, shown: list[str]) -> str | None:
        """Append what of `text` may be shown; the stop string that was found in it."""
        if self._num_tokens <= self._params.min_tokens:
            shown.append(text)
            return None
        text, stop = self._stops.push(text)
        shown.append(text)
        return stop


class TextDecoder:
    """Incremental decoding that always comes to an end, for any ids.

    `DecodeStream` waits for complete characters. Around it: ids without text are not shown to it (it decodes all that
    it holds again at each step), and ids that spell no character, which it would hold for ever, are let go.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Container[int], prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._context: list[int] = []  # ids of the last text; a decoder may treat the next id by them
        self._held: list[int] = []  # ids since
        self._restart([token for token in prompt if not self._is_silent(token)])

    def push(self, token: int) -> str:
        """The text that `token` completes; "" when it completes none."""
        if self._is_silent(token):
            return ""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as error:  # the library raises this very class
            if "prefix" not in str(error):
                raise
            # Byte tokens that no longer spell what they spelled so far: a broken character behind a whole one.
            text = self._decode(self._held)
            self._restart(self._held)
            return text
        if text is not None:
            self._context, self._held = self._held, []
            return text
        return self._let_go() if len(self._held) >= MAX_HELD_TOKENS else ""

    def flush(self) -> str:
        """The text of what is held, with U+FFFD for incomplete characters."""
        before, whole = self._decode(self._context), self._decode(self._context + self._held)
        self._held = []
        return whole[len(before) :] if whole.startswith(before) else whole

    def _let_go(self) -> str:
        """Show held ids up to where the text behind them does not depend on them."""
        before, whole = self._decode(self._context), self._decode(self._context + self._held)
        for cut in range(len(self._held) - 1, 0, -1):
            head = self._decode(self._context + self._held[:cut])
            if head + self._decode(self._held[cut:]) == whole and head.startswith(before):
                rest = self._held[cut:]
                self._restart([])
                for token in rest:
                    self._held.append(token)
                    self._stream.step(self._tokenizer, token)
                return head[len(before) :]
        return ""

    def _restart(self, context: list[int]) -> None:
        """Begin anew behind `context`, whose text is shown already."""
        if self._decode(context).endswith(REPLACEMENT):  # cut within a character: the stream would show it again
            context = []
        self._stream = DecodeStream(skip_special_tokens=False)
        self._context, self._held = context, []
        for token in context:
            self._stream.step(self._tokenizer, token)

    def _is_silent(self, token: int) -> bool:
        return (
            token in self._hidden or self._tokenizer.id_to_token(token) is None
        )  # logits may be wider than the vocabulary

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
