"""The worker process from Hello to its end, against a scheduler made of a `Hub`, over real sockets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.common.errors import EXIT_CONFIG
from quire.common.messages import (
    Heartbeat,
    Hello,
    Refused,
    RequestFault,
    Shutdown,
    StepResult,
    Welcome,
    WorkerFault,
    unpack,
)
from quire.common.process import END

from ..checkpoints import oracle_greedy
from .plans import admit, make_plan
from .scheduler import BLOCK_SIZE, PROMPT, Scheduler


def test_from_hello_to_shutdown(scheduler: Callable[..., Scheduler], expected: list[int]) -> None:
    there = scheduler()
    worker = there.start_worker()
    (ready,) = there.meet()
    assert ready.fingerprint == there.info.fingerprint
    assert ready.dtype == "float32"
    assert ready.block_bytes == 3 * 2 * 2 * BLOCK_SIZE * 32 * 4
    assert ready.available_bytes == 1 << 20
    assert there.continue_prompt(12) == expected
    there.plan(0, [], epoch=there.epoch + 1)  # of another scheduler: not answered
    there.tell(Shutdown())
    assert worker.wait(10) == 0
    for received in there.hub.received(1000):
        assert isinstance(received[1], Heartbeat)


@pytest.mark.parametrize("ending", ["shutdown", "sigterm"])
def test_two_ranks(scheduler: Callable[..., Scheduler], expected: list[int], ending: str) -> None:
    there = scheduler(size=2)
    workers = [there.start_worker(rank) for rank in (1, 0)]
    there.meet()
    assert there.continue_prompt(12) == expected
    if ending == "shutdown":
        there.tell(Shutdown())
    else:
        for worker in workers:
            worker.send_signal(END)
    assert [worker.wait(10) for worker in workers] == [0, 0]


@pytest.mark.parametrize("size", [1, 2])
def test_a_new_scheduler_finds_the_weights_loaded(
    scheduler: Callable[..., Scheduler], expected: list[int], size: int
) -> None:
    """Of two ranks, one waits in the middle of a step whose plan the other never got: the scheduler died between."""
    there = scheduler(size=size)
    workers = [there.start_worker(rank) for rank in range(size)]
    there.meet()
    there.plan(0, [(2, 0, len(PROMPT), True)], admitted=[admit(2, PROMPT, [3])])
    there.expect(StepResult)
    there.hub.send(there.peers[0], make_plan(1, [(2, len(PROMPT), 1, True)], epoch=there.epoch))
    there.listen(epoch=8)
    there.meet()
    assert {hello.fingerprint for hello in there.hellos.values()} == {there.info.fingerprint}
    assert there.continue_prompt(12) == expected  # row 2 was forgotten
    there.tell(Welcome(8, there.config, there.info, there.rendezvous))  # said again: nothing happens
    there.expect(Heartbeat)
    for worker in workers:
        worker.send_signal(END)
    assert [worker.wait(10) for worker in workers] == [0] * size


def test_a_rank_that_waits_for_another_hears_what_it_is_told(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler(size=2)
    worker = there.start_worker(0)
    there.welcome()
    there.listen(epoch=8)
    there.welcome()
    there.expect(Heartbeat)
    there.tell(Shutdown())
    assert worker.wait(10) == 0


def test_sigterm_ends_a_worker_that_nobody_welcomes(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    worker = there.start_worker()
    there.expect(Hello)
    there.expect(Hello)  # said again until it is answered
    worker.send_signal(END)
    assert worker.wait(10) == 0


def test_refused(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    worker = there.start_worker()
    identity, _ = there.expect(Hello)
    there.hub.send(identity, Refused("another protocol"))
    assert worker.wait(10) == EXIT_CONFIG


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json"])
def test_a_model_that_cannot_be_served(
    scheduler: Callable[..., Scheduler], checkpoint: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint("qwen3").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    if damage == "config.json":
        config = msgspec.json.decode((broken / damage).read_bytes())
        (broken / damage).write_bytes(msgspec.json.encode({**config, "hidden_act": "tanh"}))
    else:
        (broken / damage).write_bytes((broken / damage).read_bytes()[:-8])
    there = Scheduler(tmp_path, broken)
    try:
        worker = there.start_worker()
        there.welcome()
        fault = there.expect(WorkerFault)[1]
        assert ("tanh" if damage == "config.json" else damage) in fault.why
        assert worker.wait(10) == EXIT_CONFIG
    finally:
        there.close()


def test_a_row_of_nan_is_told_and_its_neighbours_go_on(
    tmp_path: Path, checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]
) -> None:
    """Token 11's embedding is NaN: whoever reads it is lost."""
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path / "poisoned"
    path.mkdir()
    source = checkpoint("qwen3")
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][11] = float("nan")
    save_file(tensors, path / "model.safetensors")
    there = Scheduler(tmp_path, path)
    try:
        there.start_worker()
        there.meet()
        lost = admit(0, [1, 11, 2], [7])
        there.plan(0, [(0, 0, 3, True), (2, 0, 5, True)], admitted=[lost, admit(2, PROMPT, [3, 1])])
        fault = there.expect(RequestFault)[1]
        assert (fault.step, fault.row) == (0, 0)
        result = there.expect(StepResult)[1]
        assert unpack(result.counts) == [0, 1]
        ids = unpack(result.tokens)
        there.plan(1, [(2, 5, 1, True)], released=[0])
        ids += unpack(there.expect(StepResult)[1].tokens)
        there.plan(2, [(1, 0, 5, True)], admitted=[admit(1, PROMPT, [7])])  # in the block that held NaN
        assert unpack(there.expect(StepResult)[1].tokens) == ids[:1]
        assert ids == oracle_greedy(oracle(source), PROMPT, 2)
        assert torch.isnan(tensors["model.embed_tokens.weight"]).any()
    finally:
        there.close()
