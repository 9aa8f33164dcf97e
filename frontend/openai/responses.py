"""The bodies of answers, as the openai client's strict validation wants them. Tags are fields that never vary."""

import msgspec
from msgspec import Struct

from ..outputs import RequestOutput


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(Struct):
    index: int
    text: str
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: None = None


class Completion(Struct, tag_field="object", tag="text_completion"):
    """Whole answers and chunks of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class ChatMessage(Struct, tag_field="role", tag="assistant"):
    content: str
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: None = None


class ChatCompletion(Struct, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: None = None


class ChatChunk(Struct, tag_field="object", tag="chat.completion.chunk"):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


def usage(num_prompt: int, num_generated: int, num_cached: int) -> Usage:
    return Usage(num_prompt, num_generated, num_prompt + num_generated, PromptTokensDetails(num_cached))


def usage_of(outputs: list[RequestOutput]) -> Usage:
    """Of whole requests: a prompt counts once, however many choices it has."""
    generated = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return usage(sum(len(output.prompt_token_ids) for output in outputs), generated, cached)
