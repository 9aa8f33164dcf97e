"""Every architecture against transformers in float32, through the real path: rows, plans, chunks, paged KV, shared
blocks; alone, and as two and four ranks in processes of their own."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from quire.common.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire.common.model_info import read_config
from quire.worker.layers.linear import RowLinear
from quire.worker.loading import load_decoder
from quire.worker.models import build
from quire.worker.parallel import Group

from ..checkpoints import CHECKPOINTS
from .plans import Script, random_script
from .rank import make_runner, replay

NEW_TOKENS = 24
MAX_LEN = 128
BLOCK_SIZE = 16  # of which the kernels for CPUs are; heads that are no multiple of 32 are left to the references
NUM_BLOCKS = 24
CONFIG = EngineConfig(
    model=ModelConfig(dtype="float32"),
    cache=CacheConfig(block_size=BLOCK_SIZE),
    scheduler=SchedulerConfig(max_num_seqs=4),
)


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> None:
    torch.set_num_threads(1)


def prompts(path: Path) -> list[list[int]]:
    """Of mixed lengths, three with a common beginning."""
    rng, vocab_size = random.Random(3), read_config(path)["vocab_size"]
    lists = [[rng.randrange(vocab_size) for _ in range(n)] for n in (1, 2, 9, 30, 33, 70)]
    return [*lists, [*lists[3][:25], 5, 6, 7], lists[3][:17]]


def script_for(path: Path, seed: int) -> Script:
    return random_script(
        prompts(path), NEW_TOKENS, seed=seed, num_rows=4, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, budget=40
    )


def by_sequence(script: Script, steps: list[Any]) -> list[list[Any]]:
    collected: dict[int, list[Any]] = {}
    for samplers, results in zip(script.samplers, steps, strict=True):
        for i, result in zip(samplers, results, strict=True):
            collected.setdefault(i, []).append(result)
    return [collected[i] for i in range(len(collected))]


def check(path: Path, model: Any, script: Script, tokens: list[Any], logits: list[Any]) -> None:
    """Ids follow from our logits, and our logits are transformers' for the same ids."""
    for prompt, ids, rows in zip(prompts(path), by_sequence(script, tokens), by_sequence(script, logits), strict=True):
        ours = torch.stack(rows)
        assert ours.argmax(-1).tolist() == ids
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=2e-5 * scale, rtol=0)
        assert theirs.argmax(-1).tolist() == ids


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(
    checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], name: str
) -> None:
    path = checkpoint(name)
    runner = make_runner(path, CONFIG, MAX_LEN, NUM_BLOCKS, Group())
    for seed in range(2):
        script = script_for(path, seed)
        check(path, oracle(path), script, *replay(runner, script.plans))
        runner.rows.clear()


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks(
    checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any], size: int, tmp_path: Path
) -> None:
    """Head counts, KV head counts, MLP widths and vocabularies that do not divide are among them."""
    names = list(CHECKPOINTS) if size == 2 else ["llama-odd"]  # 9 query heads on 3 KV heads: copies of KV heads
    jobs = {
        name: {
            "path": str(checkpoint(name)),
            "config": msgspec.to_builtins(CONFIG),
            "max_model_len": MAX_LEN,
            "num_blocks": NUM_BLOCKS,
        }
        for name in names
    }
    scripts = {name: script_for(checkpoint(name), 5) for name in names}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    for name, script in scripts.items():
        (tmp_path / f"{name}.plans").write_bytes(msgspec.msgpack.encode(script.plans))
    script_file = Path(__file__).with_name("rank.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script_file), str(rank), str(size), str(tmp_path)])
        for rank in range(size)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
    for name, script in scripts.items():
        stored = load_file(tmp_path / f"{name}.logits")
        logits = [stored[str(i)] for i in range(len(script.plans))]
        path = checkpoint(name)
        check(path, oracle(path), script, json.loads((tmp_path / f"{name}.tokens").read_text()), logits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ("llama", "llama-odd", "qwen3", "mistral-window")] + [("qwen3", "bfloat16")],
)
def test_a_requests_logits_are_the_same_bits_in_any_company(
    checkpoint: Callable[[str], Path], name: str, dtype: str
) -> None:
    """Alone or among others, however its prompt is cut, with a shared prefix or without."""
    path = checkpoint(name)
    runner = make_runner(
        path, msgspec.structs.replace(CONFIG, model=ModelConfig(dtype=dtype)), MAX_LEN, NUM_BLOCKS, Group()
    )
    together = script_for(path, 1)
    expected = by_sequence(together, replay(runner, together.plans)[1])
    for i, prompt in enumerate(prompts(path)):
        runner.rows.clear()
        alone = random_script(
            [prompt], NEW_TOKENS, seed=i, num_rows=4, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, budget=200
        )
        got = by_sequence(alone, replay(runner, alone.plans)[1])[0]
        assert torch.equal(torch.stack(got), torch.stack(expected[i]))


def test_random_weights_are_the_same_for_every_split(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama-odd")
    config = ModelConfig(load_format="dummy", seed=3)
    device = torch.device("cpu")
    whole, *parts = (
        load_decoder(path, config, group, device, block_size=BLOCK_SIZE, max_model_len=MAX_LEN)
        for group in (Group(), Group(0, 2), Group(1, 2))
    )
    assert torch.equal(whole.embed.weight, torch.cat([part.embed.weight for part in parts]))
    for block, *pieces in zip(whole.blocks, *(part.blocks for part in parts), strict=True):
        assert torch.equal(
            matrix(block.attn.out, 72),
            torch.cat([matrix(p.attn.out, w) for p, w in zip(pieces, (24, 48), strict=True)]),
        )
        assert torch.equal(
            matrix(block.mlp.down, 81),
            torch.cat([matrix(p.mlp.down, w) for p, w in zip(pieces, (40, 41), strict=True)]),
        )


def matrix(linear: RowLinear, width: int) -> torch.Tensor:
    """Its transpose: a product with 1 and 0 is exact."""
    return linear.apply(torch.eye(width))


def test_llama3_scaling_of_transformers_4_configs(checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint("llama3.1"))
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config["rope_parameters"])
    older |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    older.pop("dtype", None)
    assert build(older) == build(config)
