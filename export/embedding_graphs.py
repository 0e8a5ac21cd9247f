"""Two small graphs that make the embeddings of a prompt where the decoder runs, so that they never leave a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.onnxruntime import open_session
from hivtp.export.graph import IR_VERSION, OPSET
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

EMBED_NAME = "embed.onnx"
INSERT_NAME = "insert.onnx"


def write_embedding_graphs(embeddings: Path) -> None:
    """Write two graphs beside a table of token embeddings, and check what they compute.

    `embed.onnx` is `token_ids [length] int64 → embeds [length, hidden]`, rows of the table in its dtype. The table
    is external data in the .npy file itself, so it is stored once.

    `insert.onnx` is `embeds [length, hidden]`, `rows [num_rows, hidden] float32` and `row_of [length] int64 →
    inserted [length, hidden]`: at each position that row of `rows`, in the dtype of `embeds`, or where `row_of` is -1
    what was there.

    Args:
        embeddings: [vocab, hidden] in a .npy file, as `write_embeddings` writes it.

    Raises:
        VerificationError: a graph computes something else.
    """
    table: NDArray[Any] = np.load(embeddings, mmap_mode="r", allow_pickle=False)
    assert isinstance(table, np.memmap), "it was mapped"
    folder = embeddings.parent
    _write_embed(table, embeddings.name, table.offset, folder / EMBED_NAME)
    _write_insert(table, folder / INSERT_NAME)
    _verify(table, folder)


def _write_embed(table: NDArray[Any], name: str, offset: int, file: Path) -> None:
    import onnx_ir as ir

    dtype = ir.DataType.from_numpy(table.dtype)
    token_ids = ir.val("token_ids", ir.DataType.INT64, ["length"])
    stored = ir.ExternalTensor(
        name, offset, table.nbytes, dtype, shape=ir.Shape(table.shape), name="table", base_dir=file.parent
    )
    weight = ir.val("table", const_value=stored)
    embeds = ir.val("embeds", dtype, ["length", table.shape[1]])
    node = ir.node("Gather", [weight, token_ids], outputs=[embeds])
    _save([token_ids], [embeds], [node], [weight], file)


def _write_insert(table: NDArray[Any], file: Path) -> None:
    import onnx_ir as ir

    hidden, dtype = table.shape[1], ir.DataType.from_numpy(table.dtype)
    embeds = ir.val("embeds", dtype, ["length", hidden])
    rows = ir.val("rows", ir.DataType.FLOAT, ["num_rows", hidden])
    row_of = ir.val("row_of", ir.DataType.INT64, ["length"])
    zero, last_axis = (
        ir.val(key, const_value=ir.tensor(np.array([number]), name=key))
        for key, number in (("zero", 0), ("last_axis", 1))
    )
    is_row = ir.node("GreaterOrEqual", [row_of, zero])
    column = ir.node("Unsqueeze", [is_row.outputs[0], last_axis])
    # At -1 it reads the last row, which nothing takes.
    gathered = ir.node("Gather", [rows, row_of])
    cast = ir.node("Cast", [gathered.outputs[0]], attributes={"to": int(dtype)})
    inserted = ir.val("inserted", dtype, ["length", hidden])
    where = ir.node("Where", [column.outputs[0], cast.outputs[0], embeds], outputs=[inserted])
    _save([embeds, rows, row_of], [inserted], [is_row, column, gathered, cast, where], [zero, last_axis], file)


def _save(inputs: list[Any], outputs: list[Any], nodes: list[Any], initializers: list[Any], file: Path) -> None:
    import onnx_ir as ir

    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name=file.stem)
    ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name="hivtp"), file)


def _verify(table: NDArray[Any], folder: Path) -> None:
    """Refuse graphs that do not give the very rows that they are asked for."""
    random = np.random.default_rng(0)
    token_ids = random.integers(len(table), size=16)
    rows = random.normal(size=(5, table.shape[1])).astype(np.float32)
    row_of = random.integers(-1, 5, size=16)
    [embeds] = open_session(folder / EMBED_NAME).run(None, {"token_ids": token_ids})
    inputs = {"embeds": embeds, "rows": rows, "row_of": row_of}
    [inserted] = open_session(folder / INSERT_NAME).run(None, inputs)
    expected = np.where(row_of[:, None] < 0, table[token_ids], rows.astype(table.dtype)[row_of])
    if not np.array_equal(embeds, table[token_ids]) or not np.array_equal(inserted, expected):
        raise VerificationError(
            f"the graphs {EMBED_NAME} and {INSERT_NAME} do not give the rows of the token embeddings; "
            "nothing was written"
        )
