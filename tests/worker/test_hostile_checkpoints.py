"""Checkpoints that somebody made to do harm, or a disk: each is refused before it is served, and nothing else happens."""

import json
import os
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.common.config import ModelConfig
from quire.common.errors import ConfigError
from quire.worker.loading import load_decoder
from quire.worker.parallel import Group

from ..checkpoints import build_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
BESIDE = "a shard lies beside its index"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    return {
        "one file": build_checkpoint("llama", folder / "one"),
        "shards": build_checkpoint("llama", folder / "many", max_shard_size="100KB"),
    }


def load(path: Path, *, max_model_len: int = 32, **options: Any) -> None:
    load_decoder(path, ModelConfig(**options), Group(), torch.device("cpu"), block_size=16, max_model_len=max_model_len)


# --- damage, and what the refusal names -------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage to what a file says of its tensors; the tensors stay."""

    def damage(path: Path) -> None:
        stored = (path / SINGLE).read_bytes()
        length = struct.unpack_from("<Q", stored)[0]
        changed = change(json.loads(stored[8 : 8 + length]))
        encoded = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (path / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + stored[8 + length :])

    return damage


def tensor(name: str, **fields: Any) -> Callable[[Path], None]:
    return header(lambda tensors: {**tensors, name: {**tensors[name], **fields}})


def length(value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        stored = bytearray((path / SINGLE).read_bytes())
        struct.pack_into("<Q", stored, 0, value)
        (path / SINGLE).write_bytes(stored)

    return damage


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / INDEX).read_text())
        changed = change(content["weight_map"])
        text = changed if isinstance(changed, str) else json.dumps({**content, "weight_map": changed})
        (path / INDEX).write_text(text)

    return damage


def shard(name: str, file: str) -> Callable[[Path], None]:
    return index(lambda home: {**home, name: file})


def moved(to: str) -> Callable[[Path], None]:
    """The shard with DOWN lies elsewhere, and the index says so truly."""

    def damage(path: Path) -> None:
        target = path / to.format(path=path.parent)
        target.parent.mkdir(exist_ok=True)
        home = json.loads((path / INDEX).read_text())["weight_map"]
        said = to.format(path=path.parent)
        index(lambda all_: {name: said if file == home[DOWN] else file for name, file in all_.items()})(path)
        (path / home[DOWN]).rename(target)

    return damage


def config(**fields: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **fields}))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        held = load_file(path / SINGLE)
        change(held)
        save_file(held, path / SINGLE)

    return damage


def only_pickles(path: Path) -> None:
    (path / SINGLE).rename(path / "pytorch_model.bin")


def second_file(path: Path) -> None:
    (path / SINGLE).rename(path / "model-1.safetensors")
    save_file({NORM: torch.zeros(48)}, path / "model-2.safetensors")


def folder_in_its_place(path: Path) -> None:
    (path / SINGLE).unlink()
    (path / SINGLE).mkdir()


def link_to_itself(path: Path) -> None:
    (path / SINGLE).unlink()
    (path / SINGLE).symlink_to(path / SINGLE)


def pipe_in_its_place(path: Path) -> None:
    (path / SINGLE).unlink()
    os.mkfifo(path / SINGLE)


def overlapping(held: dict[str, Any]) -> dict[str, Any]:
    first, last = held[DOWN]["data_offsets"]
    return {**held, DOWN: {**held[DOWN], "data_offsets": [first - 4, last - 4]}}


