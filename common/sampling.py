"""How the next token is chosen and when a request ends. The one declaration of every sampling parameter and its range."""

import math
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from .errors import RequestError

MAX_CHOICES = 128  # as vLLM's documentation advises; its own limit of 16,384 let one request stall a server
MAX_STOP_STRINGS = 16
MAX_TOKEN_IDS = 1024  # in logit_bias and in stop_token_ids
INT64_MAX = 2**63 - 1

StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Parameters of one request. Immutable; `checked()` enforces types and ranges, `resolve()` fixes what is left open.

    Sampling is a pure function of (logits, seed, position), so equal parameters with equal seeds give equal answers.
    """

    # fmt: off
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Number of choices; choice i samples with seed + i.")] = 1
    max_tokens: Annotated[Annotated[int, Meta(ge=1, le=INT64_MAX)] | None, Meta(description="Most tokens to generate; None: up to the context length.")] = 16
    min_tokens: Annotated[int, Meta(ge=0, le=INT64_MAX, description="No stop token is sampled before this many tokens.")] = 0
    temperature: Annotated[float, Meta(ge=0.0, le=2.0, description="0 is greedy.")] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX, description="Sample from the k likeliest tokens; 0 or -1: all.")] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0, description="Sample from the likeliest tokens that hold this much probability.")] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0, description="Drop tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0, description="Divides the logit of tokens in prompt or output (CTRL, arXiv:1909.05858).")] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0, description="Subtracted once from the logit of each token in the output.")] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0, description="Subtracted per occurrence in the output.")] = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_TOKEN_IDS, description="Added to the logit of each token id.")] = {}
    seed: Annotated[Annotated[int, Meta(ge=-(2**63), le=INT64_MAX)] | None, Meta(description="None or -1: a random one is drawn when the request is accepted.")] = None
    stop: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS, description="Strings that end the text; they are not part of it.")] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_TOKEN_IDS, description="Token ids that end the output, besides the model's own.")] = []
    ignore_eos: Annotated[bool, Meta(description="Do not end at the model's end-of-sequence tokens.")] = False
    include_stop_str_in_output: Annotated[bool, Meta(description="Keep the stop string in the text.")] = False
    skip_special_tokens: Annotated[bool, Meta(description="Leave special tokens out of the text.")] = True
    best_of: Annotated[int, Meta(ge=0, le=MAX_CHOICES, description="Draw this many sequences and return the n that are likeliest; 0: n.")] = 0
    beam_width: Annotated[int, Meta(ge=0, le=MAX_CHOICES, description="Beam search with this many beams, of which the n best are returned; 0: none.")] = 0
    length_penalty: Annotated[float, Meta(ge=-5.0, le=5.0, description="Beams are compared by their log-probability over their length to this power.")] = 1.0
    early_stopping: Annotated[bool | Literal["never"], Meta(description="When a beam search ends: true, with beam_width complete answers; false, when better ones are unlikely; \"never\", when there can be none.")] = False
    # fmt: on

    @property
    def num_sequences(self) -> int:
        """That are computed side by side for a prompt."""
        return self.beam_width or max(self.n, self.best_of)

    @property
    def num_candidates(self) -> int:
        """Tokens whose log-probability the worker is asked for at each step. Of a beam search as many of the likeliest as
        leave each beam one that ends nothing; 1: the one that is drawn."""
        return max(2, 1 + len(self.stop_token_ids)) * self.beam_width if self.beam_width else min(self.best_of, 1)

    def checked(self) -> "SamplingParams":
        """The same parameters once types and ranges hold; raises `RequestError` naming the field otherwise."""
        return check(msgspec.to_builtins(self))

    def resolve(self, *, eos_token_ids: Sequence[int], vocab_size: int, room: int) -> "SamplingParams":
        """What the scheduler and the workers are sent: every open choice made, text-only fields dropped.

        `room` is the number of tokens the context has left (>= 1). `stop_token_ids` then holds every id that ends the
        output. Raises `RequestError` for token ids outside the model's vocabulary.
        """
        for param, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if beyond := [i for i in ids if i >= vocab_size]:
                raise RequestError(
                    f"{param} names token id {beyond[0]}, but the vocabulary ends at {vocab_size - 1}", param=param
                )
        stops = self.stop_token_ids if self.ignore_eos else [*self.stop_token_ids, *eos_token_ids]
        max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        seed = secrets.randbelow(2**63) if self.seed in (None, -1) else self.seed
        resolved = msgspec.structs.replace(
            self,
            n=self.n if self.beam_width else 1,
            best_of=int(self.best_of > self.n),
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            temperature=0.0 if self.beam_width else self.temperature,
            seed=seed,
            stop=[],
            stop_token_ids=sorted(set(stops)),
        )
        if resolved.num_candidates > vocab_size:
            raise RequestError(
                f"beam_width: {self.beam_width} beams and {len(resolved.stop_token_ids)} tokens that end an output need a"
                f" vocabulary of {resolved.num_candidates}, this one has {vocab_size}",
                param="beam_width",
            )
        return resolved


def check(fields: dict[str, object]) -> SamplingParams:
    """Sampling parameters from plain values (JSON, keyword arguments); raises `RequestError` with `param` set.

    `stop` may be one string.
    """
    if isinstance(fields.get("stop"), str):
        fields = fields | {"stop": [fields["stop"]]}
    for name, value in fields.items():
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, float) and not math.isfinite(number):  # NaN passes every comparison
                raise RequestError(f"{name}: expected a finite number, got {number}", param=name)
    try:
        params = msgspec.convert(fields, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explained(str(error), fields) from None
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens must not exceed max_tokens, got {params.min_tokens} > {params.max_tokens}", param="min_tokens"
        )
    _check_beams(params)
    if 0 < params.best_of < params.n:
        raise RequestError(f"best_of must not be less than n, got {params.best_of} < {params.n}", param="best_of")
    return params


# What a beam search does without, with the values that ask for nothing.
_NOT_WITH_BEAMS: dict[str, tuple[object, ...]] = {
    "best_of": (0,),
    "temperature": (0.0, 1.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": ({},),
    "stop": ([],),
}


def _check_beams(params: SamplingParams) -> None:
    if not params.beam_width:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(params, name) != neutral:
                raise RequestError(f"{name} is for a beam search: set beam_width", param=name)
        return
    for name, without in _NOT_WITH_BEAMS.items():
        if (value := getattr(params, name)) not in without:
            raise RequestError(f"{name} has no part in a beam search, got {value!r:.80}; leave it out", param=name)
    if params.n > params.beam_width:
        raise RequestError(
            f"a beam search of {params.beam_width} beams has no {params.n} answers: n must not exceed its width",
            param="n",
        )


def _explained(problem: str, fields: dict[str, object]) -> RequestError:
    """msgspec says "Expected `float` <= 2.0 - at `$.temperature`"; a client wants the field, the range and what it sent."""
    reason, _, path = problem.partition(" - at ")
    field = re.search(r"\$\.(\w+)", path)
    name = field.group(1) if field else None
    if name is None:  # an unknown field: the message itself names it
        return RequestError(reason)
    sent = repr(fields.get(name))
    return RequestError(f"{name}: {reason[0].lower()}{reason[1:]}, got {sent[:80]}", param=name)
