"""The policy: what follows from the end of a process. No processes here."""

import signal

from hypothesis import given
from hypothesis import strategies as st

from quire.common.errors import EXIT_CONFIG, EXIT_FATAL
from quire.launch.children import COMPANY_S, Child, Exit, Role
from quire.launch.restarts import FIRST_DELAY_S, LONGEST_DELAY_S, STEADY_S, WINDOW_S, Again, Over, Restarts

CODES = st.sampled_from([0, EXIT_FATAL, -signal.SIGKILL, -signal.SIGSEGV])
ROLES: list[Role] = ["frontend", "scheduler", "worker"]
GAPS = st.floats(0.0, 30.0) | st.floats(0.0, 1.0)


def end(role: Role, code: int = -signal.SIGKILL, index: int = 0) -> Exit:
    return Exit(Child(role, f"{role} {index}", "module", ()), code)


def served(max_restarts: int) -> Restarts:
    restarts = Restarts(max_restarts)
    restarts.ready()
    return restarts


@given(st.lists(st.tuples(GAPS, st.sampled_from([*ROLES, "ready"]), CODES), max_size=60), st.integers(1, 6))
def test_the_limit_within_a_minute_holds_and_nothing_but_a_limit_ends_the_engine(
    events: list[tuple[float, Role, int]], max_restarts: int
) -> None:
    restarts, now, begun = served(max_restarts), 0.0, []
    in_vain = dict.fromkeys(ROLES, 0)
    for gap, what, code in events:
        now += gap
        if what == "ready":
            restarts.ready()
            in_vain["scheduler"] = in_vain["worker"] = 0
            continue
        recent = [at for at in begun if now - at <= WINDOW_S]
        match restarts.ended(end(what, code), now):
            case Again():
                assert len(recent) < max_restarts
                in_vain[what] += 1
                begun.append(now)
            case Over(cause, why):
                assert "limit" in why and cause == end(what, code)
                assert len(recent) >= max_restarts or in_vain[what] >= max_restarts
                return


@given(st.sampled_from(["scheduler", "worker"]), st.lists(GAPS, min_size=12, max_size=12), st.integers(1, 10))
def test_a_part_without_which_nothing_is_served_waits_longer_each_time_and_not_for_ever(
    role: Role, gaps: list[float], max_restarts: int
) -> None:
    """However slowly it fails: a limit within a minute alone would let it go on."""
    restarts, now, delays = served(max_restarts), 0.0, []
    for gap in gaps:
        now += gap
        verdict = restarts.ended(end(role), now)
        if isinstance(verdict, Over):
            break
        delays.append(verdict.delay_s)
        now += verdict.delay_s
    assert len(delays) == max_restarts
    assert delays == [0.0, *(min(FIRST_DELAY_S * 2**i, LONGEST_DELAY_S) for i in range(max_restarts - 1))]


@given(st.sampled_from(ROLES), st.floats(WINDOW_S, 1e6), st.integers(1, 20))
def test_what_served_in_between_is_started_again_at_once_for_ever(role: Role, gap: float, times: int) -> None:
    restarts = served(1)
    for i in range(times):
        restarts.ready()
        assert restarts.ended(end(role), i * (gap + 1.0)) == Again(0.0)


@given(st.lists(st.floats(0.0, COMPANY_S), min_size=1, max_size=16), st.integers(0, 2))
def test_workers_that_end_together_are_one_restart_and_start_together(offsets: list[float], failed: int) -> None:
    restarts = served(failed + 1)
    for i in range(failed):
        restarts.ended(end("worker"), i * 100.0)
    at = failed * 100.0
    starts = []
    for index, offset in enumerate(sorted(offset - min(offsets) for offset in offsets)):
        verdict = restarts.ended(end("worker", index=index), at + offset)
        assert isinstance(verdict, Again)
        starts.append(max(at + offset + verdict.delay_s, at + COMPANY_S))
    assert max(starts) - min(starts) < 1e-6
    again = restarts.ended(end("worker", index=len(offsets) - 1), at + COMPANY_S)
    assert isinstance(again, Over)


@given(st.sampled_from(ROLES), CODES, st.integers(0, 5))
def test_before_it_has_served_any_end_is_the_engines(role: Role, code: int, max_restarts: int) -> None:
    assert Restarts(max_restarts).ended(end(role, code), 1.0) == Over(end(role, code))


@given(st.sampled_from(ROLES), CODES)
def test_a_wrong_configuration_and_no_restarts_end_the_engine(role: Role, code: int) -> None:
    assert served(9).ended(end(role, EXIT_CONFIG), 1.0) == Over(end(role, EXIT_CONFIG))
    assert served(0).ended(end(role, code), 1.0) == Over(end(role, code))


def test_a_frontend_that_has_lived_a_while_is_started_at_once() -> None:
    restarts, now = served(9), 0.0
    assert restarts.ended(end("frontend"), now) == Again(0.0)
    assert restarts.ended(end("frontend"), now + STEADY_S / 2) == Again(FIRST_DELAY_S)
    assert restarts.ended(end("frontend"), now + 3 * STEADY_S) == Again(0.0)
    restarts.ready()  # which says nothing of frontends
    assert restarts.ended(end("frontend"), now + 3 * STEADY_S + 1) == Again(FIRST_DELAY_S)
