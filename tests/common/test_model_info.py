"""Facts read from a model directory, and what is said when they are not there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.common.errors import ConfigError
from quire.common.model_file import ModelFile
from quire.common.model_info import context_length, model_path, read_model_info


def test_facts_of_a_checkpoint(checkpoint: Callable[[str], Path]) -> None:
    info = read_model_info("m", checkpoint("llama"))
    assert (info.architecture, info.vocab_size, info.max_model_len, info.eos_token_ids) == (
        "LlamaForCausalLM",
        320,
        512,
        (257,),
    )
    assert info.fingerprint == read_model_info("other name", checkpoint("llama")).fingerprint
    assert info.fingerprint != read_model_info("m", checkpoint("qwen3")).fingerprint


def test_a_length_beyond_the_models_names_the_one_that_works(checkpoint: Callable[[str], Path]) -> None:
    assert read_model_info("m", checkpoint("llama"), max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="largest that works is 512"):
        read_model_info("m", checkpoint("llama"), max_model_len=513)


def test_only_yarn_extends_the_stated_length() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    assert context_length(ModelFile({"max_position_embeddings": 1000, "rope_parameters": yarn})) == 4000
    assert (
        context_length(ModelFile({"max_position_embeddings": 8000, "rope_scaling": {**yarn, "rope_type": "llama3"}}))
        == 8000
    )


def test_generation_defaults_and_stop_tokens_come_from_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 1, "architectures": ["A"]})
    )
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 4], "temperature": 0.6, "top_k": 20, "do_sample": True})
    )
    info = read_model_info("m", tmp_path)
    assert info.eos_token_ids == (3, 4)
    assert info.default_sampling == {"temperature": 0.6, "top_k": 20}


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no such directory"):
        model_path(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="no such directory"):
        model_path("nobody/nothing")
    with pytest.raises(ConfigError, match="this is a file"):
        model_path(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_model_info("m", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_info("m", tmp_path / "broken")
