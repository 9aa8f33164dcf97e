"""Workers, frontends and schedulers that are lost, in every order of events: streams go on as if nothing had been."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.common import curve
from quire.common.channel import wires
from quire.common.errors import EXIT_CONFIG, EXIT_FATAL
from quire.common.messages import (
    PEER_TIMEOUT_S,
    Allocate,
    Heartbeat,
    Message,
    Quota,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
    Submit,
    ToWorker,
    Welcome,
    WorkerFault,
    pack,
)
from quire.common.sampling import SamplingParams
from quire.scheduler.serving import Serving

from .peers import NUM_BLOCKS, Engine, FakeFrontend, FakeWorker, Peer, config, running, turn

LOST_GROUPS = "quire:group_losses_total"


def load(frontend: FakeFrontend, count: int = 6, *, first: int = 0) -> None:
    """Give it requests; those it has had, again with the ids it holds of them."""
    for id in range(first, first + count):
        prompt, held = [id % 13] * (1 + 3 * id % 11), frontend.tokens(id)
        attempts = int(id in frontend.wanted and not held)
        frontend.submit(id, prompt, output=pack(held), attempts=attempts, max_tokens=20 + id % 5)


def under_way(frontend: FakeFrontend) -> bool:
    """Whether every request has a token."""
    return all(frontend.tokens(id) for id in frontend.wanted)


def restarted(engine: Engine, workers: list[FakeWorker], rank: int) -> None:
    """What a supervisor does."""
    workers[rank].die()
    workers[rank] = engine.computing(rank)


def finished(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend, *, losses: int) -> dict[str, float]:
    """All streams end as they would have, nothing is left; the metrics."""
    turn(workers, frontend, frontend.undisturbed)
    assert frontend.phases()[-1] == "ready" and "failed" not in frontend.phases()
    metrics = frontend.metrics()
    assert metrics["quire:kv_blocks_free"] == NUM_BLOCKS and metrics[LOST_GROUPS] == losses
    return metrics


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_streams_go_on_behind_a_worker_that_died(tmp_path: Path, ranks: int, rank: int, depth: int) -> None:
    with running(tmp_path, config(ranks=ranks, pipeline_depth=depth)) as engine:
        workers, frontend = engine.all_ready(ranks)
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        workers[rank].die()
        staying = [worker for worker in workers if worker.rank != rank]
        turn(staying, frontend, lambda: frontend.phases()[-1] == "recovering")
        load(frontend, first=10)  # accepted meanwhile, and told so by silence
        workers[rank] = engine.computing(rank)
        metrics = finished(engine, workers, frontend, losses=1)
        assert metrics["quire:recovery_seconds_count"] == 1 and metrics["quire:requests_resumed_total"] == 6
        assert metrics['quire:group_losses_total{cause="gone",model_name="test"}'] == 1
        status = [status for status in frontend.seen[Status] if status.phase == "recovering"][-1]
        assert status.capacity == frontend.seen[Status][-1].capacity is not None


def leave_first(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    workers[1].die()
    workers[0].leave("rank 1 is gone")
    turn(workers[:1], frontend, lambda: frontend.phases()[-1] == "recovering")
    workers[1] = engine.computing(1)


def silence_first(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    """The scheduler notices by itself, and asks those that stay."""
    workers[-1].die()
    turn([], frontend, lambda: frontend.phases()[-1] == "recovering")
    workers[-1] = engine.computing(len(workers) - 1)


def newcomer_first(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    restarted(engine, workers, len(workers) - 1)


def newcomer_long_before(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    """It has its Welcome before the one that stays says anything."""
    restarted(engine, workers, len(workers) - 1)
    turn(workers[-1:], frontend, lambda: bool(workers[-1].seen[Welcome]))


def one_after_the_other(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    for rank in (1, 0):
        restarted(engine, workers, rank)
        turn(workers, frontend, lambda: bool(workers[rank].seen[Welcome]))  # noqa: B023


def welcomed(worker: FakeWorker) -> bool:
    """By a worker that does nothing further."""
    if not worker.seen[Welcome]:
        worker.beat(worker.hello)
        worker.hear()
    return bool(worker.seen[Welcome])


def the_same_again_and_again(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    """While it loads, and between Allocate and Allocated."""
    staying, rank = workers[:-1], len(workers) - 1
    restarted(engine, workers, rank)
    turn(staying, frontend, lambda: welcomed(workers[-1]))
    restarted(engine, workers, rank)
    turn(staying, frontend, lambda: welcomed(workers[-1]))
    workers[-1].send(workers[-1].ready)
    turn(staying, frontend, lambda: bool(workers[-1].hear() and workers[-1].seen[Allocate]))
    restarted(engine, workers, rank)


def all_at_once(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    for worker in workers:
        worker.die()
    workers[:] = [engine.computing(worker.rank) for worker in reversed(workers)][::-1]


def frames_lost_from_a_worker(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    workers[0].skip()


def a_worker_that_begins_anew(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    workers[-1].leave()


def a_step_that_failed(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    workers[0].leave("IndexError: out of range")


def a_fault(engine: Engine, workers: list[FakeWorker], frontend: FakeFrontend) -> None:
    workers[-1].send(WorkerFault(len(workers) - 1, "CUDA error", EXIT_FATAL))
    turn(workers[:-1], frontend, lambda: frontend.phases()[-1] == "recovering")
    restarted(engine, workers, len(workers) - 1)


ALONE = [
    silence_first,
    newcomer_first,
    newcomer_long_before,
    the_same_again_and_again,
    all_at_once,
    frames_lost_from_a_worker,
    a_worker_that_begins_anew,
    a_step_that_failed,
    a_fault,
]


@pytest.mark.parametrize(
    ("ranks", "event"),
    [(1, event) for event in ALONE] + [(2, event) for event in (*ALONE, leave_first, one_after_the_other)],
)
def test_whatever_comes_first(
    tmp_path: Path, ranks: int, event: Callable[[Engine, list[FakeWorker], FakeFrontend], None]
) -> None:
    with running(tmp_path, config(ranks=ranks)) as engine:
        workers, frontend = engine.all_ready(ranks)
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        event(engine, workers, frontend)
        turn(workers, frontend, lambda: "recovering" in frontend.phases() and frontend.phases()[-1] == "ready")
        turn(workers, frontend, frontend.undisturbed)
        assert frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS


def test_who_comes_for_one_that_cannot_be_reached_need_not_wait_for_its_silence(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        workers, frontend = engine.all_ready(1)
        engine.process._beat_at = math.inf  # so that nobody else finds out
        workers[0].serve()
        start = time.monotonic()
        restarted(engine, workers, 0)
        turn(workers, frontend, lambda: bool(workers[0].seen[Welcome]))
        assert time.monotonic() - start < PEER_TIMEOUT_S - 1
        load(frontend)
        metrics = finished(engine, workers, frontend, losses=1)
        assert metrics['quire:group_losses_total{cause="replaced",model_name="test"}'] == 1


def test_a_late_result_of_a_group_that_is_no_more_is_nobodys(tmp_path: Path) -> None:
    with running(tmp_path, config(ranks=2)) as engine:
        workers, frontend = engine.all_ready(2)
        old = workers[0].epoch
        workers[0].step = lambda plan: []
        load(frontend)
        turn(workers, frontend, lambda: len(workers[0].seen[StepPlan]) == 2)
        workers[1].leave("")  # begins anew; rank 0 is asked to
        turn(workers, frontend, lambda: len(workers[0].seen[StepPlan]) == 4)
        for step in (1, 2, 3):
            workers[0].send(StepResult(old, step, pack([1] * 6), pack([9] * 6)))
        workers[0].resume()
        finished(engine, workers, frontend, losses=1)


def test_a_result_that_skips_a_step_is_not_believed(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        workers, frontend = engine.all_ready(1)
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        workers[0].step = lambda plan: [StepResult(plan.epoch, plan.step + 1, b"", b"")]
        turn(workers, frontend, lambda: frontend.phases()[-1] == "recovering")
        workers[0].step = workers[0].run
        workers[0].leave("")
        turn(workers, frontend, frontend.undisturbed)


def test_deaths_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(5)
    with running(tmp_path, config(ranks=2, max_num_batched_tokens=16)) as engine:
        workers, frontend = engine.all_ready(2)
        for first in range(0, 40, 8):
            load(frontend, 8, first=first)
            turn(workers, frontend, lambda: under_way(frontend))
            for _ in range(rng.randint(0, 20)):
                turn(workers, frontend, lambda: True)
                for worker in workers:
                    worker.serve(0.002)
            restarted(engine, workers, rng.randrange(2))
        turn(workers, frontend, frontend.undisturbed, 30)
        assert frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS


def test_what_kills_workers_fails_alone(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        workers, frontend = engine.all_ready(1)
        healthy = workers[0].run
        poison = 12  # a prompt of nothing else

        def step(plan: StepPlan) -> list[Message]:
            admitted = {a.row: a.tokens for a in plan.admitted}
            poisoned.update(row for row, tokens in admitted.items() if tokens == pack([poison] * 9))
            poisoned.difference_update(row for row, tokens in admitted.items() if tokens != pack([poison] * 9))
            if poisoned & set(memoryview(plan.rows).cast("i")):
                poisoned.clear()
                workers[0].leave("SIGSEGV, as it were")
                return []
            return healthy(plan)

        poisoned: set[int] = set()
        workers[0].step = step
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        frontend.send(Submit(99, pack([poison] * 9), SamplingParams(max_tokens=5, seed=0)))
        metrics = finished(engine, workers, frontend, losses=4)
        turn(workers, frontend, lambda: frontend.finish(99) == "error")
        assert "failed 4 times" in frontend.outputs(99)[-1].error and not frontend.tokens(99)
        assert metrics["quire:requests_quarantined_total"] >= 1


def test_steps_shrink_until_they_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(tmp_path, config(max_num_batched_tokens=64)) as engine:
        workers, frontend = engine.all_ready(1)
        healthy = workers[0].run

        def step(plan: StepPlan) -> list[Message]:
            if sum(memoryview(plan.counts).cast("i")) > 6:
                workers[0].leave("out of memory", out_of_memory=True)
                return []
            return healthy(plan)

        workers[0].step = step
        load(frontend, 12)
        turn(workers, frontend, frontend.undisturbed)
        metrics = frontend.metrics()
        assert metrics["quire:step_token_budget"] <= 6
        assert metrics['quire:group_losses_total{cause="out_of_memory",model_name="test"}'] <= 4
        assert metrics["quire:requests_quarantined_total"] == 0
        told = [record for record in caplog.records if "did not fit" in record.message]
        assert len(told) == metrics[LOST_GROUPS]


def test_silence_is_a_stall_and_a_sign_of_life_ends_it(tmp_path: Path) -> None:
    with running(tmp_path, config(ranks=2, stall_timeout=1.0)) as engine:
        workers, frontend = engine.all_ready(2)
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        turn(workers[:1], frontend, lambda: frontend.phases()[-1] == "stalled")
        assert (
            "rank 1 (worker 1)" in frontend.seen[Status][-1].detail and "rank 0" not in frontend.seen[Status][-1].detail
        )
        turn(workers, frontend, lambda: frontend.phases()[-1] == "ready")
        finished(engine, workers, frontend, losses=0)


@pytest.mark.parametrize("frames_lost", [True, False])
def test_what_a_frontend_had_is_forgotten_when_it_begins_anew(tmp_path: Path, frames_lost: bool) -> None:
    with running(tmp_path, config()) as engine:
        workers, frontend = engine.all_ready(1)
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        if frames_lost:
            asked = frontend.seen[Heartbeat].count(Heartbeat(0))
            frontend.skip()
            frontend.beat_at = 0.0
            turn(workers, frontend, lambda: frontend.seen[Heartbeat].count(Heartbeat(0)) > asked)
        frontend.greet()
        assert frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS, "nobody asks for it"
        load(frontend)
        metrics = finished(engine, workers, frontend, losses=0)
        assert metrics["quire:requests_resumed_total"] == 6


def test_an_observer_that_begins_anew_is_welcome(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        workers, frontend = engine.all_ready(1)
        observer = engine.frontend("observer")
        for _ in range(2):
            observer.greet()
        turn(workers, frontend, lambda: frontend.metrics()['quire:peers{model_name="test",role="observer"}'] == 1)


def test_a_bug_in_the_scheduler_costs_nothing_but_a_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, config(ranks=2)) as engine:
        workers, frontend = engine.all_ready(2)
        load(frontend)
        turn(workers, frontend, lambda: under_way(frontend))
        with monkeypatch.context() as bug:
            bug.setattr(Serving, "submit", lambda *_: 1 / 0)
            frontend.send(Submit(99, pack([1]), SamplingParams(seed=0)))
            assert engine.join() == EXIT_FATAL
        while frontend.hear(0.1):
            pass
        assert "failed" not in frontend.phases() and not frontend.seen[Shutdown]
        engine.start()
        turn(workers, frontend, lambda: frontend.seen[Heartbeat][-1:] == [Heartbeat(0)])  # of the new one
        frontend.seen[Status].clear()
        frontend.greet()
        turn(workers, frontend, lambda: frontend.phases()[-1:] == ["ready"])
        assert not any(worker.seen[Shutdown] for worker in workers)
        load(frontend)
        finished(engine, workers, frontend, losses=0)


def test_stopping_ends_workers_and_frontends(tmp_path: Path) -> None:
    with running(tmp_path, config(ranks=2)) as engine:
        workers, frontend = engine.all_ready(2)
        engine.process.stop()
        assert engine.join() == 0
        for peer in (*workers, frontend):
            peer.until(Shutdown)


def test_options_that_a_worker_cannot_serve_end_the_engine_at_any_time(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        workers, frontend = engine.all_ready(1)
        restarted(engine, workers, 0)
        turn(workers, frontend, lambda: workers[0].epoch != 0)
        workers[0].send(WorkerFault(0, "no such file", EXIT_CONFIG))
        frontend_heard = lambda: frontend.hear(0.01) is None and frontend.phases()[-1] == "failed"  # noqa: E731
        turn([], frontend, frontend_heard)
        assert engine.join() == EXIT_CONFIG
        workers[0].until(Shutdown)


def test_a_tenant_keeps_to_its_quota_and_what_is_submitted_again_is_free(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        worker, frontend = engine.ready()
        sampling = SamplingParams(max_tokens=2, seed=0)

        def submit(id: int, **more: object) -> None:
            frontend.send(Submit(id, pack([5]), sampling, **{"tenant": "a", "quota": Quota(2), **more}))  # type: ignore[arg-type]

        for id in (1, 2, 3):
            submit(id)
        submit(4, tenant="b")
        submit(5, attempts=1)
        submit(6, output=pack([7]))
        turn(worker, frontend, lambda: all(frontend.finish(id) for id in range(1, 7)))
        (refused,) = frontend.outputs(3)
        assert refused.rejection == "rate_limited" and 0 < refused.retry_after_s <= 30
        assert "2 requests per minute" in refused.error
        assert [frontend.finish(id) for id in (1, 2, 4, 5, 6)] == ["length"] * 5
        assert frontend.metrics()['vllm:admission_rejections_total{model_name="test",reason="rate_limited"}'] == 1


def test_who_is_refused_for_a_full_queue_is_told_when_to_come_again(tmp_path: Path) -> None:
    with running(tmp_path, config(max_num_seqs=1, max_num_queued_reqs=2)) as engine:
        worker, frontend = engine.ready()
        worker.step = lambda plan: []
        for id in range(6):
            frontend.submit(id, [5])
        frontend.submit(6, [5], attempts=1)
        frontend.submit(7, [5], output=pack([20]))
        turn(worker, frontend, lambda: frontend.finish(5) is not None)
        worker.resume()
        turn(worker, frontend, lambda: all(frontend.finish(id) for id in range(8)))
        rejections = {id: frontend.outputs(id)[-1].rejection for id in range(8)}
        assert [id for id in range(8) if rejections[id]] == [3, 4, 5], "what was accepted once is accepted again"
        assert all(1 <= frontend.outputs(id)[-1].retry_after_s <= 60 for id in (3, 4, 5))


def test_with_keys_only_those_who_hold_theirs_are_heard(tmp_path: Path) -> None:
    scheduler_file, peer_file = curve.make(tmp_path / "keys")
    keys = curve.read_peer_keys(peer_file)
    engine = Engine(tmp_path, config(), curve.read_scheduler_keys(scheduler_file))
    stranger = Peer(wires(engine.address)[1], ToWorker)
    worker, frontend = FakeWorker(engine.address, keys=keys), FakeFrontend(engine.address, keys=keys)
    engine._peers += [stranger, worker, frontend]
    try:
        stranger.send(worker.hello)
        frontend.greet()
        worker.compute()
        worker.say_hello()
        turn(worker, frontend, lambda: frontend.phases()[-1:] == ["ready"])
        load(frontend)
        finished(engine, [worker], frontend, losses=0)
        assert stranger.hear(0.1) is None
    finally:
        engine.close()
