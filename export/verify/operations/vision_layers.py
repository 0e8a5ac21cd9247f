"""The layers of a vision graph: each operation against transformers, on the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.graph.rounding import ZERO_POINT
from hivtp.export.graph.smoothing import CONSUMERS
from hivtp.export.verify.operations.graph_values import GraphValues
from hivtp.export.verify.operations.steering import Comparison, Steering, take_weights
from hivtp.export.verify.operations.vision_weights import VisionWeights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

# The values of a layer that are compared, see Tower, and those of the rest of the graph.
_OF_LAYER = (
    "norm1",
    "kept_norm1",
    "attention.queries",
    "attention.keys.matmul",
    "attention.values.matmul",
    "attention.probabilities",
    "attention.fused",
    "attention.merged",
    "attention.output",
    "attended",
    "norm2",
    "fc1",
    "activation",
    "fc2",
    "output",
)
# The first that a graph has is the mean over all tokens.
_SCORES = ("importance.with_cls", "importance.unmasked", "importance")
_OF_GRAPH = (
    "tokens.positioned",
    "pre_norm",
    *_SCORES,
    "rows",
    "kept_features",
    "patch_features",
    "projector.inner",
    "projector.inner.matmul",
    "projector.activation",
    "projector.output",
    "projector.output.matmul",
)
# After the name of a value: what a product of 8 bits multiplies instead of it, and what it is before a bias is added.
_PARTS = ("uint8", "scale", "rounded", "matmul")


class VisionLayers:
    """Compares a vision graph with transformers' tower and projector, layer by layer.

    The graph runs once, on one tile. Each layer of transformers then takes what the graph's has taken, with the weights
    that the graph holds, and what it computes is compared operation by operation.

    Args:
        file: the graph.
        inputs: of one tile.
        num_layers: of the tower.
        num_feature_layers: those before the features.

    Attributes:
        outputs: of the graph.
        found: the comparisons, once it was called.
    """

    def __init__(
        self, file: Path, inputs: Mapping[str, NDArray[Any]], num_layers: int, num_feature_layers: int
    ) -> None:
        self.found: list[Comparison] = []
        self._num_feature_layers = num_feature_layers
        self._weights = VisionWeights(file)
        self._values = values = GraphValues(file, inputs, _wanted(num_layers))
        self.outputs = values.outputs
        # What the first layer takes.
        self._embedded = "pre_norm" if "pre_norm" in values else "tokens.positioned"
        # A pruned graph computes its last layer for the tokens that it keeps.
        self._kept = values["rows"][0, :, 0].tolist() if "rows" in values else []

    def __call__(self, tower: Any, projector: Any) -> None:
        """Compare modules of transformers, with the checkpoint's weights, which they lose."""
        import torch

        values = self._values
        with self._steering("embeddings") as steering:
            steering.gives("operation", "tokens", tower.embeddings, values["tokens.positioned"])
            tokens = tower.embeddings(torch.from_numpy(values["pixel_values"]))
            if self._embedded == "pre_norm":
                steering.gives("operation", "norm", tower.pre_layrnorm, values["pre_norm"])
                tower.pre_layrnorm(tokens)
        states = [torch.from_numpy(np.asarray(values[self._embedded], np.float32))]
        scores: list[torch.Tensor] = []
        for index, layer in enumerate(tower.encoder.layers):
            # Layers after the features are in the graph where they score.
            if f"layers.{index}.norm1" in values:
                states.append(self._layer(index, layer, states[-1], scores))
        with self._steering("scores") as steering:
            if scores:
                found = next(values[name] for name in _SCORES if name in values)
                mean = torch.stack(scores).mean(dim=(0, 2, 3))[..., None]
                steering.compare("operation", "importance", mean, found[..., None])
        if "projector.activation" in values:
            self._project(projector, states[self._num_feature_layers])

    def _steering(self, place: str, positions: Sequence[int] = ()) -> Steering:
        return Steering(place, self.found, positions)

    def _layer(self, index: int, layer: Any, states: torch.Tensor, scores: list[torch.Tensor]) -> torch.Tensor:
        """Compare one layer on the graph's states; returns its output as the graph has it."""
        place, at, values = f"layer {index}", f"layers.{index}", self._values
        _move_biases(layer.self_attn)
        path = f"vision.encoder.layers.{index}."
        _move_factors(layer, path, self._weights)
        take_weights(layer, path, self._weights.rounded, place, self.found)
        kept = self._kept if f"{at}.kept_norm1" in values else ()
        with self._steering(place) as whole, self._steering(place, kept) as steering:
            self._steer(whole, steering, layer, at)
            if f"{at}.attention.probabilities" in values:
                hook = layer.self_attn.register_forward_hook(lambda _module, _inputs, out: scores.append(out[1]))
            output = layer(states, attention_mask=None)
            if f"{at}.attention.probabilities" in values:
                hook.remove()
                found = values[f"{at}.attention.probabilities"]
                whole.compare("operation", "attention maps", scores[-1], found)
            return steering.compare("operation", "output", output, values[f"{at}.output"])

    def _steer(self, whole: Steering, steering: Steering, layer: Any, at: str) -> None:
        """Compare what a layer computes of all tokens, and the rest, which the last one has of the kept tokens only."""
        attention, mlp, values, path = layer.self_attn, layer.mlp, self._values, f"vision.encoder.{at}"
        whole.gives("operation", "first norm", layer.layer_norm1, values[f"{at}.norm1"])
        queries_from = f"{at}.norm1"
        if f"{at}.kept_norm1" in values:
            queries_from = f"{at}.kept_norm1"
            steering.takes("operation", "kept tokens", attention.q_proj, values[queries_from])
        self._product(steering, f"{path}.self_attn.q_proj", attention.q_proj, queries_from, f"{at}.attention.queries")
        self._product(whole, f"{path}.self_attn.k_proj", attention.k_proj, f"{at}.norm1", f"{at}.attention.keys.matmul")
        self._product(
            whole, f"{path}.self_attn.v_proj", attention.v_proj, f"{at}.norm1", f"{at}.attention.values.matmul"
        )
        [mixed] = [name for kind in ("fused", "merged") if (name := f"{at}.attention.{kind}") in values]
        steering.takes("operation", "attention", attention.out_proj, values[mixed])
        self._product(steering, f"{path}.self_attn.out_proj", attention.out_proj, mixed, f"{at}.attention.output")
        steering.takes("operation", "sum", layer.layer_norm2, values[f"{at}.attended"])
        steering.gives("operation", "second norm", layer.layer_norm2, values[f"{at}.norm2"])
        self._product(steering, f"{path}.mlp.fc1", mlp.fc1, f"{at}.norm2", f"{at}.fc1")
        steering.takes("operation", "activation", mlp.fc2, values[f"{at}.activation"])
        self._product(steering, f"{path}.mlp.fc2", mlp.fc2, f"{at}.activation", f"{at}.fc2")

    def _project(self, projector: Any, states: torch.Tensor) -> None:
        values = self._values
        take_weights(projector, "projector.", self._weights.rounded, "projector", self.found)
        with self._steering("projector") as steering:
            source = f"layers.{self._num_feature_layers - 1}.output" if self._num_feature_layers else self._embedded
            features = states[:, self._kept] if self._kept else states
            if "patch_features" in values:
                source, features = "patch_features", states[:, 1:]
            elif "kept_features" in values:
                source = "kept_features"
            steering.takes("operation", "features", projector.linear_1, values[source])
            self._product(steering, "projector.linear_1", projector.linear_1, source, "projector.inner")
            steering.takes("operation", "activation", projector.linear_2, values["projector.activation"])
            self._product(
                steering, "projector.linear_2", projector.linear_2, "projector.activation", "projector.output"
            )
            projector(features)

    def _product(self, steering: Steering, path: str, module: torch.nn.Linear, source: str, result: str) -> None:
        import torch

        values, name = self._values, path.rpartition(".")[2]
        # Without a bias the product itself is the result.
        found = values[result if result in values else f"{result}.matmul"]
        if not self._weights.is_in_blocks(f"{path}.weight"):
            steering.product(name, module, self._rounded(source), found)
            return
        if f"{result}.matmul" in values and result in values:
            # Next to what such a product may be off by, a wrong bias would not show.
            with_bias = torch.from_numpy(values[f"{result}.matmul"]) + module.bias.detach()
            steering.compare("operation", f"bias of {name}", with_bias, found)
        steering.gives("blocks", name, module, found)

    def _rounded(self, source: str) -> NDArray[np.float32] | None:
        """What a product multiplies instead of a value; None where it multiplies the value."""
        values = self._values
        if f"{source}.rounded" in values:
            return values[f"{source}.rounded"].astype(np.float32)
        if f"{source}.uint8" not in values:
            return None
        whole = values[f"{source}.uint8"].astype(np.float32) - ZERO_POINT
        rounded: NDArray[np.float32] = whole * values[f"{source}.scale"]
        return rounded


