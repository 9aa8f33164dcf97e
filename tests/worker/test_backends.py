"""Which backend serves a model, and that a model computes through nothing else."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.common.config import ModelConfig
from quire.common.errors import ConfigError
from quire.common.model_info import read_config
from quire.worker import loading
from quire.worker.backends import TORCH, Backend, Capabilities, choose
from quire.worker.decoder import Decoder
from quire.worker.loading import load_decoder
from quire.worker.models import build
from quire.worker.models.spec import Decoder as Spec
from quire.worker.parallel import Group
from quire.worker.runner import Runner
from quire.worker.weights import Loader, RandomWeights

from .plans import random_script

CPU = torch.device("cpu")
NARROW = replace(
    TORCH,
    name="narrow",
    supports=Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        head_dims=frozenset({64, 128}),
        block_sizes=frozenset({16, 32}),
        windows=False,
    ),
)


@pytest.fixture
def spec(checkpoint: Callable[[str], Path]) -> Spec:
    return build(read_config(checkpoint("mistral-window")))


def with_head_dims(spec: Spec, *dims: int) -> Spec:
    layers = (replace(layer, attn=replace(layer.attn, head_dim=d)) for layer, d in zip(spec.layers, dims, strict=False))
    return replace(spec, layers=tuple(layers))


def without_windows(spec: Spec) -> Spec:
    return replace(spec, layers=tuple(replace(x, attn=replace(x.attn, window=None)) for x in spec.layers))


def test_the_first_backend_that_includes_what_is_asked_for_is_chosen(spec: Spec) -> None:
    backends = (NARROW, TORCH)
    wide = without_windows(with_head_dims(spec, 64, 128))
    cuda = torch.device("cuda", 3)
    assert choose(wide, cuda, torch.bfloat16, 16, backends) is NARROW
    for asked in (
        (wide, CPU, torch.bfloat16, 16),
        (wide, cuda, torch.float32, 16),
        (wide, cuda, torch.bfloat16, 8),
        (with_head_dims(spec, 64, 128), cuda, torch.bfloat16, 16),
        (without_windows(with_head_dims(spec, 64, 80)), cuda, torch.bfloat16, 16),
    ):
        assert choose(*asked, backends) is TORCH


def test_what_is_missing_is_told_for_each_backend(spec: Spec) -> None:
    only_half = replace(TORCH, name="half", supports=replace(TORCH.supports, dtypes=frozenset({torch.float16})))
    with pytest.raises(ConfigError) as error:
        choose(with_head_dims(spec, 96, 64), CPU, torch.float32, 8, (NARROW, only_half))
    assert "narrow lacks device cpu, dtype float32, head dim 96, --block-size 8, sliding windows;" in str(error.value)
    assert str(error.value).endswith("half lacks dtype float32")


def test_everything_is_computed_by_the_backend(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wraps plans in a form of its own and pads to another multiple gives the same ids."""
    path = checkpoint("qwen3")
    called: set[str] = set()

    def told(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            if name == "paged_attention":
                args = (*args[:3], args[3]["mine"], *args[4:])
            result = function(*args, **kwargs)
            return {"mine": result} if name == "plan_attention" else result

        return call

    functions = [f.name for f in fields(Backend) if callable(getattr(TORCH, f.name))]
    other = replace(TORCH, row_multiple=8, **{name: told(name, getattr(TORCH, name)) for name in functions})
    script = random_script([[5, 9, 200], [7] * 30], 8, seed=1, num_rows=4, block_size=8, num_blocks=20)
    results = []
    for backend in (TORCH, other):
        monkeypatch.setattr(loading, "choose", lambda *_, chosen=backend: chosen)
        decoder = load_decoder(path, ModelConfig(), Group(), CPU, block_size=8, max_model_len=64)
        runner = Runner(decoder, num_rows=4, max_len=64, num_blocks=20, block_size=8)
        results.append([runner.launch(plan).read().tokens for plan in script.plans])
    assert results[0] == results[1]
    assert called == set(functions)


def test_layers_that_differ_in_their_kv_cannot_share_a_cache(spec: Spec) -> None:
    loader = Loader(RandomWeights(0, CPU), spec.names, Group(), torch.float32, CPU)
    assert Decoder(spec, loader, TORCH, 32).kv_shape == (3, 2, spec.layers[0].attn.head_dim)
    mixed = with_head_dims(spec, 16, 32, 16)
    with pytest.raises(AssertionError, match="differ"):
        assert Decoder(mixed, loader, TORCH, 32).kv_shape
