"""The vision tower of a transformers model in PyTorch: features of a layer, and the scores of the middle ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hivtp.runtime.config import read_config
from hivtp.runtime.language.torch_errors import require_packages, torch_errors
from hivtp.runtime.language.transformers import torch_device
from hivtp.runtime.weights import open_source
from hivtp_ops.errors import ScoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hivtp.engines.base import Arrays
    from hivtp.engines.bundle import Bundle
    from hivtp.runtime.language.options import LanguageOptions

# Bounds the attention maps of a scoring layer: 21 MB for each tile of CLIP ViT-L/14 at 336 px.
TILES_PER_MAP = 4


class LayerRunner(Protocol):
    """How the encoder layers of a tower are run."""

    def run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a layer on [tiles, tokens, width]."""

    def run_scoring(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of a layer, and the attention [tiles, tokens] float32 that each token receives; see `attend`."""


def run_tower(
    tower: Any,
    tiles: torch.Tensor,
    feature_layers: Sequence[int],
    scoring_layers: range,
    layers: LayerRunner | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a CLIP tower up to the layers that are asked for.

    Args:
        tower: a `transformers.CLIPVisionModel`, or what has its parts.
        tiles: [tiles, 3, H, W].
        feature_layers: whose outputs are the features, as `hidden_states` numbers them: i is the output of i layers.
        scoring_layers: 0-based layers whose attention is read; none where nothing is pruned.
        layers: runs a layer; None runs those of transformers.

    Returns:
        Features [tiles, 1 + patches, width of all feature layers together]; and importance [tiles, patches] float32,
        the mean attention that each patch receives over layers, heads and queries, or None.

    Source: HIVTP (arXiv 2509.23663), importance.
    """
    import torch

    layers = layers or TransformersLayers()
    hidden = tower.pre_layrnorm(tower.embeddings(tiles))
    states, scores = {0: hidden}, []
    for index, layer in enumerate(tower.encoder.layers[: max(*feature_layers, scoring_layers.stop)]):
        if index in scoring_layers:
            outputs = [layers.run_scoring(layer, part) for part in hidden.split(TILES_PER_MAP)]
            hidden, received = (torch.cat(parts) for parts in zip(*outputs, strict=True))
            scores.append(received)
        else:
            hidden = layers.run(layer, hidden)
        if index + 1 in feature_layers:
            states[index + 1] = hidden
    features = torch.cat([states[index] for index in feature_layers], dim=-1)
    return features, torch.stack(scores).mean(dim=0)[:, 1:] if scores else None


class TransformersLayers:
    """See LayerRunner: the layers of transformers."""

    def run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """See LayerRunner.run."""
        output: torch.Tensor = layer(hidden, attention_mask=None)
        return output

    def run_scoring(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerRunner.run_scoring."""
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        projected = [project(normed) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
        mixed, received = attend(projected, attention.head_dim, attention.scale)
        hidden = hidden + attention.out_proj(mixed)
        return hidden + layer.mlp(layer.layer_norm2(hidden)), received


def attend(projected: Sequence[torch.Tensor], head_size: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the mean attention that each token receives over heads and queries.

    Both come from one map. For ViT-L on a CPU that costs a tenth more than a layer with fused attention; the scores
    beside the fused layer would cost three tenths.

    Args:
        projected: queries, keys and values, each [tiles, tokens, heads * head_size].
        head_size: of a head.
        scale: of the products of queries and keys.

    Returns:
        What `out_proj` takes, of the shape and dtype of the values; and [tiles, tokens] float32.
    """
    queries, keys, values = (part.reshape(*part.shape[:2], -1, head_size).transpose(1, 2) for part in projected)
    weights = (queries.float() * scale @ keys.float().transpose(2, 3)).softmax(dim=-1)
    mixed = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)
    return mixed, weights.mean(dim=(1, 2))


class TransformersVision:
    """An Engine that computes what the bundle's vision graph does, from the checkpoint's weights, in PyTorch.

    Args:
        bundle: says which rule prunes.
        options: the checkpoint, the device and the dtype, those of the language model.

    Raises:
        CheckpointError: the checkpoint is damaged, or not the one that the bundle was exported from.
        EngineError: torch cannot load it.
        MissingExtraError: torch, transformers or safetensors is not installed.
        SettingsError: torch has no such device.
    """

    max_tiles: int | None = None

    def __init__(self, bundle: Bundle, options: LanguageOptions) -> None:
        assert options.checkpoint is not None, "LanguageOptions asks for it"
        require_packages("torch", "transformers", "safetensors", extra="transformers")
        import torch
        from transformers import CLIPVisionModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        self._manifest = bundle.manifest
        self._spec = bundle.manifest.pruning
        device, dtype = torch_device(options.device, options.dtype), getattr(torch, options.dtype)
        weights = open_source(options.checkpoint, bundle.manifest)
        config = read_config(weights.folder)
        self._feature_layer = range(config.vision_config.num_hidden_layers + 1)[config.vision_feature_layer]
        with torch.device("meta"):
            tower, projector = CLIPVisionModel(config.vision_config), LlavaMultiModalProjector(config)
        with torch_errors(device, "vision tower"):
            for module, prefix in ((tower, "vision."), (projector, "projector.")):
                state = {name: tensor.to(device, dtype) for name, tensor in weights.part(prefix).items()}
                module.load_state_dict(state, strict=False, assign=True)
        embeddings = tower.embeddings
        # A buffer that checkpoints leave out, so it is made anew off the meta device.
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
        self._tower, self._projector = tower.eval(), projector.eval()
        self._device, self._dtype = device, dtype
        self.description = f"transformers in {options.dtype}"
        pruned = () if self._spec is None else ("kept_indices", "kept_counts", "importance")
        self.output_names = ("image_embeds", *pruned)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        import torch

        with torch_errors(self._device, "vision tower"), torch.inference_mode():
            outputs = self._run({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()})
            return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def _run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        from hivtp_ops import torch_op

        vision, spec = self._manifest.vision, self._spec
        scoring = range(0) if spec is None else spec.scoring_layers
        tiles = inputs["pixel_values"].to(self._device, self._dtype)
        features, importance = run_tower(self._tower, tiles, [self._feature_layer], scoring)
        prefix = vision.num_prefix_tokens
        if spec is None or importance is None:
            return {"image_embeds": self._projector(features[:, 1 - prefix :]).float()}
        if "patch_mask" in inputs:
            importance = importance.masked_fill(~inputs["patch_mask"].to(self._device), -torch.inf)
        if importance.isnan().any():
            raise ScoreError("the importance scores hold NaN: the vision tower overflowed; load it in a wider dtype")
        indices, counts = torch_op.prune(importance, vision.grid, spec)
        # Token 0 is the CLS, so patch i is token i + 1; padding (-1) reads the CLS, and is zeroed.
        rows = torch.cat([torch.zeros_like(indices[:, :prefix]), indices + 1], dim=1)
        embeds = self._projector(features.gather(1, rows[:, :, None].expand(-1, -1, features.shape[2]))).float()
        is_kept = torch.arange(rows.shape[1], device=rows.device) < counts[:, None] + prefix
        return {
            "image_embeds": embeds.masked_fill(~is_kept[:, :, None], 0),
            "kept_indices": indices,
            "kept_counts": counts,
            "importance": importance,
        }
