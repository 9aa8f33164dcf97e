"""The schedulers that are compared, by name, each as its users get it unless told otherwise."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from quire.common.config import CacheConfig, SchedulerConfig
from quire.scheduler.scheduler import Scheduler

from .fleet import Policy, Setup
from .gpu import H200, QWEN3_8B, Roofline, StepTime
from .vllm import VllmLike

DEVICE = Roofline()
DEFAULTS = SchedulerConfig()


@dataclass(frozen=True)
class Machine:
    """What the schedulers have to serve with: by default, Qwen3-8B on one H200."""

    step_time: StepTime = DEVICE
    kv_tokens: int = DEVICE.kv_tokens()
    host_tokens: int = 0  # --swap-space
    block_size: int = 16
    max_model_len: int = 40_960
    depth: int = 2

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.block_size

    @property
    def host_blocks(self) -> int:
        return self.host_tokens // self.block_size


@dataclass(frozen=True)
class Choice:
    """What of a policy is not its default."""

    scheduler: SchedulerConfig = DEFAULTS
    max_queue_s: float = 0.0


Maker = Callable[[Machine, Choice], Policy]


def quire(machine: Machine, choice: Choice) -> Policy:
    cache = CacheConfig(block_size=machine.block_size)
    scheduler = Scheduler(
        choice.scheduler, cache, machine.num_blocks, machine.max_model_len, num_host_blocks=machine.host_blocks
    )
    block_bytes = machine.block_size * QWEN3_8B.kv_bytes
    scheduler.kv.restoring_takes(block_bytes / H200.host_bytes_s, block_bytes / H200.disk_bytes_s)
    return scheduler


def vllm(machine: Machine, choice: Choice) -> Policy:  # noqa: ARG001  # its defaults, whatever ours are told
    return VllmLike(machine.num_blocks, machine.block_size, machine.max_model_len)


def vllm_2048(machine: Machine, choice: Choice) -> Policy:  # noqa: ARG001
    return VllmLike(machine.num_blocks, machine.block_size, machine.max_model_len, max_num_batched_tokens=2048)


def unpaced(machine: Machine, choice: Choice) -> Policy:
    return quire(machine, replace(choice, scheduler=unpaced_config(choice.scheduler)))


@dataclass(frozen=True)
class Kind:
    """`patient`: its clients wait however long it takes, --max-queue or not."""

    make: Maker
    patient: bool
    what: str


KINDS = {
    "quire": Kind(quire, False, "ours; clients give up after --max-queue"),
    "quire-patient": Kind(quire, True, "ours; clients wait however long it takes"),
    "quire-unpaced": Kind(unpaced, False, "ours without --target-itl; clients give up after --max-queue"),
    "vllm": Kind(vllm, True, "vLLM's defaults (it knows no limit on waiting)"),
    "vllm-impatient": Kind(vllm, False, "vLLM's defaults; clients give up after --max-queue"),
    "vllm-2048": Kind(vllm_2048, True, "vLLM with the 2,048 tokens a step that it once had"),
}


def setup(name: str, machine: Machine, choice: Choice) -> Setup:
    kind = KINDS[name]
    return Setup(
        make=lambda: kind.make(machine, choice),
        step_time=machine.step_time,
        max_model_len=machine.max_model_len,
        block_size=machine.block_size,
        host_blocks=machine.host_blocks,
        depth=machine.depth,
        max_queue_s=0.0 if kind.patient else choice.max_queue_s,
    )


def paced_config(config: SchedulerConfig, target_itl_ms: float | None) -> SchedulerConfig:
    fields = {name: getattr(config, name) for name in config.__struct_fields__}
    if target_itl_ms is not None and "target_itl" in fields:
        fields["target_itl"] = target_itl_ms
    return SchedulerConfig(**fields)


def unpaced_config(config: SchedulerConfig) -> SchedulerConfig:
    return paced_config(config, 0.0)
