"""The kernels' benchmarks: inputs of a model's sizes, what each provider runs on them, and what ours launches.

A file has its kernel's name and declares `BENCH`: what makes the problem, by the kernel's function.
"""
