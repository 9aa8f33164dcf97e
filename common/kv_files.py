"""Where KV is kept on disk: a folder for each model and way of computing it, since KV is of use to no other."""

from pathlib import Path

from .config import EngineConfig
from .errors import ConfigError
from .model_info import ModelInfo


def folder(config: EngineConfig, model: ModelInfo, dtype: str, layout: str) -> Path:
    """Below `--kv-disk`, which must be given. `dtype` and `layout` are those of the KV. Raises ConfigError for what cannot be kept."""
    assert config.cache.kv_disk is not None
    if not config.cache.enable_prefix_caching:
        raise ConfigError("--kv-disk keeps prefixes for later requests, so it needs --enable-prefix-caching")
    weights = f"-dummy{config.model.seed}" if config.model.load_format == "dummy" else ""
    ranks = config.parallel.tensor_parallel_size
    name = f"{model.fingerprint[:24]}{weights}-{dtype}-{layout}-tp{ranks}-block{config.cache.block_size}"
    return Path(config.cache.kv_disk).expanduser() / name
