"""The likeliest tokens of the rows that ask for them, against a naive reading, as they go over the wire."""

from array import array

import numpy as np
import pytest
import torch

from quire.common.messages import unpack
from quire.common.sampling import SamplingParams
from quire.worker.sampling.best import best
from quire.worker.sampling.table import SamplingTable

VOCAB = 40


@pytest.mark.parametrize("seed", range(20))
def test_each_row_gets_as_many_as_it_asked_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 5, (9, VOCAB))).float()
    before = logits.clone()
    counts = rng.integers(0, 12, 9) * rng.integers(0, 2, 9)
    counts[seed % 9] = 3
    drawn = torch.from_numpy(rng.integers(0, VOCAB, 9))
    found = best(logits, drawn, counts)
    assert found is not None and torch.equal(logits, before)
    columns = found.read()
    ids, logprobs = unpack(columns[0]), array("f", columns[1]).tolist()
    for row, count in enumerate(counts):
        exact = before[row].double().numpy()
        exact = exact - np.log(np.exp(exact - exact.max()).sum()) - exact.max()
        order = np.argsort(-exact)[:count] if count != 1 else drawn[row : row + 1].numpy()
        mine, ids = ids[:count], ids[count:]
        values, logprobs = logprobs[:count], logprobs[count:]
        assert mine == order.tolist()
        assert values == pytest.approx(exact[order].tolist(), abs=1e-4)
    assert not ids and not logprobs


def test_nobody_asks() -> None:
    assert (
        best(torch.full((2, VOCAB), float("nan")), torch.zeros(2, dtype=torch.int64), np.zeros(2, dtype=np.int64))
        is None
    )


def test_a_row_forgets_what_it_asked_for() -> None:
    table = SamplingTable(3, VOCAB)
    table.set(1, SamplingParams(seed=0, beam_width=3, stop_token_ids=[1, 2, 3]), 4)
    assert table.num_candidates.tolist() == [0, 12, 0]
    table.set(1, SamplingParams(seed=0, n=1, best_of=1), 4)
    assert table.num_candidates.tolist() == [0, 1, 0]
    table.set(1, SamplingParams(seed=0), 4)
    assert not table.num_candidates.any()
