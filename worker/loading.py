"""From an engine's options to a decoder with its weights, on its device."""

import logging
import os
from pathlib import Path

import torch

from ..common.config import EngineConfig, ModelConfig
from ..common.errors import ConfigError
from ..common.model_info import read_config
from .backends import choose
from .decoder import Decoder
from .models import build
from .parallel import Group
from .weights import DTYPES, Checkpoint, Loader, OnBytes, RandomWeights

log = logging.getLogger(__name__)


def pick_device(wanted: str, rank: int) -> torch.device:
    """`wanted` is auto, cpu or cuda; ranks of one host take its GPUs in turn. ConfigError when there is no GPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; --device cpu works everywhere")
    return torch.device("cuda", rank % torch.cuda.device_count()) if wanted == "cuda" else torch.device("cpu")


def set_threads(config: EngineConfig) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.parallel.threads or max(1, cores // config.parallel.tensor_parallel_size))


def load_decoder(
    path: Path,
    config: ModelConfig,
    group: Group,
    device: torch.device,
    *,
    block_size: int,
    max_model_len: int,
    on_bytes: OnBytes | None = None,
) -> Decoder:
    """This rank's share of the model at `path`. Raises ConfigError for what cannot be served.

    `on_bytes` hears of every tensor of a checkpoint; random weights come without.
    """
    spec = build(read_config(path))
    dtype = DTYPES[spec.dtype if config.dtype == "auto" else config.dtype]
    backend = choose(spec, device, dtype, block_size)
    if config.load_format == "dummy":
        loader = Loader(RandomWeights(config.seed, device), spec.names, group, dtype, device)
        return Decoder(spec, loader, backend, max_model_len)
    checkpoint = Checkpoint(path, on_bytes)
    decoder = Decoder(spec, Loader(checkpoint, spec.names, group, dtype, device), backend, max_model_len)
    if unread := checkpoint.unread:
        log.warning("%s: %d tensors are not part of the model: %s", path, len(unread), ", ".join(unread[:8]))
    return decoder
