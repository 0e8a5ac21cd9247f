"""An ONNX graph of a bundle as OpenVINO takes it: its functions expanded, its weights where the manifest says."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import read_regular
from hivtp.engines.openvino.library import run_errors
from hivtp.engines.signature import Tensor, Tensors, check_tensors
from hivtp_ops.errors import BundleError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hivtp.engines.bundle import Bundle

# Of a graph without its weights; that of a 7B decoder has half a megabyte.
MAX_GRAPH_BYTES = 2**28
# Element types by OpenVINO's names, as onnxruntime writes them.
_TYPES = {"f32": "tensor(float)", "f16": "tensor(float16)", "i64": "tensor(int64)", "boolean": "tensor(bool)"}


def read_graph(core: Any, bundle: Bundle, name: str) -> Any:
    """Read a graph of a bundle.

    OpenVINO does not expand functions of a model, such as the op that prunes, so they are expanded before. It maps
    weights only from the folder that the graph lies in, and takes any that a graph names there; so what the graph
    names is checked before, and where it has to be another graph than the bundle's, or the weights are links as in the
    cache of the Hugging Face hub, both get a folder of their own: the weights are linked there, or copied where that
    is another file system.

    Args:
        core: an `openvino.Core`.
        bundle: an opened bundle.
        name: of the graph, relative to the bundle.

    Returns:
        An `openvino.Model`, whose weights are mapped from files.

    Raises:
        BundleError: it is not a graph, or it reads weights from anything but a file beside it that the manifest lists.
        EngineError: openvino cannot read it.
        MissingExtraError: onnx is not installed.
    """
    file = bundle.folder / name
    model = _parse(file)
    weights = {location: _weights_file(bundle, name, location) for location in _locations(model)}
    if not model.functions and not any(found.is_symlink() for found in weights.values()):
        with run_errors(f"reading {file}"):
            return core.read_model(file)
    with tempfile.TemporaryDirectory(prefix="hivtp-openvino-") as folder, run_errors(f"reading {file}"):
        for location, found in weights.items():
            _link(found.resolve(), Path(folder) / location)
        graph = Path(folder) / "model.onnx"
        graph.write_bytes(_expanded(model).SerializeToString())
        # What is mapped stays when the folder goes.
        return core.read_model(graph)


def check_graph(file: Path, model: Any, inputs: Tensors, outputs: Tensors) -> None:
    """Refuse a graph that its manifest does not describe; see `check_tensors`.

    Raises:
        BundleError: the first difference.
    """
    check_tensors(file, _described(model.inputs), inputs, _described(model.outputs), outputs)


def _described(ports: Iterable[Any]) -> Iterator[Tensor]:
    for port in ports:
        shape = [length.get_length() if length.is_static else None for length in port.get_partial_shape()]
        kind = port.get_element_type().get_type_name()
        yield Tensor(port.get_any_name(), _TYPES.get(kind, kind), shape)


def _parse(file: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "openvino") from error
    try:
        return onnx.load_model_from_string(read_regular(file, MAX_GRAPH_BYTES))
    except Exception as error:  # a damaged file makes protobuf raise more than one kind
        raise BundleError(f"{file} is not a readable ONNX graph ({error}); copy or export the bundle again") from error


def _expanded(model: Any) -> Any:
    import onnx.inliner

    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # whatever the checks of onnx raise on a stranger's functions
        raise BundleError(f"the functions of a graph cannot be expanded ({error}); export the bundle again") from error


def _locations(model: Any) -> set[str]:
    """The files that weights are read from, as the graph names them."""
    return {
        entry.value for tensor in _tensors(model.graph) for entry in tensor.external_data if entry.key == "location"
    }


def _tensors(graph: Any) -> Iterator[Any]:
    """Every constant of a graph, and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _weights_file(bundle: Bundle, name: str, location: str) -> Path:
    """A file of weights; those that the manifest lists were checked when the bundle was opened."""
    found = (PurePosixPath(name).parent / location).as_posix()
    if location != PurePosixPath(location).name or found not in bundle.manifest.files:
        raise BundleError(
            f"{name} reads weights from {location[:80]!r}, which the manifest does not list; export the bundle again"
        )
    return bundle.folder / found


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
