"""The least time that work can take on a GPU: what its arithmetic alone, or its memory traffic alone, would take.

Williams, Waterman & Patterson 2009. Peaks are the makers' own, dense and without sparsity; no kernel reaches them.
"""

from dataclasses import dataclass

from megapar.bench.problem import Work


@dataclass(frozen=True)
class Gpu:
    """Peaks: TFLOP/s of matrix products of 16 bits and of fp32 (as TF32), TFLOP/s of other fp32, GB/s of memory."""

    name: str
    tensor_16: float
    tensor_32: float
    vector: float
    memory: float

    def peak(self, work: Work) -> float:
        """FLOP/s for this work."""
        if not work.tensor_cores:
            return self.vector * 1e12
        return (self.tensor_32 if work.dtype == "fp32" else self.tensor_16) * 1e12


# NVIDIA A100 80GB SXM data sheet (2021); H100 SXM5 data sheet (2023), which gives rates with sparsity: half of them;
# Blackwell architecture technical brief (2024), HGX B200.
GPUS = (
    Gpu("A100", 312.0, 156.0, 19.5, 2039.0),
    Gpu("H100", 989.4, 494.7, 67.0, 3350.0),
    Gpu("B200", 2250.0, 1125.0, 80.0, 8000.0),
)


@dataclass(frozen=True)
class Least:
    """Milliseconds that the arithmetic takes at least, and the memory traffic."""

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)

    @property
    def bound(self) -> str:
        return "compute" if self.compute_ms > self.memory_ms else "memory"


def least(work: Work, gpu: Gpu) -> Least:
    return Least(1e3 * work.flops / gpu.peak(work), 1e3 * work.bytes / (gpu.memory * 1e9))


def gpu_named(device: str) -> Gpu | None:
    """The GPU of the table that a device's name says it is: "NVIDIA H100 80GB HBM3" is an H100."""
    return next((gpu for gpu in GPUS if gpu.name in device), None)
