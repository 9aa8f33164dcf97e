"""A request that is taken up again, from its prompt and the tokens it has so far, goes on as if nothing had happened: what
a stream shows after a worker's death is what it would have shown without it."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.common.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire.common.model_info import read_config
from quire.common.sampling import SamplingParams
from quire.worker.parallel import Group
from quire.worker.runner import Runner

from .plans import GREEDY, random_script
from .rank import make_runner, replay

NEW_TOKENS = 24
NUM_BLOCKS = 40
CONFIG = EngineConfig(
    model=ModelConfig(dtype="float32"), cache=CacheConfig(block_size=8), scheduler=SchedulerConfig(max_num_seqs=4)
)
PARAMETERS = (
    GREEDY,
    SamplingParams(temperature=2.0, seed=77),
    SamplingParams(temperature=2.0, seed=78),
    SamplingParams(temperature=1.9, top_p=0.95, top_k=100, min_p=0.001, seed=5),
    SamplingParams(temperature=2.0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.5, seed=-3),
    SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=2.0, seed=0),
    SamplingParams(temperature=2.0, seed=9, min_tokens=16, stop_token_ids=list(range(160))),
    SamplingParams(temperature=2.0, seed=9),
)


def run(
    runner: Runner, prompts: Sequence[list[int]], outputs: Sequence[list[int]], seed: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """What is added behind `outputs`, and the logits it was drawn from: prompt i with PARAMETERS[i], among the others."""
    script = random_script(
        prompts,
        NEW_TOKENS,
        seed=seed,
        num_rows=4,
        block_size=8,
        num_blocks=NUM_BLOCKS,
        sampling=PARAMETERS,
        outputs=outputs,
    )
    runner.rows.clear()
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Any]] = [[] for _ in prompts]
    for samplers, step_tokens, step_logits in zip(script.samplers, *replay(runner, script.plans), strict=True):
        for i, token, row in zip(samplers, step_tokens, step_logits, strict=True):
            assert token is not None
            tokens[i].append(token)
            logits[i].append(row)
    return tokens, [torch.stack(rows) for rows in logits]


@pytest.mark.parametrize("name", ["llama", "llama-odd", "qwen2-mqa", "qwen3", "mistral-window"])
def test_a_request_that_is_taken_up_again_goes_on_as_it_would_have(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    torch.set_num_threads(1)
    path, rng = checkpoint(name), random.Random(name)
    runner = make_runner(path, CONFIG, 128, NUM_BLOCKS, Group())
    prompt = rng.choices(range(read_config(path)["vocab_size"]), k=19)
    prompts = [prompt] * len(PARAMETERS)
    tokens, logits = run(runner, prompts, [[] for _ in prompts], seed=0)
    assert len({tuple(ids) for ids in tokens}) == len(PARAMETERS), "each parameter makes a difference here"
    for seed in range(1, 4):
        had = [rng.randrange(NEW_TOKENS) for _ in prompts]
        more, of = run(runner, prompts, [ids[:k] for ids, k in zip(tokens, had, strict=True)], seed)
        assert more == [ids[k:] for ids, k in zip(tokens, had, strict=True)]
        for ours, theirs, k in zip(of, logits, had, strict=True):
            assert torch.equal(ours, theirs[k:])
