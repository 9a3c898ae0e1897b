"""`megapar verify`: does every layout compute what one process computes, and are the operations' gradients right?

First every operation that the model uses is checked alone (`megapar/operations.py`): a wrong backward would be the same
one in every layout, and in the run that they are compared with.

The one-process run writes every gradient and updated weight of its first steps, in logical coordinates. Every rank of
every layout then compares all that it holds with its place in there: replicas and tied copies too, so a copy that
drifts is detected even if nothing reads it.
"""

import json
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megapar.config.check import with_layout
from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig, VerifyConfig
from megapar.launch.pool import PoolError, WorkerPool
from megapar.launch.rank import one_line
from megapar.launch.rundir import REFERENCE
from megapar.operations import BOUND, Report, check_operations
from megapar.part import BuildStage
from megapar.train.metrics import finite
from megapar.train.trainer import Trainer
from megapar.update_rules import optimizer_kind

# Largest errors that rounding can explain, with an order of magnitude to spare (gradients and losses relative, updates
# in units of the learning rate). A wrong sum is off by a factor, not by a digit.
BOUNDS = {
    "fp64": {"gradient": 1e-11, "update": 1e-8, "loss": 1e-13},
    "fp32": {"gradient": 2e-4, "update": 5e-2, "loss": 1e-6},
}

# Losses below it are compared with it: one that is a difference, such as a policy's, may come to 0.
LEAST_LOSS = 0.01
MOST = 5  # wrong gradients that are shown; verify.json has all
JOB_TIMEOUT_S = 3600.0  # of a layout's whole job; a stuck collective ends by train.timeout_s


@dataclass
class Compared:
    """What one rank found in one step.

    loss: its part of the loss. errors: largest |difference| of the gradient and of the updated value, by parameter.
    elements: parameters that this rank counts (all ranks together: every one once).
    """

    loss: float
    grad_norm: float
    errors: dict[str, list[float]]
    elements: int


@dataclass
class Verdict:
    """The comparison of one layout."""

    layout: str
    gradient: float = 0.0
    update: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    worst: str = ""  # first step and parameter over a bound, or what went wrong
    passed: bool = True
    seconds: float = 0.0


class RunRecord:
    """The reference's gradients and weights on disk: one flat fp64 array per step and kind, by parameter name."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes, self.norms = folder, shapes, dict[int, float]()
        self.offsets, self.size = {}, 0
        for name, shape in sorted(shapes.items()):
            self.offsets[name] = self.size
            self.size += math.prod(shape)

    @classmethod
    def open(cls, folder: Path) -> "RunRecord":
        shapes = json.loads((folder / "shapes.json").read_text())
        return cls(folder, {name: tuple(shape) for name, shape in shapes.items()})

    def array(self, step: int, kind: str, mode: str) -> np.ndarray:
        return np.memmap(self.folder / f"{step}.{kind}", np.float64, mode, shape=(self.size,))  # type: ignore[call-overload]

    def part(self, array: np.ndarray, name: str) -> np.ndarray:
        shape = self.shapes[name]
        return array[self.offsets[name] : self.offsets[name] + math.prod(shape)].reshape(shape)

    def gradient_scale(self, step: int, name: str) -> float:
        """What the error of a parameter's gradient is relative to: its largest element, or a thousandth of the root
        mean square of all gradients, where that is more."""
        gradients = self.array(step, "gradient", "r")
        if step not in self.norms:
            self.norms[step] = float(np.linalg.norm(gradients))
        floor = 1e-3 * self.norms[step] / math.sqrt(self.size)
        return max(float(np.abs(self.part(gradients, name)).max()), floor)

    def rounding_alone(self, steps: int, name: str, bound: float) -> np.ndarray:
        """Where all gradients of the first steps are zero to within `bound`, of a parameter's shape."""
        alone = np.ones(self.shapes[name], dtype=np.bool_)
        for step in range(1, steps + 1):
            gradient = self.part(self.array(step, "gradient", "r"), name)
            alone &= np.abs(gradient) <= bound * self.gradient_scale(step, name)
        return alone


def run_reference(
    rank: int, world_size: int, config: TrainConfig, folder: str, **stages: Any
) -> list[tuple[float, float]]:
    """One process: writes the record, returns (loss, gradient norm) by step. stages: build_stage, or nothing."""
    trainer = Trainer(config, rank, **stages)
    shapes = {held.piece.record.name: held.piece.record.shape for held in trainer.buffers.held()}
    (Path(folder) / "shapes.json").write_text(json.dumps(shapes))
    record = RunRecord(Path(folder), shapes)

    def write(step: int, kind: str, buckets: Sequence[Tensor]) -> None:
        array = record.array(step, kind, "w+")
        for held in trainer.buffers.held():
            record.part(array, held.piece.record.name)[...] = held.view(buckets).double().cpu().numpy()

    history = []
    for step in range(1, config.train.steps + 1):
        result = trainer.step(step, partial(write, step, "gradient", trainer.sync.owned))
        write(step, "weight", trainer.buffers.params)
        history.append((result.loss, result.result.grad_norm))
    trainer.close()
    return history


