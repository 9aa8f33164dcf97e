"""The sampler against a naive float64 reading of its documentation, row by row."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.sampling import SamplingParams
from quire.kernels.gumbel import gumbel
from quire.kernels.sampling import sample
from quire.worker.sampling.table import SamplingTable

VOCAB = 50


class Case:
    """Rows with parameters, tokens and logits of their own."""

    def __init__(self, params: list[SamplingParams], seed: int = 0, num_prompt: int = 4, length: int = 12) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = params
        self.table = SamplingTable(len(params), VOCAB)
        for row, row_params in enumerate(params):
            self.table.set(row, row_params, num_prompt)
        self.num_prompt, self.length = num_prompt, length
        self.logits = torch.randn(len(params), VOCAB, generator=generator) * 3
        self.tokens = torch.randint(0, VOCAB, (len(params), length + 5), generator=generator, dtype=torch.int32)

    def sample(self, rows: list[int] | None = None) -> list[int]:
        rows = list(range(len(self.params))) if rows is None else rows
        draws = self.table.select(np.array(rows), np.full(len(rows), self.length))
        before = self.logits.clone()
        ids, faulty = sample(self.logits[rows], draws, self.tokens)
        assert torch.equal(self.logits.nan_to_num(7), before.nan_to_num(7))
        assert not faulty.any()
        return ids.tolist()

    def scores(self, row: int) -> list[float]:
        """The logits that are compared: adjusted, scaled and filtered, in float64."""
        p, tokens = self.params[row], self.tokens[row, : self.length].tolist()
        output = tokens[self.num_prompt :]
        z = self.logits[row].double().tolist()
        for i, bias in p.logit_bias.items():
            z[i] += bias
        for i in range(VOCAB):
            if i in tokens:
                z[i] = z[i] / p.repetition_penalty if z[i] > 0 else z[i] * p.repetition_penalty
            z[i] -= p.frequency_penalty * output.count(i) + p.presence_penalty * (i in output)
        if len(output) < p.min_tokens:
            for i in p.stop_token_ids:
                z[i] = -math.inf
        if p.temperature == 0:
            return z
        z = [x / p.temperature for x in z]
        z = keep(z, [i for i, x in enumerate(z) if x >= max(z) + (math.log(p.min_p) if p.min_p else -math.inf)])
        order = sorted(range(VOCAB), key=lambda i: -z[i])
        if p.top_k > 0:
            order = order[: p.top_k]
        z = keep(z, order)
        top = max(z)
        z = [x - top for x in z]
        total = sum(math.exp(z[i]) for i in order)
        mass, kept = 0.0, []
        for i in order:
            if mass < p.top_p or p.top_p == 1.0:
                kept.append(i)
            mass += math.exp(z[i]) / total
        return keep(z, kept)

    def expected(self, row: int) -> int:
        z, p = torch.tensor(self.scores(row), dtype=torch.float64), self.params[row]
        if p.temperature > 0:
            z += gumbel(torch.tensor([p.seed]), torch.tensor([self.length]), VOCAB)[0].double()
        return int(z.argmax())


def keep(z: list[float], ids: list[int]) -> list[float]:
    return [x if i in set(ids) else -math.inf for i, x in enumerate(z)]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 100, **fields})


some_params = st.builds(
    params,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 3, 7, 49, 50, 51, 2**62]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 2.0, -0.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4),
    min_tokens=st.sampled_from([0, 8, 9, 30]),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(some_params, min_size=1, max_size=6), st.integers(0, 1000))
def test_each_row_is_what_the_documentation_says(rows: list[SamplingParams], seed: int) -> None:
    case = Case(rows, seed)
    assert case.sample() == [case.expected(row) for row in range(len(rows))]


@settings(max_examples=50, deadline=None)
@given(st.lists(some_params, min_size=2, max_size=8), st.integers(0, 1000), st.randoms())
def test_a_row_does_not_depend_on_the_others(rows: list[SamplingParams], seed: int, rng: Any) -> None:
    case = Case(rows, seed)
    together = case.sample()
    assert [case.sample([row])[0] for row in range(len(rows))] == together
    some = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
    assert case.sample(some) == [together[row] for row in some]


def test_neutral_parameters_are_greedy_and_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([params(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1)] * 4)
    monkeypatch.setattr("quire.kernels.sampling._choose", None)
    assert case.sample() == case.logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-6])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    case = Case([params(temperature=temperature)])
    assert case.sample() == case.logits.argmax(-1).tolist()


def test_draws_follow_the_filtered_distribution() -> None:
    """Chi-square over seeds; 27.9 is the 99.9 % quantile at 9 degrees of freedom."""
    n = 4000
    case = Case([params(temperature=0.8, top_k=10, seed=seed) for seed in range(n)])
    case.logits[:] = case.logits[0]
    expected = torch.tensor(case.scores(0)).softmax(-1) * n
    counts = torch.bincount(torch.tensor(case.sample()), minlength=VOCAB).double()
    live = expected > 0
    assert int(live.sum()) == 10
    assert counts[~live].sum() == 0
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 27.9


def test_equal_seed_and_position_give_the_same_token_and_other_positions_others() -> None:
    case = Case([params(seed=5), params(seed=5), params(seed=6)])
    case.logits[:] = torch.zeros(VOCAB)
    first = case.sample()
    assert first[0] == first[1]
    drawn = set()
    for case.length in range(5, 12):
        drawn.add(tuple(case.sample()))
    assert len(drawn) == 7


def test_nan_is_told_and_stays_in_its_row() -> None:
    rows = [params(temperature=t, top_k=k, top_p=0.9, min_p=0.1) for t in (0.0, 1.0) for k in (0, 3)] * 2
    case = Case(rows)
    clean = case.sample()
    case.logits[1, 7] = case.logits[2, :] = float("nan")
    draws = case.table.select(np.arange(8), np.full(8, case.length))
    ids, faulty = sample(case.logits, draws, case.tokens)
    assert faulty.tolist() == [False, True, True, False, False, False, False, False]
    assert [i for i, bad in zip(ids.tolist(), faulty, strict=True) if not bad] == [clean[0], *clean[3:]]
    assert ids[faulty].tolist() == [0, 0]


def test_ids_that_the_model_has_no_logits_for_are_ignored() -> None:
    case = Case([params(temperature=0.0, min_tokens=50, stop_token_ids=[3, VOCAB, 10**6], logit_bias={VOCAB: 5.0})])
    case.logits[0, 3] = 100.0
    best = case.logits[0].argsort(descending=True).tolist()
    assert best[0] == 3
    assert case.sample() == [best[1]]
