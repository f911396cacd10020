"""The 4-bit codes of bitsandbytes, as its CPU and its CUDA kernels make them."""
