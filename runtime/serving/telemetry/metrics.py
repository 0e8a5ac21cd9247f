"""What the server counts, in vLLM's words with the prefix `hivtp:`, and what pruning adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client import Counter, Histogram
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """The counters of one server.

    Args:
        model: the label `model_name` of all of them.
        gauges: by name, what is read when somebody asks, and its help.
        totals: the same of what only grows.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(
        self,
        model: str,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        totals: Mapping[str, tuple[str, Callable[[], float]]],
    ) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "serve") from error

        self._registry = CollectorRegistry()
        self._registry.register(_Live(model, gauges, totals))
        self._model = model
        self.prompt_tokens = self._counter("prompt_tokens", "positions of all prompts, visual tokens included")
        self.cached_tokens = self._counter("prompt_tokens_cached", "of these, found in the KV cache")
        self.generation_tokens = self._counter("generation_tokens", "tokens of all answers")
        self.image_tokens = self._counter("image_tokens", "visual tokens before pruning")
        self.kept_tokens = self._counter("kept_image_tokens", "visual tokens that the language model saw")
        self.tiles = self._counter("image_tiles", "tiles of all images")
        self._success = self._labelled("request_success", "answers by how they ended", "finished_reason")
        self._failures = self._labelled("request_failures", "requests by the code of their error", "code")
        self._rejections = self._labelled("admission_rejections", "requests that were refused for want of room", "code")
        self.ttft = self._histogram("time_to_first_token_seconds", "from the request to the first token", SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "between two tokens", STEP_SECONDS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "from the request to the last token", SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "waiting for others", SECONDS)
        self.vision = self._histogram("request_vision_time_seconds", "in the vision stage", SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "from the slot to the first token", SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "from the first token to the last", SECONDS)
        self.loop_lag = self._histogram("event_loop_lag_seconds", "of the loop that answers clients", STEP_SECONDS)
        self.prompt_size = self._histogram("request_prompt_tokens", "positions of a prompt", TOKENS)
        self.answer_size = self._histogram("request_generation_tokens", "tokens of an answer", TOKENS)

    def succeeded(self, reason: str) -> None:
        """Count an answer."""
        self._success.labels(self._model, reason).inc()

    def failed(self, code: str, *, is_rejected: bool) -> None:
        """Count a request that got an error."""
        self._failures.labels(self._model, code).inc()
        if is_rejected:
            self._rejections.labels(self._model, code).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def _counter(self, name: str, purpose: str) -> Counter:
        from prometheus_client import Counter

        return Counter(f"hivtp:{name}", purpose, ["model_name"], registry=self._registry).labels(self._model)

    def _labelled(self, name: str, purpose: str, label: str) -> Counter:
        from prometheus_client import Counter

        return Counter(f"hivtp:{name}", purpose, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, purpose: str, buckets: Iterable[float]) -> Histogram:
        from prometheus_client import Histogram

        histogram = Histogram(
            f"hivtp:{name}", purpose, ["model_name"], registry=self._registry, buckets=tuple(map(float, buckets))
        )
        return histogram.labels(self._model)


class _Live:
    """Reads values when they are asked for."""

    def __init__(
        self,
        model: str,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        totals: Mapping[str, tuple[str, Callable[[], float]]],
    ) -> None:
        self._model = model
        self._gauges = gauges
        self._totals = totals

    def collect(self) -> Iterable[Metric]:
        """All of them; prometheus-client calls it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, (purpose, read) in self._gauges.items():
            gauge = GaugeMetricFamily(f"hivtp:{name}", purpose, labels=["model_name"])
            gauge.add_metric([self._model], read())
            yield gauge
        for name, (purpose, read) in self._totals.items():
            total = CounterMetricFamily(f"hivtp:{name}", purpose, labels=["model_name"])
            total.add_metric([self._model], read())
            yield total
