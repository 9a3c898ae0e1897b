"""`megapar verify train.device=cuda`: the layouts on one device, their reference on another.

The other device is Triton's interpreter here, whose kernels are those of a GPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapar.config.keys import changed
from megapar.launch.pool import WorkerPool
from megapar.verify import Verdict, compare_layouts, run_layout, run_reference
from tests.parallel.layouts import verify_config

SMALL = {"model.layers": 2, "train.dtype": "fp32", "train.steps": 1, "train.global_batch_size": 2}


class TwoDevices:
    """A pool whose GPUs are interpreted. asked: (function, ranks, device of the pool's call, of the config, backend)"""

    def __init__(self, cpu: WorkerPool, gpu: WorkerPool, spoil: float = 0.0) -> None:
        self.cpu, self.gpu, self.spoil = cpu, gpu, spoil
        self.asked: list[tuple[Any, ...]] = []

    def run(self, fn: Callable[..., Any], ranks: int, config: Any, folder: str, **options: Any) -> list[Any]:
        device = options.pop("device", "cpu")
        self.asked.append((fn, ranks, device, config.train.device, config.kernels.backend))
        if device == "cpu":
            return self.cpu.run(fn, ranks, config, folder, **options)
        values = {"train.device": "cpu", "kernels.backend": "interpret", "optim.lr": config.optim.lr + self.spoil}
        return self.gpu.run(fn, ranks, changed(config, values), folder, **options)


def compared(pool: TwoDevices, prefix: str, folder: Path) -> list[Verdict]:
    config = changed(verify_config(prefix, ["single", "tp2"], **SMALL), {"train.device": "cuda"})
    return list(compare_layouts(config, pool, str(folder)))  # type: ignore[arg-type]


def test_the_reference_is_on_the_cpu(pool: WorkerPool, interpreter: WorkerPool, prefix: str, tmp_path: Path) -> None:
    devices = TwoDevices(pool, interpreter)
    verdicts = compared(devices, prefix, tmp_path)
    assert [(one.layout, one.passed) for one in verdicts] == [("single", True), ("tp2", True)], verdicts
    assert devices.asked == [
        (run_reference, 1, "cpu", "cpu", "torch"),
        (run_layout, 1, "cuda", "cuda", "auto"),
        (run_layout, 2, "cuda", "cuda", "auto"),
    ]
    # Two forms of the kernels, so the bits differ: nothing was compared with itself.
    assert all(0 < one.gradient < 2e-4 for one in verdicts)


def test_a_device_that_computes_something_else(
    pool: WorkerPool, interpreter: WorkerPool, prefix: str, tmp_path: Path
) -> None:
    verdicts = compared(TwoDevices(pool, interpreter, spoil=1e-3), prefix, tmp_path)
    assert [(one.layout, one.passed) for one in verdicts] == [("single", False), ("tp2", False)]
    assert all("value of" in one.worst for one in verdicts)
