"""The sampling parameters of running requests, by row, in columns: a step selects its rows with one index each."""

from dataclasses import dataclass, fields
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.sampling import SamplingParams
from ..plan import Flags, Ints

Floats = NDArray[np.float64]
COLDEST = 1e-5  # below this a temperature is greedy: dividing by it would overflow (vLLM's limit, too)


@dataclass(frozen=True, slots=True)
class Draws:
    """What is sampled in one step, s rows: parameters, and where each row's token will stand."""

    rows: Ints
    positions: Ints  # index of the sampled token in its sequence, which is the number of tokens before it
    num_prompt: Ints
    temperature: Floats
    top_k: Ints  # 0: all
    top_p: Floats
    min_p: Floats
    repetition: Floats
    presence: Floats
    frequency: Floats
    seeds: Ints
    bias: list[dict[int, float]]
    banned: list[list[int]]  # stop tokens, where there are too few tokens for any

    @property
    def random(self) -> Flags:
        return np.greater_equal(self.temperature, COLDEST)

    @property
    def penalized(self) -> Flags:
        return np.not_equal(self.repetition, 1.0) | np.not_equal(self.presence, 0.0) | np.not_equal(self.frequency, 0.0)

    @property
    def adjusted(self) -> Flags:
        """Rows whose logits something changes before they are compared."""
        sparse = [bool(bias) or bool(banned) for bias, banned in zip(self.bias, self.banned, strict=True)]
        return self.penalized | np.array(sparse, dtype=np.bool_)

    def take(self, which: Flags) -> "Draws":
        def taken(column: Any) -> Any:
            return column[which] if isinstance(column, np.ndarray) else list(compress(column, which))

        return Draws(**{field.name: taken(getattr(self, field.name)) for field in fields(self)})


class SamplingTable:
    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_prompt: Ints = np.zeros(num_rows, dtype=np.int64)
        self.integers: Ints = np.zeros((num_rows, 3), dtype=np.int64)  # top_k, seed, min_tokens
        self.numbers: Floats = np.zeros((num_rows, 6))  # temperature, top_p, min_p, repetition, presence, frequency
        self.bias: list[dict[int, float]] = [{} for _ in range(num_rows)]
        self.stops: list[list[int]] = [[] for _ in range(num_rows)]

    def set(self, row: int, params: SamplingParams, num_prompt: int) -> None:
        """`params` are resolved: the seed is a number and `stop_token_ids` holds every id that ends the output."""
        assert params.seed is not None, "sampling parameters are resolved before they reach a worker"
        self.num_prompt[row] = num_prompt
        self.integers[row] = max(0, params.top_k), params.seed, params.min_tokens
        self.numbers[row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        # A model may name end-of-sequence tokens that it has no logits for.
        self.bias[row] = {i: value for i, value in params.logit_bias.items() if i < self.vocab_size}
        self.stops[row] = [i for i in params.stop_token_ids if i < self.vocab_size]

    def select(self, rows: Ints, lengths: Ints) -> Draws:
        """The draws of `rows`, which hold `lengths` tokens."""
        num_prompt = self.num_prompt[rows]
        top_k, seeds, min_tokens = self.integers[rows].T
        temperature, top_p, min_p, repetition, presence, frequency = self.numbers[rows].T
        early = lengths - num_prompt < min_tokens
        return Draws(
            rows=rows,
            positions=lengths,
            num_prompt=num_prompt,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            seeds=seeds,
            bias=[self.bias[row] for row in rows],
            banned=[self.stops[row] if held_back else [] for row, held_back in zip(rows, early, strict=True)],
        )
