"""Every sampling parameter: its range holds, its edges are inside, and what is refused is named."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.common.errors import RequestError
from quire.common.sampling import MAX_TOKEN_IDS, SamplingParams, check

BAD = [
    ("n", 0), ("n", 129), ("n", 10**9), ("n", "2"), ("n", 1.5), ("n", True),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**64), ("max_tokens", "5"),
    ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", None),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"), ("temperature", 10**400),
    ("top_k", -2), ("top_k", 2**63), ("top_k", 1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1), ("min_p", -math.inf),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1), ("presence_penalty", math.nan), ("frequency_penalty", -2.1), ("frequency_penalty", []),
    ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101.0}), ("logit_bias", {1: math.nan}), ("logit_bias", {"x": 1.0}), ("logit_bias", [1]), ("logit_bias", {1: 10**400}),
    ("logit_bias", dict.fromkeys(range(MAX_TOKEN_IDS + 1), 0.0)),
    ("seed", 2**63), ("seed", 1.5), ("seed", "x"), ("stop", [""]), ("stop", ["x"] * 17), ("stop", ""), ("stop", [1]),
    ("stop_token_ids", [-1]), ("stop_token_ids", [2**31]), ("stop_token_ids", ["x"]), ("ignore_eos", 1), ("skip_special_tokens", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("param", "value"), BAD, ids=lambda v: str(v)[:20])
def test_what_is_out_of_range_or_of_the_wrong_type_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        check({param: value})
    assert caught.value.param == param
    assert caught.value.status == 400
    assert param in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 1),
        ("n", 128),
        ("temperature", 0),
        ("temperature", 2.0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("min_p", 1.0),
        ("seed", -1),
        ("seed", 2**63 - 1),
        ("max_tokens", None),
        ("logit_bias", {"7": -100}),
    ],
)
def test_the_edges_are_inside(param: str, value: object) -> None:
    assert param in check({param: value}).__struct_fields__


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(RequestError, match="guided_json"):
        check({"guided_json": "x"})


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        max_tokens=st.none() | st.integers(1, 99),
    ),
    st.integers(1, 50),
)
def test_resolving_leaves_nothing_open(params: SamplingParams, room: int) -> None:
    resolved = params.checked().resolve(eos_token_ids=[2], vocab_size=10, room=room)
    assert resolved.seed is not None
    assert resolved.seed >= 0 or resolved.seed == params.seed
    assert 1 <= resolved.max_tokens <= room
    assert resolved.min_tokens <= resolved.max_tokens
    assert resolved.stop_token_ids == [2]
    assert resolved.resolve(eos_token_ids=[2], vocab_size=10, room=room) == resolved


def test_ignore_eos_keeps_the_requests_own_stop_tokens() -> None:
    resolved = SamplingParams(ignore_eos=True, stop_token_ids=[5]).resolve(eos_token_ids=[2], vocab_size=10, room=9)
    assert resolved.stop_token_ids == [5]


@pytest.mark.parametrize("params", [SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=[10])])
def test_token_ids_beyond_the_vocabulary_are_refused(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="ends at 9"):
        params.resolve(eos_token_ids=[], vocab_size=10, room=9)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert check({"stop": "x"}) == SamplingParams(stop="x").checked() == check({"stop": ["x"]})
