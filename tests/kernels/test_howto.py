"""docs/howto/add-a-kernel.md does what it says."""

import re
from pathlib import Path

from megapar.launch.pool import WorkerPool
from tests.kernels import cases

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto" / "add-a-kernel.md"


def test_the_howtos_kernel(interpreter: WorkerPool, tmp_path: Path) -> None:
    file = tmp_path / "scaled_silu.py"
    text = HOWTO.read_text()
    file.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    bench = "\n\n".join(
        ["import torch", "import torch.nn.functional as F", *re.findall(r"```py\n(.*?)```", text, re.DOTALL)]
    )
    value, gradient, specs, moved, distances = interpreter.run(cases.run_howto, 1, str(file), bench)[0]
    # bf16 keeps 8 bits: half a unit in the last place of values up to 6; the gradient is rounded in several steps.
    assert value <= 2**-9 * 8
    assert gradient <= 2**-9 * 8 * 2
    assert specs == ["scaled_silu_14336"]
    # The benchmark at the demo's width of 384, 5 tokens, fp32: x and the result; x, the gradients of both.
    assert moved == [2 * 4 * 5 * 384, 3 * 4 * 5 * 384]
    assert len(distances) == 2 and max(distances) < 1e-6  # a few roundings of numbers up to 6
