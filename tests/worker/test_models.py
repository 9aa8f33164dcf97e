"""config.json to spec: hostile values are refused by name, and windows are transformers' own."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

from quire.common.errors import ConfigError
from quire.common.model_info import read_model_info
from quire.worker.models import build
from quire.worker.models.spec import Decoder

from ..checkpoints import CHECKPOINTS, LLAMA3_ROPE, SHAPE

HOSTILE = [None, 0, -1, 1.5, "x", [], {}, [[1]], {"a": 1}, True, 10**30, float("inf"), float("nan")]


def windows(spec: Decoder) -> list[int | None]:
    return [layer.attn.window for layer in spec.layers]


@pytest.mark.parametrize("name", ["llama3.1", "qwen2-window", "mistral-window"])
def test_a_malformed_value_is_refused_by_its_name(checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Every key of the file, every kind of wrong value: a ConfigError that names the key, or a spec."""
    good = json.loads((checkpoint(name) / "config.json").read_text())
    for key in [*good, "text_config", "rope_scaling", "torch_dtype", "n_positions", "quantization_config"]:
        for value in HOSTILE:
            config = good | {key: value}
            (tmp_path / "config.json").write_text(json.dumps(config))
            for read in (partial(build, config), partial(read_model_info, "m", tmp_path)):
                try:
                    read()
                except ConfigError as error:  # or it names the key that no longer goes with this one
                    assert any(name in str(error) for name in (key, "layer_types", "head")), (key, value)


def test_malformed_rope_is_refused() -> None:
    base = {**SHAPE, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    for key in LLAMA3_ROPE:
        for value in ("a", [], -1, 0, {}):
            with pytest.raises(ConfigError, match=key):
                build(base | {"rope_parameters": LLAMA3_ROPE | {key: value}})
    with pytest.raises(ConfigError, match="yarn"):
        build(base | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}})


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 5},
        {"temperature": float("nan")},
        {"top_k": 1.5},
        {"top_p": "x"},
        {"min_p": -1},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_recommendations_that_no_request_could_make_are_refused_at_the_start(
    checkpoint: Callable[[str], Path], tmp_path: Path, generation: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint("llama") / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ConfigError, match=f"generation_config.json: {next(iter(generation))}"):
        read_model_info("m", tmp_path)


def test_end_of_sequence_ids_without_logits_are_left_out(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint("llama") / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [-1, 2, 99999, True, "x"], "top_k": 50.0})
    )
    info = read_model_info("m", tmp_path)
    assert info.eos_token_ids == (2,)
    assert info.default_sampling == {"top_k": 50}


QWEN = [
    {"sliding_window": 8},
    {"sliding_window": 8, "use_sliding_window": False},
    {"sliding_window": 8, "use_sliding_window": True},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": None},
    {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    {
        "use_sliding_window": False,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
]


@pytest.mark.parametrize("keys", QWEN, ids=str)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwens_windows_are_transformers(family: str, keys: dict[str, Any]) -> None:
    theirs = getattr(transformers, f"{family}Config")(**SHAPE, **keys)
    effective = theirs.sliding_window if theirs.use_sliding_window else None
    wanted = [effective if kind == "sliding_attention" else None for kind in theirs.layer_types]
    file = {**SHAPE, "rms_norm_eps": 1e-6, "hidden_act": "silu", "architectures": [f"{family}ForCausalLM"], **keys}
    assert windows(build(file)) == wanted


def test_llama_has_no_window_whatever_its_file_says() -> None:
    file = {
        **SHAPE,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "architectures": ["LlamaForCausalLM"],
        "sliding_window": 4,
    }
    assert windows(build(file)) == [None] * 3


def test_mistrals_window_must_be_said() -> None:
    file = {**SHAPE, "rms_norm_eps": 1e-6, "hidden_act": "silu", "architectures": ["MistralForCausalLM"]}
    assert windows(build(file | {"sliding_window": 4})) == [4] * 3
    assert windows(build(file | {"sliding_window": None})) == [None] * 3
    with pytest.raises(ConfigError, match="sliding_window is missing"):
        build(file)


def test_every_checkpoint_of_the_tests_is_a_known_architecture(checkpoint: Callable[[str], Path]) -> None:
    for name in CHECKPOINTS:
        assert build(json.loads((checkpoint(name) / "config.json").read_text())).layers
