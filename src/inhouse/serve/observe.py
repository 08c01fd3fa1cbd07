"""Turns the events of a call, and the state of the engines, into metrics.

Knows the names of `metrics.TABLE`; nothing of protocols.
"""

from collections.abc import Sequence

from inhouse.core.errors import CapacityError, ContextLengthError, InhouseError
from inhouse.engine.request import EmbedEvent, Failed, Request
from inhouse.engine.session import Session
from inhouse.engine.text import TextDelta, TextEnd, TextEvent, TextFailed
from inhouse.serve.metrics import Metrics


class CallObserver:
    """Observes one call. Times are those of time.monotonic().

    Args:
        metrics: where to count.
        model: the label `model_name`.
        requests: of the call, in order.
        arrived: when the call came in.
    """

    def __init__(self, metrics: Metrics, model: str, requests: Sequence[Request], arrived: float) -> None:
        self._metrics, self._model, self._requests, self._arrived = metrics, model, requests, arrived
        self._last: dict[tuple[int, int], float] = {}
        self._first: set[int] = set()
        self._longest: dict[int, int] = {}

    def rejected(self, error: InhouseError) -> None:
        """The engine refused the call at the door."""
        self._metrics.count("admission_rejections", self._model, 1, _reason(error))

    def see(self, index: int, event: TextEvent) -> None:
        """An event of request `index`."""
        if isinstance(event, TextDelta):
            self._delta(index, event)
        elif isinstance(event, TextEnd):
            self._end(index, event)
        elif isinstance(event, TextFailed):
            self._metrics.count("corrupted_requests", self._model)
            self._metrics.count("request_success", self._model, 1, "error")

    def aborted(self, requests: int) -> None:
        """That many requests were still running when the client went away."""
        if requests:
            self._metrics.count("request_success", self._model, requests, "abort")

    def _delta(self, index: int, event: TextDelta) -> None:
        if not event.tokens:
            return
        key = (index, event.choice)
        if index not in self._first:
            self._first.add(index)
            self._observe("time_to_first_token_seconds", event.time - self._arrived)
        if key in self._last:
            self._observe("inter_token_latency_seconds", event.time - self._last[key])
        self._last[key] = event.time

    def _end(self, index: int, event: TextEnd) -> None:
        """Counts a choice; what belongs to the whole request is counted with its last choice."""
        usage, timings, request = event.usage, event.timings, self._requests[index]
        self._longest[index] = max(self._longest.get(index, 0), usage.completion_tokens)
        self._metrics.count("request_success", self._model, 1, event.reason)
        self._observe("request_generation_tokens", usage.completion_tokens)
        if usage.completion_tokens > 1:
            self._observe("request_time_per_output_token_seconds", timings.decode / (usage.completion_tokens - 1))
        if not event.last:
            return
        self._observe("request_prompt_tokens", usage.prompt_tokens)
        self._observe("request_max_num_generation_tokens", self._longest[index])
        self._observe("request_params_n", request.params.n)
        if request.max_tokens is not None:
            self._observe("request_params_max_tokens", request.max_tokens)
        self._observe("e2e_request_latency_seconds", timings.total)
        self._observe("request_queue_time_seconds", timings.queue)
        self._observe("request_inference_time_seconds", timings.prefill + timings.decode)
        self._observe("request_prefill_time_seconds", timings.prefill)
        self._observe("request_decode_time_seconds", timings.decode)

    def _observe(self, name: str, value: float) -> None:
        self._metrics.observe(name, self._model, max(0.0, value))


class VectorObserver:
    """Observes one call that is answered with vectors. `model`: the label `model_name`."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model, self._tokens = metrics, model, 0

    def rejected(self, error: InhouseError) -> None:
        """The engine refused the call at the door."""
        self._metrics.count("admission_rejections", self._model, 1, _reason(error))

    def aborted(self) -> None:
        """The client went away."""
        self._metrics.count("request_success", self._model, 1, "abort")

    def see(self, event: EmbedEvent) -> None:
        """An event of the call; what belongs to the whole request is counted with its last."""
        if isinstance(event, Failed):
            self._metrics.count("corrupted_requests", self._model)
            self._metrics.count("request_success", self._model, 1, "error")
            return
        self._tokens += event.tokens
        if event.last:
            self._metrics.count("request_success", self._model, 1, "stop")
            self._metrics.observe("request_prompt_tokens", self._model, self._tokens)
            self._metrics.observe("e2e_request_latency_seconds", self._model, max(0.0, event.timings.total))
            self._metrics.observe("request_queue_time_seconds", self._model, max(0.0, event.timings.queue))
            self._metrics.observe("request_inference_time_seconds", self._model, max(0.0, event.timings.prefill))


def _reason(error: InhouseError) -> str:
    """Why a call was refused, as the metric has it."""
    if isinstance(error, CapacityError):
        return "capacity"
    return "context_length" if isinstance(error, ContextLengthError) else "invalid"


def observe_engine(metrics: Metrics, session: Session) -> None:
    """Brings gauges and totals up to the engine's own counters, which see every request however it ends."""
    stats = session.engine.stats()
    metrics.level("num_requests_running", session.name, stats.running)
    metrics.level("num_requests_waiting", session.name, stats.waiting + stats.embed_waiting)
    metrics.level("kv_cache_usage_perc", session.name, stats.kv_usage)
    metrics.total("prompt_tokens", session.name, stats.prompt_tokens + stats.embed_tokens)
    metrics.total("embed_inputs", session.name, stats.embed_inputs)
    metrics.total("prompt_tokens_cached", session.name, stats.prefix_hits)
    metrics.total("generation_tokens", session.name, stats.generation_tokens)
    metrics.total("prefix_cache_queries", session.name, stats.prefix_queries)
    metrics.total("prefix_cache_hits", session.name, stats.prefix_hits)
    metrics.total("num_preemptions", session.name, stats.preemptions)


def watch_steps(metrics: Metrics, session: Session) -> None:
    """Observes every step of the session's engine from now on."""
    session.on_step = lambda step: metrics.observe("iteration_tokens_total", session.name, step.tokens)