def named_twice(home: dict[str, str]) -> str:
    return json.dumps({"weight_map": home}).replace("{", f'{{"{DOWN}": "model-00001-of-00009.safetensors", ', 2)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "header of 2^63 bytes": ("one file", length(2**63), [SINGLE]),
    "header of 2^64 - 1 bytes": ("one file", length(2**64 - 1), [SINGLE]),
    "header longer than the file": ("one file", length(10**7), [SINGLE]),
    "empty header": ("one file", length(0), [SINGLE]),
    "header that is no JSON": ("one file", header(lambda _: b'{"a": '), [SINGLE]),
    "header that is not UTF-8": ("one file", header(lambda _: b"\xff\xfe" * 40), [SINGLE]),
    "header nested deeply": ("one file", header(lambda _: b'{"a":' * 10_000), [SINGLE]),
    "header that is a list": ("one file", header(lambda _: []), [SINGLE]),
    "overlapping tensors": ("one file", header(overlapping), [SINGLE, "offset"]),
    "offsets beyond the file": ("one file", tensor(DOWN, data_offsets=[2**40, 2**40 + 15360]), [SINGLE]),
    "offsets that fall": ("one file", tensor(DOWN, data_offsets=[64, 32]), [SINGLE]),
    "negative offsets": ("one file", tensor(DOWN, data_offsets=[-64, 0]), [SINGLE]),
    "a shape beyond 2^64": ("one file", tensor(DOWN, shape=[2**62, 8]), [SINGLE]),
    "another shape of the same size": ("one file", tensor(DOWN, shape=[80, 48]), [SINGLE, DOWN, "(48, 80)"]),
    "another type of the same size": ("one file", tensor(DOWN, dtype="I32"), [SINGLE, DOWN, "I32"]),
    "an unknown type": ("one file", tensor(DOWN, dtype="\x1b[31mF33"), [SINGLE]),
    "another name": ("one file", header(lambda h: {("x" if k == DOWN else k): v for k, v in h.items()}), [DOWN]),
    "a scalar": ("one file", tensors(lambda t: t.update({NORM: torch.tensor(1.0)})), [SINGLE, NORM, "()"]),
    "nothing in the files": ("one file", tensors(lambda t: t.clear()), ["model.embed_tokens.weight"]),
    "two files that hold one tensor": ("one file", second_file, ["model-2.safetensors", NORM, "model-1.safetensors"]),
    "a folder": ("one file", folder_in_its_place, ["no *.safetensors"]),
    "a pipe": ("one file", pipe_in_its_place, ["no *.safetensors"]),
    "a link to itself": ("one file", link_to_itself, ["no *.safetensors"]),
    "pickles only": ("one file", only_pickles, ["pytorch_model.bin", "convert it to safetensors"]),
    "shard above": ("shards", moved("../secret.safetensors"), [INDEX, "../secret", BESIDE]),
    "shard below": ("shards", moved("x/secret.safetensors"), [INDEX, "x/secret", BESIDE]),
    "shard elsewhere": ("shards", moved("{path}/secret.safetensors"), [INDEX, "/secret", BESIDE]),
    "shard of another format": ("shards", moved("pytorch_model.bin"), [INDEX, "pytorch_model.bin", BESIDE]),
    "shard that is the folder above": ("shards", shard(DOWN, ".."), [INDEX, DOWN, BESIDE]),
    "shard without a name": ("shards", shard(DOWN, ""), [INDEX, DOWN, BESIDE]),
    "shard with a null byte": ("shards", shard(DOWN, "a\0.safetensors"), [INDEX, DOWN, r"a\x00"]),
    "shard that is no text": ("shards", shard(DOWN, "\ud800.safetensors"), [INDEX, DOWN, r"\ud800"]),
    "shard with a long name": ("shards", shard(DOWN, "a" * 300 + ".safetensors"), ["missing", DOWN]),
    "index that names what is not there": (
        "shards",
        shard("model.x", "model-00001-of-00006.safetensors"),
        ["model-00001-of-00006.safetensors", "there is no 'model.x' in it", INDEX],
    ),
    "index with a name that is no text": ("shards", shard("\ud800", "model-00001-of-00006.safetensors"), [r"\ud800"]),
    "index that names a tensor twice": ("shards", index(named_twice), [INDEX, DOWN, "twice"]),
    "index that is nested deeply": ("shards", index(lambda _: "[" * 100_000), [INDEX]),
    "index with a number for a file": ("shards", index(lambda home: {**home, DOWN: 7}), [INDEX, DOWN]),
    "a vocabulary larger than the embedding": (
        "one file",
        config(vocab_size=400),
        ["embed_tokens", "(320, 48)", "400"],
    ),
    "a vocabulary of 2^31": ("one file", config(vocab_size=2**31 - 1), ["embed_tokens", "(320, 48)"]),
    "more layers than tensors": ("one file", config(num_hidden_layers=4), ["model.layers.3."]),
    "fewer layers than tensors": ("one file", config(num_hidden_layers=2), ["9 tensors", "model.layers.2.", SINGLE]),
    "a bias that the config leaves out": (
        "one file",
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
        ["1 tensors", "q_proj.bias in model.safetensors"],
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path, what: str) -> None:
    which, damage, words = DAMAGE[what]
    path = Path(shutil.copytree(checkpoints[which], tmp_path / "model"))
    damage(path)
    with pytest.raises(ConfigError) as error:
        load(path)
    message = str(error.value)
    for word in words:
        assert word in message
    assert len(message) < 1500 and message.isprintable(), message


