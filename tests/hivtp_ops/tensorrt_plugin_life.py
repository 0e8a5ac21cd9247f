"""What TensorRT does with the plugin from registration to the kernel, step by step; prints it as JSON.

A script of its own, since it needs TensorRT's bindings, and TensorRT keeps what is registered until the process ends.
"""

from __future__ import annotations

import json
import sys
import types

import numpy as np

try:
    import tensorrt as trt
except ImportError:
    # The bindings alone, which PyPI has without the libraries; the environment has stubs of those.
    import tensorrt_bindings as trt

    sys.modules["tensorrt"] = trt
import tensorrt.plugin
from tensorrt.plugin import _lib

from hivtp_ops import op, tensorrt_plugin

FIELD_TYPES = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}


def fields(attributes: dict[str, int | float]) -> trt.PluginFieldCollection:
    """Make what the ONNX parser makes of a node's attributes."""
    collection = []
    for name, value in attributes.items():
        dtype, field_type = FIELD_TYPES[type(value)]
        collection.append(trt.PluginField(name, np.array([value], dtype=dtype), field_type))
    return trt.PluginFieldCollection(collection)


def tensor(dtype: trt.DataType, *shape: int) -> trt.DynamicPluginTensorDesc:
    """Describe an input or an output; -1 is a dynamic size."""
    described = trt.DynamicPluginTensorDesc()
    described.desc = trt.PluginTensorDesc()
    described.desc.type, described.desc.format, described.desc.dims = dtype, trt.TensorFormat.LINEAR, shape
    described.min, described.opt, described.max = ([size if size > 0 else n for size in shape] for n in (1, 5, 9))
    return described


def main() -> None:
    """Register, create, configure, compile."""
    attributes, capacity = json.loads(sys.argv[1]), int(sys.argv[2])
    creators = {}

    def register_creator(name: str, namespace: str, attribute_types: dict[str, tuple[bool, type]]) -> None:
        creators[f"{namespace}::{name}"] = _lib._TemplatePluginCreator(name, namespace, attribute_types)

    _lib._register_plugin_creator = register_creator
    tensorrt_plugin.compile_kernel = lambda source, target: f"{target}\n{source}".encode()
    # Symbolic sizes have no values outside of a build, so the launch is looked at as the plugin asks for it.
    launches = []

    class KernelLaunchParams(tensorrt.plugin.KernelLaunchParams):
        def __init__(self, **sizes: object) -> None:
            super().__init__(**sizes)
            launches.append(sizes)

    tensorrt.plugin.KernelLaunchParams = KernelLaunchParams
    tensorrt_plugin.register_plugin()
    tensorrt_plugin.register_plugin()

    [(identifier, creator)] = creators.items()
    plugin = creator.create_plugin(
        op.NAME,
        op.PLUGIN_NAMESPACE,
        fields(attributes),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    dtypes = plugin.get_output_data_types([trt.float32], [2])
    shapes = plugin.get_output_shapes([trt.DimsExprs(2)], [], None)
    num_patches = attributes["rows"] * attributes["cols"]
    in_out = [tensor(trt.float32, -1, num_patches), tensor(trt.int64, -1, capacity), tensor(trt.int64, -1)]
    formats = plugin.get_supported_format_combinations(in_out, 1)
    plugin.configure_plugin(in_out[:1], in_out[1:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(0)

    launch, arguments = types.SimpleNamespace(), types.SimpleNamespace()
    plugin.get_launch_params([trt.DimsExprs(2)], in_out, 1, launch, arguments, None)
    name, program = plugin.get_kernel([item.desc for item in in_out[:1]], [item.desc for item in in_out[1:]])
    is_block_per_tile = launches[0].pop("grid_x") is plugin.input_descs[0].shape_expr[0]
    print(  # noqa: T201  the result
        json.dumps(
            {
                "plugin": identifier,
                "attributes": {name: value.item() for name, value in plugin.attrs.items()},
                "fields": {field.name: field.type.name for field in creator.field_names},
                "dtypes": [str(dtype) for dtype in dtypes],
                "ranks": [len(shape) for shape in shapes],
                "formats": [f"{item.type} {item.format}" for item in formats],
                "tactics": tactics,
                "is_block_per_tile": is_block_per_tile,
                "launch": launches[0],
                "num_extra_arguments": arguments.nbSymExprs,
                "kernel": name,
                "program": program.decode(),
            }
        )
    )


if __name__ == "__main__":
    main()
