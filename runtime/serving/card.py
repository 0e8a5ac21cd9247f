"""What the server says of its model: the entry in /v1/models, with what pruning keeps and what a request may hold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.images.decode import FORMATS
from hivtp_ops import PRESETS, PruningSpec
from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from hivtp.runtime.serving.flow.service import Service


def card(service: Service, name: str, created: int) -> dict[str, Any]:
    """The model under one of its names.

    Args:
        service: serves it.
        name: as clients may call it.
        created: when the server began, in seconds since 1970.
    """
    manifest, settings = service.model.bundle.manifest, service.settings
    vision, sampling = manifest.vision, service.model.manifest.sampling
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "hivtp",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.engine.max_positions,
        "max_tokens": service.max_tokens,
        "capabilities": {"vision": True, "streaming": True, "tools": False},
        "sampling_defaults": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
        },
        "visual_tokens_per_tile": {
            "before": vision.num_image_tokens,
            "kept": vision.num_prefix_tokens + vision.capacity,
        },
        "has_tiles": manifest.tiling is not None,
        "pruning": None if manifest.pruning is None else _pruning(manifest.pruning, vision.grid),
        "limits": {
            "images": settings.max_images,
            "image_bytes": settings.max_image_bytes,
            "image_pixels": settings.max_image_pixels,
            "image_formats": list(FORMATS),
            "body_bytes": settings.max_body_bytes,
        },
    }


def _pruning(spec: PruningSpec, grid: tuple[int, int]) -> dict[str, Any]:
    return {"preset": preset_name(spec, grid), "grid": list(grid), **spec.to_dict()}


def preset_name(spec: PruningSpec, grid: tuple[int, int]) -> str | None:
    """The preset that a rule is, whatever its layers; None where it is none of them."""
    for name in PRESETS:
        try:
            preset = PruningSpec.preset(name, grid)
        except SpecError:
            # This preset does not fit the grid, so that it is another one.
            continue
        if replace(preset, first_layer=spec.first_layer, num_layers=spec.num_layers) == spec:
            return name
    return None
