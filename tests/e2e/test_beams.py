"""Beam search by the whole engine finds what transformers' finds, however the work is cut."""

import asyncio
import os
import random
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from quire import LLM, SamplingParams

from ..checkpoints import oracle_greedy
from .server import Server

TOKENS = 24
PAD = 319
FEW = {"num_gpu_blocks_override": 12, "max_model_len": 128, "max_num_seqs": 12}
WIDTHS = (1, 2, 3, 4, 5)
PENALTIES = (-1.0, 0.0, 1.0, 2.0)
ENDINGS = (False, True, "never")


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(256) for _ in range(length)] for length in (21, 5, 40, 32, 17)[:count]]


def oracle_beams(model: Any, prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
    """What transformers finds, with the scores that it gives."""
    import torch

    ids, stops = torch.tensor([prompt]), params.stop_token_ids
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=params.beam_width,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_new_tokens=params.max_tokens,
        pad_token_id=PAD,
        eos_token_id=stops or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    outputs = [row[len(prompt) :].tolist() for row in found.sequences]
    ends = [next((i + 1 for i, id in enumerate(output) if id in stops), len(output)) for output in outputs]
    scores = found.sequences_scores.tolist() if params.beam_width > 1 else [float("nan")]
    return [(output[:end], score) for output, end, score in zip(outputs, ends, scores, strict=True)]


def searches(model: Any, prompt: list[int]) -> list[SamplingParams]:
    """Every kind of search; tokens that the model likes end the outputs of some."""
    likely = oracle_greedy(model, prompt, TOKENS)
    stops: list[list[int]] = [[], [likely[5]], [likely[3], likely[8], 11]]
    return [
        SamplingParams(
            beam_width=width,
            n=max(1, width - 1),
            length_penalty=penalty,
            early_stopping=ending,  # type: ignore[arg-type]
            max_tokens=TOKENS,
            ignore_eos=True,
            stop_token_ids=stops[(width + i) % 3],
        )
        for i, (width, penalty, ending) in enumerate(product(WIDTHS, PENALTIES, ENDINGS))
    ]


def check(path: Path, model: Any, *, every: int, **options: object) -> dict[str, float]:
    """All searches at once, and greedy requests between them. Returns the engine's metrics."""
    jobs = [(prompt, params) for prompt in prompts(2) for params in searches(model, prompt)[::every]]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    others = prompts(5)
    with LLM(str(path), dtype="float32", **options) as llm:
        given = [prompt for prompt, _ in jobs] + others
        answers = llm.generate(given, [params for _, params in jobs] + [greedy] * len(others), use_tqdm=False)
        metrics = llm.get_metrics()
    for (prompt, params), answer in zip(jobs, answers, strict=False):
        found = [output.token_ids for output in answer.outputs]
        wanted = oracle_beams(model, prompt, params)
        assert found == [output for output, _ in wanted], params
        for output, (tokens, score) in zip(answer.outputs, wanted, strict=True):
            assert output.finish_reason == ("stop" if tokens[-1] in params.stop_token_ids else "length")
            assert params.beam_width == 1 or output.cumulative_logprob == pytest.approx(
                score * len(tokens) ** params.length_penalty, rel=1e-4
            )
    for prompt, answer in zip(others, answers[len(jobs) :], strict=True):
        assert answer.outputs[0].token_ids == oracle_greedy(model, prompt, TOKENS)
    return metrics


def test_every_search(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]) -> None:
    check(checkpoint("qwen3"), oracle(checkpoint("qwen3")), every=1)


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_depth": 1, "swap_space": 0.01},
        {"enable_prefix_caching": False, "block_size": 5, "num_gpu_blocks_override": 30},
    ],
    ids=str,
)
def test_few_blocks(
    checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], options: dict[str, object]
) -> None:
    metrics = check(checkpoint("llama"), oracle(checkpoint("llama")), every=6, **FEW | options)
    assert metrics["vllm:num_preemptions_total"] > 0


def test_a_sliding_window(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]) -> None:
    check(checkpoint("mistral-window"), oracle(checkpoint("mistral-window")), every=7, **FEW)


def test_two_workers(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]) -> None:
    check(checkpoint("qwen3"), oracle(checkpoint("qwen3")), every=7, tensor_parallel_size=2, **FEW)


def test_deaths_in_the_middle_are_not_seen(demo: Server) -> None:
    """A search begins again from its prompt; it finds the same."""
    body = {"prompt": "What is 17 + 25?", "use_beam_search": True, "n": 3, "best_of": 4, "max_tokens": 200}
    wanted = demo.http.post("/v1/completions", json=body).json()
    assert wanted["usage"]["completion_tokens"] <= 3 * 200 and len(wanted["choices"]) == 3

    async def disturbed(server: Server) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            answer = asyncio.create_task(client.post("/v1/completions", json=body))
            for role in ("scheduler", "worker"):
                steps = server.metric("quire:steps_total")
                while server.metric("quire:steps_total") < steps + 20:
                    await asyncio.sleep(0)
                children = psutil.Process(server.process.pid).children()
                victim = next(child for child in children if f"quire.launch.{role}" in child.cmdline())
                os.kill(victim.pid, signal.SIGKILL)
            found: dict[str, Any] = (await answer).json()
            return found

    with Server() as server:
        server.wait_ready()
        assert asyncio.run(disturbed(server))["choices"] == wanted["choices"]