def _move_biases(attention: Any) -> None:
    """Move biases as the graph does, which changes nothing that attention computes.

    What is the same for all keys of a query cancels in the softmax, and probabilities sum to one, so that the bias of
    the values passes through them.
    """
    import torch

    bias = attention.out_proj.weight @ attention.v_proj.bias + attention.out_proj.bias
    attention.out_proj.bias = torch.nn.Parameter(bias, requires_grad=False)
    attention.k_proj.bias = attention.v_proj.bias = None


def _move_factors(layer: Any, path: str, weights: VisionWeights) -> None:
    """Move factors from norms to the products after them as a graph does, see SmoothedWeights; that changes nothing.

    The graph's norms say by how much. Whether they are right shows in what is compared afterwards: the biases of the
    norms, and the weights.
    """
    import torch

    def scaled(module: Any, name: str, factors: torch.Tensor) -> None:
        value = getattr(module, name).detach() * factors
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))

    for name, linears in CONSUMERS.items():
        norm, gains = layer.get_submodule(name), weights.gains(f"{path}{name}.weight")
        if gains is None or weights.rounded(f"{path}{linears[0]}.weight") is None:
            continue
        factors = torch.where(gains == 0, 1.0, norm.weight.detach() / gains)
        for kind in ("weight", "bias"):
            scaled(norm, kind, 1 / factors)
        for linear in linears:
            scaled(layer.get_submodule(linear), "weight", factors)


def _wanted(num_layers: int) -> Iterator[str]:
    values = [f"layers.{index}.{name}" for index in range(num_layers) for name in _OF_LAYER]
    for name in (*values, *_OF_GRAPH):
        yield name
        yield from (f"{name}.{part}" for part in _PARTS)
