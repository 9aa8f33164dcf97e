"""The whole choice as a kernel sees it: columns and coordinates. What it computes is held against a naive reading in
tests/worker/test_sampler.py."""

import numpy as np
import pytest
import torch

from quire.kernels.filters import keep_likely
from quire.kernels.penalties import add_entries, penalize
from quire.kernels.sampling import Draws, Entries, sample

VOCAB = 40


def entries(rng: np.random.Generator, num_rows: int, values: list[float]) -> Entries:
    dense = rng.random((num_rows, VOCAB)) < 0.05
    dense[rng.random(num_rows) < 0.5] = False
    rows, ids = dense.nonzero()
    return Entries(rows, ids, rng.choice(values, len(rows)))


def random_draws(rng: np.random.Generator, num_rows: int) -> Draws:
    return Draws(
        rows=rng.permutation(num_rows),
        positions=rng.integers(5, 12, num_rows),
        num_prompt=rng.integers(1, 6, num_rows),
        temperature=rng.choice([0.0, 0.5, 1.0], num_rows),
        top_k=rng.choice([0, 1, 5], num_rows),
        top_p=rng.choice([0.5, 1.0], num_rows),
        min_p=rng.choice([0.0, 0.1], num_rows),
        repetition=rng.choice([1.0, 1.5], num_rows),
        presence=rng.choice([0.0, 1.0], num_rows),
        frequency=rng.choice([0.0, -1.0], num_rows),
        seeds=rng.integers(-(2**63), 2**63 - 1, num_rows),
        bias=entries(rng, num_rows, [-5.0, 8.0]),
        bans=entries(rng, num_rows, [-np.inf]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_rows_taken_out_choose_as_they_did(seed: int) -> None:
    rng, num_rows = np.random.default_rng(seed), 9
    draws = random_draws(rng, num_rows)
    logits, tokens = torch.randn(num_rows, VOCAB), torch.randint(0, VOCAB, (num_rows, 15), dtype=torch.int32)
    ids, faulty = sample(logits, draws, tokens)
    assert not faulty.any()
    banned = set(zip(draws.bans.rows.tolist(), draws.bans.ids.tolist(), strict=True))
    assert not banned & set(enumerate(ids.tolist()))
    which = rng.random(num_rows) < 0.5
    some = torch.from_numpy(which)
    assert torch.equal(sample(logits[some], draws.take(which), tokens)[0], ids[some])


def test_entries_are_added_where_they_say() -> None:
    logits = torch.zeros(3, VOCAB)
    add_entries(logits, np.array([0, 2, 2]), np.array([7, 0, 39]), np.array([1.5, -np.inf, 2.0]))
    assert logits[0, 7] == 1.5
    assert logits[2, 0] == -torch.inf
    assert logits[2, 39] == 2.0
    assert logits.count_nonzero() == 3


def test_tokens_behind_a_rows_own_are_not_seen() -> None:
    tokens = torch.randint(0, VOCAB, (2, 9), dtype=torch.int32)
    columns = {f"{name}_s": np.array([value, value]) for name, value in [("repetition", 1.3), ("presence", 1.0)]}
    results = []
    for filler in (3, 30):
        tokens[0, 4:], tokens[1, 6:] = filler, filler + 1
        logits = torch.arange(VOCAB).float().expand(2, -1).clone()
        penalize(logits, tokens, np.array([4, 6]), np.array([2, 6]), frequency_s=np.array([0.5, 0.5]), **columns)
        results.append(logits)
    assert torch.equal(*results)


def test_neutral_filters_keep_everything() -> None:
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    keep_likely(logits, min_p_s=np.zeros(4), top_k_s=np.array([0, VOCAB, VOCAB + 1, 2**62]), top_p_s=np.ones(4))
    assert torch.equal(logits, before)
