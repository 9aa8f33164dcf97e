"""Replays plans: rows -> batch -> logits of the rows that sample -> ids, back into the rows.

A step has two halves. What follows from a plan is launched without waiting for the device to be done with it; the host
reads the ids afterwards, and may have launched the next step by then.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.messages import StepPlan
from ..common.sampling import SamplingParams
from . import kv_cache
from .batch import Batch, build_batch
from .decoder import Decoder
from .kv_store import KvFile, KvStore, host_blocks
from .plan import Columns, Ints, read_columns
from .rows import Rows
from .sampling.best import Best, best


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One id for each row that sampled, in the plan's order, None where the row cannot go on."""

    tokens: list[int | None]
    faults: list[tuple[int, str]]  # (row, why)
    best_ids: bytes = b""  # as in `StepResult`
    best_logprobs: bytes = b""


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that has been launched: its ids are in the rows, and on their way to whoever reads them."""

    rows: Ints  # that sampled
    ids: Tensor  # [len(rows)] int64
    faulty: Tensor  # [len(rows)] bool; of rank 0 alone
    best: Best | None  # likewise; for the rows that asked
    done: torch.Event | None  # None: the device had no more to do when the launch returned

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return self.done is None or self.done.query()

    def read(self) -> StepOutput:
        """The host's copy. Waits for the device."""
        tokens, bad = self.ids.tolist(), self.faulty.tolist()
        return StepOutput(
            [None if wrong else token for token, wrong in zip(tokens, bad, strict=True)],
            [(row, "the model's logits are NaN") for row, wrong in zip(self.rows.tolist(), bad, strict=True) if wrong],
            *(self.best.read() if self.best else ()),
        )


class Runner:
    """A decoder with KV memory of `num_blocks` blocks, besides the null block, and `num_rows` rows of `max_len` tokens.

    `num_host_blocks` more are in host memory, and those of `file` on disk. `between` is called before each layer of each
    step. Raises ConfigError when memory does not hold them.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_rows: int,
        max_len: int,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        file: KvFile | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.decoder = decoder
        self.between = between
        self.group = decoder.group
        self.cache = kv_cache.allocate(num_blocks, decoder.kv_shape, block_size, decoder.dtype, decoder.device)
        host = host_blocks(num_host_blocks, self.cache.shape[1:], decoder.dtype, decoder.device)
        self.store = KvStore(self.cache, host, file.blocks if file else host[:0])
        self.rows = Rows(
            num_rows=num_rows,
            max_len=max_len,
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=decoder.spec.vocab_size,
            device=decoder.device,
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Usable blocks, tokens in each, and blocks in all places, the null block included."""
        return self.rows.num_blocks, self.rows.block_size, self.store.num_blocks

    @torch.inference_mode()
    def warm_up(self, num_tokens: int = 1) -> None:
        """Run a step of padding, up to the logits: what comes first is slow. Its KV goes to block 0."""
        longest = self.rows.max_len
        counts = [min(longest, num_tokens - i) for i in range(0, num_tokens, longest)]
        columns = Columns(
            rows=np.full(len(counts), self.rows.null_row),
            starts=np.zeros(len(counts), dtype=np.int64),
            counts=np.array(counts),
            samples=np.ones(len(counts), dtype=np.bool_),
            copies=np.zeros((0, 2), dtype=np.int64),
        )
        batch = self._batch(columns)
        self.decoder.head(self.decoder.forward(batch, self.cache, self.between)[batch.last_s])

    @torch.inference_mode()
    def rehearse_sampling(self) -> None:
        """Sample for every row at once, with all that sampling can be asked for. Leaves the rows' parameters overwritten."""
        params = SamplingParams(top_p=0.5, presence_penalty=1.0, repetition_penalty=1.1, seed=0)
        num_rows = self.rows.num_rows
        rows, lengths = np.arange(num_rows), np.ones(num_rows, dtype=np.int64)
        for row in rows:
            self.rows.sampling.set(int(row), params, 1)
        logits = torch.zeros(num_rows, self.decoder.spec.vocab_size, device=self.decoder.device)
        self.decoder.backend.sample(logits, self.rows.sampling.select(rows, lengths), self.rows.tokens)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Replay the next plan, up to appending the ids to their rows. The launched steps may be read later, in any
        number behind. Raises PlanError when the plan does not fit what came before, PeerLost when a rank is gone."""
        self.rows.apply(plan)
        columns = read_columns(plan, self.rows.num_rows)
        self.rows.check(plan, columns)
        self.store.check(plan, columns)
        self.store.copy(columns.copies)
        rows = columns.rows[columns.samples]
        ids, faulty, likeliest = self._run(columns, rows) if len(columns.rows) else _nothing()
        return Pending(rows, ids, faulty, likeliest, _event(self.decoder.device))

    def _run(self, columns: Columns, rows: Ints) -> tuple[Tensor, Tensor, Best | None]:
        batch = self._batch(columns)
        hidden = self.decoder.forward(batch, self.cache, self.between)
        if not len(rows):
            return _nothing()
        logits = self.decoder.head(hidden[batch.last_s])[: len(rows)]
        likeliest = None
        if self.group.rank == 0:
            draws = self.rows.sampling.select(rows, self.rows.lengths[rows])
            ids, faulty = self.decoder.backend.sample(logits, draws, self.rows.tokens)
            likeliest = best(logits, ids, self.rows.sampling.num_candidates[rows])
        else:
            ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
            faulty = torch.zeros(len(rows), dtype=torch.bool)
        self.rows.append(rows, self.group.broadcast(ids))
        return ids, faulty, likeliest

    def _batch(self, columns: Columns) -> Batch:
        return build_batch(self.rows, columns, self.decoder.spec.windows, self.decoder.backend)


def _nothing() -> tuple[Tensor, Tensor, None]:
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), None


def _event(device: torch.device) -> torch.Event | None:
    """When what was launched so far is done; None on a CPU, where it is."""
    if device.type != "cuda":
        return None
    event = torch.Event(device)
    event.record()
    return event


def peak_bytes(
    decoder: Decoder,
    *,
    num_rows: int,
    max_len: int,
    block_size: int,
    num_tokens: int,
    between: Callable[[], None] = lambda: None,
) -> int:
    """Memory that rows, a step of `num_tokens` and sampling for every row take on a GPU, besides weights and KV."""
    torch.cuda.reset_peak_memory_stats(decoder.device)
    before = torch.cuda.memory_allocated(decoder.device)
    runner = Runner(decoder, num_rows=num_rows, max_len=max_len, num_blocks=0, block_size=block_size, between=between)
    runner.warm_up(num_tokens)
    runner.rehearse_sampling()
    return torch.cuda.max_memory_allocated(decoder.device) - before
