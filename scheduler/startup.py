"""From the first worker to the first plan: which phase the engine is in, and how many KV blocks it gets."""

from collections.abc import Sequence
from pathlib import Path

from ..common import kv_files
from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..common.messages import Status, WorkerReady
from ..common.model_info import ModelInfo
from .blocks import blocks_for
from .disk_index import DiskIndex
from .peers import Worker


def phase(workers: Sequence[Worker], num_ranks: int) -> Status:
    """The state of a start: that of the worker that is furthest behind. "ready" is not among them."""
    if len(workers) < num_ranks:
        return Status("connecting", len(workers) / num_ranks, f"{len(workers)} of {num_ranks} workers are here")
    loading = [worker for worker in workers if worker.ready is None]
    if loading:
        return _reported("loading", loading, num_ranks)
    late = [worker for worker in workers if worker.allocated is None]
    warm = all(worker.progress is not None and worker.progress.phase == "warming up" for worker in late)
    return _reported("warming up" if warm else "allocating", late, num_ranks)


def _reported(phase: str, late: Sequence[Worker], num_ranks: int) -> Status:
    """`late` are in this phase, the other ranks have it behind them."""
    reports = [worker.progress for worker in late if worker.progress is not None and worker.progress.phase == phase]
    done = num_ranks - len(late) + sum(min(max(0.0, report.fraction), 1.0) for report in reports)
    return Status(phase, done / num_ranks, next((report.detail for report in reports), ""))


def num_blocks(ready: Sequence[WorkerReady], config: EngineConfig, max_model_len: int) -> int:
    """KV blocks that every worker can hold, not more than can be of use.

    Raises ConfigError when one context does not fit: any request that is accepted must be able to finish.
    """
    block_size = config.cache.block_size
    needed = blocks_for(max_model_len, block_size)
    if config.cache.num_gpu_blocks_override is not None:
        count = config.cache.num_gpu_blocks_override
        lower = f"--num-gpu-blocks-override to {needed}"
    else:
        count = min(worker.available_bytes // worker.block_bytes for worker in ready)
        count = min(count, config.scheduler.max_num_seqs * needed)
        memory = needed * max(worker.block_bytes for worker in ready) / 2**20
        lower = (
            f"the memory of each worker's KV cache to {memory:,.0f} MiB (--gpu-memory-utilization, --kv-cache-memory)"
        )
    if count < needed:
        fitting = max(count, 0) * block_size
        shorter = f"lower --max-model-len to {fitting}, or " if fitting else ""
        raise ConfigError(
            f"the KV cache holds {fitting} tokens, but one context may have {max_model_len}: {shorter}raise {lower}"
        )
    return count


def num_saved(ready: Sequence[WorkerReady]) -> tuple[int, int]:
    """Blocks that every worker can hold in host memory and on disk."""
    host = min(worker.host_bytes // worker.block_bytes for worker in ready)
    return max(0, host), max(0, min(worker.disk_bytes // worker.block_bytes for worker in ready))


def disk_index(config: EngineConfig, model: ModelInfo, workers: Sequence[Worker], num_blocks: int) -> DiskIndex:
    """The index of the workers' files, which they have opened. Raises ConfigError when it cannot be used."""
    ids = [worker.allocated.disk_id for worker in workers if worker.allocated is not None]
    dtype, layout = next((x.ready.dtype, x.ready.kv_layout) for x in workers if x.ready is not None)
    file = kv_files.folder(config, model, dtype, layout) / "index"
    return DiskIndex(file, ids, num_blocks, config.cache.block_size)


def rendezvous(config: EngineConfig, run_dir: Path, epoch: int) -> str:
    """Where the ranks meet; a file must be new, hence the epoch in its name."""
    parallel = config.parallel
    if parallel.tensor_parallel_size == 1:
        return ""
    if parallel.master_addr is not None:
        return f"tcp://{parallel.master_addr}:{parallel.master_port}"
    return f"file://{run_dir.resolve()}/rendezvous-{epoch}"


def mismatch(ready: WorkerReady, rank: int, model: ModelInfo) -> str | None:
    """What is wrong with a worker's report, if anything."""
    if ready.fingerprint != model.fingerprint:
        return f"worker {rank} loaded another checkpoint of {model.model} than the scheduler sees; compare the files"
    if ready.block_bytes <= 0:
        return f"worker {rank} reports KV blocks of {ready.block_bytes} bytes"
    return None
