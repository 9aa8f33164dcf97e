"""Whatever a Submit holds, it becomes a valid request or one refusal."""

import math
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.common.messages import MAX_TIMEOUT_S, Submit, pack
from quire.common.sampling import SamplingParams
from quire.scheduler import intake

VOCABULARY = 50
SAMPLING = SamplingParams(max_tokens=4, seed=1)
IDS = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, VOCABULARY - 1), max_size=5)


@given(IDS, IDS)
def test_ids_are_kept_or_refused(prompt: list[int], output: list[int]) -> None:
    submit = Submit(3, pack(prompt), SAMPLING, output=pack(output))
    if prompt and all(0 <= id < VOCABULARY for id in prompt + output):
        request = intake.request(submit, b"client", VOCABULARY, 1.0)
        assert request.tokens == array("i", prompt + output) and request.num_prompt == len(prompt)
        assert (request.id, request.client, request.limit) == (3, b"client", len(prompt) + 4)
    else:
        with pytest.raises(intake.Malformed):
            intake.request(submit, b"client", VOCABULARY, 1.0)


@pytest.mark.parametrize(
    ("beams", "output", "fine"),
    [
        ({"beam_width": 4, "n": 4}, [], True),
        ({"beam_width": 4, "n": 5}, [], False),
        ({"beam_width": 25}, [], True),
        ({"beam_width": 26}, [], False),  # two candidates for each are more than there are tokens
        ({"beam_width": 13, "stop_token_ids": [1, 2, 3]}, [], False),
        ({"beam_width": 4}, [1], False),
        ({"n": 2}, [], False),
    ],
    ids=str,
)
def test_a_search_has_candidates_enough_and_no_output(beams: dict[str, Any], output: list[int], fine: bool) -> None:
    sampling = SamplingParams(max_tokens=4, seed=1, **beams)
    submit = Submit(3, pack([1]), sampling, output=pack(output))
    if fine:
        assert intake.request(submit, b"", VOCABULARY, 0.0).sampling == sampling
    else:
        with pytest.raises(intake.Malformed):
            intake.request(submit, b"", VOCABULARY, 0.0)


@given(st.binary(max_size=9), st.binary(max_size=9))
def test_any_bytes_are_read_or_refused(prompt: bytes, output: bytes) -> None:
    try:
        request = intake.request(Submit(3, prompt, SAMPLING, output=output), b"", VOCABULARY, 0.0)
    except intake.Malformed as refusal:
        assert str(refusal)
    else:
        assert request.tokens.tobytes() == prompt + output


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=None, seed=1),
        SamplingParams(max_tokens=4),
        SamplingParams(max_tokens=4, seed=1, n=2),
        SamplingParams(max_tokens=4, seed=1, stop_token_ids=[VOCABULARY]),
        SamplingParams(max_tokens=4, seed=1, logit_bias={VOCABULARY: 1.0}),
    ],
)
def test_unresolved_sampling_is_refused(sampling: SamplingParams) -> None:
    with pytest.raises(intake.Malformed):
        intake.request(Submit(3, pack([1]), sampling), b"", VOCABULARY, 0.0)


ANY_TIME = st.floats() | st.floats(0.0, MAX_TIMEOUT_S)


@given(ANY_TIME, ANY_TIME, ANY_TIME, st.booleans())
def test_limits_count_from_the_arrival_and_nonsense_is_none(
    waited_s: float, timeout_s: float, max_queue_s: float, resumed: bool
) -> None:
    output = pack([1]) if resumed else b""
    submit = Submit(3, pack([1]), SAMPLING, waited_s, output=output, timeout_s=timeout_s, max_queue_s=max_queue_s)
    arrived_at = intake.arrived_at(submit, 1e6)
    assert 1e6 - MAX_TIMEOUT_S <= arrived_at <= 1e6
    if 0.0 <= waited_s <= MAX_TIMEOUT_S:
        assert arrived_at == 1e6 - waited_s
    assert intake.ends_at(submit, arrived_at) == (arrived_at + timeout_s if timeout_s > 0 else math.inf)
    queues = max_queue_s > 0 and not resumed
    assert intake.begins_by(submit, arrived_at) == (arrived_at + max_queue_s if queues else math.inf)