def run_layout(rank: int, world_size: int, config: TrainConfig, folder: str, **stages: Any) -> list[Compared]:
    """One rank of a layout: trains the same steps and compares everything it holds. stages: as of `run_reference`."""
    record = RunRecord.open(Path(folder))
    trainer = Trainer(config, rank, **stages)
    by_sign, bound = optimizer_kind(config.optim.name).by_sign, BOUNDS[config.train.dtype]["gradient"]
    history = []

    def compare(step: int, kind: str, buckets: Sequence[Tensor], found: Compared) -> None:
        array = record.array(step, kind, "r")
        for held in trainer.buffers.held():
            name, values = held.piece.record.name, held.view(buckets)
            box = held.piece.shard.box
            apart = np.abs(values.double().cpu().numpy() - record.part(array, name)[box])
            if by_sign and kind == "weight":  # of a gradient that is rounding the sign is anyone's
                apart[record.rounding_alone(step, name, bound)[box]] = 0.0
            error = float(apart.max(initial=0.0))
            errors = found.errors.setdefault(name, [0.0, 0.0])
            column = 0 if kind == "gradient" else 1
            errors[column] = error if math.isnan(error) else max(errors[column], error)
            if held.counted and kind == "weight" and trainer.mesh.first_replica:
                found.elements += values.numel()

    for step in range(1, config.train.steps + 1):
        found = Compared(0.0, 0.0, {}, 0)

        def reduced(step: int = step, found: Compared = found) -> None:
            compare(step, "gradient", trainer.buffers.gather(trainer.sync.owned), found)

        result = trainer.step(step, reduced)
        compare(step, "weight", trainer.buffers.params, found)
        found.loss, found.grad_norm = result.loss, result.result.grad_norm
        history.append(found)
    trainer.close()
    return history


def judge(
    layout: str,
    config: TrainConfig,
    record: RunRecord,
    reference: list[tuple[float, float]],
    ranks: list[list[Compared]],
) -> Verdict:
    """Bring the ranks' findings together and hold them against the bounds."""
    bounds = BOUNDS[config.train.dtype]
    verdict = Verdict(layout)

    def hold(value: float, kind: str, what: str) -> None:
        if not value <= getattr(verdict, kind):
            setattr(verdict, kind, value)
        if not value <= bounds.get(kind, bounds["gradient"]) and verdict.passed:
            verdict.passed, verdict.worst = False, what

    for step, (loss, norm) in enumerate(reference, start=1):
        found = [history[step - 1] for history in ranks]

        def error(name: str, column: int, found: list[Compared] = found) -> float:
            errors = [one.errors[name][column] for one in found if name in one.errors]
            return math.nan if any(map(math.isnan, errors)) else max(errors)

        names = sorted({name for one in found for name in one.errors})
        for name in names:
            apart = relative(error(name, 0), record.gradient_scale(step, name))
            hold(apart, "gradient", f"step {step}: gradient of {name}")
        apart = relative(max(abs(one.grad_norm - norm) for one in found), norm)
        hold(apart, "grad_norm", f"step {step}: gradient norm")
        hold(abs(sum(one.loss for one in found) - loss) / max(abs(loss), LEAST_LOSS), "loss", f"step {step}: loss")
        for name in names:
            hold(error(name, 1) / config.optim.lr, "update", f"step {step}: value of {name}")
        if (held := sum(one.elements for one in found)) != record.size and verdict.passed:
            verdict.passed, verdict.worst = False, f"the ranks count {held} parameters, not {record.size}"
    return verdict


def relative(error: float, scale: float) -> float:
    """0 of a step that has no gradient, as where a policy's rewards are all alike, if it has none here either."""
    if scale:
        return error / scale
    return error if math.isnan(error) else math.inf if error else 0.0


def reference_of(config: VerifyConfig) -> VerifyConfig:
    """The configuration of the one-process run. Of layouts on GPUs it is on the CPU, in torch's form of the kernels:
    another device and other code, so that one rank on a GPU is a layout like any other."""
    one = with_layout(config, Layout())
    if config.train.device == "cpu":
        return one
    return changed(one, {"train.device": "cpu", "kernels.backend": "torch"})


