"""A plan's columns as arrays, once they are well-formed. What breaks the contract of `StepPlan` is a `PlanError`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.errors import EngineError
from ..common.messages import StepPlan

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class PlanError(EngineError):
    """The scheduler's view of this worker and the worker's own differ: going on would mix up requests."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Of a step, one entry per row that runs."""

    rows: Ints
    starts: Ints
    counts: Ints
    samples: Flags
    copies: Ints  # [n, 2]: blocks, from and to

    @property
    def ends(self) -> Ints:
        return self.starts + self.counts


def read_columns(plan: StepPlan, num_rows: int) -> Columns:
    """Raises PlanError unless the columns are equally long, their rows distinct and in range, and nothing is negative.
    Whether a row holds what the plan reads of it is `Rows.check`'s to say, whether there is a block the store's."""
    if any(len(column) % 4 for column in (plan.rows, plan.starts, plan.counts)):
        raise PlanError(f"step {plan.step}: a column is not a whole number of int32")
    if len(plan.copies) % 8:
        raise PlanError(f"step {plan.step}: the copies are not pairs of int32")
    copies = np.frombuffer(plan.copies, dtype="<i4").astype(np.int64).reshape(-1, 2)
    rows, starts, counts = (
        np.frombuffer(column, dtype="<i4").astype(np.int64) for column in (plan.rows, plan.starts, plan.counts)
    )
    samples = np.frombuffer(plan.samples, dtype=np.uint8)
    if not len(rows) == len(starts) == len(counts) == len(samples):
        lengths = f"rows {len(rows)}, starts {len(starts)}, counts {len(counts)}, samples {len(samples)}"
        raise PlanError(f"step {plan.step}: the columns differ in length: {lengths}")
    if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
        raise PlanError(f"step {plan.step}: there are rows 0 to {num_rows - 1}, not {rows.tolist()}")
    if len(np.unique(rows)) != len(rows):
        raise PlanError(f"step {plan.step}: a row is named twice in {rows.tolist()}")
    if len(rows) and (starts.min() < 0 or counts.min() < 1):
        raise PlanError(f"step {plan.step}: starts must be >= 0 and counts >= 1")
    if samples.max(initial=0) > 1:
        raise PlanError(f"step {plan.step}: samples must be 0 or 1")
    return Columns(rows, starts, counts, samples.astype(np.bool_), copies)
