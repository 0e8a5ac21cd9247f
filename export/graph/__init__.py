"""The vision graphs: towers, scores, pruning and projector as ONNX."""
