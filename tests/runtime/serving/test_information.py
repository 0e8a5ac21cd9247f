"""What the server tells of itself: the model, how long a conversation is, what pruning kept, counters and the log."""

from __future__ import annotations

import io
import json
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.serving.card import preset_name
from hivtp.runtime.serving.telemetry.logs import LineFormatter, log, logger, logging_to, where
from hivtp_ops import PRESETS, PruningSpec, select
from tests.support.answers import load
from tests.support.serving import CHAT, asking, body, random_image, serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp import Pipeline
    from tests.support.serving import Server


def tokenized(server: Server, content: Any) -> dict[str, Any]:
    response = server.client.post("/tokenize", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_card_says_what_the_model_takes(server: Server, pruned: Pipeline):
    [card] = server.client.get("/v1/models").json()["data"]
    assert card == server.client.get("/v1/models/hivtp").json()
    assert (card["id"], card["object"], card["max_model_len"]) == ("hivtp", "model", 512)
    assert card["sampling_defaults"]["temperature"] == 0
    assert card["visual_tokens_per_tile"] == {
        "before": pruned.model.bundle.manifest.vision.num_image_tokens,
        "kept": pruned.model.bundle.manifest.vision.capacity,
    }
    assert not card["has_tiles"]
    assert card["pruning"] == {
        "preset": "paper",
        "grid": list(pruned.model.bundle.manifest.vision.grid),
        **pruned.model.bundle.manifest.pruning.to_dict(),
    }
    settings = server.service.settings
    assert card["limits"] == {
        "images": settings.max_images,
        "image_bytes": settings.max_image_bytes,
        "image_pixels": settings.max_image_pixels,
        "image_formats": ["JPEG", "PNG", "WEBP", "GIF", "BMP"],
        "body_bytes": settings.max_body_bytes,
    }


def test_a_preset_is_known_by_its_rule():
    for grid in ((24, 24), (12, 12), (27, 27)):
        for name in PRESETS:
            spec = PruningSpec.preset(name, grid)
            assert preset_name(spec.resolve(24), grid) == name
            assert preset_name(replace(spec, global_ratio=0.3), grid) is None
    # One that a small grid has no room for is none of its rules.
    assert preset_name(PruningSpec(window=3, regions=1, keep=2), (3, 3)) is None


def test_a_conversation_is_counted_as_the_decoder_sees_it(exact_bundle: Path, server: Server):
    image = random_image(1)
    # A rule whose count is fixed is counted exactly.
    pipeline = load(exact_bundle)
    with serving(pipeline.model) as exact:
        for content in ("what is it", asking("what is it", image), asking("how", image, random_image(2, 30, 90))):
            found = tokenized(exact, content)
            assert found["is_exact"]
            assert found["count"] == exact.chat(content).json()["usage"]["prompt_tokens"]
    pipeline.close()
    # Else at most.
    found = tokenized(server, asking("what is it", image))
    assert not found["is_exact"]
    assert found["count"] >= server.chat(asking("what is it", image)).json()["usage"]["prompt_tokens"]
    assert tokenized(server, "what is it")["is_exact"]


def test_a_text_is_counted(server: Server, pruned: Pipeline):
    found = server.client.post("/tokenize", json={"prompt": "what is it"}).json()
    assert found["tokens"] == pruned.model.tokenizer.encode("what is it")
    assert found["count"] == len(found["tokens"])
    for wrong in ({}, {"prompt": 3}, {"messages": []}, {"prompt": "a", "model": "other"}):
        assert server.client.post("/tokenize", json=wrong).status_code in (400, 404)


def test_pruning_is_told_where_it_is_asked_for(server: Server, pruned: Pipeline):
    images = [random_image(11, 96, 64), random_image(12, 50, 80)]
    content = asking("what is it", *images)
    assert "hivtp" not in server.chat(content).json()
    short = server.chat(content, hivtp={}).json()
    assert set(short["hivtp"]) == {"image_tokens", "kept_tokens", "timings"}
    assert set(short["hivtp"]["timings"]) == {
        "queue_ms",
        "preprocess_ms",
        "vision_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms_per_token",
    }
    found = server.chat(content, hivtp={"include": ["kept_indices", "importance"]}).json()
    # A stream tells it before the words, since an answer may be long, or stopped.
    first, told, *words, last = server.stream(content, hivtp={"include": ["kept_indices", "importance"]})
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert told["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}
    assert told["hivtp"] == {"images": found["hivtp"]["images"]}
    assert not any("hivtp" in chunk for chunk in words)
    assert set(last["hivtp"]) == set(short["hivtp"])
    assert last["hivtp"]["kept_tokens"] == found["hivtp"]["kept_tokens"]
    *words, last = server.stream(content, hivtp={})
    assert not any("hivtp" in chunk for chunk in words)
    assert set(last["hivtp"]) == set(short["hivtp"])

    answer = pruned.generate("<image> what is it <image>", [Image.open(io.BytesIO(image)) for image in images])
    details = found["usage"]["prompt_tokens_details"]
    assert found["hivtp"]["image_tokens"] == answer.num_image_tokens == details["unpruned_multimodal_tokens"]["image"]
    assert found["hivtp"]["kept_tokens"] == answer.num_kept_tokens == details["multimodal_tokens"]["image"]
    manifest = pruned.model.bundle.manifest
    for image, size, kept in zip(found["hivtp"]["images"], [(64, 96), (80, 50)], answer.kept_indices, strict=True):
        assert (image["height"], image["width"]) == size
        assert image["grid"] == list(manifest.vision.grid)
        assert image["image_tokens"] == manifest.vision.num_image_tokens
        assert image["kept_tokens"] == len(kept)
        [view] = image["views"]
        [tile] = view["tiles"]
        assert (view["tile_rows"], view["tile_cols"]) == (1, 1)
        assert tile["kept_indices"] == kept
        scores = np.array([tile["importance"]], np.float32)
        selection = select(scores, manifest.vision.grid, manifest.pruning)
        assert selection.indices[0, : selection.counts[0]].tolist() == kept
        expected = dict(zip(selection.indices[0].tolist(), selection.is_global[0].tolist(), strict=True))
        assert tile["is_global"] == [expected[index] for index in kept]
        assert 0 < sum(tile["is_global"]) < len(kept)


def test_an_unpruned_model_has_no_stages(unpruned: Pipeline):
    with serving(unpruned.model) as server:
        found = server.chat(asking("what", random_image(1)), hivtp={"include": ["kept_indices", "importance"]}).json()
        [image] = found["hivtp"]["images"]
        assert image["kept_tokens"] == image["image_tokens"]
        [tile] = image["views"][0]["tiles"]
        assert len(tile["kept_indices"]) == image["image_tokens"]
        assert tile["is_global"] is None
        assert tile["importance"] == []
        assert server.client.get("/v1/models/hivtp").json()["pruning"] is None


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (50, 50), (20, 200)], ids=str)
@pytest.mark.parametrize("options", [{}, {"do_pad": True}, {"size": (30, 40), "do_center_crop": False}, {"size": 20}])
def test_the_region_of_a_tile_is_what_it_shows(size: tuple[int, int], options: dict[str, Any]):
    """A white spot of the image is where the region says."""
    processor = ImageProcessor(**{"size": 32, "crop_size": (32, 32), **options})
    left, top, right, bottom = processor.region(size)
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    row, col = height // 2, width // 2
    pixels[row - 2 : row + 2, col - 2 : col + 2] = 255
    seen = np.asarray(processor.frame(Image.fromarray(pixels)).convert("L"), np.float64)
    seen[seen < 60] = 0
    rows, cols = np.indices(seen.shape)
    found = [(index * seen).sum() / seen.sum() + 0.5 for index in (rows, cols)]
    assert top + found[0] / seen.shape[0] * (bottom - top) == pytest.approx(row, abs=1.5)
    assert left + found[1] / seen.shape[1] * (right - left) == pytest.approx(col, abs=1.5)


