from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from hivtp.engines.torch.memory import to_tensor, torch_dtype

DTYPES = {
    np.float32: torch.float32,
    np.float16: torch.float16,
    ml_dtypes.bfloat16: torch.bfloat16,
    np.int64: torch.int64,
    np.bool_: torch.bool,
}


@pytest.mark.parametrize(("dtype", "expected"), DTYPES.items())
def test_an_array_becomes_a_tensor_of_the_same_bits(dtype: type, expected: torch.dtype) -> None:
    assert torch_dtype(dtype) == expected
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    for values in (array, array.T, array[:0], array[0, 0]):
        tensor = to_tensor(values)
        assert (tensor.dtype, tuple(tensor.shape)) == (expected, values.shape)
        np.testing.assert_array_equal(tensor.double().numpy(), values.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_must_not_be_written_to_is_copied(dtype: type) -> None:
    array = np.ones((2, 3), dtype)
    assert to_tensor(array).data_ptr() == array.ctypes.data
    array.flags.writeable = False
    assert to_tensor(array).data_ptr() != array.ctypes.data
