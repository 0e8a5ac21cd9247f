"""Spans of OpenTelemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hivtp.runtime.serving.tracing import Tracing
from tests.support.serving import CHAT, asking, body, random_image, serving

if TYPE_CHECKING:
    import pytest

    from hivtp import Pipeline


def test_an_answer_is_a_span_with_its_stages(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(pruned.model, model_names=("m",)) as server:
        content = body(asking("what is it", random_image(1)), ignore_eos=True)
        usage = server.client.post(CHAT, json=content, headers={"traceparent": parent}).json()["usage"]
        assert server.chat("what", n=2).status_code == 400
    *stages, chat, refused = exporter.get_finished_spans()
    assert [span.name for span in (*stages, chat, refused)] == ["prepare", "prefill", "decode", "chat", "chat"]
    assert format(chat.context.trace_id, "032x") == parent.split("-")[1]
    assert format(chat.parent.span_id, "016x") == parent.split("-")[2]
    assert {span.parent.span_id for span in stages} == {chat.context.span_id}
    assert chat.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert chat.attributes["hivtp.kept_tokens"] == usage["prompt_tokens_details"]["multimodal_tokens"]["image"]
    assert refused.attributes["error.type"] == "unsupported"
    ends = [(span.start_time, span.end_time) for span in (*stages, chat)]
    assert all(start <= end for start, end in ends)
    assert chat.start_time == stages[0].start_time
    assert [span.end_time for span in stages[:2]] == [span.start_time for span in stages[1:]]


def test_without_the_package_there_are_no_spans(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    assert Tracing()._tracer is None
