"""The Python API on real processes, with a tiny random model."""

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.common.errors import ConfigError, EngineError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SMALL = {"num_gpu_blocks_override": 64, "max_model_len": 128, "threads": 1}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, **SMALL) as llm:
        yield llm


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_prompts_of_every_form_are_answered_in_order(llm: LLM) -> None:
    alone = [llm.generate(text, GREEDY, use_tqdm=False)[0] for text in ("one", "two three", "four")]
    ids = [output.prompt_token_ids for output in alone]
    together = llm.generate(["one", {"prompt_token_ids": ids[1]}, ids[2]], GREEDY)
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert all(
        o.finished and len(o.outputs[0].token_ids) == 8 and o.outputs[0].finish_reason == "length" for o in together
    )
    assert [o.prompt for o in together] == ["one", None, None]
    assert llm.generate(ids[0], GREEDY)[0].outputs[0].text == alone[0].outputs[0].text
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    seeded = SamplingParams(seed=3, n=2, max_tokens=4, ignore_eos=True)
    first, second = llm.generate(["a", "b"], [GREEDY, seeded])
    assert (len(first.outputs), len(second.outputs)) == (1, 2)
    assert [len(c.token_ids) for c in second.outputs] == [4, 4]
    with pytest.raises(RequestError, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_more_prompts_than_the_scheduler_would_queue(model: str) -> None:
    with LLM(model, max_num_seqs=2, max_num_queued_reqs=3, **SMALL) as llm:
        outputs = llm.generate([f"prompt {i}" for i in range(24)], GREEDY)
    assert [o.prompt for o in outputs] == [f"prompt {i}" for i in range(24)]


def test_wrong_input_is_told(llm: LLM) -> None:
    with pytest.raises(RequestError, match="temperature"):
        llm.generate("a", SamplingParams(temperature=5.0))
    with pytest.raises(RequestError, match="maximum context length is 128 tokens, and the prompt has 500"):
        llm.generate([[5] * 500], GREEDY)
    with pytest.raises(RequestError, match="prompt_token_ids"):
        llm.generate([{"text": "a"}], GREEDY)
    assert llm.generate("a", GREEDY)[0].finished  # it lives


def test_it_works_inside_a_running_loop(llm: LLM) -> None:
    async def notebook() -> int:
        return len(llm.generate("one", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    assert asyncio.run(notebook()) == 8


def test_an_async_engine_streams_and_aborts(model: str, llm: LLM) -> None:
    whole = llm.generate("one", GREEDY)[0].outputs[0]

    async def use() -> None:
        async with AsyncLLM(model, **SMALL) as engine:
            parts = [output.outputs[0] async for output in engine.generate("one", GREEDY, "my id")]
            assert parts[-1].token_ids == whole.token_ids
            assert parts[-1].text == whole.text
            assert all(later.token_ids[: len(p.token_ids)] == p.token_ids for p, later in itertools.pairwise(parts))
            long = SamplingParams(max_tokens=100, ignore_eos=True)
            async for _ in engine.generate("two", long):
                break
            both = await asyncio.gather(*(_last(engine, "one", GREEDY) for _ in range(4)))
            assert both == [whole.token_ids] * 4

    asyncio.run(use())


async def _last(engine: AsyncLLM, prompt: str, params: SamplingParams) -> list[int]:
    ids: list[int] = []
    async for output in engine.generate(prompt, params):
        ids = output.outputs[0].token_ids
    return ids


def test_what_keeps_it_from_starting_is_raised(model: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean tensor_parallel_size"):
        LLM(model, tensor_parallel=2)
    with pytest.raises(ConfigError, match="512"):
        LLM(model, max_model_len=100_000)
    with pytest.raises(ConfigError, match="max-model-len"):  # the scheduler's own words: one context does not fit
        LLM(model, num_gpu_blocks_override=1, threads=1)
    with pytest.raises(ConfigError, match="no such directory"):
        LLM("/no/such/model")


@pytest.mark.parametrize("part", ["worker", "scheduler"])
def test_a_part_that_dies_is_replaced_and_no_token_is_another(model: str, llm: LLM, part: str) -> None:
    long = SamplingParams(max_tokens=100, ignore_eos=True, seed=5)
    prompts = [f"prompt {i}" for i in range(32)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, long, use_tqdm=False)]
    before = set(children())
    with LLM(model, **SMALL) as other:
        ours = set(children()) - before
        victim = next(p for p in ours if f"quire.launch.{part}" in p.cmdline())
        timer = threading.Timer(0.05, victim.kill)
        timer.start()
        outputs = other.generate(prompts, long, use_tqdm=False)
        timer.join()
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert other.generate("one", GREEDY, use_tqdm=False)[0].finished
        replaced = set(children()) - before
        assert victim not in replaced
    assert not psutil.wait_procs(list(ours | replaced), timeout=5)[1]


def test_an_engine_that_is_gone_for_good_is_named_to_those_who_wait(model: str) -> None:
    before = set(children())
    with LLM(model, max_restarts=0, **SMALL) as llm:
        ours = set(children()) - before
        worker = next(p for p in ours if "quire.launch.worker" in p.cmdline())
        worker.kill()
        with pytest.raises(EngineError, match="worker 0 was killed by signal 9"):
            for _ in range(100):
                llm.generate("one", SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
        with pytest.raises(EngineError, match="worker 0"):
            llm.generate("one", GREEDY, use_tqdm=False)
    assert not psutil.wait_procs(list(ours), timeout=5)[1]


def test_a_closed_engine_leaves_nothing_and_says_so(model: str) -> None:
    before = set(children())
    llm = LLM(model, **SMALL)
    ours = set(children()) - before
    assert len(ours) == 2
    llm.close()
    llm.close()
    assert not psutil.wait_procs(list(ours), timeout=5)[1]
    with pytest.raises(EngineError, match="closed"):
        llm.generate("one", GREEDY)


@pytest.mark.parametrize("ending", ["", "raise SystemExit(7)", "os.kill(os.getpid(), 9)"])
def test_a_script_that_closes_nothing_leaves_nothing(model: str, ending: str) -> None:
    script = f"""
import os, psutil
from quire import LLM
llm = LLM({model!r}, **{SMALL!r})
llm.generate("one", use_tqdm=False)
print(*(p.pid for p in psutil.Process().children()), flush=True)
{ending}
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == {"": 0, "raise SystemExit(7)": 7}.get(ending, -9), result.stderr
    assert "Traceback" not in result.stderr
    pids = [int(word) for word in result.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
