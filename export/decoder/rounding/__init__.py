"""Rounding that a text calibrates: GPTQ for weights of 4 bits, smoothing for activations of 8."""