@pytest.fixture(scope="module")
def make_next_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a tiny LLaVA-NeXT with these settings."""
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("next") / "checkpoint", family="llava_next", text=text)

    def make(**settings: Any) -> Path:
        return export_bundle(
            checkpoint, tmp_path_factory.mktemp("exported") / "bundle", ExportSettings(**settings), is_quiet=True
        ).folder

    return make


def test_the_tiles_of_llava_next_are_told(make_next_bundle: Callable[..., Path]):
    pipeline = load(make_next_bundle())
    with serving(pipeline.model) as server:
        image = random_image(5, 120, 60)
        content = asking("what is it", image)
        found = server.chat(content, hivtp={"include": ["kept_indices"]}).json()
        [told] = found["hivtp"]["images"]
        base, grid = told["views"]
        assert (base["tile_rows"], base["tile_cols"], base["region"]) == (1, 1, [0, 0, 120, 60])
        assert len(grid["tiles"]) == grid["tile_rows"] * grid["tile_cols"] > 1
        left, top, right, bottom = grid["region"]
        # The image fills the tiles in one direction, and padding the rest on both sides.
        assert left <= 0.5
        assert top <= 0.5
        assert right >= 119.5
        assert bottom >= 59.5
        assert (right - left) / (bottom - top) == pytest.approx(grid["tile_cols"] / grid["tile_rows"])
        answer = pipeline.generate("what is it", [image])
        tiles = [tile["kept_indices"] for view in told["views"] for tile in view["tiles"]]
        assert tiles == answer.kept_indices
        count = tokenized(server, content)
        assert count["count"] >= found["usage"]["prompt_tokens"]
        assert count["image_tokens"][0] < told["image_tokens"]
        assert server.metric("image_tiles_total") == len(tiles)
        assert server.client.get("/v1/models/hivtp").json()["has_tiles"]
    pipeline.close()
    unpruned = load(make_next_bundle(is_pruned=False))
    with serving(unpruned.model) as server:
        count = tokenized(server, content)
        assert count["is_exact"]
        assert count["count"] == server.chat(content).json()["usage"]["prompt_tokens"]
    unpruned.close()


def test_the_counters_are_those_of_the_answers(pruned: Pipeline):
    with serving(pruned.model, model_names=("m",)) as server:
        images = [random_image(21), random_image(22)]
        usages = [server.chat(asking("what is it", image)).json()["usage"] for image in images]
        usages.append(server.chat("how many", max_tokens=2, ignore_eos=True).json()["usage"])
        assert server.chat("what", n=3).status_code == 400
        total = {
            "prompt_tokens_total": sum(usage["prompt_tokens"] for usage in usages),
            "generation_tokens_total": sum(usage["completion_tokens"] for usage in usages),
            "kept_image_tokens_total": sum(
                usage["prompt_tokens_details"]["multimodal_tokens"]["image"] for usage in usages
            ),
            "image_tokens_total": sum(
                usage["prompt_tokens_details"]["unpruned_multimodal_tokens"]["image"] for usage in usages
            ),
            "image_tiles_total": 2,
            "time_to_first_token_seconds_count": 3,
            "e2e_request_latency_seconds_count": 3,
            "request_queue_time_seconds_count": 3,
            "request_prefill_time_seconds_count": 3,
            "request_decode_time_seconds_count": 3,
            "request_vision_time_seconds_count": 2,
            "request_prompt_tokens_sum": sum(usage["prompt_tokens"] for usage in usages),
            "inter_token_latency_seconds_count": sum(usage["completion_tokens"] - 1 for usage in usages),
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
        }
        for name, value in total.items():
            assert server.metric(name, model_name="m") == value, name
        assert server.metric("request_success_total", finished_reason="length") >= 1
        assert server.metric("request_failures_total", code="unsupported") == 1
        assert server.client.head("/metrics").status_code == 200


def test_a_line_is_json_or_text():
    record = logging.LogRecord("hivtp.serving", logging.INFO, "x.py", 1, "request", None, None)
    record.fields = {"id": "a", "ms": 1.5}
    line = json.loads(LineFormatter(is_json=True).format(record))
    assert {**line, "time": None} == {"time": None, "level": "info", "event": "request", "id": "a", "ms": 1.5}
    text = LineFormatter(is_json=False).format(record)
    assert text.endswith('INFO request id="a" ms=1.5')
    record.fields = {"path": "/a\nb"}
    assert "\n" not in LineFormatter(is_json=False).format(record)
    assert "\n" not in LineFormatter(is_json=True).format(record)


def test_an_error_is_logged_without_its_words():
    def inner() -> None:
        raise KeyError("what the user said")

    try:
        try:
            inner()
        except KeyError as error:
            raise ValueError("more of it") from error
    except ValueError as error:
        found = where(error)
    assert [place.split(" at ")[0] for place in found] == ["ValueError", "KeyError"]
    assert "inner" in found[1]
    assert "said" not in str(found)


def test_a_log_that_cannot_be_written_costs_no_answer(pruned: Pipeline):
    class FullDisk(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    class Stuck(io.StringIO):
        def write(self, _text: str) -> int:
            time.sleep(0.5)
            return 0

    for stream in (FullDisk(), Stuck()):
        with logging_to(stream, "json"), serving(pruned.model) as server:
            started = time.monotonic()
            for _ in range(20):
                assert server.chat("what", max_tokens=1).status_code == 200
            assert time.monotonic() - started < 5
        assert logger.handlers == []


def test_the_log_has_counts_and_no_words(pruned: Pipeline):
    stream = io.StringIO()
    secret, image = "pelican umbrella", random_image(31)
    with logging_to(stream, "json"), serving(pruned.model, api_keys=("the-key",)) as server:
        server.client.headers["authorization"] = "Bearer the-key"
        server.chat(asking(secret, image), user=secret)
        server.chat(asking(secret, image), stream=True)
        server.chat(secret, n=7)
        server.chat(asking(secret, b"no image"))
        server.chat(f"{secret} " * 600)
        server.client.post(CHAT, json=body(secret), headers={"authorization": "Bearer wrong-key"})
        log(logging.INFO, "end")
    text = stream.getvalue()
    assert secret not in text
    assert "data:" not in text
    assert "key" not in text.replace("invalid_api_key", "")
    lines = [json.loads(line) for line in text.splitlines()]
    whole, streamed, *refused = [line for line in lines if line["event"] == "request"]
    for line in (whole, streamed):
        assert (line["status"], line["images"], line["finish"] in ("stop", "length")) == (200, 1, True)
        assert line["kept_tokens"] > 0
        assert {"queue_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms", "ttft_ms"} <= set(line)
    codes = [(line["status"], line["code"]) for line in refused]
    assert codes == [
        (400, "unsupported"),
        (400, "invalid_image"),
        (400, "context_length_exceeded"),
        (401, "invalid_api_key"),
    ]
    assert len({line["id"] for line in lines if "id" in line}) == 6
