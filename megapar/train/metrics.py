"""One row of figures per step, on rank 0, whatever the layout: metrics.jsonl first, then the sinks and the terminal."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.layout import AXES, INSIDE_STAGES, RANK_ORDER
from megapar.config.schema import TrainConfig
from megapar.mesh import Mesh
from megapar.tasks import task_kind
from megapar.torch_compat import all_gather_single
from megapar.trace.spans import BUSY, IDLE, Span
from megapar.train.sinks import sink_kinds

if TYPE_CHECKING:
    from tqdm import tqdm as Bar

_WAITS = (*RANK_ORDER, "world")  # world: the gradient norm, where ranks meet once per step
_COLUMNS = ("loss", "phase", "busy", "idle", *_WAITS, "stop")


def local_figures(loss: float, spans: list[Span], stop: bool = False) -> list[float]:
    """This rank's figures in the order of `_COLUMNS`: its part of the loss, seconds, whether it is to stop."""
    seconds: dict[str, float] = {}
    for span in spans:
        seconds[span.kind] = seconds.get(span.kind, 0.0) + span.seconds
    busy = sum(seconds.get(kind, 0.0) for kind in BUSY)
    waits = (seconds.get(axis, 0.0) for axis in _WAITS)
    return [loss, seconds.get("phase", 0.0), busy, seconds.get(IDLE, 0.0), *waits, float(stop)]


def gather_figures(figures: list[float], mesh: Mesh) -> Tensor:
    """[*sizes in RANK_ORDER, columns] fp64 on the CPU: every rank's figures by place in the mesh. Collective.

    Over the hosts' group: a GPU is not asked, and may have another step to do.
    """
    mine = torch.tensor([figures], dtype=torch.float64)
    rows = mine
    if mesh.world_size > 1:
        rows = mine.new_empty(mesh.world_size, len(figures))
        with mesh.timeline.doing("world", "the gathering of figures", waiting=True):
            all_gather_single(rows, mine, group=mesh.hosts)
    return rows.view(*(mesh.layout[name] for name in RANK_ORDER), len(figures))


def global_loss(part: float, mesh: Mesh) -> float:
    """The loss of a step from every rank's part, with the bits that its row will have. Collective."""
    return totals(gather_figures(local_figures(part, []), mesh))[_COLUMNS.index("loss")]


def _columns(figures: Tensor) -> dict[str, Tensor]:
    return {name: figures[..., index] for index, name in enumerate(_COLUMNS)}


def compute_seconds(figures: Tensor) -> Tensor:
    """[*sizes in RANK_ORDER]: every rank's seconds in F, B, I, W and reduction less the waits for peers in them."""
    column = _columns(figures)
    compute = column["busy"]
    for axis in reversed(INSIDE_STAGES):
        compute = compute - column[axis]
    return compute


def summarise(figures: Tensor) -> dict[str, Any]:
    """loss, compute_s, idle_s, bubble and exposed_comm_s of a step from all ranks' figures.

    compute_s: seconds in F, B, I, W and reduction less the waits for communication in them, mean over ranks. On a GPU
    that is the stream's time: where the host is late, it holds gaps between kernels.
    idle_s: seconds in which a GPU may have had no work, at most; mean over ranks.
    exposed_comm_s of an axis: seconds that even the last of a group to arrive waited, so that waiting for a late
    peer counts where it was late; of all groups of the axis the slowest.
    bubble: share of the pipeline phase in none of F, B, I, W or reduction, mean over ranks. A pipeline's phase lasts
    until its last rank is done, as in the schedule's ideal.
    """
    column, compute = _columns(figures), compute_seconds(figures)
    exposed = {axis: float(column[axis].amin(dim).max()) for dim, axis in enumerate(RANK_ORDER)}
    exposed["world"] = float(column["world"].min())
    phase = column["phase"].amax(RANK_ORDER.index("pp"), keepdim=True)
    return {
        "loss": totals(figures)[_COLUMNS.index("loss")],
        "compute_s": float(compute.mean()),
        "idle_s": float(column["idle"].mean()),
        "bubble": float((1.0 - column["busy"] / phase).mean()),
        "exposed_comm_s": exposed,
    }


def any_to_stop(figures: Tensor) -> bool:
    """Whether a rank has been asked to stop: the same on all of them."""
    return bool(figures[..., _COLUMNS.index("stop")].any())


def totals(figures: Tensor) -> list[float]:
    """The sum of all ranks' parts of every figure. Of ranks that repeat each other the first ones are summed, so that
    the sum has the bits that it has without the others."""
    for dim, axis in enumerate(RANK_ORDER):
        if AXES[axis].splits is None:
            figures = figures.narrow(dim, 0, 1)
    columns = figures.flatten(0, -2).unbind(-1)
    return [float(column.contiguous().sum()) for column in columns]


class MetricsWriter:
    """Writes rows to metrics.jsonl and to the sinks, and shows progress on a terminal."""

    def __init__(self, config: TrainConfig, console: TextIO, first_step: int) -> None:
        assert config.run.dir is not None
        self.folder = Path(config.run.dir)
        self._task = task_kind(config.task.name)
        self._file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._console = console
        self._bar: Bar | None = None
        kinds = [kind for kind in sink_kinds() if kind.wanted(config)]
        self._sinks = [kind(config, first_step, self.say) for kind in kinds]
        interactive = console.isatty()
        if config.logger.progress and interactive:
            from tqdm import tqdm  # here: without a terminal nobody needs it

            self._bar = tqdm(
                total=config.train.steps,
                initial=first_step - 1,
                file=console,
                unit="step",
                dynamic_ncols=True,
                leave=True,
            )
        self._plain = config.logger.progress and not interactive
        self._every = max(1, config.train.steps // 10)

    def step(self, row: Mapping[str, Any]) -> None:
        """A row of a training step."""
        self._write(row)
        told = "".join(f"{figure.text(row[figure.key])}  " for figure in self._task.of_steps)
        figures = f"loss {row['loss']:.4f}  {told}{row['tokens_per_s']:,.0f} tokens/s"
        if row["skipped_steps"]:
            figures += f"  {row['skipped_steps']} skipped"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif self._plain and (row["step"] % self._every == 0 or row["step"] == 1):
            self.say(f"step {row['step']:>6}  {figures}")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of an evaluation."""
        self._write(row)
        self.say(f"step {row['step']:>6}  validation loss {self._task.shown(row)}")

    def partition(self, step: int, before: list[int], after: list[int]) -> None:
        """A row of layers that moved after a step."""
        self._write({"step": step, "partition": after})
        self.say(f"step {step:>6}  layers per stage {before} -> {after}, by measured times")

    def say(self, text: str) -> None:
        """A line on the terminal, above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._console)
        else:
            print(text, file=self._console, flush=True)

    def sync(self) -> None:
        """Have the rows so far on disk, as before a checkpoint that a run goes on from without them."""
        with _writing(self._file.name):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        with _writing(self._file.name):
            self._file.write(json.dumps(finite(row), allow_nan=False) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.log(row)


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); make room, or use another run.dir") from None


def rows_before(folder: Path, step: int, figure: str) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics.jsonl up to a step that have a figure."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if figure in row and row["step"] <= step:
                yield row


def finite(value: Any) -> Any:
    """Nested rows as JSON can hold them: it has no NaN and no infinity, so null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
