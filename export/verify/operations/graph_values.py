"""Values from within a graph: it runs once, and also gives what its operations pass to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.engines.onnxruntime import open_session, run_errors
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray


class GraphValues:
    """The values of one run of a graph, by name.

    Args:
        file: the graph; a copy of it without its weights lies beside it meanwhile.
        inputs: what it runs on.
        wanted: names of values; those that the graph does not have are left out.

    Raises:
        EngineError: onnxruntime cannot run it.
    """

    def __init__(self, file: Path, inputs: Mapping[str, NDArray[Any]], wanted: Iterable[str]) -> None:
        import onnx_ir as ir

        model = ir.load(file)
        known = {str(value.name): value for node in model.graph for value in node.outputs if value.name}
        outputs = [str(value.name) for value in model.graph.outputs]
        names = [*outputs, *(name for name in dict.fromkeys(wanted) if name in known and name not in outputs)]
        model.graph.outputs.extend(known[name] for name in names[len(outputs) :])
        copy = file.with_name(f"checked-{file.name}")
        try:
            # The weights stay where they are; both files name them relative to their folder.
            ir.save(model, copy)
            session = open_session(copy)
            with run_errors(f"checking {file}"):
                found = session.run(names, dict(inputs))
        finally:
            copy.unlink(missing_ok=True)
        self._file = file
        self._values: dict[str, NDArray[Any]] = {**inputs, **dict(zip(names, found, strict=True))}
        self._outputs = outputs

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        """What the graph gives without being asked for more."""
        return {name: self._values[name] for name in self._outputs}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: NDArray[Any] | None = None) -> NDArray[Any] | None:
        """A value, or another where the graph has none of that name."""
        return self._values.get(name, default)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A value.

        Raises:
            VerificationError: the graph has none of that name.
        """
        try:
            return self._values[name]
        except KeyError as error:
            raise VerificationError(
                f"{self._file.name} has no value {name}, so it cannot be checked; nothing was written. Install the "
                "versions of onnx-ir and onnxruntime-genai that hivtp's `export` extra asks for"
            ) from error
