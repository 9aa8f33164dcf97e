"""Quotas hold over any stretch of time, whoever asks when; and what a full queue is told is what happens."""

from hypothesis import given
from hypothesis import strategies as st

from quire.common.messages import Quota
from quire.scheduler.quotas import MAX_TENANTS, MINUTE_S, Quotas

asks = st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=60)


@given(asks, st.integers(1, 20))
def test_no_stretch_of_time_has_more_requests_than_its_share(asked: list[tuple[float, int, int]], limit: int) -> None:
    quotas, now, admitted = Quotas(), 0.0, []
    for gap, prompt, _ in asked:
        now += gap
        if quotas.admit("a", Quota(limit), prompt, now) is None:
            admitted.append(now)
    for i, first in enumerate(admitted):
        for j, last in enumerate(admitted[i:], 1):
            assert j <= limit + (last - first) * limit / MINUTE_S + 1e-3


@given(asks, st.integers(1, 200))
def test_tokens_are_charged_as_they_come_and_paid_off_in_time(asked: list[tuple[float, int, int]], limit: int) -> None:
    quotas, now, used, last = Quotas(), 0.0, 0, 0
    for gap, prompt, output in asked:
        now += gap
        if quotas.admit("a", Quota(0, limit), prompt, now) is None:
            assert used <= limit + now * limit / MINUTE_S, "it was let in with a quota that was used up"
            quotas.charge("a", Quota(0, limit), output, now)
            used += prompt + output
            last = prompt + output
    assert used <= limit + now * limit / MINUTE_S + last, "only the last one may go beyond"


@given(asks, st.integers(0, 20), st.integers(0, 200))
def test_who_comes_when_it_was_told_to_is_let_in(
    asked: list[tuple[float, int, int]], requests: int, tokens: int
) -> None:
    quotas, now, quota = Quotas(), 0.0, Quota(requests, tokens)
    for gap, prompt, output in asked:
        now += gap
        if refusal := quotas.admit("a", quota, prompt, now):
            assert refusal.retry_after_s > 0 and "per minute" in refusal.why
            early = now + refusal.retry_after_s * 0.9 - 1e-3
            assert early <= now or quotas.admit("a", quota, prompt, early), "it could have come sooner"
            now += refusal.retry_after_s
            assert quotas.admit("a", quota, prompt, now) is None
        quotas.charge("a", quota, output, now)


def test_the_scarcer_quota_is_named() -> None:
    quotas = Quotas()
    assert quotas.admit("a", Quota(1, 1000), 900, 0.0) is None
    refusal = quotas.admit("a", Quota(1, 1000), 900, 0.0)
    assert refusal is not None and "1 requests" in refusal.why and refusal.retry_after_s == MINUTE_S
    quotas.charge("a", Quota(1, 1000), 5000, 0.0)
    refusal = quotas.admit("a", Quota(1, 1000), 900, MINUTE_S)
    assert refusal is not None and "1000 tokens" in refusal.why


def test_tenants_have_buckets_of_their_own() -> None:
    quotas = Quotas()
    assert [quotas.admit(tenant, Quota(1), 1, 0.0) is None for tenant in "abab"] == [True, True, False, False]


def test_without_a_quota_nothing_is_remembered() -> None:
    quotas = Quotas()
    for _ in range(1000):
        assert quotas.admit("a", Quota(), 10**6, 0.0) is None
        quotas.charge("a", Quota(), 10**6, 0.0)
    assert len(quotas) == 0


def test_a_quota_that_changes_counts_from_then_on() -> None:
    quotas = Quotas()
    assert quotas.admit("a", Quota(1), 1, 0.0) is None and quotas.admit("a", Quota(1), 1, 0.0)
    assert quotas.admit("a", Quota(2), 1, 0.0) is None and quotas.admit("a", Quota(), 1, 0.0) is None


def test_a_bounded_number_of_tenants_is_remembered() -> None:
    quotas = Quotas()
    for tenant in range(MAX_TENANTS + 10):
        assert quotas.admit(str(tenant), Quota(1), 1, 0.0) is None
    assert len(quotas) == MAX_TENANTS
    assert quotas.admit(str(MAX_TENANTS), Quota(1), 1, 0.0) is not None, "those that came last"
