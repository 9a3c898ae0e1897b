"""Kernels: tensors in, tensors out. Installed as `megapar.kernels`; imports nothing when it is imported."""
