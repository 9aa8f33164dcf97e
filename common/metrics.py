"""Every metric, declared once: one line each. They belong to the scheduler; any frontend's /metrics shows them.

Names and buckets are vLLM's where the meaning is the same, so that its dashboards and autoscalers work; ours begin with
"quire:". Counters are exported with the suffix _total.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

M = TypeVar("M", Counter, Gauge)

# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80,
)
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000,
)
STEP_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# fmt: on


class Histogram(Collector):
    """Counts by upper bound. Unlike the library's, it takes many equal values at once: a step gives one per row."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], model_name: str) -> None:
        self._name, self._text, self._bounds, self._model_name = name, text, bounds, model_name
        self._counts = [0] * (len(bounds) + 1)  # the last one is beyond every bound
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric([self._model_name], list(zip(names, accumulate(self._counts), strict=True)), self._sum)
        yield family


class Metrics:
    """One engine's metrics. Construct one per scheduler; nothing is global."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        # fmt: off
        self.running = self._gauge("vllm:num_requests_running", "Sequences that hold a row.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait for a row.")
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.")
        self.blocks_total = self._gauge("quire:kv_blocks", "KV blocks there are.")
        self.blocks_free = self._gauge("quire:kv_blocks_free", "KV blocks that no sequence holds; cached prefixes count as free, pinned ones do not.")
        self.peers = self._gauge("quire:peers", "Processes connected to the scheduler.", "role")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of admitted sequences.")
        self.prompt_tokens_cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self.preemptions = self._counter("vllm:num_preemptions", "Sequences preempted for lack of KV blocks.")
        self.success = self._counter("vllm:request_success", "Finished sequences.", "finished_reason")
        self.rejections = self._counter("vllm:admission_rejections", "Sequences that were not accepted.", "reason")
        self.blocks_moved = self._counter("quire:kv_blocks_moved", "KV blocks that left the device for host memory or disk (saved), came back (restored), or were computed again, being cheaper (recomputed).", "how")
        self.blocks_pinned = self._gauge("quire:kv_blocks_pinned", "KV blocks that pinned prefixes keep from eviction.")
        self.blocks_unpinned = self._counter("quire:kv_blocks_unpinned", "KV blocks that are pinned no more: their time was over (expired), running sequences needed them (pressure), their tenant pinned others or had more than its part (quota), an operator said so (asked), they were lost with the workers (lost) or not to be trusted (forgotten).", "why")
        self.timed_out = self._counter("quire:requests_timed_out", "Sequences that ran out of time (timeout, max_queue_time) before anything was computed for them, or after.", "phase")
        self.bad_frames = self._counter("quire:bad_frames", "Frames that were dropped: they did not decode, or came again.", "wire", "side")
        self.group_losses = self._counter("quire:group_losses", "Worker groups that were lost, at a start or later.", "cause")
        self.recovery_time = self._histogram("quire:recovery_seconds", "From the loss of a worker group that served until another one does.", LATENCY_BUCKETS)
        self.resumed = self._counter("quire:requests_resumed", "Sequences that went on after workers or a scheduler were lost.")
        self.quarantined = self._counter("quire:requests_quarantined", "Sequences that were computed alone, being in flight at two losses in a row.")
        self.step_budget = self._gauge("quire:step_token_budget", "Most tokens of a step; halved when one does not fit the device's memory.")
        self.steps = self._counter("quire:steps", "Steps dispatched to the workers.")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self.itl = self._histogram("vllm:inter_token_latency_seconds", "Between tokens of a sequence.", ITL_BUCKETS)
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", LATENCY_BUCKETS)
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "From arrival to the first row.", LATENCY_BUCKETS)
        self.request_prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of finished sequences.", TOKEN_BUCKETS)
        self.request_generation_tokens = self._histogram("vllm:request_generation_tokens", "Tokens generated by finished sequences.", TOKEN_BUCKETS)
        self.step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens computed per step.", STEP_BUCKETS)
        self.step_time = self._histogram("quire:step_seconds", "From dispatch of a step to its result.", ITL_BUCKETS)
        # fmt: on

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._bind(Gauge(name, text, ("model_name", *labels), registry=self.registry), labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._bind(Counter(name, text, ("model_name", *labels), registry=self.registry), labels)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, bounds, self.model_name)
        self.registry.register(histogram)
        return histogram

    def _bind(self, metric: M, labels: tuple[str, ...]) -> M:
        """Metrics without labels of their own are bound at once; of the others, `metric.labels(model_name, value)` is."""
        return metric if labels else metric.labels(self.model_name)
