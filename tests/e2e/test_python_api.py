"""LLM and AsyncLLM: as a script uses them, and where an event loop already runs."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.common.errors import ConfigError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo") as llm:
        yield llm


def test_outputs_come_in_order_of_prompts(llm: LLM) -> None:
    prompts = [f"x{i} = " for i in range(20)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [out.prompt for out in outputs] == prompts
    assert [out.outputs[0].text for out in outputs] == [
        llm.generate(p, GREEDY, use_tqdm=False)[0].outputs[0].text for p in prompts
    ]
    assert all(out.finished for out in outputs)


def test_parameters_for_each_prompt(llm: LLM) -> None:
    lengths = [3, 1, 5]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    assert [len(out.outputs[0].token_ids) for out in llm.generate(["a", "b", "c"], params, use_tqdm=False)] == lengths


def test_chat(llm: LLM) -> None:
    answer = llm.chat(
        [{"role": "user", "content": "What is 17 + 25?"}], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False
    )
    assert "42" in answer[0].outputs[0].text


def test_it_works_where_an_event_loop_runs(llm: LLM) -> None:
    async def notebook() -> str:
        return llm.generate("x = ", GREEDY, use_tqdm=False)[0].outputs[0].text

    assert asyncio.run(notebook()) == llm.generate("x = ", GREEDY, use_tqdm=False)[0].outputs[0].text


def test_bad_requests_raise_and_leave_the_engine_alive(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2048"):
        llm.generate([[1] * 3000], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError) as wrong:
        llm.generate("x", SamplingParams(temperature=5.0), use_tqdm=False)
    assert wrong.value.param == "temperature"
    assert llm.generate("x", GREEDY, use_tqdm=False)[0].outputs[0].text


def test_a_wrong_option_names_the_nearest() -> None:
    with pytest.raises((ConfigError, TypeError), match="max_model_len"):
        LLM("demo", max_model_length=5)


def test_a_model_that_cannot_be_served_raises() -> None:
    with pytest.raises(ConfigError, match="/no/such"):
        LLM("/no/such/model")


def test_the_async_stream() -> None:
    async def run() -> tuple[str, int]:
        engine = AsyncLLM("demo")
        text, parts = "", 0
        async for output in engine.generate("def f(", GREEDY):
            text, parts = output.outputs[0].text, parts + 1
        streams = await asyncio.gather(*(collect(engine) for _ in range(5)))
        assert set(streams) == {text}
        await engine.close()
        return text, parts

    async def collect(engine: AsyncLLM) -> str:
        text = ""
        async for output in engine.generate("def f(", GREEDY):
            text = output.outputs[0].text
        return text

    text, parts = asyncio.run(run())
    assert text
    assert parts > 1


def test_a_script_without_a_main_guard_leaves_no_process() -> None:
    code = "from quire import LLM, SamplingParams\nprint(LLM('demo').generate('x = ', SamplingParams(max_tokens=4), use_tqdm=False)[0].outputs[0].text)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
