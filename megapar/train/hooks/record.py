"""A row of figures for every step, and the run in a few of them."""

import json
import os
import time
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

from megapar.config.errors import UserError
from megapar.config.stages import stage_layers, stage_names
from megapar.cores import num_cores
from megapar.data.manifest import read_manifest
from megapar.kernels import backend_of, backends
from megapar.parallel.agreement import gather_texts
from megapar.part import DTYPES
from megapar.pipeline.graphs import why_not
from megapar.schedule.simulate import simulate
from megapar.stop import stop_request
from megapar.tasks import task_kind
from megapar.train.hooks.hook import Hook, Seen
from megapar.train.metrics import any_to_stop, gather_figures, local_figures, rows_before, summarise
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop

MOST = 1000  # rows that are kept for the summary; metrics.jsonl has them all


class Record(Hook):
    """On rank 0, of this start of the run. steps: how many; first: the row of the one that warms up; recent: the last
    MOST of those behind it. before_this: steps of the starts before, if it goes on in its directory; last: the row of
    the last of them. late: figures are looked at a step later."""

    order = 10

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.steps = 0
        self.first: dict[str, Any] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=MOST)
        self.before_this = 0
        self.last: dict[str, Any] = {}
        self.skipped = loop.start.skipped
        self.cores_per_rank = num_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", loop.trainer.mesh.world_size))
        self.on_gpu = self.late = loop.config.train.device == "cuda"
        self._unread: tuple[int, Step, float | None] | None = None
        self.moved()

    def moved(self) -> None:
        self.bubble_ideal = simulate(self.loop.trainer.schedule).mean_bubble

    def start(self) -> None:
        if self.loop.start.goes_on and self.loop.writer is not None:
            for row in rows_before(self.loop.folder, self.loop.start.step - 1, "loss"):
                self.before_this, self.last = self.before_this + 1, row

    def before(self, step: int) -> None:
        self._start = time.perf_counter()

    def after(self, step: int, done: Step) -> None:
        """On a GPU the step before is looked at, so that the device has this one to do."""
        seconds = time.perf_counter() - self._start
        if self.late:
            self.settle()
            self._unread = (step, done, None)
        else:
            self._read(step, done, seconds)

    def settle(self) -> None:
        if self._unread is not None:
            unread, self._unread = self._unread, None
            self._read(*unread)

    def _read(self, step: int, done: Step, seconds: float | None) -> None:
        """seconds: that the step took; None: that the device took."""
        asked = stop_request().asked()
        figures = gather_figures(local_figures(done.loss, done.spans, asked), self.loop.trainer.mesh)
        self.loop.stopping = any_to_stop(figures)
        self.skipped += done.result.skipped
        summary = summarise(figures)
        seen = Seen(step, summary["loss"], done.result.grad_norm, done.result.skipped, figures)
        added = {key: value for hook in self.loop.hooks for key, value in hook.read(seen).items()}
        if self.loop.writer is not None:
            row = self._row(step, done, summary, done.seconds if seconds is None else seconds) | added
            if self.steps == 0:
                self.first = row
            else:
                self.recent.append(row)
            self.steps += 1
            self.loop.writer.step(row)

    def _row(self, step: int, done: Step, summary: dict[str, Any], seconds: float) -> dict[str, Any]:
        tokens = self.loop.trainer.task.tokens_per_step
        return {
            "step": step,
            "loss": summary["loss"],
            **done.said,
            "grad_norm": done.result.grad_norm,
            "lr": done.lr,
            "tokens": step * tokens,
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds,
            "compute_s": summary["compute_s"],
            **({"gpu_idle": summary["idle_s"] / seconds} if self.on_gpu else {}),
            "bubble": summary["bubble"],
            "bubble_ideal": self.bubble_ideal,
            "cores_per_rank": self.cores_per_rank,
            "exposed_comm_s": summary["exposed_comm_s"],
            "skipped_steps": self.skipped,
        }

    def finish(self) -> dict[str, Any]:
        """Medians over the last MOST steps, without the first, which warms up, if there are others."""
        engines = self._engines()
        if self.loop.writer is None:
            return {}
        # The last start may have ended between its last checkpoint and its summary.
        config, rows = self.loop.config, self.recent or [self.first or self.last]
        train = config.train

        def median_of(key: str, part: str | None = None) -> float:
            return median(row[key] if part is None else row[key][part] for row in rows)

        return {
            "layout": dict(config.parallel.layout),
            "kernels": {kernel: backend_of(kernel, train.device, DTYPES[train.dtype]) for kernel in backends()},
            "steps": self.before_this + self.steps,
            "layers_per_stage": stage_layers(config),
            "stages": stage_names(config),
            "skipped_steps": self.skipped,
            "loss": rows[-1]["loss"],
            "loss_unit": task_kind(config.task.name).loss.unit,
            "tokens_per_s": median_of("tokens_per_s"),
            "step_time_s": median_of("step_time_s"),
            "compute_s": median_of("compute_s"),
            **({"gpu_idle": median_of("gpu_idle")} if self.on_gpu else {}),
            "bubble": median_of("bubble"),
            "bubble_ideal": rows[-1]["bubble_ideal"],
            "exposed_comm_s": {axis: median_of("exposed_comm_s", axis) for axis in rows[0]["exposed_comm_s"]},
            "cores_per_rank": self.cores_per_rank,
            "dp_bytes_per_step": self.loop.trainer.sync.sent // max(1, self.steps),
            "tp_overlap": engines,
            "cuda_graphs": self._graphs(),
            "skipped_text": self._skipped_text(),
        }

    def _skipped_text(self) -> dict[str, str]:
        """Files and folders of the data that are no text, or were left out for another reason: why, by name."""
        prefix = self.loop.config.data.prefix
        try:
            manifest = read_manifest(prefix) if prefix else None
        except UserError:  # changed meanwhile; the training is done all the same
            return {}
        return manifest["source"].get("skipped", {}) if manifest else {}

    def _graphs(self) -> dict[str, Any]:
        """captured: graphs of this rank; why_not: what forbids them."""
        graphs, config = self.loop.trainer.graphs, self.loop.config
        reason = "train.cuda_graphs=off" if config.train.cuda_graphs == "off" else why_not(config)
        return {"captured": graphs.captured if graphs is not None else 0, "why_not": reason}

    def _engines(self) -> dict[str, dict[str, str]]:
        """What ran every tensor-parallel matmul of the model, by weight and direction; the same on every rank."""
        mesh = self.loop.trainer.mesh
        texts = gather_texts(json.dumps(self.loop.trainer.context.overlaps.ran()), mesh["world"], mesh.device)
        return {name: ran for text in texts for name, ran in json.loads(text).items()}


HOOK = Record
