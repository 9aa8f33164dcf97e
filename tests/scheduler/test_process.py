"""The scheduler's process over real sockets, between a worker and a frontend that are not real."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from quire.common.channel import encode
from quire.common.errors import EXIT_CONFIG
from quire.common.messages import (
    PEER_TIMEOUT_S,
    PROTOCOL,
    STRANGER_EPOCH,
    Abort,
    Allocated,
    Heartbeat,
    Hello,
    Message,
    Outputs,
    Progress,
    Refused,
    RequestFault,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
    Submit,
    Welcome,
    WorkerReady,
    pack,
    unpack,
)
from quire.common.sampling import SamplingParams

from ..ports import free_ports
from .peers import INFO, NUM_BLOCKS, Engine, config, running, turn


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with running(tmp_path, config()) as engine:
        yield engine


def test_a_start_is_told_to_frontends_and_observers(tmp_path: Path) -> None:
    with running(tmp_path, config(ranks=2)) as engine:
        frontend, observer = engine.frontend(), engine.frontend("observer")
        workers = [engine.worker(rank) for rank in (0, 1)]
        for peer in (frontend, observer):
            welcome = peer.greet()
            assert welcome.config == config(ranks=2) and welcome.model == INFO
            peer.until(Status)
        for worker in workers:
            worker.start()
        assert workers[0].seen[Welcome][0].rendezvous.startswith("file://")
        assert all(worker.allocate().num_blocks == NUM_BLOCKS for worker in workers)
        for peer in (frontend, observer):
            turn(workers[0], peer, lambda peer=peer: peer.phases()[-1] == "ready")
            capacity = peer.seen[Status][-1].capacity
            assert capacity is not None and capacity.num_tokens == NUM_BLOCKS * 4
            order = ["connecting", "loading", "allocating", "warming up", "ready"]
            assert peer.phases() == [phase for phase in order if phase in peer.phases()]
        frontend.submit(1, [5] * 3)
        turn(workers[0], frontend, lambda: frontend.finish(1) == "length")
        while len(workers[1].seen[StepPlan]) < len(workers[0].seen[StepPlan]):
            workers[1].serve(1.0)
        assert workers[1].seen[StepPlan] == workers[0].seen[StepPlan], "every rank gets the same plans"


def test_requests_are_served_and_counted(engine: Engine) -> None:
    worker, frontend = engine.ready()
    for id in range(20):
        frontend.submit(id, [7] * (1 + id), max_tokens=1 + id % 7)
    turn(worker, frontend, lambda: all(frontend.finish(id) for id in range(20)))
    for id in range(20):
        assert len(frontend.tokens(id)) == 1 + id % 7
        indices = [output.first_index for output in frontend.outputs(id)]
        assert indices == list(range(1 + id % 7))
    assert all(
        len({output.id for output in message.outputs}) == len(message.outputs) for message in frontend.seen[Outputs]
    ), "at most one output of a request in a message"
    metrics = frontend.metrics()
    assert metrics["vllm:request_success_total"] == 20 and metrics["vllm:prompt_tokens_total"] == sum(range(1, 21))
    generated = sum(1 + id % 7 for id in range(20))
    assert metrics["vllm:generation_tokens_total"] == generated
    assert metrics["vllm:time_to_first_token_seconds_count"] == metrics["vllm:e2e_request_latency_seconds_count"] == 20
    assert metrics["vllm:inter_token_latency_seconds_count"] == generated - 20
    assert metrics["quire:kv_blocks_free"] == metrics["quire:kv_blocks"] == NUM_BLOCKS
    assert metrics["quire:step_seconds_count"] == metrics["quire:steps_total"] == len(worker.seen[StepPlan])


@pytest.mark.parametrize("depth", [1, 2])
def test_as_many_plans_are_out_as_configured(tmp_path: Path, depth: int) -> None:
    with running(tmp_path, config(pipeline_depth=depth)) as engine:
        worker, frontend = engine.ready()
        frontend.submit(1, [5, 5], max_tokens=9)
        worker.step = lambda plan: []
        turn(worker, frontend, lambda: len(worker.seen[StepPlan]) == depth)
        for _ in range(5):
            worker.hear(0.05)
        assert len(worker.seen[StepPlan]) == depth
        for plan in worker.seen[StepPlan]:
            worker.send(*worker.answer(plan))
        worker.step = worker.answer
        turn(worker, frontend, lambda: frontend.finish(1) == "length")


def test_an_abort_frees_within_one_step(engine: Engine) -> None:
    worker, frontend = engine.ready()
    for id in (1, 2):
        frontend.submit(id, [id] * 8, max_tokens=50)
    turn(worker, frontend, lambda: len(frontend.tokens(1)) > 2)
    running_rows = unpack(worker.seen[StepPlan][-1].rows)
    frontend.send(Abort([1, 99]))
    turn(worker, frontend, lambda: worker.released != [])
    assert worker.released[0] in running_rows and len(worker.released) == 1
    turn(worker, frontend, lambda: frontend.finish(2) == "length")
    assert frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS and frontend.finish(1) is None


def test_a_request_goes_on_where_its_client_says(engine: Engine) -> None:
    worker, frontend = engine.ready()
    frontend.submit(1, [5, 6], output=pack([20, 21]), max_tokens=4)
    turn(worker, frontend, lambda: frontend.finish(1) == "length")
    assert [output.first_index for output in frontend.outputs(1)] == [2, 3]
    admitted = worker.seen[StepPlan][0].admitted[0]
    assert unpack(admitted.tokens) == [5, 6, 20, 21] and admitted.num_prompt == 2


def test_a_request_that_is_submitted_again_replaces_itself(engine: Engine) -> None:
    worker, frontend = engine.ready()
    frontend.submit(1, [5, 6], max_tokens=50)
    turn(worker, frontend, lambda: len(frontend.tokens(1)) > 3)
    held = len(frontend.tokens(1))
    frontend.seen[Outputs].clear()
    frontend.submit(1, [5, 6], output=pack([20] * held), max_tokens=held + 2)
    turn(worker, frontend, lambda: frontend.finish(1) == "length")
    assert frontend.outputs(1)[-1].first_index == held + 1


@pytest.mark.parametrize(
    ("prompt", "sampling", "rejection"),
    [
        (b"", {}, ""),
        (b"abc", {}, ""),
        (pack([100]), {}, ""),
        (pack([-1]), {}, ""),
        (pack([1]), {"max_tokens": None}, ""),
        (pack([1]), {"logit_bias": {100: 1.0}}, ""),
        (pack([1] * 65), {}, "too_long"),
    ],
)
def test_what_cannot_be_served_is_refused_by_itself(
    engine: Engine, prompt: bytes, sampling: dict[str, object], rejection: str
) -> None:
    worker, frontend = engine.ready()
    frontend.send(Submit(1, prompt, SamplingParams(**{"max_tokens": 4, "seed": 0, **sampling})))  # type: ignore[arg-type]
    frontend.submit(2, [5])
    turn(worker, frontend, lambda: frontend.finish(2) == "length")
    (refused,) = frontend.outputs(1)
    assert refused.finish == "error" and refused.error and refused.rejection == rejection
    assert frontend.metrics()["vllm:admission_rejections_total"] == 1


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    with running(tmp_path, config(max_num_seqs=1, max_num_queued_reqs=2)) as engine:
        worker, frontend = engine.ready()
        worker.step = lambda plan: []
        for id in range(5):
            frontend.submit(id, [5])
        turn(worker, frontend, lambda: frontend.finish(4) is not None)
        worker.resume()
        turn(worker, frontend, lambda: all(frontend.finish(id) for id in range(5)))
        assert [frontend.outputs(id)[-1].rejection for id in range(5)] == ["", "", "", "overloaded", "overloaded"]


def test_before_the_engine_is_ready_requests_are_refused(engine: Engine) -> None:
    frontend = engine.frontend()
    frontend.greet()
    frontend.submit(1, [5])
    assert frontend.until(Outputs).outputs[0].rejection == "overloaded"


def test_frames_that_mean_nothing_are_dropped_and_counted(engine: Engine) -> None:
    worker, frontend = engine.ready()
    rng = random.Random(0)
    for peer in (worker, frontend):
        for _ in range(100):
            peer.send_bytes(rng.randbytes(rng.randint(1, 40)))
        peer.send_bytes(msgspec.msgpack.encode(["Submit", 1, "not bytes"]))
        peer.send_bytes(b"\x91" * 5000)
    frontend.submit(1, [5])
    turn(worker, frontend, lambda: frontend.finish(1) == "length")
    assert frontend.metrics()["quire:bad_frames_total"] > 190, "a few are of a conversation that has ended"


def test_frames_that_were_dropped_at_the_other_end_are_counted(engine: Engine) -> None:
    worker, frontend = engine.ready()
    for count in (3, 5, 5, 2):  # counts from 0 again: another process
        worker.send(Heartbeat(worker.epoch, count))
        frontend.send(Heartbeat(1, count))
    frontend.submit(1, [5])
    turn(worker, frontend, lambda: frontend.finish(1) == "length")
    metrics = frontend.metrics()
    for wire in ("frontends", "workers"):
        assert metrics[f'quire:bad_frames_total{{model_name="test",side="peer",wire="{wire}"}}'] == 7


def test_messages_out_of_place_are_dropped(engine: Engine) -> None:
    worker, frontend = engine.ready()
    for message in (
        StepResult(worker.epoch, 1, pack([1]), pack([1])),
        StepResult(worker.epoch + 1, 1, b"", b""),
        RequestFault(worker.epoch, 7, 0, "no such step"),
        RequestFault(worker.epoch - 1, 1, 0, "another epoch"),
        Allocated(5),
        WorkerReady(5, "", "", "", 0, 0),
        Progress("no such phase", 7.0),
        Heartbeat(12345),
    ):
        worker.send(message)
    for message in (Abort([1, 2, 3]), Heartbeat(0)):
        frontend.send(message)
    frontend.send_bytes(encode(StepResult(worker.epoch, 1, b"", b"")))
    frontend.submit(1, [5])
    turn(worker, frontend, lambda: frontend.finish(1) == "length")
    worker.send(StepResult(worker.epoch, 1, pack([1]), pack([1])))  # answered long ago
    frontend.submit(2, [5])
    turn(worker, frontend, lambda: frontend.finish(2) == "length")


def test_a_result_that_does_not_fit_fails_its_requests_and_no_other(engine: Engine) -> None:
    worker, frontend = engine.ready()
    worker.step = lambda plan: [StepResult(plan.epoch, plan.step, b"abc", b"")]
    frontend.submit(1, [5], max_tokens=1)
    turn(worker, frontend, lambda: frontend.finish(1) == "error")
    worker.step = worker.answer
    frontend.submit(2, [5])
    turn(worker, frontend, lambda: frontend.finish(2) == "length")
    assert frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS


def test_a_faulty_row_fails_one_request(engine: Engine) -> None:
    worker, frontend = engine.ready()

    def step(plan: StepPlan) -> list[Message]:
        if len(unpack(plan.rows)) < 2 or frontend.finish(1):
            return worker.answer(plan)
        return [RequestFault(plan.epoch, plan.step, 0, "NaN logits"), *worker.answer(plan)]

    frontend.submit(1, [5], max_tokens=30)
    turn(worker, frontend, lambda: len(frontend.tokens(1)) > 0)
    worker.step = step
    frontend.submit(2, [6], max_tokens=30)
    turn(worker, frontend, lambda: frontend.finish(1) is not None and frontend.finish(2) is not None)
    assert frontend.finish(1) == "error" and frontend.outputs(1)[-1].error == "NaN logits"
    assert frontend.finish(2) == "length" and len(frontend.tokens(2)) == 30


def test_other_protocols_roles_and_ranks_are_refused(engine: Engine) -> None:
    engine.ready()
    for peer, hello, word in (
        (engine.frontend(), Hello(PROTOCOL + 1, "frontend", "new"), "protocol"),
        (engine.frontend(), Hello(PROTOCOL, "worker", "lost"), "frontends' wire"),
        (engine.worker(), Hello(PROTOCOL + 1, "worker", "new"), "protocol"),
        (engine.worker(), Hello(PROTOCOL, "frontend", "lost"), "workers' wire"),
        (engine.worker(), Hello(PROTOCOL, "worker", "far", 1), "rank 1"),
        (engine.worker(), Hello(PROTOCOL, "worker", "other", 0, "other"), "another model"),
    ):
        peer.send(hello)
        assert word in peer.until(Refused).why
        peer.send(Heartbeat(1))
        assert peer.until(Heartbeat, 2) == Heartbeat(STRANGER_EPOCH), "the first one came with the connection"


def test_a_rank_that_is_held_by_one_who_lives_is_refused(engine: Engine) -> None:
    worker, frontend = engine.ready()
    twin = engine.worker()
    deadline = time.monotonic() + 10
    while not twin.seen[Refused]:
        assert time.monotonic() < deadline
        twin.say_hello()
        worker.beat_at = 0.0
        worker.serve()  # a sign of life
        twin.hear(0.05)
    assert "rank 0 is taken" in twin.seen[Refused][0].why
    frontend.submit(1, [5])
    turn(worker, frontend, lambda: frontend.finish(1) == "length")
    assert frontend.metrics()["quire:group_losses_total"] == 0


def test_a_stranger_is_asked_to_say_hello(engine: Engine) -> None:
    frontend = engine.frontend()
    frontend.submit(1, [5])
    assert frontend.until(Heartbeat).epoch == STRANGER_EPOCH
    worker = engine.worker()
    worker.send(Allocated(0))
    assert worker.until(Heartbeat).epoch == STRANGER_EPOCH


def test_a_frontend_that_vanishes_frees_what_it_had(engine: Engine) -> None:
    worker, frontend = engine.ready()
    gone = engine.frontend()
    gone.greet()
    gone.submit(1, [5] * 8, max_tokens=50)
    worker.step = lambda plan: []
    turn(worker, frontend, lambda: len(worker.seen[StepPlan]) == 2)
    assert frontend.metrics()["quire:kv_blocks_free"] < NUM_BLOCKS
    gone.link.socket.close(linger=0)
    turn(worker, frontend, lambda: frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS, 5.0)


def test_a_frontend_that_is_silent_is_dropped_and_may_come_back(engine: Engine) -> None:
    worker, frontend = engine.ready()
    silent = engine.frontend()
    silent.greet()
    silent.submit(1, [5] * 8, max_tokens=50)
    worker.step = lambda plan: []
    turn(worker, frontend, lambda: len(worker.seen[StepPlan]) == 2)
    start = time.monotonic()
    turn(worker, frontend, lambda: frontend.metrics()["quire:kv_blocks_free"] == NUM_BLOCKS, PEER_TIMEOUT_S + 3)
    assert time.monotonic() - start > PEER_TIMEOUT_S - 1
    silent.hear()
    silent.send(Heartbeat(worker.epoch))
    while silent.until(Heartbeat).epoch != STRANGER_EPOCH:
        silent.seen[Heartbeat].clear()
    silent.send(Hello(PROTOCOL, "frontend", "back"))
    silent.until(Welcome, 2)


def test_too_little_memory_ends_the_engine_with_advice(tmp_path: Path) -> None:
    small = msgspec.structs.replace(config(), cache=msgspec.structs.replace(config().cache, num_gpu_blocks_override=5))
    with running(tmp_path, small) as engine:
        frontend, worker = engine.frontend(), engine.worker()
        frontend.greet()
        worker.start()
        turn(worker, frontend, lambda: frontend.phases()[-1:] == ["failed"])
        assert "--max-model-len to 20" in frontend.seen[Status][-1].detail and engine.join() == EXIT_CONFIG


def test_a_worker_with_other_weights_ends_the_engine(engine: Engine) -> None:
    frontend, worker = engine.frontend(), engine.worker()
    frontend.greet()
    worker.start(fingerprint="other")
    turn(worker, frontend, lambda: frontend.phases()[-1:] == ["failed"])
    assert engine.join() == EXIT_CONFIG


def test_an_address_that_is_taken_is_a_configuration_error(tmp_path: Path) -> None:
    port = free_ports(2)
    script = _script(f"tcp://127.0.0.1:{port}", tmp_path)
    first = subprocess.Popen(script)
    try:
        while not _listens(port):
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(script, capture_output=True, text=True, timeout=20)
        assert second.returncode == EXIT_CONFIG and "cannot listen on" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.terminate()
        assert first.wait(10) == 0


def test_sigterm_says_goodbye_and_memory_stays_small(tmp_path: Path) -> None:
    process = subprocess.Popen(_script(f"ipc://{tmp_path}", tmp_path))
    engine = Engine.__new__(Engine)
    engine.address, engine._peers = f"ipc://{tmp_path}", []
    try:
        worker, frontend = engine.ready()
        for id in range(50):
            frontend.submit(id, [7] * 20, max_tokens=20)
        turn(worker, frontend, lambda: all(frontend.finish(id) for id in range(50)))
        assert psutil.Process(process.pid).memory_info().rss < 150 << 20
        frontend.submit(50, [7] * 20, max_tokens=40)
        turn(worker, frontend, lambda: len(frontend.tokens(50)) > 2)
        start = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0 and time.monotonic() - start < 2.0
        frontend.until(Shutdown)
        worker.until(Shutdown)
    finally:
        process.kill()
        for peer in engine._peers:
            peer.close()


def test_the_process_knows_nothing_of_torch() -> None:
    code = "import quire.scheduler.process, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _script(address: str, run_dir: Path) -> list[str]:
    code = f"""
import logging, sys
from pathlib import Path
from quire.scheduler.process import main
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.scheduler.peers import INFO, config
logging.basicConfig(level="INFO")
sys.exit(main(config(), INFO, address={address!r}, run_dir=Path({str(run_dir)!r}), supervised=False))
"""
    return [sys.executable, "-c", code]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
