"""A vision graph in two parts: what decides which patches are kept, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EMBEDS = "image_embeds"


@dataclass(frozen=True)
class Parts:
    """A graph that was cut.

    Attributes:
        scores: from the graph's inputs to every output but `image_embeds`, and to the values at the cut.
        rest: from the values at the cut, in their order, to `image_embeds`.
        names: the outputs of `scores` before the values at the cut.
    """

    scores: Any
    rest: Any
    names: tuple[str, ...]


def cut_after_scores(openvino: Any, model: Any) -> Parts:
    """Cut a pruning vision graph behind its scores, so that each part can be computed in a precision of its own.

    The part for the scores holds all that importance and kept indices depend on, and nothing else.

    Args:
        openvino: the package.
        model: an `openvino.Model` with the output `image_embeds` and others; it is of no use after this.
    """
    ops = openvino.opset13
    results = {output.get_any_name(): output.get_node().input_value(0) for output in model.outputs}
    embeds = results.pop(EMBEDS)
    deciding = _ancestors([value.get_node() for value in results.values()])
    cut: dict[tuple[str, int], Any] = {}
    is_constant: dict[str, bool] = {}
    for node in _ancestors([embeds.get_node()]).values():
        if node.get_name() in deciding:
            continue
        for port in node.inputs():
            source = port.get_source_output()
            key = (source.get_node().get_name(), source.get_index())
            if key[0] not in deciding or _is_constant(source.get_node(), is_constant):
                continue
            if key not in cut:
                value = ops.parameter(source.get_partial_shape(), source.get_element_type())
                cut[key] = (source, value)
            port.replace_source_output(cut[key][1].output(0))
    values = [source for source, _ in cut.values()]
    scores = openvino.Model([ops.result(value) for value in (*results.values(), *values)], model.get_parameters())
    rest = openvino.Model([ops.result(embeds)], [value for _, value in cut.values()])
    return Parts(scores, rest, tuple(results))


def _ancestors(nodes: list[Any]) -> dict[str, Any]:
    """These nodes and all that they depend on, by name."""
    found: dict[str, Any] = {}
    while nodes:
        node = nodes.pop()
        if node.get_name() not in found:
            found[node.get_name()] = node
            nodes += [value.get_node() for value in node.input_values()]
    return found


def _is_constant(node: Any, known: dict[str, bool]) -> bool:
    """Whether nothing that goes into a run reaches a node."""
    name = node.get_name()
    if name not in known:
        known[name] = node.get_type_name() != "Parameter" and all(
            _is_constant(value.get_node(), known) for value in node.input_values()
        )
    return known[name]
