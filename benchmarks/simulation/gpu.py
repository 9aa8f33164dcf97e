"""How long a step takes: a roofline of a GPU and a model, or a line fitted to measured steps.

Every figure of `H200` and `QWEN3_8B` is taken from measurements and shapes that others published; the comment beside
it says which. With them the model gives 212, 834, 3,133, 10,085 and 20,678 tokens/s for 1, 4, 16, 64 and 256 streams of
128 + 1,024 tokens; vLLM 0.30 on an H100, scaled by bandwidth to an H200, gives 209, 785, 3,026, 9,376 and 19,104.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from quire.common.messages import StepPlan


class Features(NamedTuple):
    """What a step's time depends on."""

    rows: int
    tokens: int  # whose KV is computed
    samples: int  # rows that get a token
    context: int  # KV slots that decoding rows read
    pairs: int  # query and key positions that meet in the attention of prefilling rows
    host: int = 0  # blocks copied between the device and the host, either way
    disk: int = 0  # likewise the disk
    device: int = 0  # likewise from the device to itself


def features(plan: StepPlan, num_blocks: int, host_blocks: int = 0) -> Features:
    """`num_blocks` are the device's; the host's follow, then the disk's."""
    starts = np.frombuffer(plan.starts, np.int32).astype(np.int64)
    counts = np.frombuffer(plan.counts, np.int32).astype(np.int64)
    decoding = counts == 1
    context = int(starts[decoding].sum()) + int(decoding.sum())
    chunk, start = counts[~decoding], starts[~decoding]
    pairs = int((chunk * start + chunk * (chunk + 1) // 2).sum())
    sampled = plan.samples.count(1)
    if not plan.copies:
        return Features(len(counts), int(counts.sum()), sampled, context, pairs)
    ends = np.frombuffer(plan.copies, np.int32).reshape(-1, 2).max(axis=1)
    device, disk = int((ends <= num_blocks).sum()), int((ends > num_blocks + host_blocks).sum())
    return Features(len(counts), int(counts.sum()), sampled, context, pairs, len(ends) - device - disk, disk, device)


class StepTime(Protocol):
    """Seconds that a step takes on the device."""

    def seconds(self, step: Features) -> float: ...


@dataclass(frozen=True)
class Gpu:
    """Rates that are reached, not those of the data sheet."""

    weight_bytes_s: float
    kv_bytes_s: float  # reading KV while decoding
    linear_flops: float
    attention_flops: float  # of prefill
    host_bytes_s: float  # each way
    disk_bytes_s: float
    memory_bytes: float


H200 = Gpu(
    weight_bytes_s=0.75 * 4.3e12,  # 4.3 TB/s: a copy on an H200; 0.75: vLLM 0.30 for 1 to 128 streams of Qwen3-8B
    kv_bytes_s=0.85
    * 4.3e12,  # Llama-3.1-8B's inter-token time over its context runs at 0.9 of bandwidth; 0.85 is the aim
    linear_flops=0.85 * 790e12,  # 790 TFLOP/s: bf16 products on an H200; 0.85 of it in prefill is the aim
    attention_flops=350e12,  # the aim for prefill from 4k tokens on; other Triton kernels on Hopper: 115 to 608
    host_bytes_s=50e9,  # one way over PCIe 5, measured with vLLM's offloading on an H100
    disk_bytes_s=5e9,  # assumed: one NVMe drive
    memory_bytes=141e9,
)


@dataclass(frozen=True)
class Model:
    """The shape of a decoder with grouped-query attention."""

    linear_bytes: float  # of all layers, read once a step
    head_bytes: float  # lm_head, likewise
    embedding_bytes: float  # resident, not read
    kv_bytes: int  # of one token
    layers: int
    heads: int
    head_dim: int
    weight_bytes: int = 2  # of one weight


QWEN3_8B = Model(
    linear_bytes=2 * 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288),
    head_bytes=2 * 151_936 * 4096,  # with the above 15.137 GB, as published for a step
    embedding_bytes=2 * 151_936 * 4096,
    kv_bytes=2 * 36 * 8 * 128 * 2,  # 147,456
    layers=36,
    heads=32,
    head_dim=128,
)


@dataclass(frozen=True)
class Roofline:
    """Kernels one after the other, each at the rate of what bounds it."""

    gpu: Gpu = H200
    model: Model = QWEN3_8B
    block_size: int = 16

    def seconds(self, step: Features) -> float:
        gpu, model = self.gpu, self.model
        linear_flops = 2 * model.linear_bytes / model.weight_bytes * step.tokens
        head_flops = 2 * model.head_bytes / model.weight_bytes * step.samples
        linears = max(model.linear_bytes / gpu.weight_bytes_s, linear_flops / gpu.linear_flops)
        head = max(model.head_bytes / gpu.weight_bytes_s, head_flops / gpu.linear_flops) if step.samples else 0.0
        decode = step.context * model.kv_bytes / gpu.kv_bytes_s
        prefill = step.pairs * 4 * model.layers * model.heads * model.head_dim / gpu.attention_flops
        block = self.block_size * model.kv_bytes
        copies = step.host * block / gpu.host_bytes_s + step.disk * block / gpu.disk_bytes_s
        return linears + head + decode + prefill + copies + 2 * step.device * block / gpu.kv_bytes_s

    def kv_tokens(self, share: float = 0.9) -> int:
        """That fit beside the weights in a share of the memory; 3 % of which goes to activations and graphs."""
        model = self.model
        weights = model.linear_bytes + model.head_bytes + model.embedding_bytes
        return int((share * 0.97 * self.gpu.memory_bytes - weights) / model.kv_bytes)


@dataclass(frozen=True)
class Fitted:
    """Seconds for each feature, and for a step as such."""

    constant: float
    weights: tuple[float, ...]  # in the order of `Features`

    def seconds(self, step: Features) -> float:
        return self.constant + sum(map(float.__mul__, self.weights, map(float, step)))

    @classmethod
    def of(cls, steps: Sequence[Features], seconds: Sequence[float]) -> "Fitted":
        """Least squares of the relative error; what comes out negative is left out, the worst first."""
        columns = np.array([(1.0, *step) for step in steps])
        took = np.array(seconds)
        use = [i for i in range(columns.shape[1]) if columns[:, i].any()]
        while True:
            found, *_ = np.linalg.lstsq(columns[:, use] / took[:, None], np.ones(len(took)), rcond=None)
            if (found >= 0).all():
                break
            scaled = found * columns[:, use].mean(axis=0)
            del use[int(scaled.argmin())]
        weights = np.zeros(columns.shape[1])
        weights[use] = found
        return cls(float(weights[0]), tuple(map(float, weights[1:])))

    @classmethod
    def read(cls, path: Path) -> "Fitted":
        """A JSON list of objects with `took_us` and the fields of `Features`, those that are 0 left out if liked."""
        rows = json.loads(path.read_text())
        steps = [Features(*(int(row.get(name, 0)) for name in Features._fields)) for row in rows]
        return cls.of(steps, [row["took_us"] / 1e6 for row in rows])
