"""Greedy output of the whole engine is transformers' output, token for token, however the work is cut.

Every checkpoint goes through one engine that makes life hard: a step of 24 tokens cuts every prompt of more into
chunks, and 33 blocks hold less than half of what the prompts grow to, so sequences are preempted and computed again.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.common.model_info import DEMO

from ..checkpoints import CHECKPOINTS, oracle_greedy

TOKENS = 64
LENGTHS = (1, 2, 7, 16, 17, 33, 48, 100)
HARD = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 33, "max_model_len": 256}
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


def prompts(vocabulary: int) -> list[list[int]]:
    """Mixed lengths; the last two share a prefix of several blocks with the one before them."""
    rng = random.Random(7)
    lists = [[rng.randrange(vocabulary) for _ in range(length)] for length in LENGTHS]
    return [*lists, [*lists[-1][:80], 5, 6, 7], lists[-1][:64]]


def generate(llm: LLM, batch: list[list[int]]) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(batch, GREEDY, use_tqdm=False)]


def check(path: Path, model: Any, **options: object) -> None:
    batch = prompts(model.config.vocab_size)
    wanted = [oracle_greedy(model, prompt, TOKENS) for prompt in batch]
    with LLM(str(path), dtype="float32", **options) as llm:
        assert generate(llm, batch) == wanted  # batched, chunked, preempted
        assert [generate(llm, [prompt])[0] for prompt in batch[-3:]] == wanted[-3:]  # alone, behind cached prefixes


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_worker(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], name: str) -> None:
    check(checkpoint(name), oracle(checkpoint(name)), **HARD)


# Every architecture is split in tests/worker/test_architectures.py; these split unevenly, copy KV heads, have a window, norms.
@pytest.mark.parametrize("name", ["llama-odd", "qwen2-mqa", "mistral-window", "qwen3"])
def test_two_workers(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], name: str) -> None:
    check(checkpoint(name), oracle(checkpoint(name)), tensor_parallel_size=2, **HARD)


@pytest.mark.parametrize(
    "options", [{}, {"enable_prefix_caching": False}, {"pipeline_depth": 1}, {"block_size": 5}], ids=str
)
def test_options_that_change_the_way_and_not_the_answer(
    checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], options: dict[str, object]
) -> None:
    check(checkpoint("qwen3"), oracle(checkpoint("qwen3")), **options)


def test_the_built_in_model(oracle: Callable[[Path], Any]) -> None:
    check(DEMO, oracle(DEMO), **HARD)


def test_hardship_is_real(checkpoint: Callable[[str], Path]) -> None:
    """The engine above does preempt and does hit the prefix cache; otherwise it would prove nothing."""
    with LLM(str(checkpoint("llama")), dtype="float32", **HARD) as llm:
        outputs = llm.generate(prompts(320), GREEDY, use_tqdm=False)
        again = llm.generate(prompts(320)[-1:], GREEDY, use_tqdm=False)
        metrics = llm.get_metrics()
    assert metrics["vllm:num_preemptions_total"] > 0
    assert again[0].num_cached_tokens >= 48
    assert all(len(out.outputs[0].token_ids) == TOKENS for out in outputs)
