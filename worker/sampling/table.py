"""The sampling parameters of running requests, by row, in columns: a step selects its rows with one index each."""

import numpy as np
from numpy.typing import NDArray

from ...common.sampling import SamplingParams
from ...kernels.sampling import Draws, Entries
from ..plan import Flags, Ints

Floats = NDArray[np.float64]
_NONE = Entries(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))


class Sparse:
    """Numbers by token id, of the few rows that have any. A step without them pays one look at a column of flags."""

    def __init__(self, num_rows: int) -> None:
        self._has: Flags = np.zeros(num_rows, dtype=np.bool_)
        self._held: dict[int, tuple[Ints, Floats]] = {}

    def set(self, row: int, values: dict[int, float]) -> None:
        self._held.pop(row, None)
        if values:
            self._held[row] = np.array(list(values), dtype=np.int64), np.array(list(values.values()), dtype=np.float64)
        self._has[row] = bool(values)

    def select(self, rows: Ints, which: Flags | None = None) -> Entries:
        """Of `rows`, those that `which` names."""
        has = self._has[rows] if which is None else self._has[rows] & which
        at = has.nonzero()[0]
        if not len(at):
            return _NONE
        ids, values = zip(*(self._held[row] for row in rows[at].tolist()), strict=True)
        return Entries(at.repeat([len(each) for each in ids]), np.concatenate(ids), np.concatenate(values))


class SamplingTable:
    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_prompt: Ints = np.zeros(num_rows, dtype=np.int64)
        self.integers: Ints = np.zeros((num_rows, 3), dtype=np.int64)  # top_k, seed, min_tokens
        self.numbers: Floats = np.zeros((num_rows, 6))  # temperature, top_p, min_p, repetition, presence, frequency
        self.num_candidates: Ints = np.zeros(num_rows, dtype=np.int64)
        self.bias = Sparse(num_rows)
        self.stops = Sparse(num_rows)  # -inf

    def set(self, row: int, params: SamplingParams, num_prompt: int) -> None:
        """`params` are resolved: the seed is a number and `stop_token_ids` holds every id that ends the output."""
        assert params.seed is not None, "sampling parameters are resolved before they reach a worker"
        self.num_prompt[row] = num_prompt
        self.num_candidates[row] = params.num_candidates
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
        self.bias.set(row, {i: value for i, value in params.logit_bias.items() if i < self.vocab_size})
        self.stops.set(row, {i: float("-inf") for i in params.stop_token_ids if i < self.vocab_size})

    def select(self, rows: Ints, lengths: Ints) -> Draws:
        """The draws of `rows`, which hold `lengths` tokens."""
        num_prompt = self.num_prompt[rows]
        top_k, seeds, min_tokens = self.integers[rows].T
        temperature, top_p, min_p, repetition, presence, frequency = self.numbers[rows].T
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
            bias=self.bias.select(rows),
            bans=self.stops.select(rows, lengths - num_prompt < min_tokens),
        )