# --- what is no damage ------------------------------------------------------------------------------------------------


def test_links_are_the_owners_choice(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The Hugging Face cache is made of them."""
    path = tmp_path / "model"
    path.mkdir()
    for file in checkpoints["shards"].iterdir():
        (path / file.name).symlink_to(file)
    load(path)


def test_code_in_a_model_folder_is_not_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoints["one file"], tmp_path / "model"))
    config(auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"})(path)
    for name in ("modeling.py", "__init__.py", "conftest.py", "setup.py"):
        (path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    loaded = set(sys.modules)
    load(path)
    assert not (tmp_path / "ran").exists()
    assert not any("modeling" in name for name in set(sys.modules) - loaded)


def test_a_context_that_is_only_claimed_takes_no_memory(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="--max-model-len"):
        load(checkpoints["one file"], max_model_len=2**40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_looked_for_when_asked(
    checkpoints: dict[str, Path], tmp_path: Path, value: float
) -> None:
    path = Path(shutil.copytree(checkpoints["one file"], tmp_path / "model"))
    load(path, check_weights=True)

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held[DOWN][3, 5] = value
        held[NORM][:2] = value

    tensors(spoil)(path)
    load(path)
    with pytest.raises(ConfigError) as error:
        load(path, check_weights=True)
    for word in (f"{DOWN} in {SINGLE} (1 of 3840)", f"{NORM} in {SINGLE} (2 of 48)", "2 tensors", "float32"):
        assert word in str(error.value)


def test_weights_that_a_narrower_type_cannot_hold(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoints["one file"], tmp_path / "model"))
    tensors(lambda held: held[DOWN].fill_(1e5))(path)
    load(path, check_weights=True, dtype="bfloat16")
    with pytest.raises(ConfigError, match=f"{DOWN} in {SINGLE} .3840 of 3840."):
        load(path, check_weights=True, dtype="float16")


# --- any damage -------------------------------------------------------------------------------------------------------

SNIPPETS = (b"9", b"0", b"-", b"null", b"1e999", b"[]", b"{}", b'""', b"\\ud800", b"NaN", b"2147483647")
MOST_MIB = 300


def mutated(content: bytes, rng: random.Random, within: int) -> bytes:
    """A few changes to the first `within` bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(max(1, min(within, len(changed))))
        match rng.randrange(6):
            case 0 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at : at + rng.choice((1, 2, 8, 100))]
            case 3:
                changed[at:at] = bytes(rng.choices(b'0123456789{}[],:"nul-.eE\\', k=rng.choice((1, 2, 9))))
            case 4:
                changed[at : at + 1] = rng.choice(SNIPPETS)
            case _:
                del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_checkpoint_loads_or_is_refused(checkpoints: dict[str, Path], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "model"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(100):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(rng.choice(list(checkpoints.values())), path)
        files = [
            file
            for file in sorted(path.iterdir())
            if file.suffix == ".safetensors" or file.name in (INDEX, "config.json")
        ]
        file = rng.choice(files)
        content = file.read_bytes()
        told = 8 + struct.unpack_from("<Q", content)[0] if file.suffix == ".safetensors" else len(content)
        file.write_bytes(mutated(content, rng, told if rng.random() < 0.9 else len(content)))
        try:
            load(path, check_weights=rng.random() < 0.3)
            outcomes["loaded"] += 1
        except ConfigError as error:
            assert "memory" not in str(error), error
            outcomes["refused"] += 1
    assert outcomes["loaded"] and outcomes["refused"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MOST_MIB
