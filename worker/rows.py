"""The permanent state of running requests, a row each: tokens, block table, sampling parameters.

Tokens and tables live on the device, so a step's tensors are gathered there, and a sampled token is in its row before
anybody has read its value. Lengths are known to the host without asking the device: plans tell them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.messages import Admitted, StepPlan
from .plan import Columns, Ints, PlanError
from .sampling.table import SamplingTable


class Piece(NamedTuple):
    """Values for columns first, first + 1, ... of a row."""

    row: int
    first: int
    values: Ints


def _write(table: Tensor, pieces: list[Piece]) -> None:
    """Put pieces that do not overlap into `table`, with one copy to its device."""
    if not pieces:
        return
    counts = np.array([len(piece.values) for piece in pieces])
    begins = np.array([piece.first for piece in pieces]) - (counts.cumsum() - counts)
    columns = np.arange(counts.sum()) + begins.repeat(counts)
    rows = np.array([piece.row for piece in pieces]).repeat(counts)
    values = np.concatenate([piece.values for piece in pieces])
    at = torch.from_numpy(np.stack((rows, columns, values))).to(table.device)
    table[at[0], at[1]] = at[2].int()


class Rows:
    """`num_rows` rows of at most `max_len` tokens; blocks are 1 to `num_blocks`.

    One row more, `null_row`, holds token 0 and block 0: what pads a step belongs to it.
    """

    def __init__(
        self, *, num_rows: int, max_len: int, num_blocks: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.num_rows = self.null_row = num_rows
        self.max_len = max_len
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        max_blocks = -(-max_len // block_size)
        self.tokens = torch.zeros(num_rows + 1, max_len + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(num_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self.lengths: Ints = np.zeros(num_rows, dtype=np.int64)  # tokens, sampled ones included
        self.table_lengths: Ints = np.zeros(num_rows, dtype=np.int64)  # blocks
        self.sampling = SamplingTable(num_rows, vocab_size)

    def clear(self) -> None:
        """Release every row."""
        self.lengths[:] = self.table_lengths[:] = 0

    def apply(self, plan: StepPlan) -> None:
        """Release, admit and grow, in this order. Raises PlanError for what cannot be.

        The device hears of it in one write to the tokens and one to the tables, however much has changed.
        """
        tokens: list[Piece] = []
        blocks: list[Piece] = []
        for row in plan.released:
            self._require(plan, row, admitted=True)
            self.lengths[row] = self.table_lengths[row] = 0
        for request in plan.admitted:
            self._require(plan, request.row, admitted=False)
            tokens.append(self._admitted_tokens(plan, request))
            blocks.append(self._appended_blocks(plan, request.row, request.blocks))
        for row, appended in plan.new_blocks:
            self._require(plan, row, admitted=True)
            blocks.append(self._appended_blocks(plan, row, appended))
        _write(self.tokens, tokens)
        _write(self.tables, blocks)

    def check(self, plan: StepPlan, columns: Columns) -> None:
        """Raises PlanError unless the rows hold the tokens and the blocks that the step reads and writes."""
        lengths, ends = self.lengths[columns.rows], columns.ends
        for wrong, why in (
            (ends > lengths, "reads tokens that the row does not have"),
            (columns.samples & (ends != lengths), "samples before the end of the row"),
            (columns.samples & (lengths > self.max_len), "samples beyond the context"),
            (ends > self.table_lengths[columns.rows] * self.block_size, "writes KV where the row has no block"),
        ):
            if wrong.any():
                i = int(wrong.argmax())
                row, start, end, held = columns.rows[i], columns.starts[i], ends[i], lengths[i]
                blocks = self.table_lengths[row]
                raise PlanError(
                    f"step {plan.step}: row {row} {why}: [{start}, {end}) of {held} tokens, {blocks} blocks"
                )

    def append(self, rows: Ints, ids: Tensor) -> None:
        """Put one sampled token at the end of each row; `ids` [len(rows)] int64 is on the device."""
        at = torch.from_numpy(np.stack((rows, self.lengths[rows]))).to(self.device)
        self.tokens[at[0], at[1]] = ids.int()
        self.lengths[rows] += 1

    def _require(self, plan: StepPlan, row: int, *, admitted: bool) -> None:
        if not 0 <= row < self.num_rows:
            raise PlanError(f"step {plan.step}: there are rows 0 to {self.num_rows - 1}, not {row}")
        if (self.lengths[row] > 0) != admitted:
            raise PlanError(f"step {plan.step}: row {row} is {'not in use' if admitted else 'in use already'}")

    def _admitted_tokens(self, plan: StepPlan, request: Admitted) -> Piece:
        if len(request.tokens) % 4:
            raise PlanError(f"step {plan.step}: the tokens of row {request.row} are not a whole number of int32")
        tokens = np.frombuffer(request.tokens, dtype="<i4")
        if not 0 < len(tokens) <= self.max_len or not 0 < request.num_prompt <= len(tokens):
            raise PlanError(
                f"step {plan.step}: row {request.row} gets {len(tokens)} tokens, {request.num_prompt} of them prompt; "
                f"rows have 1 to {self.max_len}"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise PlanError(f"step {plan.step}: row {request.row} gets a token outside the vocabulary")
        self.lengths[request.row] = len(tokens)
        self.sampling.set(request.row, request.sampling, request.num_prompt)
        self.table_lengths[request.row] = 0
        return Piece(request.row, 0, tokens.astype(np.int64))

    def _appended_blocks(self, plan: StepPlan, row: int, blocks: list[int]) -> Piece:
        first = int(self.table_lengths[row])
        if first + len(blocks) > self.tables.shape[1]:
            raise PlanError(f"step {plan.step}: row {row} gets more than {self.tables.shape[1]} blocks")
        if blocks and not 1 <= min(blocks) <= max(blocks) <= self.num_blocks:
            raise PlanError(f"step {plan.step}: row {row} gets blocks {blocks}; there are 1 to {self.num_blocks}")
        self.table_lengths[row] += len(blocks)
        return Piece(row, first, np.array(blocks, dtype=np.int64))
