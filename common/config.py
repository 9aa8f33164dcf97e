"""Every option, declared once: one typed, described line each.

From a line come the flag, the environment variable (`QUIRE_...`), the YAML key, validation, `--help` and the README's
table (`launch/options.py` makes all of them). Names are vLLM's where the meaning is vLLM's; `aliases` are accepted too.
The structs cross the wire as they are, so every process of an engine works from one command line.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


def option(description: str, *, aliases: tuple[str, ...] = (), metavar: str | None = None, **limits: Any) -> Meta:
    """A field's description and limits. `metavar` names the value in `--help` where the type does not."""
    return Meta(description=description, extra={"aliases": aliases, "metavar": metavar}, **limits)


Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0.0, le=86400.0)]
Gibibytes = Annotated[float, Meta(ge=0.0, le=65536.0)]
Share = Annotated[float, Meta(gt=0.0, le=1.0)]


# fmt: off
# One line an option, however long.


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model"""

    model: Annotated[str, option("Local directory, Hugging Face repository, or 'demo', the built-in model.", metavar="MODEL")] = "demo"
    tokenizer: Annotated[str | None, option("Directory of the tokenizer, when it is not the model's.", metavar="DIR")] = None
    served_model_name: Annotated[tuple[str, ...], option("Names that requests may use for the model. By default the value of --model.", metavar="NAME")] = ()
    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], option("Type of weights and activations; auto: the checkpoint's.")] = "auto"
    max_model_len: Annotated[Positive | None, option("Tokens of prompt and output together. By default the model's own limit.", metavar="TOKENS")] = None
    load_format: Annotated[Literal["auto", "dummy"], option("auto: safetensors; dummy: random weights, only config.json is needed.")] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], option("Where the workers compute; auto: a GPU when there is one.")] = "auto"
    seed: Annotated[int, option("Seed of dummy weights.", ge=0)] = 0
    check_weights: Annotated[bool, option("Look for NaN and infinite weights while loading, and refuse them.")] = False


class CacheConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KV cache"""

    block_size: Annotated[int, option("Tokens per KV block.", ge=1, le=256, metavar="TOKENS")] = 16
    gpu_memory_utilization: Annotated[Share | None, option("Share of the device's memory for weights and KV cache. By default 0.9 of a GPU, 0.5 of the memory that is free on a CPU.", metavar="SHARE")] = None
    kv_cache_memory: Annotated[Positive | None, option("Memory of the KV cache per worker, in place of the share above (4GiB, 512MiB, ...).", aliases=("kv-cache-memory-bytes",), metavar="BYTES")] = None
    num_gpu_blocks_override: Annotated[Positive | None, option("Number of KV blocks, whatever the memory.", metavar="BLOCKS")] = None
    enable_prefix_caching: Annotated[bool, option("Share the KV blocks of equal prefixes.")] = True
    max_pinned: Annotated[float, option("Share of the KV blocks that pinned prefixes (field cache_control) may keep from eviction, all tenants together.", ge=0.0, le=1.0, metavar="SHARE")] = 0.25
    swap_space: Annotated[Gibibytes | None, option("GiB of host memory, for each worker, that take the blocks the device has no room for. By default 4 beside a GPU, none on a CPU.", metavar="GIB")] = None
    kv_disk: Annotated[str | None, option("Directory for blocks that host memory has no room for either. What is there survives a restart.", metavar="DIR")] = None
    kv_disk_space: Annotated[float, option("GiB of --kv-disk, for each worker.", gt=0.0, le=65536.0, metavar="GIB")] = 16.0


class SchedulerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scheduler"""

    max_num_seqs: Annotated[int, option("Sequences that run at once.", ge=1, le=4096, metavar="SEQS")] = 256
    max_num_batched_tokens: Annotated[int, option("Tokens per step; a longer prompt is computed in chunks.", ge=1, metavar="TOKENS")] = 2048
    max_num_queued_reqs: Annotated[Positive | None, option("Sequences that may wait; one more is answered with 503. By default 16 for each of --max-num-seqs.", metavar="SEQS")] = None
    target_itl: Annotated[float, option("Longest time between two tokens of a stream that the prompts of others may bring about, by computing them in smaller chunks; 0 is no limit. Where decoding alone takes more than half of it, it may double.", ge=0.0, le=60000.0, metavar="MILLISECONDS")] = 50.0
    pipeline_depth: Annotated[int, option("Steps in flight: 1 waits for each, 2 plans one while another runs.", ge=1, le=8, metavar="STEPS")] = 2


class ParallelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parallelism"""

    tensor_parallel_size: Annotated[int, option("Workers that split each layer between them.", ge=1, le=64, aliases=("tp",), metavar="N")] = 1
    threads: Annotated[Positive | None, option("CPU threads of each worker. By default the cores divided by the workers, and fewer for a model of few weights.", metavar="N")] = None
    master_addr: Annotated[str | None, option("Address of rank 0, when the workers are on several hosts. By default they meet through a file.", metavar="HOST")] = None
    master_port: Annotated[int, option("Port on --master-addr where the workers meet.", ge=1, le=65535, metavar="PORT")] = 29501


class RecoveryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Recovery"""

    max_restarts: Annotated[int, option("Restarts of dead or stalled processes within a minute; at one more the engine ends with exit code 70.", ge=0, metavar="N")] = 10
    stall_timeout: Annotated[float, option("A process without progress for so long is reported by /health, and started anew after as long again.", ge=1.0, metavar="SECONDS")] = 30.0


class SightConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sight"""

    journal_size: Annotated[int, option("Memory for the journal of what the scheduler is told and decides, for `quire replay`; 0 is no journal.", ge=0, metavar="BYTES")] = 16 << 20
    journal_dir: Annotated[str | None, option("Where journals are written, on the scheduler's host. By default the engine's run directory, which goes with it.", metavar="DIR")] = None
    reveal_prompts: Annotated[bool, option("Let journals and `quire tap` hold the token ids of prompts and outputs. Otherwise others take their place.")] = False


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Server"""

    host: Annotated[str, option("Address to listen on. Anything but loopback should go with --api-key.", metavar="HOST")] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on; 0 picks a free one.", ge=0, le=65535, metavar="PORT")] = 8000
    frontends: Annotated[int, option("HTTP processes that share the port.", ge=1, le=64, aliases=("api-server-count",), metavar="N")] = 1
    api_key: Annotated[tuple[str, ...], option("Keys, one of which each request must bring (Authorization: Bearer ...); as themselves or as sha256:HEX.", metavar="KEY")] = ()
    api_keys_file: Annotated[str | None, option("YAML file of API keys with names, scopes and quotas; read again when it changes.", metavar="FILE")] = None
    max_connections: Annotated[int, option("Open connections of each HTTP process; one more is answered with 503.", ge=1, metavar="N")] = 4096
    overload_status: Annotated[Literal["503", "429"], option("HTTP status when the queue is full.")] = "503"
    chat_template: Annotated[str | None, option("File with a Jinja chat template, in place of the tokenizer's.", metavar="FILE")] = None
    strict_fields: Annotated[bool, option("Answer a request with an unknown field with 400 instead of a warning header.")] = False
    max_body_bytes: Annotated[int, option("Largest request body.", ge=1024, metavar="BYTES")] = 16 << 20
    request_timeout: Annotated[Seconds | None, option("Time from a request's arrival to its last token, for requests that name none (field timeout). By default there is no limit.", metavar="SECONDS")] = None
    max_queue_time: Annotated[Seconds | None, option("Time that a request may wait before anything of it is computed, for requests that name none (field max_queue_time). By default there is no limit.", metavar="SECONDS")] = None
    drain_timeout: Annotated[float, option("Seconds that running requests get to finish after SIGTERM.", ge=0.0, metavar="SECONDS", aliases=("shutdown-timeout",))] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], option("Least severe log lines to print.")] = "info"


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All options of one engine, by group."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    sight: SightConfig = SightConfig()
    server: ServerConfig = ServerConfig()
