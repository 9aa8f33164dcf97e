"""From an engine's options to a decoder with its weights, on its device."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from ..common.config import EngineConfig, ModelConfig
from ..common.errors import ConfigError
from ..common.model_info import read_config
from .backends import choose
from .decoder import Decoder
from .failures import out_of_memory
from .models import build
from .models import spec as models
from .parallel import Group
from .weights import DTYPES, Checkpoint, Loader, OnBytes, RandomWeights, Source, some

WEIGHTS_OF_A_THREAD = 8_000_000  # below it a second thread gained about a tenth alone, and cost half under load
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def pick_device(wanted: str, rank: int) -> torch.device:
    """`wanted` is auto, cpu or cuda; ranks of one host take its GPUs in turn. ConfigError when there is no GPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; --device cpu works everywhere")
    return torch.device("cuda", rank % torch.cuda.device_count()) if wanted == "cuda" else torch.device("cpu")


def num_threads(config: EngineConfig, model: models.Decoder, num_cores: int) -> int:
    """Of a worker's share of `num_cores` as many as have enough to do. Threads meet some hundred times in a step: those of a
    small model would wait for each other, and keep the cores from the processes around them."""
    share = max(1, num_cores // config.parallel.tensor_parallel_size)
    return config.parallel.threads or min(share, max(1, model.num_weights // WEIGHTS_OF_A_THREAD))


def prepare_host(config: EngineConfig, path: Path) -> None:
    """Set up threads and memory of this process for the model at `path`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(num_threads(config, build(read_config(path)), cores))
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives memory above a threshold back to the system at once: a prefill step of 4,096 tokens then took 1.2
        # times as long, for the pages of its large tensors, taken anew for every layer.
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)


def load_decoder(
    path: Path,
    config: ModelConfig,
    group: Group,
    device: torch.device,
    *,
    block_size: int,
    max_model_len: int,
    on_bytes: OnBytes | None = None,
    between: Callable[[], None] = lambda: None,
) -> Decoder:
    """This rank's share of the model at `path`. Raises ConfigError for what cannot be served.

    `on_bytes` hears of every tensor of a checkpoint; random weights come without. `between` is called before each tensor.
    """
    spec = build(read_config(path))
    _check_positions(spec, max_model_len)
    dtype = DTYPES[spec.dtype if config.dtype == "auto" else config.dtype]
    backend = choose(spec, device, dtype, block_size)
    checkpoint: Checkpoint | None = None
    source: Source = RandomWeights(config.seed, device)
    if config.load_format != "dummy":
        source = checkpoint = Checkpoint(path, on_bytes, holds=dtype if config.check_weights else None)
    loader = Loader(source, spec.names, group, dtype, device, between)
    backend.prepare(dtype, between)
    try:
        decoder = Decoder(spec, loader, backend, max_model_len)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(f"{path}: its weights do not fit into the memory of {device} ({error!s:.200})") from None
    if checkpoint:
        _judge(checkpoint, spec, dtype)
    return decoder


def _check_positions(spec: models.Decoder, max_model_len: int) -> None:
    """A context that a file only claims must not take the host's memory: each layer's keys would take more."""
    needed = max_model_len * 4 * sum({rope: rope.dim for rope in (layer.attn.rope for layer in spec.layers)}.values())
    if needed > (free := psutil.virtual_memory().available):
        raise ConfigError(
            f"a context of {max_model_len} tokens needs {needed / 2**30:,.1f} GiB for its positions alone, "
            f"{free / 2**30:,.1f} GiB are free: lower --max-model-len"
        )


def _judge(checkpoint: Checkpoint, spec: models.Decoder, dtype: torch.dtype) -> None:
    """Once everything has been read. A tensor that nobody asked for says that config.json describes another model: a
    bias that is left out, for one, would be a model that answers nonsense."""
    if faulty := checkpoint.faulty:
        shown = ", ".join(faulty[:10])
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError(f"{checkpoint.path}: {len(faulty)} tensors hold what is no finite {kind}: {shown}")
    harmless = {f"{spec.names['head']}.weight"} if spec.tied_head else set()
    if unread := checkpoint.unread - harmless:
        raise ConfigError(
            f"{checkpoint.path}: {len(unread)} tensors are not part of the model that config.json describes: "
            f"{some(f'{name} in {checkpoint.home[name]}' for name in unread)}"
        )
