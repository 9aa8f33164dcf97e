"""What a request asks to have pinned: `cache_control`, in Anthropic's shape, on the request, a message or a part of one."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pydantic
from msgspec import Struct

from ...common.errors import RequestError
from ..chat_template import ChatOptions
from ..tokenizer import Tokenizer
from .protocol import CacheControl, ChatRequest


class Pin(Struct, frozen=True):
    seconds: float = 0.0
    num_tokens: int = 0  # of the prompt; 0: all


NO_PIN = Pin()


async def pin_of(
    body: ChatRequest,
    messages: Sequence[dict[str, Any]],
    options: ChatOptions,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
) -> Pin:
    """All of the prompt for a request that is marked itself, else up to the last mark in its messages; for as long as
    any mark asks. `messages` are the body's, and `prompt` is what came of them. Raises RequestError for a mark that is none.

    The border is where the prompt's ids part from those of the conversation that ends with the mark. A template that
    refuses such a conversation, or begins it otherwise, gives none: then all is pinned.
    """
    marks = _marks(body)
    if not marks:
        return NO_PIN if body.cache_control is None else Pin(body.cache_control.seconds)
    asked = [mark for mark, _, _ in marks] + ([body.cache_control] if body.cache_control else [])
    seconds = max(mark.seconds for mark in asked)
    if body.cache_control is not None:
        return Pin(seconds)
    _, last, num_parts = marks[-1]
    head = list(messages[: last + 1])
    if num_parts is not None:
        head[-1] = {**head[-1], "content": head[-1]["content"][:num_parts]}
    ended = msgspec.structs.replace(options, add_generation_prompt=False, continue_final_message=False)
    try:
        return Pin(seconds, await tokenizer.shared_with_chat(prompt, head, ended))
    except RequestError:
        return Pin(seconds)


def _marks(body: ChatRequest) -> list[tuple[CacheControl, int, int | None]]:
    """Each mark, the index of its message, and how many parts of that it spans if not all; in order."""
    marks: list[tuple[CacheControl, int, int | None]] = []
    for index, message in enumerate(body.messages):
        parts = message.content if isinstance(message.content, list) else []
        for place, part in enumerate(parts):
            if part.cache_control is not None:
                marks.append((_checked(part.cache_control, f"messages[{index}].content[{place}]"), index, place + 1))
        if message.cache_control:
            marks.append((message.cache_control, index, None))
    return marks


def _checked(mark: Any, path: str) -> CacheControl:
    try:
        return CacheControl.model_validate(mark)
    except pydantic.ValidationError:
        raise RequestError(
            f"{path}.cache_control must be {{'type': 'ephemeral'}}, with a 'ttl' of '5m' or '1h' if any",
            param=f"{path}.cache_control",
        ) from None
