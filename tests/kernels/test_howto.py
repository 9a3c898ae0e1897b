"""docs/howto/add-a-kernel.md does what it says."""

import re
from pathlib import Path

from megapar.launch.pool import WorkerPool
from tests.kernels import cases

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto" / "add-a-kernel.md"


def test_the_howtos_kernel(interpreter: WorkerPool, tmp_path: Path) -> None:
    """Its two files, and nothing else: every list has it, and it is run, compiled and benchmarked."""
    for folder, language in (("kernels", "python"), ("bench", "py")):
        (tmp_path / folder).mkdir()
        blocks = re.findall(rf"```{language}\n(.*?)```", HOWTO.read_text(), re.DOTALL)
        (tmp_path / folder / "scaled_silu.py").write_text("\n\n".join(blocks))
    value, gradient, specs, moved, distances = interpreter.run(cases.run_howto, 1, str(tmp_path))[0]
    # bf16 keeps 8 bits: half a unit in the last place of values up to 6; the gradient is rounded in several steps.
    assert value <= 2**-9 * 8
    assert gradient <= 2**-9 * 8 * 2
    assert specs == ["scaled_silu_14336"]
    # The benchmark at the demo's width of 384, 5 tokens, fp32: x and the result; x, the gradients of both.
    assert moved == [2 * 4 * 5 * 384, 3 * 4 * 5 * 384]
    assert len(distances) == 2 and max(distances) < 1e-6  # a few roundings of numbers up to 6
