"""PyTorch as an engine: the vision graph as a `torch.fx` graph, on the CPU or on a GPU."""
