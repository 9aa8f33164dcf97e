"""Who hangs, in the judgement of the supervisor. Time is a number here."""

from hypothesis import given
from hypothesis import strategies as st

from quire.common.messages import HEARTBEAT_S, Status
from quire.launch.stalls import LONGEST_TURN_S, STARTING_S, Awake, SchedulerHangs, Silent, Watch, WorkersHang

TIMEOUT_S = 30.0
STALLED = Status("stalled", detail="worker 1 is silent")


def watch() -> Watch:
    watch = Watch(TIMEOUT_S)
    watch.began(0.0)
    return watch


def verdicts(watch: Watch, seconds: range, *, heard: bool) -> dict[int, object]:
    found = {}
    for now in seconds:
        if heard:
            watch.heard(now)
        if verdict := watch.verdict(now):
            found[now] = verdict
    return found


def test_a_silent_scheduler_is_told_of_then_ended_and_so_is_the_next() -> None:
    found = verdicts(watch(), range(130), heard=False)
    hangs = SchedulerHangs("was silent for 60 s and was killed")
    assert found == {30: Silent(30.0), 60: hangs, 90: Silent(30.0), 120: hangs}


def test_a_scheduler_that_speaks_again_is_forgiven() -> None:
    seen = watch()
    assert verdicts(seen, range(59), heard=False) == {30: Silent(30.0)}
    seen.heard(59.0)
    assert verdicts(seen, range(60, 88), heard=False) == {}
    assert verdicts(seen, range(88, 95), heard=False) == {89: Silent(30.0)}


def test_a_scheduler_that_starts_has_time() -> None:
    seen = Watch(2.0)
    seen.began(0.0)
    assert list(verdicts(seen, range(100), heard=False)) == [int(STARTING_S), 2 * int(STARTING_S), 3 * int(STARTING_S)]
    seen.heard(100.0)
    assert list(verdicts(seen, range(100, 105), heard=False)) == [102, 104]


def test_without_a_scheduler_nothing_hangs() -> None:
    assert verdicts(Watch(TIMEOUT_S), range(200), heard=False) == {}
    seen = watch()
    seen.told(STALLED, 0.0)
    seen.ended()
    assert verdicts(seen, range(200), heard=False) == {}


def test_stalled_workers_are_ended_when_it_lasts_and_once() -> None:
    seen = watch()
    seen.told(STALLED, 0.0)
    seen.told(STALLED, 20.0)
    hang = WorkersHang("was killed, the engine being stalled: worker 1 is silent")
    assert verdicts(seen, range(61), heard=True) == {30: hang, 60: hang}
    seen.told(Status("recovering"), 61.0)
    assert verdicts(seen, range(61, 200), heard=True) == {}


def test_what_a_scheduler_said_counts_only_while_it_speaks() -> None:
    seen = watch()
    seen.heard(25.0)
    seen.told(STALLED, 0.0)
    assert verdicts(seen, range(28, 55), heard=False) == {}
    seen.began(60.0)
    assert verdicts(seen, range(60, 200), heard=True) == {}


@given(st.lists(st.floats(0.0, 1e4), max_size=50))
def test_time_stands_still_while_the_supervisor_is_away(gaps: list[float]) -> None:
    awake, now, known = Awake(0.0), 0.0, 0.0
    for gap in gaps:
        now += gap
        time = awake.time(now)
        assert -1e-6 <= time - known <= min(gap, LONGEST_TURN_S) + 1e-6
        known = time
    assert abs(known - sum(min(gap, LONGEST_TURN_S) for gap in gaps)) < 1e-3


def test_a_short_timeout_does_not_take_the_pause_between_heartbeats_for_silence() -> None:
    seen = Watch(1.0)
    seen.began(0.0)
    for turn in range(100):
        seen.heard(turn * 1.2 * HEARTBEAT_S)
        assert seen.verdict((turn * 1.2 + 1.19) * HEARTBEAT_S) is None
