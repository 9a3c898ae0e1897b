"""What the compiler makes of the Triton kernels, read without a GPU: `megapar kernels`."""
