from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest

from hivtp.engines.bundle import Bundle
from hivtp.export import embedding_graphs
from hivtp.export.embedding_graphs import EMBED_NAME, INSERT_NAME, write_embedding_graphs
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=[np.float16, np.float32])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> np.ndarray:
    table = np.random.default_rng(1).normal(size=(40, 12)).astype(request.param)
    np.save(tmp_path / "embeddings.npy", table)
    write_embedding_graphs(tmp_path / "embeddings.npy")
    return table


def test_token_ids_become_rows_of_the_table(table: np.ndarray, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(tmp_path / EMBED_NAME)
    for token_ids in ([39], [0, 5, 5, 1]):
        [embeds] = session.run(None, {"token_ids": np.array(token_ids)})
        assert embeds.dtype == table.dtype
        np.testing.assert_array_equal(embeds, table[token_ids])


def test_rows_are_inserted_where_they_belong_and_nowhere_else(table: np.ndarray, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(tmp_path / INSERT_NAME)
    rows = np.random.default_rng(2).normal(size=(3, 12)).astype(np.float32)
    embeds = table[:5]
    for row_of in ([-1, 2, 0, 2, -1], [-1] * 5, [0, 1, 2, 1, 0]):
        [inserted] = session.run(None, {"embeds": embeds, "rows": rows, "row_of": np.array(row_of)})
        expected = [old if row < 0 else rows[row].astype(table.dtype) for old, row in zip(embeds, row_of, strict=True)]
        np.testing.assert_array_equal(inserted, expected)


def test_the_table_is_stored_once(table: np.ndarray, tmp_path: Path) -> None:
    assert (tmp_path / EMBED_NAME).stat().st_size < 500
    [weight] = onnx.load(tmp_path / EMBED_NAME, load_external_data=False).graph.initializer
    place = {entry.key: entry.value for entry in weight.external_data}
    assert place["location"] == "embeddings.npy"
    stored = (tmp_path / "embeddings.npy").read_bytes()[int(place["offset"]) :]
    assert len(stored) == int(place["length"])
    assert stored == table.tobytes()


def test_graphs_that_give_other_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = embedding_graphs._write_embed
    monkeypatch.setattr(
        embedding_graphs, "_write_embed", lambda table, name, offset, file: write(table[:-1], name, offset + 24, file)
    )
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(1).normal(size=(40, 12)).astype(np.float16))
    with pytest.raises(VerificationError, match=r"embed\.onnx and insert\.onnx do not give the rows"):
        write_embedding_graphs(tmp_path / "embeddings.npy")


def test_a_bundle_for_a_gpu_holds_them_and_says_so(half_bundle: Path, pruned_bundle: Path) -> None:
    decoder = Bundle.open(half_bundle, check_hashes=True).manifest.language.decoder
    assert (decoder.precision, decoder.dtype) == ("fp16", "float16")
    assert (half_bundle / decoder.embed_file).is_file()
    assert (half_bundle / decoder.insert_file).is_file()
    decoder = Bundle.open(pruned_bundle).manifest.language.decoder
    assert (decoder.dtype, decoder.embed_file, decoder.insert_file) == ("float32", None, None)
