"""Checkpoints that are damaged, incomplete or not what config.json says; slices; unsupported configurations."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.common.config import ModelConfig
from quire.common.errors import ConfigError
from quire.common.model_info import read_config
from quire.worker.decoder import Decoder
from quire.worker.layers.attention import share_heads
from quire.worker.loading import load_decoder
from quire.worker.models import build
from quire.worker.models.spec import Attention, Rope
from quire.worker.parallel import Group, Part
from quire.worker.weights import Checkpoint

from ..checkpoints import build_checkpoint, model_for

EMBED = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


@pytest.fixture
def sharded(sharded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_once, tmp_path / "sharded"))


def load(path: Path, group: Group | None = None, **options: Any) -> Decoder:
    return load_decoder(
        path, ModelConfig(**options), group or Group(), torch.device("cpu"), block_size=16, max_model_len=32
    )


def shard_of(path: Path, tensor: str) -> Path:
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(path)
    for word in words:
        assert word in str(error.value)


def test_shards_are_read_as_one_file_is(copy: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, several = (load(path).blocks[2].mlp.up.apply(torch.eye(48)) for path in (copy, sharded))
    assert torch.equal(one, several)


def test_ranks_read_their_slices(copy: Path) -> None:
    whole = load_file(copy / "model.safetensors")
    for rank in range(3):
        source = Checkpoint(copy)
        part = Group(rank, 3).share(80)
        assert torch.equal(
            source.read(DOWN, [Part(48, range(48)), part]), whole[DOWN][:, part.mine.start : part.mine.stop]
        )


def test_bytes_are_reported_up_to_the_whole(sharded: Path) -> None:
    heard: list[tuple[int, int]] = []
    load_decoder(
        sharded,
        ModelConfig(),
        Group(1, 2),
        torch.device("cpu"),
        block_size=16,
        max_model_len=32,
        on_bytes=lambda done, total: heard.append((done, total)),
    )
    assert heard == sorted(heard)
    assert 0.9 < heard[-1][0] / heard[-1][1] <= 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_at_load(copy: Path, dtype: str) -> None:
    decoder = load(copy, dtype=dtype)
    assert decoder.embed.weight.dtype == decoder.norm.weight.dtype == getattr(torch, dtype)


def test_truncated_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(copy, "model.safetensors", "truncated")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 200, b"\x08\0\0\0\0\0\0\0garbage!"])
def test_file_that_is_no_safetensors(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    refused(copy, "model.safetensors")


def test_truncated_shard(sharded: Path) -> None:
    file = shard_of(sharded, DOWN)
    file.write_bytes(file.read_bytes()[:-1])
    refused(sharded, file.name, "truncated")


def test_missing_shard(sharded: Path) -> None:
    shard_of(sharded, DOWN).unlink()
    refused(sharded, shard_of(sharded, DOWN).name, "missing", "model.layers.1.")


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, "no *.safetensors", "--load-format dummy")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": "../../secret"}}'])
def test_malformed_index(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    refused(sharded, "index.json")


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][DOWN] = content["weight_map"][EMBED]
    index.write_text(json.dumps(content))
    refused(sharded, DOWN, content["weight_map"][EMBED])


def test_missing_tensor(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.__delitem__(DOWN))
    refused(copy, DOWN, "no tensor")


def test_wrong_shape_names_both(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({DOWN: torch.zeros(48, 81)}))
    refused(copy, DOWN, "(48, 81)", "(48, 80)", "model.safetensors")


def test_wrong_type(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({DOWN: torch.zeros(48, 80, dtype=torch.int8)}))
    refused(copy, DOWN, "I8")


def test_leftover_tensors_are_refused_except_those_that_follow_from_the_config(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))
    load(copy)
    extra = {f"model.extra.{i:02}": torch.zeros(6) for i in range(12)}
    rewrite(copy, lambda tensors: tensors.update(extra))
    refused(copy, "12 tensors", "model.extra.00 in model.safetensors", "model.extra.09", "and 2 more")


def test_a_head_that_is_tied_may_be_stored_all_the_same(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint("qwen2-mqa"), tmp_path / "tied"))
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].clone()}))
    load(path)


def test_random_weights_need_only_the_config(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    one, same, other = (load(copy, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.embed.weight, same.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)


UNSUPPORTED = [
    ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
    ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type", "yarn", "llama3"]),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["rope_parameters", "factor is missing"]),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
    ({"num_attention_heads": 5}, ["num_attention_heads 5", "num_key_value_heads 2"]),
    ({"hidden_size": "48"}, ["hidden_size", "integer from 1"]),
    ({"rms_norm_eps": None}, ["rms_norm_eps"]),
    ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, ["layer_types", "linear_attention"]),
    ({"dtype": "float8_e4m3fn"}, ["dtype", "bfloat16"]),
    ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
]


@pytest.mark.parametrize(("changes", "words"), UNSUPPORTED)
def test_what_is_not_implemented_is_refused(
    checkpoint: Callable[[str], Path], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        build({**read_config(checkpoint("llama")), **changes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("window", [[], {}, 0, False, "", "24", 1.5])
def test_a_window_is_a_count_or_null(checkpoint: Callable[[str], Path], window: Any) -> None:
    with pytest.raises(ConfigError, match="sliding_window"):
        build({**read_config(checkpoint("mistral-window")), "sliding_window": window})


def test_a_missing_key_is_named(checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint("llama"))
    for key in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "hidden_act", "intermediate_size", "vocab_size"):
        with pytest.raises(ConfigError, match=key):
            build({k: v for k, v in config.items() if k != key})


def test_qwen2_configs_of_transformers_4_say_where_windows_begin(checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint("qwen2-window"))
    older = {k: v for k, v in config.items() if k != "layer_types"}
    assert build(older) == build(config)
    assert build({**older, "use_sliding_window": False}).windows == (None,)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (8, 1), (7, 7), (6, 2), (32, 8)])
def test_every_head_has_one_owner_and_the_kv_head_it_reads(heads: int, kv_heads: int) -> None:
    spec = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=8, rope=Rope(dim=8, theta=1.0))
    for size in range(1, heads + 1):
        owned: list[int] = []
        for rank in range(size):
            share = share_heads(spec, Group(rank, size))
            queries, kv = share.queries.mine, share.kv.mine
            per_kv = len(queries) // len(kv)
            assert per_kv * len(kv) == len(queries) > 0
            assert [kv[i // per_kv] for i in range(len(queries))] == [q // (heads // kv_heads) for q in queries]
            owned += queries
        assert owned == list(range(heads))
    with pytest.raises(ConfigError, match=f"{heads} attention heads"):
        share_heads(spec, Group(0, heads + 1))


def test_models_can_be_judged_without_torch() -> None:
    import subprocess
    import sys

    code = "import quire.worker.models, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_oracle_is_what_was_saved(copy: Path) -> None:
    assert torch.equal(load(copy).embed.weight, model_for("llama").model.embed_tokens.weight)
