"""Tensors as they are stored: checkpoints, dequantization, the files beside them."""
