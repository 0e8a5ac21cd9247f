"""The counters of a service: what each answer adds to them, and what is read when somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.serving.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from hivtp.runtime.serving.flow.admission import Admission
    from hivtp.runtime.serving.flow.engine import Engine
    from hivtp.runtime.serving.flow.exchange import Exchange
    from hivtp.runtime.vision.cache import EmbeddingCache


def make_metrics(model: str, engine: Engine, admission: Admission, cache: EmbeddingCache) -> Metrics:
    """The metrics of a service.

    Args:
        model: what the server calls the model.
        engine: whose state is read.
        admission: whose requests and bytes are counted.
        cache: of images seen before.
    """
    gauges = {
        "num_requests_running": ("requests in a slot", lambda: engine.state.num_running),
        "num_requests_waiting": (
            "requests that wait, or whose images are worked on",
            lambda: max(0, admission.num_inside - engine.state.num_running),
        ),
        "kv_cache_usage_perc": ("share of the KV cache that running requests may need", lambda: engine.state.kv_share),
        "waiting_bytes": ("of requests that wait to be prepared", lambda: admission.num_waiting_bytes),
        "mm_cache_bytes": ("of the embeddings of images seen before", lambda: cache.num_bytes),
    }
    totals = {
        "mm_cache_queries": ("images that were looked up", lambda: cache.num_queries),
        "mm_cache_hits": ("images that had been seen before", lambda: cache.num_hits),
    }
    return Metrics(model, gauges, totals)


def count_answer(metrics: Metrics, exchange: Exchange, finish_reason: str) -> None:
    """Count an answer that has ended."""
    job, usage = exchange.job, exchange.usage
    assert job is not None, "an answer comes of a job"
    begun, first, ended = job.begun_at, job.first_token_at, job.ended_at
    assert begun is not None, "an answer has begun"
    assert first is not None, "an answer has a token"
    assert ended is not None, "an answer has ended"
    metrics.prompt_tokens.inc(usage.num_prompt_tokens)
    metrics.cached_tokens.inc(usage.num_cached_tokens)
    metrics.generation_tokens.inc(usage.num_new_tokens)
    metrics.image_tokens.inc(usage.num_image_tokens)
    metrics.kept_tokens.inc(usage.num_kept_tokens)
    metrics.tiles.inc(sum(len(image.tiles) for image in job.prompt.images))
    metrics.ttft.observe(first - exchange.arrived_at)
    metrics.e2e.observe(ended - exchange.arrived_at)
    metrics.queue.observe(exchange.waited_seconds)
    if job.prompt.images:
        metrics.vision.observe(job.prompt.vision_ms / 1e3)
    metrics.prefill.observe(first - begun)
    metrics.decode.observe(ended - first)
    metrics.prompt_size.observe(usage.num_prompt_tokens)
    metrics.answer_size.observe(usage.num_new_tokens)
    metrics.succeeded(finish_reason)
