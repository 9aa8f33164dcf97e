"""Facts of a model that its small files tell, read without torch: `config.json`, `generation_config.json`, file sizes."""

import hashlib
from pathlib import Path
from typing import Any

from msgspec import Struct

from .errors import ConfigError, RequestError
from .model_file import ModelFile
from .sampling import check

DEMO = Path(__file__).resolve().parent.parent / "worker" / "models" / "demo"
ENDLESS = 1 << 20  # a model without a stated limit (ALiBi, for one) is served up to this many tokens


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What scheduler and frontend must know of a model. Crosses the wire."""

    model: str  # as the user named it
    architecture: str
    vocab_size: int  # width of the logits
    context_length: int  # what the model was made for
    max_model_len: int  # what is served: at most context_length
    eos_token_ids: tuple[int, ...]
    fingerprint: str  # equal for equal checkpoints on different hosts
    default_sampling: dict[str, float | int] = {}  # from generation_config.json


def model_path(model: str) -> Path:
    """The local directory of `model`: 'demo', a path, or a repository that is in the Hugging Face cache.

    Raises ConfigError when there is none. Downloads nothing: `launch` does, before any process starts.
    """
    if model == "demo":
        return DEMO
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(
            f"--model {model}: this is a file; name the directory that holds config.json and *.safetensors"
        )
    if cached := _hub_snapshot(model):
        return cached
    raise ConfigError(
        f"--model {model}: no such directory, and no such repository in the local Hugging Face cache; 'demo' is the built-in model"
    )


def _hub_snapshot(model: str) -> Path | None:
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (0.2 s that only a hub name is worth)

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def read_config(path: Path) -> ModelFile:
    """`config.json` of a model directory; raises ConfigError when it is absent or not a JSON object."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{path}: there is no config.json in this directory; it does not hold a model")
    return ModelFile.read(file)


def read_model_info(model: str, path: Path, *, max_model_len: int | None = None) -> ModelInfo:
    """Raises ConfigError for files that cannot be read and for a `max_model_len` that the model was not made for."""
    config = read_config(path)
    generation_file = path / "generation_config.json"
    generation = ModelFile.read(generation_file) if generation_file.is_file() else ModelFile({})
    limit = context_length(config)
    if max_model_len is not None and max_model_len > limit:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond what {model} was made for; the largest that works is {limit}"
        )
    vocab_size = config.count("vocab_size")
    return ModelInfo(
        model=model,
        architecture=(config.names("architectures") or ["unknown"])[0],
        vocab_size=vocab_size,
        context_length=limit,
        max_model_len=max_model_len or limit,
        eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id")), vocab_size),
        fingerprint=fingerprint(path),
        default_sampling=_default_sampling(generation),
    )


def context_length(config: ModelFile) -> int:
    """Tokens of context a model was made for. RoPE scaling extends the stated limit only where it says from what (YaRN)."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    stated = next((config.count(key) for key in keys if config.get(key) is not None), ENDLESS)
    scaling = config.part("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")
    if "yarn" in (scaling.get("rope_type"), scaling.get("type")) and "original_max_position_embeddings" in scaling:
        return max(stated, int(scaling.count("original_max_position_embeddings") * scaling.number("factor")))
    return stated


def fingerprint(path: Path) -> str:
    """SHA-256 over config.json and the names and sizes of the weight files: cheap, and different for different models."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _default_sampling(generation: ModelFile) -> dict[str, float | int]:
    """The sampling defaults a model recommends; do_sample false says nothing about a server's default (vLLM's reading)."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if isinstance(top_k := given.get("top_k"), float) and top_k.is_integer():
        given["top_k"] = int(top_k)
    try:
        check(given)
    except RequestError as error:
        raise ConfigError(f"{generation.where}: {error}") from None
    return given


def _token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids; a model may name some that it has no logits for, and those it will never choose."""
    ids = value if isinstance(value, list) else [value]
    return tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)
