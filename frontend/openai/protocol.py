"""The bodies of requests: names and types only. Ranges of sampling parameters are `common.sampling`'s.

Fields are strict (no number from a string), null means the default, and unknown ones are kept, so that they can be
named to the client. Every list has a limit and is given up at its first wrong item: a million explained errors take
seconds, in which nobody else gets a token.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ...common.messages import MAX_TIMEOUT_S
from ...common.model_info import ENDLESS
from ...common.sampling import MAX_STOP_STRINGS, MAX_TOKEN_IDS, SamplingParams

MAX_SALT = 1024
MAX_NAME = 256
MAX_ITEMS = 4096  # messages, and parts of one

Seconds = Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S, allow_inf_nan=False)]

_ID_SCHEMA = {"type": "integer", "minimum": 0}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": _ID_SCHEMA, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": _ID_SCHEMA, "minItems": 1}, "minItems": 1},
    ]
}


def _short(value: Any) -> Any:
    """Limits a dictionary before its entries are looked at, as pydantic does for lists."""
    if isinstance(value, dict) and len(value) > MAX_TOKEN_IDS:
        raise PydanticCustomError("too_long", f"at most {MAX_TOKEN_IDS} entries")
    return value


# Ranges are declared there, names and types here.
_SAMPLING = msgspec.json.schema(SamplingParams)["$defs"]["SamplingParams"]["properties"]


def described(body: type["Body"]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a `body` itself."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, ranged in _SAMPLING.items():
        if name in schema["properties"]:
            stated = {key: value for key, value in ranged.items() if key != "default"}  # a model may recommend another
            alternatives = [stated, {"type": "null"}, *([ranged["items"]] if name == "stop" else [])]
            schema["properties"][name] = {"anyOf": alternatives}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if type(fields) is dict else fields


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; there is none


class CacheControl(Body):
    """Anthropic's: keep the KV of the prompt up to here."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"

    @property
    def seconds(self) -> float:
        return {"5m": 300.0, "1h": 3600.0}[self.ttl]


class GenerationRequest(Body):
    """What completions and chat share. Each field of SamplingParams is one here."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_TOKEN_IDS), BeforeValidator(_short)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    best_of: int | None = None  # with use_beam_search: its width
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=MAX_NAME)
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)
    cache_salt: str | None = Field(default=None, max_length=MAX_SALT)
    cache_control: CacheControl | None = None
    timeout: Seconds | None = None
    max_queue_time: Seconds | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)] = None  # `prompts_of` checks it
    echo: bool | None = None
    add_special_tokens: bool = True


class ContentPart(Body):
    type: str
    text: str | None = None
    cache_control: Annotated[Any, WithJsonSchema(CacheControl.model_json_schema())] = None  # `pin_of` checks it


class InputMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    name: str | None = Field(default=None, max_length=MAX_NAME)
    cache_control: CacheControl | None = None


class ChatInput(Body):
    """Messages and how the template turns them into a prompt."""

    messages: Annotated[list[InputMessage], Field(max_length=MAX_ITEMS, fail_fast=True)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(GenerationRequest, ChatInput):
    """POST /v1/chat/completions"""

    max_completion_tokens: int | None = None


class TokenizeText(Body):
    """POST /tokenize, with a prompt"""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(ChatInput):
    """POST /tokenize, with messages"""

    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=ENDLESS, fail_fast=True)]


# Fields that exist elsewhere and not here, with the values that ask for nothing. Any other value is refused: a client
# that sets one of these would get another answer than it asked for.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),  # of chat; completions declare it
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "logprobs": (False,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
