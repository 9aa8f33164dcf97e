"""Percentiles, spread, arrivals and workloads: what the benchmarks' figures rest on."""

import argparse
import json
import math
import statistics
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.benchmarks import traffic
from quire.benchmarks.figures import percentile, ratios, spread
from quire.benchmarks.work import Work, random_prompts, work

SOME = 200
numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(numbers, st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile([], 50))


@given(numbers)
def test_a_spread_holds_all_and_is_in_order(values: list[float]) -> None:
    found = spread(values)
    assert all(found.low <= value <= found.high for value in values)
    assert found.low <= found.median <= found.high


def test_ratios_are_of_one_round_each() -> None:
    assert ratios([10, 20, 30, 1], [10, 40, 15, 0]) == [1, 0.5, 2, math.inf]
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


@given(st.integers(1, 999), st.integers(1, 9999), st.integers(1, 9999))
def test_work_is_read_as_it_is_written(requests: int, prompt: int, output: int) -> None:
    one = Work(requests, prompt, output)
    assert work(str(one)) == one


@pytest.mark.parametrize("text", ["", "32", "32x128", "0x128/64", "32x128/0", "ax1/1", "1x1/1x1"])
def test_other_work_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        work(text)


def test_prompts_are_the_seeds() -> None:
    assert random_prompts(3, 20, "a") == random_prompts(3, 20, "a") != random_prompts(3, 20, "b")
    assert [len(prompt) for prompt in random_prompts(3, 20, "a")] == [20, 20, 20]


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_arrivals_are_a_poisson_process(rate: float) -> None:
    times = traffic.poisson(rate, 20_000, 0)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) * rate == pytest.approx(1, rel=0.05)
    assert statistics.pstdev(gaps) * rate == pytest.approx(1, rel=0.05)  # of an even rate it would be 0
    each_second = Counter(math.floor(at * rate) for at in times)  # how many in 1/rate: Poisson, so variance is mean
    counts = [each_second[i] for i in range(round(times[-1] * rate))]
    assert statistics.pvariance(counts) == pytest.approx(1, rel=0.1)


def test_lengths_like_sharegpts_have_its_means_and_fit() -> None:
    drawn = list(islice(traffic.like_sharegpt(0, 100_000), 20_000))
    prompts, outputs = [prompt for prompt, _ in drawn], [output for _, output in drawn]
    assert statistics.mean(prompts) == pytest.approx(traffic.MEAN_PROMPT, rel=0.05)
    assert statistics.mean(outputs) == pytest.approx(traffic.MEAN_OUTPUT, rel=0.05)
    assert statistics.median(prompts) < statistics.mean(prompts)
    short = list(islice(traffic.like_sharegpt(0, 256), SOME))
    assert all(p >= traffic.SHORTEST and o >= 1 and p + o <= 256 for p, o in short)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_a_shared_prefix_is_shared_to_its_end_and_no_further(share: float) -> None:
    jobs = list(islice(traffic.shared_prefix(traffic.same_length(100, 4), share, 0), SOME))
    prompts = [job[0]["prompt"] for job in jobs]
    shared = round(100 * share)
    assert {len(prompt) for prompt in prompts} == {100}
    assert len({tuple(prompt[:shared]) for prompt in prompts}) == 1
    if share < 1:
        assert len({prompt[shared] for prompt in prompts}) > 1


def test_conversations_have_their_turns_and_messages_alone() -> None:
    jobs = list(islice(traffic.conversations(traffic.same_length(5, 3), 4, 0), 3))
    assert [len(job) for job in jobs] == [4, 4, 4]
    assert all(
        body["max_tokens"] == 3 and len(body["messages"][0]["content"].split()) == 5 for job in jobs for body in job
    )


def test_lengths_are_read_from_pairs_and_from_conversations(tmp_path: Path) -> None:
    said = [{"value": "a" * 40}, {"value": "b" * 80}, {"value": "c"}]
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps([[7, 9], {"conversations": said}, {"conversations": said[:1]}]))
    assert list(islice(traffic.from_file(path), 3)) == [(7, 9), (10, 20), (7, 9)]
