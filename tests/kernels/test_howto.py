"""docs/howto/add-a-kernel.md does what it says."""

import re
from pathlib import Path

from megapar.launch.pool import WorkerPool
from tests.kernels import cases

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto" / "add-a-kernel.md"


def test_the_howtos_kernel(interpreter: WorkerPool, tmp_path: Path) -> None:
    file = tmp_path / "scaled_silu.py"
    file.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", HOWTO.read_text(), re.DOTALL)))
    value, gradient, specs = interpreter.run(cases.run_howto, 1, str(file))[0]
    # bf16 keeps 8 bits: half a unit in the last place of values up to 6; the gradient is rounded in several steps.
    assert value <= 2**-9 * 8
    assert gradient <= 2**-9 * 8 * 2
    assert specs == ["scaled_silu_14336"]
