"""TensorRT and TensorRT for RTX: plans are built once, kept in the bundle, and run on the GPU."""
