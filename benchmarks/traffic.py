"""What HTTP clients ask for, and when: arrivals and workloads, each a function of a seed."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quire.benchmarks.http_client import Body
from quire.benchmarks.work import HIGHEST_ID, LOWEST_ID

Job = list[Body]  # requests of one client, one after the other; messages are behind those before and their answers
Lengths = Iterator[tuple[int, int]]  # tokens of prompt and output

# The means of the ShareGPT conversations that vLLM's paper used (161 and 338 tokens); the shape is a log-normal of ours.
MEAN_PROMPT, MEAN_OUTPUT, SIGMA = 161, 338, 1.0
SHORTEST = 4
WORDS = ("time", "house", "paper", "value", "result", "number", "water", "light", "system", "table", "river", "because")


def poisson(rate: float, count: int, seed: object) -> list[float]:
    """Seconds from the start at which each of `count` requests arrives: `rate` a second, independently."""
    rng = random.Random(f"arrivals/{seed}")
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


def same_length(prompt: int, output: int) -> Lengths:
    return itertools.repeat((prompt, output))


def like_sharegpt(seed: object, longest: int) -> Lengths:
    """Many short ones, few very long ones; prompt and output together at most `longest`."""
    rng = random.Random(f"lengths/{seed}")

    def drawn(mean: float) -> int:
        return max(SHORTEST, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))

    while True:
        prompt = min(drawn(MEAN_PROMPT), longest - SHORTEST)
        yield prompt, min(drawn(MEAN_OUTPUT), longest - prompt)


def from_file(path: Path) -> Lengths:
    """Over and over, those of a JSON file: pairs of token counts, or ShareGPT's conversations (four letters a token)."""
    told: list[Any] = json.loads(path.read_text())
    pairs: list[tuple[int, int]] = []
    for entry in told:
        if isinstance(entry, dict):
            said = [len(turn["value"]) // 4 for turn in entry["conversations"][:2]]
            pairs += [(max(said[0], SHORTEST), max(said[1], SHORTEST))] if len(said) == 2 else []
        else:
            pairs.append((int(entry[0]), int(entry[1])))
    return itertools.cycle(pairs)


def random_ids(lengths: Lengths, seed: object) -> Iterator[Job]:
    rng = random.Random(f"ids/{seed}")
    for prompt, output in lengths:
        yield [{"prompt": _ids(rng, prompt), "max_tokens": output}]


def words(lengths: Lengths, seed: object) -> Iterator[Job]:
    """Text: so many words, so the server tokenizes as well."""
    rng = random.Random(f"words/{seed}")
    for prompt, output in lengths:
        yield [{"prompt": _said(rng, prompt), "max_tokens": output}]


def shared_prefix(lengths: Lengths, share: float, seed: object) -> Iterator[Job]:
    """Random ids, of which the first `share` of each prompt are the same for all."""
    rng = random.Random(f"prefix/{seed}")
    common: list[int] = []
    for prompt, output in lengths:
        shared = round(prompt * share)
        common += _ids(rng, shared - len(common))
        yield [{"prompt": common[:shared] + _ids(rng, prompt - shared), "max_tokens": output}]


def conversations(lengths: Lengths, turns: int, seed: object) -> Iterator[Job]:
    """Chats of so many turns; each says a prompt's length of words behind all that was said before."""
    rng = random.Random(f"turns/{seed}")
    while True:
        said = itertools.islice(lengths, turns)
        yield [{"messages": [{"role": "user", "content": _said(rng, n)}], "max_tokens": output} for n, output in said]


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count)]


def _said(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))
