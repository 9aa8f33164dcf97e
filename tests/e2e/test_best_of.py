"""`best_of` by the whole engine: those answers that transformers finds likeliest, however the work is cut."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams

DRAWN = 6


def logprob_of(model: Any, prompt: list[int], output: list[int]) -> float:
    """What transformers gives all tokens of an output together."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(len(output)), output].sum())


@pytest.mark.parametrize(
    "options",
    [
        {"num_gpu_blocks_override": 12, "max_model_len": 128, "pipeline_depth": 1},
        {"tensor_parallel_size": 2, "max_num_seqs": 4},
    ],
    ids=str,
)
def test_the_likeliest_of_those_that_are_drawn(
    checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], options: dict[str, Any]
) -> None:
    path = checkpoint("qwen3")
    model, rng = oracle(path), random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (21, 5, 40)]
    asked = {
        "temperature": 1.3,
        "top_k": 40,
        "presence_penalty": 0.5,
        "max_tokens": 24,
        "stop_token_ids": list(range(0, 256, 16)),
        "seed": 7,
    }
    with LLM(str(path), dtype="float32", **options) as llm:
        drawn = llm.generate(prompts, SamplingParams(n=DRAWN, **asked), use_tqdm=False)
        best = llm.generate(prompts, SamplingParams(n=2, best_of=DRAWN, **asked), use_tqdm=False)
    lengths = set()
    for prompt, every, found in zip(prompts, drawn, best, strict=True):
        logprobs = {tuple(output.token_ids): logprob_of(model, prompt, output.token_ids) for output in every.outputs}
        wanted = sorted(logprobs.items(), key=lambda item: -item[1])[:2]
        assert [tuple(output.token_ids) for output in found.outputs] == [tokens for tokens, _ in wanted]
        for index, (output, (_, logprob)) in enumerate(zip(found.outputs, wanted, strict=True)):
            assert output.index == index and output.cumulative_logprob == pytest.approx(logprob, abs=1e-3)
        lengths |= {len(output.token_ids) for output in every.outputs}
    assert len(lengths) > 2
