"""Beam searches for simulated runs: what may follow a prefix, and what must be found."""

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec

from quire.scheduler.beams import single
from quire.scheduler.request import Request

VOCABULARY = 13

Following = Callable[[list[int], int], list[tuple[int, float]]]  # of a sequence, so many tokens and logprobs


def likeliest(prefix: int, first: int, count: int) -> list[tuple[int, float]]:
    """What may follow a prefix, the token `first` before all others, with made-up log-probabilities."""
    rng = random.Random(prefix)
    tokens = rng.sample([token for token in range(VOCABULARY) if token != first], count - 1)
    logprobs = sorted((single(-4 * rng.random()) for _ in range(count)), reverse=True)
    return list(zip([first, *tokens], logprobs, strict=True))


def searching(request: Request, rng: random.Random, rejection: Callable[[Request], str | None]) -> Request:
    """The same request with beams, if that is not rejected, or one of several that are compared."""
    width = rng.randint(0, 5)
    if not width:
        return replace(request, sampling=msgspec.structs.replace(request.sampling, best_of=1))
    sampling = msgspec.structs.replace(
        request.sampling,
        beam_width=width,
        n=rng.randint(1, width),
        min_tokens=0,
        length_penalty=rng.choice((-1.0, 0.0, 0.5, 1.0, 2.0)),
        early_stopping=rng.choice((True, False, "never")),
    )
    wide = replace(request, sampling=sampling)
    return request if rejection(wide) else wide


def best_found(request: Request, limit: int, following: Following) -> tuple[list[int], str]:
    """Every beam by every token at each step, without a thought of what it costs. Returns the tokens of the hypotheses,
    -1 behind each, and how the best one ends."""
    params, first = request.sampling, request.num_prompt
    going: list[tuple[float, list[int]]] = [(0.0, request.tokens.tolist())]
    done: list[tuple[float, list[int], str]] = [(-1e9, [], "")] * params.beam_width
    while True:
        every = [
            (single(score + logprob), [*tokens, token])
            for score, tokens in going
            for token, logprob in following(tokens, params.num_candidates)
        ]
        every = sorted(every, key=lambda each: -each[0])[: params.num_candidates]
        length = len(every[0][1]) - first
        power = single(length**params.length_penalty)
        ends = [tokens[-1] in params.stop_token_ids for _, tokens in every]
        for (score, tokens), end in list(zip(every, ends, strict=True))[: params.beam_width]:
            if end or first + length == limit:
                done.append((single(score / power), tokens[first:], "stop" if end else "length"))
        done = sorted(done, key=lambda each: -each[0])[: params.beam_width]
        going = [each for each, end in zip(every, ends, strict=True) if not end][: params.beam_width]
        if params.early_stopping == "never" and params.length_penalty > 0:
            power = single((limit - first) ** params.length_penalty)
        full = all(reason for _, _, reason in done)
        content = params.early_stopping is True or params.beam_width == 1 or going[0][0] / power <= done[-1][0]
        if first + length == limit or (full and content):
            best = done[: params.n]
            return [token for _, tokens, _ in best for token in (*tokens, -1)], best[0][2]
