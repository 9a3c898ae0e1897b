"""Kernels that write to the memory of other ranks: collectives, and matmuls fused with them."""
