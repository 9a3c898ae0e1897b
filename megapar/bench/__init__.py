"""Microbenchmarks: how fast the kernels are beside those of other libraries, and how fast they could be at most."""
