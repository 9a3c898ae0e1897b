"""What a section sees of its run: the device, the time that is left, and where its rows go."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.gpu.table import Row, read_rows, row_of, skipped

OURS = ("megapar", "experiments")  # a module of these that isn't there has moved, and is no missing package


class Run:
    """One section's part of a run.

    device: cuda or cpu; cuda: whether it is the first; backend: of the kernels there
    """

    def __init__(
        self, section: str, out: Path, seconds: float, device: str, seed: int, versions: dict[str, str],
        send: Callable[[Row], None],
    ) -> None:  # fmt: skip
        self.section, self.out, self.device, self.seed, self.send = section, out, device, seed, send
        self.end = time.monotonic() + seconds
        self.cuda = device == "cuda"
        self.backend = "triton" if self.cuda else "interpret"
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.same = {"device": name, "versions": versions}
        self.side: Any = None
        torch.manual_seed(seed)
        random.seed(seed)

    def left(self) -> float:
        return self.end - time.monotonic()

    # ------------------------------------------------------------------------------------------------------------ rows

    def row(
        self, check: str, ok: bool, value: Any = None, unit: str = "", floor: float | None = None,
        met: bool | None = None, kind: str = "", note: str = "",
    ) -> None:  # fmt: skip
        """ok: whether the number is right. met: whether it reaches its floor, which counts where it was measured."""
        kind = kind or ("measured" if self.cuda else "rehearsed")
        met = met if kind == "measured" and floor is not None else None
        others = {"value": value, "unit": unit, "floor": floor, "floor_met": met, "note": note}
        self.send(row_of(self.section, check, bool(ok), kind, **others, **self.same))

    def skip(self, check: str, reason: str) -> None:
        self.send(skipped(self.section, check, reason, **self.same))

    def within(self, check: str, value: float, bound: float, expected: float | None = None, note: str = "") -> None:
        """An error: wrong beyond `bound`, and NaN is. Its floor is what is expected of it: at most `expected`."""
        met = None if expected is None else value <= expected
        self.row(check, value <= bound, value, "error", expected, met, note=f"at most {bound:g}. {note}".rstrip())

    def rate(self, check: str, value: float, unit: str, floor: float | None = None, note: str = "") -> None:
        """Something that was timed, of which more is better. On a CPU there is no figure."""
        floor = None if floor is None or math.isnan(floor) else floor
        if self.cuda:
            met = floor is None or value >= floor  # card-only
            self.row(check, math.isfinite(value), value, unit, floor, met, note=note)  # card-only
        else:
            self.row(check, True, None, unit, floor)

    def share(self, check: str, value: float, most: float, note: str = "") -> None:
        """Something that was timed, of which less is better: its floor is the most that is expected."""
        if self.cuda:
            self.row(check, math.isfinite(value), value, "", most, value <= most, note=note)  # card-only
        else:
            self.row(check, True, None, "", most)

    def attempt(self, check: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run one check. What it raises is a row; an error of the device ends the section."""
        if self.left() < 0:
            self.skip(check, "no time left")
            return None
        try:
            return function(*args, **options)
        except Exception as error:
            self.failed(check, error)
            if self.cuda and "CUDA error" in str(error):
                raise SystemExit(3) from None  # card-only
            return None

    def failed(self, check: str, error: BaseException) -> None:
        """A row of what a check or the section raised. A package that isn't installed is no error."""
        missing = missing_package(error)
        if missing:
            self.skip(check, missing)
        else:
            self.row(check, False, note=last_line(error))

    def ceiling(self, check: str) -> float:
        """What `ceilings` measured in this run; NaN without it."""
        rows = read_rows(self.out / "accept.json")
        values = [row["value"] for row in rows if (row["section"], row["check"]) == ("ceilings", check)]
        return values[-1] if values and isinstance(values[-1], float) else math.nan

    # --------------------------------------------------------------------------------------------------------- tensors

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)

    def poison(self) -> None:
        """From here on new memory holds NaN, so that what a kernel leaves out is seen."""
        deterministic(fill=True)
        assert bool(torch.zeros(1, device=self.device).new_empty(9).isnan().all()), "new memory holds no NaN"

    def noise(self) -> None:
        """Other work on a second stream."""
        if not self.cuda:
            return
        if self.side is None:  # card-only
            self.side = torch.cuda.Stream()
            self.junk = [self.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(3)]
            torch.cuda.synchronize()
        with torch.cuda.stream(self.side):  # card-only
            for _ in range(random.randrange(4)):
                torch.mm(self.junk[0], self.junk[1], out=self.junk[2])

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()  # card-only

    def bench(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a call, the median of runs that find the L2 cache empty; without a GPU it is called once."""
        if not self.cuda:
            call()
            return math.nan
        from triton.testing import do_bench  # card-only

        return float(do_bench(call, warmup=10, rep=50, return_mode="median"))  # card-only


def missing_package(error: BaseException) -> str:
    """What to say of an error that comes of a package that isn't installed; nothing of another."""
    name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    package = name.partition(".")[0]
    return f"needs the package {package}, which is not installed" if package and package not in OURS else ""


def deterministic(fill: bool = False) -> None:
    """As a rank asks for it. fill: new memory with NaN, which a rank does not."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:120]
