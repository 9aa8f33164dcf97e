"""Replays plans: rows -> batch -> logits of the rows that sample -> ids, back into the rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.messages import StepPlan
from . import kv_cache
from .batch import Batch, build_batch
from .decoder import Decoder
from .plan import Columns, read_columns
from .rows import Rows
from .sampling.sampler import sample


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One id for each row that sampled, in the plan's order, None where the row cannot go on."""

    tokens: list[int | None]
    faults: list[tuple[int, str]]  # (row, why)


class Runner:
    """A decoder with KV memory of `num_blocks` blocks, besides the null block, and `num_rows` rows of `max_len` tokens.

    Raises ConfigError when memory does not hold them.
    """

    def __init__(self, decoder: Decoder, *, num_rows: int, max_len: int, num_blocks: int, block_size: int) -> None:
        self.decoder = decoder
        self.group = decoder.group
        self.num_rows, self.max_len = num_rows, max_len
        self.num_blocks, self.block_size = num_blocks, block_size
        self.cache = kv_cache.allocate(num_blocks, decoder.kv_shape, block_size, decoder.dtype, decoder.device)
        self.forget()

    def forget(self) -> None:
        """Empty every row."""
        self.rows = Rows(
            num_rows=self.num_rows,
            max_len=self.max_len,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            vocab_size=self.decoder.spec.vocab_size,
            device=self.decoder.device,
        )

    @torch.inference_mode()
    def warm_up(self, num_tokens: int = 1) -> None:
        """Run a step of padding, up to the logits: what comes first is slow. Its KV goes to block 0."""
        counts = [min(self.max_len, num_tokens - i) for i in range(0, num_tokens, self.max_len)]
        columns = Columns(
            rows=np.full(len(counts), self.rows.null_row),
            starts=np.zeros(len(counts), dtype=np.int64),
            counts=np.array(counts),
            samples=np.ones(len(counts), dtype=np.bool_),
        )
        batch = build_batch(self.rows, columns, self.decoder.spec.windows)
        self.decoder.head(self.decoder.forward(batch, self.cache)[batch.last_s])

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepOutput:
        """Replay the next plan. Raises PlanError when it does not fit what came before."""
        self.rows.apply(plan)
        columns = read_columns(plan, self.rows.num_rows)
        self.rows.check(plan, columns)
        if not len(columns.rows):
            return StepOutput([], [])
        batch = build_batch(self.rows, columns, self.decoder.spec.windows)
        hidden = self.decoder.forward(batch, self.cache)
        if not columns.samples.any():
            return StepOutput([], [])
        return self._sample(hidden, batch, columns)

    def _sample(self, hidden: Tensor, batch: Batch, columns: Columns) -> StepOutput:
        rows = columns.rows[columns.samples]
        logits = self.decoder.head(hidden[batch.last_s])[: len(rows)]
        faulty = torch.zeros(len(rows), dtype=torch.bool)
        if self.group.rank == 0:
            ids, faulty = sample(logits, self.rows.sampling.select(rows, self.rows.lengths[rows]), self.rows.tokens)
        else:
            ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        self.rows.append(rows, self.group.broadcast(ids))
        tokens, bad = ids.tolist(), faulty.tolist()
        return StepOutput(
            [None if wrong else token for token, wrong in zip(tokens, bad, strict=True)],
            [(int(row), "the model's logits are NaN") for row, wrong in zip(rows, bad, strict=True) if wrong],
        )


def peak_bytes(decoder: Decoder, *, num_rows: int, max_len: int, block_size: int, num_tokens: int) -> int:
    """Memory that rows and a step of `num_tokens` take on a GPU, besides weights and KV."""
    torch.cuda.reset_peak_memory_stats(decoder.device)
    before = torch.cuda.memory_allocated(decoder.device)
    Runner(decoder, num_rows=num_rows, max_len=max_len, num_blocks=0, block_size=block_size).warm_up(num_tokens)
    return torch.cuda.max_memory_allocated(decoder.device) - before