def compare_layouts(
    config: VerifyConfig, pool: WorkerPool, folder: str, build_stage: BuildStage | None = None
) -> Iterator[Verdict]:
    """Run the reference and every layout of a resolved configuration; verdicts come as they are found.

    build_stage: as of `ModelPart`; a function at the top level of a module, as it travels by pickle
    """

    def job(function: Callable[..., Any]) -> Callable[..., Any]:
        return function if build_stage is None else partial(function, build_stage=build_stage)

    reference = pool.run(job(run_reference), 1, reference_of(config), folder, timeout=JOB_TIMEOUT_S)[0]
    if not any(norm for _, norm in reference):
        steps = f"all gradients of {config.train.steps} steps are 0"
        remedy = "; give a reward that tells completions of an untrained model apart" if config.reward else ""
        raise UserError(f"verify: {steps}, so no layout can be told from another{remedy}")
    record = RunRecord.open(Path(folder))
    for text in config.layouts or []:
        layout, start = Layout.parse(text), time.perf_counter()
        try:
            ranks = pool.run(
                job(run_layout),
                layout.world,
                with_layout(config, layout),
                folder,
                timeout=JOB_TIMEOUT_S,
                operation_timeout=config.train.timeout.total_seconds(),
                device=config.train.device,
            )
            verdict = judge(str(layout), config, record, reference, ranks)
        except PoolError as error:
            verdict = Verdict(str(layout), math.nan, math.nan, math.nan, math.nan, what_failed(error), passed=False)
        verdict.seconds = time.perf_counter() - start
        yield verdict


def what_failed(error: PoolError) -> str:
    """A failed job in one line."""
    line = one_line(error.error) if error.error is not None else str(error).splitlines()[0]
    return f"rank {error.rank}: {line}"


def run(config: VerifyConfig, build_stage: BuildStage | None = None) -> int:
    """The command: checks the operations, prints a table row per layout, writes `out`, returns 1 if anything is wrong.

    build_stage: as of `ModelPart`; a function at the top level of a module, for the ranks to find it

    Raises UserError for another function, and for a model that can't run at all.
    """
    try:
        pickle.dumps(build_stage)
    except Exception as error:
        raise UserError("build_stage: ranks can't find it; use a function at the top level of a module") from error
    report: dict[str, Any] = {"dtype": config.train.dtype, "bounds": BOUNDS[config.train.dtype], "layouts": []}
    start = time.perf_counter()
    try:
        operations = check_operations(config, build_stage)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model can't run in one process: {one_line(error)}") from error
    seconds = time.perf_counter() - start
    report["operations"] = asdict(operations) | {"bound": BOUND, "seconds": seconds}
    _show(operations, seconds)
    if operations.wrong:
        print("no layout was compared: the one-process run would have the same gradients")
    else:
        report["layouts"] = [asdict(verdict) for verdict in _table(config, build_stage)]
    _write(config, report)
    return 1 if operations.wrong or not all(verdict["passed"] for verdict in report["layouts"]) else 0


def _show(operations: Report, seconds: float) -> None:
    if not operations.wrong:
        what = f"{operations.gradients} gradients of {operations.checked} operations and modules"
        if operations.not_alone:
            what += f" ({len(operations.not_alone)} more can't run alone: {', '.join(operations.not_alone[:MOST])})"
        print(
            f"{what} in fp64 against finite differences; bound {BOUND:.0e}: {operations.error:.1e} {seconds:.1f}s  pass"
        )
        return
    for wrong in operations.wrong[:MOST]:
        print(f"FAIL  {wrong}")
    if len(operations.wrong) > MOST:
        print(f"FAIL  and {len(operations.wrong) - MOST} more gradients")


def _table(config: VerifyConfig, build_stage: BuildStage | None) -> list[Verdict]:
    """Compare the layouts, with a row of the table for each."""
    bounds = BOUNDS[config.train.dtype]
    layouts = [Layout.parse(text) for text in config.layouts or []]
    width = max([len(str(layout)) for layout in layouts] + [len("layout")])
    where = "" if config.train.device == "cpu" else " on the CPU"
    print(
        f"{config.train.steps} steps in {config.train.dtype} against one process{where}; bounds: "
        + ", ".join(f"{kind} {bound:.0e}" for kind, bound in bounds.items())
    )
    print(f"{'layout':<{width}}  gradient  grad norm   update      loss   time")
    verdicts = []
    with (
        tempfile.TemporaryDirectory(prefix=REFERENCE, dir=config.run.dir) as folder,
        WorkerPool(max([layout.world for layout in layouts] + [1]), config.kernels.backend == "interpret") as pool,
    ):
        for verdict in compare_layouts(config, pool, folder, build_stage):
            verdicts.append(verdict)
            numbers = "".join(
                f"{value:>10.1e}" for value in (verdict.gradient, verdict.grad_norm, verdict.update, verdict.loss)
            )
            end = "pass" if verdict.passed else f"FAIL  {verdict.worst}"
            print(f"{verdict.layout:<{width}}{numbers} {verdict.seconds:>5.1f}s  {end}", flush=True)
    failed = sum(not verdict.passed for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} layouts agree with the one-process run")
    return verdicts


def _write(config: VerifyConfig, report: dict) -> None:
    assert config.run.dir is not None
    path = Path(config.out or os.path.join(config.run.dir, "verify.json"))
    path.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    print(path)
