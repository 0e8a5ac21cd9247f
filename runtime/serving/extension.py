"""What hivtp tells beyond OpenAI's fields, where a request asks for it: pruning in numbers, and where it kept what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.runtime.vision.overlay import is_of_global_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.model import Model
    from hivtp.runtime.serving.flow.exchange import Exchange
    from hivtp.runtime.vision.encoder import EncodedImage
    from hivtp.runtime.vision.stage import KeptPatches


def extension(model: Model, exchange: Exchange, answer: Answer) -> dict[str, Any]:
    """The field `hivtp` of a whole answer to a request that has it: `counts`, and `kept` where it is asked for."""
    found = counts(exchange, answer)
    return {**found, **kept(model, exchange)} if has_images(exchange) else found


def has_images(exchange: Exchange) -> bool:
    """Whether the request asks where pruning kept what."""
    return exchange.work is not None and bool(exchange.work.chat.includes)


def counts(exchange: Exchange, answer: Answer) -> dict[str, Any]:
    """What the last chunk of a stream says.

    `image_tokens` and `kept_tokens` count visual tokens before and after pruning; `timings` are in milliseconds.
    """
    job = exchange.job
    assert job is not None, "an answer comes of a job"
    usage, timings = exchange.usage, answer.timings
    first, begun = job.first_token_at or 0.0, job.begun_at or 0.0
    decode_ms = timings.decode_ms_per_token
    return {
        "image_tokens": usage.num_image_tokens,
        "kept_tokens": usage.num_kept_tokens,
        "timings": {
            "queue_ms": round(exchange.waited_seconds * 1e3, 3),
            "preprocess_ms": round(timings.preprocess_ms, 3),
            "vision_ms": round(timings.vision_ms, 3),
            "prefill_ms": round((first - begun) * 1e3, 3),
            "ttft_ms": round((first - exchange.arrived_at) * 1e3, 3),
            "decode_ms_per_token": None if decode_ms is None else round(decode_ms, 3),
        },
    }


def kept(model: Model, exchange: Exchange) -> dict[str, Any]:
    """What the chunk after a stream's first token says: it is known before the answer, which may be long, or stopped.

    `images` has for each image of the conversation:

    * `width`, `height` of the upright image in pixels, `grid` [rows, cols] of patches in a tile, and both counts.
    * `views`: how tiles show the image. Each has `tile_rows` and `tile_cols`, and `region` [left, top, right, bottom],
      what its tiles together show, in pixels of the image; padding lies outside of the image.
    * `tiles` of a view, in raster order: `kept_indices`, raster indices of patches in the tile, ascending; and
      `is_global`, for each whether the global stage kept it, null where nothing is pruned. With "importance" in
      `include` also `importance`, the score of every patch; null stands for padding.
    """
    work, job = exchange.work, exchange.job
    assert work is not None, "an answer comes of what was read"
    assert job is not None, "an answer comes of a job"
    has_scores = "importance" in (work.chat.includes or ())
    images = zip(job.prompt.images, work.sizes, strict=True)
    number = len(work.sizes)
    return {"images": [_image(model, image, size, number, has_scores=has_scores) for image, size in images]}


def _image(
    model: Model, image: EncodedImage, size: tuple[int, int], num_images: int, *, has_scores: bool
) -> dict[str, Any]:
    height, width = size
    manifest = model.bundle.manifest
    tiles = iter(image.tiles)
    views = [
        {
            "tile_rows": view.tile_rows,
            "tile_cols": view.tile_cols,
            "region": list(view.region),
            "tiles": [
                _tile(model, tile, has_scores=has_scores) for tile in _take(tiles, view.tile_rows * view.tile_cols)
            ],
        }
        for view in model.images.views(size, num_images)
    ]
    return {
        "width": width,
        "height": height,
        "grid": list(manifest.vision.grid),
        "image_tokens": image.num_unpruned_tokens,
        "kept_tokens": len(image.embeds),
        "views": views,
    }


def _tile(model: Model, tile: KeptPatches, *, has_scores: bool) -> dict[str, Any]:
    manifest = model.bundle.manifest
    is_global = is_of_global_stage(tile, manifest.vision.grid, manifest.pruning)
    found: dict[str, Any] = {
        "kept_indices": tile.kept_indices.tolist(),
        "is_global": None if is_global is None else is_global.tolist(),
    }
    if has_scores:
        scores = [] if tile.importance is None else tile.importance.tolist()
        # JSON has no infinity, which is what a patch of the padding scores.
        found["importance"] = [score if score > float("-inf") else None for score in scores]
    return found


def _take(tiles: Iterator[KeptPatches], number: int) -> list[KeptPatches]:
    return [next(tiles) for _ in range(number)]
