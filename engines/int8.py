"""Whether the products of 8 bits are exact on this processor: found by multiplying."""

from __future__ import annotations

from functools import cache

import numpy as np

# A MatMulInteger of uint8 "a" [m, k] and int8 "b" [k, n], as bytes, since running a bundle needs no onnx; the test of
# this module writes the same bytes with it.
PROBE = (
    b"\x08\n:f\n\x18\n\x01a\n\x01b\x12\x01y"
    b'"\rMatMulInteger\x12\x05probe'
    b"Z\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01m\n\x03\x12\x01k"
    b"Z\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01n"
    b"b\x15\n\x01y\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01n"
    b"B\x04\n\x00\x10\x15"
)
# An entry of a session's config: int8 weights become uint8, whose products ONNX Runtime adds in 32 bits everywhere.
EXACT_PRODUCTS = "session.x64quantprecision"
# More than any kernel takes at once.
PROBE_SIDE = 64


@cache
def overflows_int8() -> bool:
    """Whether ONNX Runtime's usual product of uint8 activations and int8 weights is inexact here.

    On x86 without VNNI it adds two such products in 16 bits, which saturate: the largest activation times the largest
    weight, twice, is 64,770, and 32,767 is left. Sessions ask for `EXACT_PRODUCTS` there and only there, since
    processors with VNNI would lose speed by it.

    Source: ONNX Runtime, onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    activations = np.full((PROBE_SIDE, PROBE_SIDE), np.iinfo(np.uint8).max, np.uint8)
    weights = np.full((PROBE_SIDE, PROBE_SIDE), np.iinfo(np.int8).max, np.int8)
    [products] = session.run(None, {"a": activations, "b": weights})
    return not np.array_equal(products, activations.astype(np.int32) @ weights.astype(np.int32))
