"""Metrics in Prometheus text, under the names and buckets that vLLM gave them, so that dashboards carry over.

The prefix is `inhouse:`, or `vllm:` by a switch. All names stand in one table; a test compares it with the docs.
Only what this engine has is listed: a gauge that could never move would be a lie on a dashboard.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric; counters are exported with `_total`, histograms with `_bucket`, `_sum` and `_count`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()  # beside model_name and engine
    buckets: tuple[float, ...] = ()


TABLE: tuple[Row, ...] = (
    Row("num_requests_running", "gauge", "requests in the running batch"),
    Row("num_requests_waiting", "gauge", "requests waiting to be scheduled"),
    Row("kv_cache_usage_perc", "gauge", "used share of the KV blocks, 0 to 1"),
    Row("prefix_cache_queries", "counter", "prompt tokens looked up in the prefix cache"),
    Row("prefix_cache_hits", "counter", "prompt tokens found in the prefix cache"),
    Row("num_preemptions", "counter", "sequences sent back to the queue because blocks ran out"),
    Row("admission_rejections", "counter", "requests refused at the door", ("reason",)),
    Row("prompt_tokens", "counter", "prompt tokens that were computed or found"),
    Row("prompt_tokens_cached", "counter", "of these, tokens taken from the prefix cache"),
    Row("generation_tokens", "counter", "tokens generated"),
    Row("embed_inputs", "counter", "inputs answered with vectors or scores"),
    Row("request_success", "counter", "choices that ended: stop, length, abort, error", ("finished_reason",)),
    Row("corrupted_requests", "counter", "requests that ended because a step failed"),
    Row("iteration_tokens_total", "histogram", "tokens computed in a step", (), _ITERATION),
    Row("request_prompt_tokens", "histogram", "prompt tokens a request", (), _TOKENS),
    Row("request_generation_tokens", "histogram", "generated tokens a request", (), _TOKENS),
    Row("request_max_num_generation_tokens", "histogram", "longest choice of a request", (), _TOKENS),
    Row("request_params_n", "histogram", "choices asked for", (), _N),
    Row("request_params_max_tokens", "histogram", "token limit asked for", (), _TOKENS),
    Row("time_to_first_token_seconds", "histogram", "from arrival to the first token", (), _TTFT),
    Row("inter_token_latency_seconds", "histogram", "between two tokens of one choice", (), _ITL),
    Row("request_time_per_output_token_seconds", "histogram", "mean time a token after the first", (), _ITL),
    Row("e2e_request_latency_seconds", "histogram", "from arrival to the end", (), _LATENCY),
    Row("request_queue_time_seconds", "histogram", "waiting before the first step", (), _LATENCY),
    Row("request_inference_time_seconds", "histogram", "from the first step to the end", (), _LATENCY),
    Row("request_prefill_time_seconds", "histogram", "from the first step to the first token", (), _LATENCY),
    Row("request_decode_time_seconds", "histogram", "from the first token to the end", (), _LATENCY),
)

_CLASSES: Mapping[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Metrics:
    """All metrics of one server, in a registry of its own (nothing global, so tests can run two).

    Args:
        prefix: `inhouse:` or `vllm:`.
    """

    def __init__(self, prefix: str = "inhouse:") -> None:
        self._registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, str], float] = {}
        for row in TABLE:
            extra = {"buckets": row.buckets} if row.buckets else {}
            labels = ("model_name", "engine", *row.labels)
            name = prefix + row.name
            self._metrics[row.name] = _CLASSES[row.kind](name, row.help, labels, registry=self._registry, **extra)

    def _child(self, name: str, model: str, labels: Iterable[str]) -> Any:
        return self._metrics[name].labels(model, "0", *labels)

    def count(self, name: str, model: str, amount: float = 1, *labels: str) -> None:
        """Adds to a counter."""
        self._child(name, model, labels).inc(amount)

    def total(self, name: str, model: str, value: float) -> None:
        """Brings a counter up to a total that is counted elsewhere."""
        before = self._totals.get((name, model), 0.0)
        if value > before:
            self._totals[name, model] = value
            self.count(name, model, value - before)

    def level(self, name: str, model: str, value: float) -> None:
        """Sets a gauge."""
        self._child(name, model, ()).set(value)

    def observe(self, name: str, model: str, value: float) -> None:
        """Adds one observation to a histogram."""
        self._child(name, model, ()).observe(value)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)
