"""What a plan must hold to; and that a step reads what the plans before it wrote."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from quire.common.messages import StepPlan, pack
from quire.worker.backends import TORCH
from quire.worker.batch import build_batch
from quire.worker.plan import PlanError, read_columns
from quire.worker.rows import Rows

from .plans import admit, make_plan

BLOCK_SIZE = 4


def make_rows() -> Rows:
    """Row 1 holds six tokens and two blocks."""
    rows = Rows(num_rows=3, max_len=16, num_blocks=9, block_size=BLOCK_SIZE, vocab_size=100, device=torch.device("cpu"))
    rows.apply(make_plan(0, [], admitted=[admit(1, [10, 11, 12, 13, 14, 15], [5, 2])]))
    return rows


def run(rows: Rows, plan: StepPlan) -> None:
    rows.apply(plan)
    rows.check(plan, read_columns(plan, rows.num_rows))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"released": [0]}, "row 0 is not in use"),
    ({"released": [3]}, "rows 0 to 2"),
    ({"released": [-1]}, "rows 0 to 2"),
    ({"released": [1, 1]}, "row 1 is not in use"),
    ({"admitted": [admit(1, [1], [])]}, "row 1 is in use already"),
    ({"admitted": [admit(0, [], [])]}, "gets 0 tokens"),
    ({"admitted": [admit(0, [1] * 17, [])]}, "gets 17 tokens"),
    ({"admitted": [admit(0, [1, 2], [], num_prompt=3)]}, "3 of them prompt"),
    ({"admitted": [admit(0, [100], [])]}, "outside the vocabulary"),
    ({"admitted": [admit(0, [-1], [])]}, "outside the vocabulary"),
    ({"admitted": [admit(0, [1], [0])]}, "there are 1 to 9"),
    ({"admitted": [admit(0, [1], [10])]}, "there are 1 to 9"),
    ({"admitted": [admit(0, [1], [1, 2, 3, 4, 5])]}, "more than 4 blocks"),
    ({"new_blocks": [(0, [1])]}, "row 0 is not in use"),
    ({"new_blocks": [(1, [1, 3, 4])]}, "more than 4 blocks"),
    ({"work": [(1, 0, 7, False)]}, "reads tokens that the row does not have"),
    ({"work": [(0, 0, 1, False)]}, "reads tokens that the row does not have"),
    ({"work": [(1, 0, 5, True)]}, "samples before the end"),
    ({"work": [(3, 0, 1, False)]}, "rows 0 to 2"),
    ({"work": [(1, 0, 1, False), (1, 1, 1, False)]}, "named twice"),
    ({"work": [(1, -1, 1, False)]}, "starts must be"),
    ({"work": [(1, 0, 0, False)]}, "counts >= 1"),
    ({"admitted": [admit(0, [1] * 9, [1, 3])], "work": [(0, 0, 9, True)]}, "has no block"),
]


@pytest.mark.parametrize(("fields", "why"), BROKEN)
def test_plans_that_cannot_be(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why) as error:
        run(make_rows(), make_plan(17, **{"work": [], **fields}))
    assert "step 17" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"rows": b"\0\0\0"}, {"starts": pack([0, 0])}, {"counts": b""}, {"samples": b"\0\0"}, {"samples": b"\2"}],
)
def test_columns_that_are_malformed(change: dict[str, bytes]) -> None:
    plan = msgspec.structs.replace(make_plan(4, [(1, 0, 1, False)]), **change)
    with pytest.raises(PlanError, match="step 4"):
        read_columns(plan, 3)


def test_released_rows_may_be_admitted_by_the_same_plan() -> None:
    rows = make_rows()
    run(rows, make_plan(1, [(1, 0, 2, True)], released=[1], admitted=[admit(1, [7, 8], [9])]))
    assert rows.lengths.tolist() == [0, 2, 0]
    assert rows.tables[1, 0] == 9


def test_a_batch_gathers_tokens_positions_and_slots() -> None:
    rows = make_rows()
    rows.apply(make_plan(1, [], admitted=[admit(0, [20, 21, 22], [7])]))
    rows.append(np.array([0]), torch.tensor([42]))  # sampled: its value never passed through a plan
    plan = make_plan(2, [(1, 2, 3, False), (0, 3, 1, True)])
    columns = read_columns(plan, 3)
    rows.check(plan, columns)
    batch = build_batch(rows, columns, (None,), TORCH)
    assert batch.ids_t.tolist() == [12, 13, 14, 42]
    assert batch.positions_t.tolist() == [2, 3, 4, 3]
    assert batch.slots_t.tolist() == [5 * 4 + 2, 5 * 4 + 3, 2 * 4, 7 * 4 + 3]
    assert batch.last_s.tolist() == [3, 0, 0, 0]


def test_padding_belongs_to_the_null_block() -> None:
    rows = make_rows()
    batch = build_batch(rows, read_columns(make_plan(1, [(1, 0, 6, True)]), 3), (None, 3), TORCH)
    assert batch.ids_t.tolist() == [10, 11, 12, 13, 14, 15, 0, 0]
    assert (batch.slots_t[6:] < BLOCK_SIZE).all()
    assert (batch.slots_t[:6] >= BLOCK_SIZE).all()
