from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import load_language_model
from hivtp.export.decoder.last_position import CUT, cut_to_last_position
from hivtp.export.decoder.model_builder import BUILDER_OPTIONS, builder_class, builder_config
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir


@pytest.fixture(params=["llama", "mistral", "llama-fp16"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> ir.Model:
    """A decoder as the builder alone makes it."""
    import onnx_ir as ir

    language, _, is_half = request.param.partition("-")
    folder = make_checkpoint(tmp_path / "checkpoint", language=language)
    checkpoint = Checkpoint.open(folder)
    dtype, provider = (ir.DataType.FLOAT16, "cuda") if is_half else (ir.DataType.FLOAT, "cpu")
    builder: Any = builder_class(language)(
        builder_config(checkpoint), dtype, dtype, provider, str(tmp_path), dict(BUILDER_OPTIONS)
    )
    builder.loaded_model = load_language_model(checkpoint)
    builder.make_model("")
    builder.model.graph.sort()
    model: ir.Model = builder.model
    return model


def run(model: ir.Model, lengths: tuple[int, ...], batch: int) -> list[np.ndarray]:
    """Outputs of the last of several chunks of a prompt, the KV cache carried along."""
    import onnx_ir as ir
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    shapes = {value.name: value.shape for value in session.get_inputs()}
    dtype = {value.name: np.float16 if "16" in value.type else np.float32 for value in session.get_inputs()}[
        "inputs_embeds"
    ]
    names = [value.name for value in session.get_outputs()]
    random = np.random.default_rng(0)
    # The tiny checkpoint has 2 key-value heads of 16.
    past = {name: np.zeros((batch, 2, 0, 16), dtype=dtype) for name in shapes if name.startswith("past_key_values")}
    num_seen, outputs = 0, []
    for length in lengths:
        num_seen += length
        embeds = random.normal(size=(batch, length, shapes["inputs_embeds"][2])).astype(dtype)
        mask = np.ones((batch, num_seen), dtype=np.int64)
        outputs = session.run(None, {"inputs_embeds": embeds, "attention_mask": mask, **past})
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], outputs[1:], strict=True)
        }
    return outputs


@pytest.mark.parametrize(("lengths", "batch"), [((1,), 1), ((9,), 2), ((9, 1), 2), ((5, 4), 1)])
def test_the_cut_changes_no_output(built: ir.Model, lengths: tuple[int, ...], batch: int) -> None:
    before = run(built, lengths, batch)
    cut_to_last_position(built)
    built.graph.sort()
    for one, other in zip(before, run(built, lengths, batch), strict=True):
        tolerance = 1e-5 if one.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance / 10)


def test_the_last_layer_computes_one_position_after_its_attention(built: ir.Model) -> None:
    cut_to_last_position(built)
    built.graph.sort()
    nodes = list(built.graph)
    last_attention = max(index for index, node in enumerate(nodes) if node.op_type == "GroupQueryAttention")
    after = [node for node in nodes[last_attention + 1 :] if node.op_type == "MatMul"]
    assert [node.name.split("/")[-2] for node in after] == ["o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    for node in after:
        assert node.outputs[0].shape[1] == 1
    assert not {node.name for node in nodes} & set(CUT)


def test_a_graph_without_the_builders_cut_is_refused(built: ir.Model) -> None:
    cut_to_last_position(built)
    with pytest.raises(CheckpointError, match="onnxruntime-genai"):
        cut_to_last_position(built)
