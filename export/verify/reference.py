"""The reference: what PyTorch and transformers compute from the same checkpoint, in float32."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hivtp.export.decoder.language_layers import LanguageLayers
from hivtp.export.graph.shape import VisionShape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp_ops.spec import PruningSpec


@dataclass(frozen=True)
class VisionReference:
    """The unpruned vision stage in float32.

    Attributes:
        features: [tiles, prefix + patches, width], the layer that LLaVA selects.
        embeds: [tiles, prefix + patches, hidden of the language model], after the projector.
        layer_importance: [scoring layers, tiles, patches]; None without a spec.
    """

    features: NDArray[np.float32]
    embeds: NDArray[np.float32]
    layer_importance: NDArray[np.float32] | None

    @property
    def importance(self) -> NDArray[np.float32] | None:
        """[tiles, patches], the mean over the scoring layers; None without a spec."""
        if self.layer_importance is None:
            return None
        importance: NDArray[np.float32] = self.layer_importance.mean(axis=0)
        return importance


def vision_reference(
    checkpoint: Checkpoint,
    spec: PruningSpec | None,
    pixel_values: NDArray[np.float32],
    observer: Callable[[Any, Any], None] | None = None,
) -> VisionReference:
    """Run transformers' vision tower and projector.

    Args:
        checkpoint: only its vision and projector weights are read.
        spec: with its layers resolved.
        pixel_values: [tiles, 3, H, W] float32.
        observer: gets the tower and the projector in the end.
    """
    import torch
    from transformers import AutoModel
    from transformers.initialization import no_init_weights
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    # transformers writes into the config.
    config = deepcopy(checkpoint.config)
    # Random weights, which are overwritten, would take a third of the time.
    with no_init_weights():
        # In float32 whatever the config says: checkpoints in half precision say so for each of their parts.
        tower = AutoModel.from_config(config.vision_config, attn_implementation="eager", dtype=torch.float32).eval()
        projector = LlavaMultiModalProjector(config).eval()
    fused = deepcopy(tower.config)
    fused._attn_implementation = "sdpa"
    for part, module in (("vision.", tower), ("projector.", projector)):
        weights = {name: tensor.float() for name, tensor in checkpoint.part(part).items()}
        # The tower's last norm, and what pools its tokens, serve an output that LLaVA does not use.
        module.load_state_dict(weights, strict=part != "vision.", assign=True)

    shape = VisionShape.of(config)
    received: list[torch.Tensor] = []

    def record(_module: object, _inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        # Mean over heads and queries, CLS column dropped (HIVTP, arXiv 2509.23663, importance).
        received.append(outputs[1].float().mean(dim=(1, 2))[:, shape.num_class_tokens :])

    for index, layer in enumerate(tower.encoder.layers):
        if spec is not None and index in spec.scoring_layers:
            layer.self_attn.register_forward_hook(record)
        else:
            # Attention that nobody reads need not be written out.
            layer.self_attn.config = fused
    with torch.inference_mode():
        outputs = tower(torch.from_numpy(pixel_values), output_hidden_states=True)
        features = outputs.hidden_states[config.vision_feature_layer]
        features = features[:, shape.num_class_tokens - shape.num_prefix_tokens :]
        embeds = projector(features)
        layer_importance = torch.stack(received).numpy() if received else None
        if observer is not None:
            observer(tower, projector)
    return VisionReference(features.numpy(), embeds.numpy(), layer_importance)


class LayerObserver(Protocol):
    """Looks at the layers of a language model while each is in memory."""

    def layer(self, index: int, layer: torch.nn.Module, places: Mapping[str, Any]) -> None:
        """A layer with the checkpoint's weights, which it may lose, and its arguments besides the hidden states."""

    def head(self, norm: torch.nn.Module, head: torch.Tensor) -> None:
        """The last norm, and the projection [vocab, hidden] to the logits."""


def language_reference(
    config: Any,
    read_weight: Callable[[str], torch.Tensor],
    sequences: Sequence[NDArray[np.float32]],
    num_last: Sequence[int] | None = None,
    observer: LayerObserver | None = None,
) -> list[NDArray[np.float32]]:
    """Run transformers' language model in float32 with one layer in memory at a time.

    Args:
        config: the language model's config.
        read_weight: returns a weight by its name in the causal language model; each is read once.
        sequences: embeddings, [length, hidden] float32 each; those of one length are computed together.
        num_last: for each sequence how many of its last positions are wanted; None is all of all.
        observer: gets each layer after it has run; all sequences have one length.

    Returns:
        For each sequence the logits of the wanted positions, [positions, vocab] float32.
    """
    import torch

    layers = LanguageLayers(config, read_weight)
    members: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        members.setdefault(len(sequence), []).append(index)
    with torch.inference_mode():
        states = {
            length: torch.from_numpy(np.stack([sequences[index] for index in indices]))
            for length, indices in members.items()
        }
        places = {length: layers.places(length) for length in states}
        for index in range(len(layers)):
            with layers.layer(index) as layer:
                states = {length: layer(hidden, **places[length]) for length, hidden in states.items()}
                if observer is not None:
                    [places_of_all] = places.values()
                    observer.layer(index, layer, places_of_all)
        norm, weight = layers.norm(), layers.head()
        head = weight.T
        logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(sequences)
        for length, indices in members.items():
            for row, index in enumerate(indices):
                first = 0 if num_last is None else length - num_last[index]
                logits[index] = (norm(states[length][row, first:]) @ head).numpy()
        if observer is not None:
            observer.head(norm, weight)
    return logits
