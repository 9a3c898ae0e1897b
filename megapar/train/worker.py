"""One rank of `megapar train`: the loop from the first step to the summary."""

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megapar.checkpoint import load, save
from megapar.config.keys import changed
from megapar.config.schema import SampleConfig, TrainConfig
from megapar.config.stages import stage_layers
from megapar.console import console
from megapar.cores import num_cores
from megapar.data.tokenizer import Tokenizer
from megapar.kernels import backend_of, backends
from megapar.parallel.agreement import gather_texts
from megapar.schedule.simulate import simulate
from megapar.trace import Span
from megapar.train.metrics import MetricsWriter, finite, gather_figures, local_figures, summarise, total_loss
from megapar.train.rebalance import StageTimes
from megapar.train.sampling import generate_tokens, keep_tokenizer
from megapar.train.summary import summary_text
from megapar.train.tracing import Tracer
from megapar.train.trainer import DTYPES, Step, Trainer


def run(config: TrainConfig, rank: int, world_size: int) -> None:
    """Train as rank `rank` of `world_size` with the default process group up. `config` is resolved."""
    if config.train.device == "cuda":  # on a CPU our operations are deterministic, and asking costs seconds of imports
        torch.use_deterministic_algorithms(True)
        # That would also fill every fresh tensor with NaN; we never read one before writing it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    Loop(config, rank).run()


class Loop:
    """The steps of a run. Every rank walks it alike; rank 0 also writes."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        assert config.run.dir is not None
        self.config, self.folder = config, Path(config.run.dir)
        self.trainer = Trainer(config, rank)
        self.first_step = 1
        if config.checkpoint.load is not None:
            self.first_step = load(config.checkpoint.load, self.trainer.optimizer, config).step + 1
        self.tracer = Tracer(config, self.trainer.mesh, self.trainer.schedule, self.first_step)
        self.writer = MetricsWriter(config, console(), self.first_step) if rank == 0 else None
        if self.writer is not None:
            keep_tokenizer(config)
        self.rebalances = bool(config.pipeline.rebalance) and config.parallel.pp > 1
        self.times = StageTimes()
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.skipped = 0
        self.cores_per_rank = num_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.mesh.world_size))
        self.bubble_ideal = simulate(self.trainer.schedule).mean_bubble

    def run(self) -> None:
        steps, every = self.config.train.steps, self.config.train.eval_every
        if every:
            self._evaluate(self.first_step - 1)
        for step in range(self.first_step, steps + 1):
            spans = self._step(step)
            if every and (step % every == 0 or step == steps):
                self._evaluate(step)
            saved = None
            if step == steps or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                saved = self._save(step)
            self.tracer.after(step, spans)  # the state is safe before anything is made of times
            if self.rebalances and step % self.config.pipeline.rebalance == 0 and step < steps:
                self._rebalance(step, saved)
        sample, engines = self._sample(), self._engines()
        if self.writer is not None:
            self._finish(self.writer, sample, engines)
        self.trainer.close()

    def _save(self, step: int) -> Path:
        return save(self.folder / "checkpoints", self.trainer.optimizer, self.config, step)

    def _rebalance(self, step: int, saved: Path | None) -> None:
        """Move layers to where they are faster: into a checkpoint, and out of it in another partition."""
        before = stage_layers(self.config)
        after = self.times.layers(before, self.trainer.mesh)
        if after == before:
            return
        saved, mesh = saved or self._save(step), self.trainer.mesh
        self.trainer.context.close()
        del self.trainer  # its memory, before the next one takes as much
        self.config = changed(self.config, {"pipeline.partition": after})
        self.trainer = Trainer(self.config, mesh.rank, mesh=mesh)
        load(saved, self.trainer.optimizer, self.config)
        self.tracer.moved(self.config, self.trainer.schedule)
        self.bubble_ideal = simulate(self.trainer.schedule).mean_bubble
        if self.writer is not None:
            self.writer.partition(step, before, after)

    def _step(self, step: int) -> list[Span]:
        self.tracer.before(step)
        start = time.perf_counter()
        done = self.trainer.step(step)
        if self.rebalances:
            self.times.add(done.spans)
        figures = gather_figures(local_figures(done.loss, done.spans), self.trainer.mesh)
        self.skipped += done.result.skipped
        if self.writer is not None:
            row = self._row(step, done, summarise(figures), time.perf_counter() - start)
            self.rows.append(row)
            self.writer.step(row)
        return done.spans

    def _row(self, step: int, done: Step, summary: dict[str, Any], seconds: float) -> dict[str, Any]:
        tokens = self.trainer.task.tokens_per_step
        return {
            "step": step,
            "loss": summary["loss"],
            "grad_norm": done.result.grad_norm,
            "lr": done.lr,
            "tokens": step * tokens,
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds,
            "compute_s": summary["compute_s"],
            "bubble": summary["bubble"],
            "bubble_ideal": self.bubble_ideal,
            "cores_per_rank": self.cores_per_rank,
            "exposed_comm_s": summary["exposed_comm_s"],
            "skipped_steps": self.skipped,
        }

    def _evaluate(self, step: int) -> None:
        part = self.trainer.evaluate()
        figures = gather_figures(local_figures(part, []), self.trainer.mesh)
        if self.writer is not None:
            loss = total_loss(figures)
            row = {"step": step, "val_loss": loss, "val_bits_per_char": self.trainer.task.bits_per_char(loss)}
            self.evaluations.append(row)
            self.writer.evaluation(row)

    def _sample(self) -> str | None:
        """Text that the trained model writes, if asked for; the same on every rank."""
        task = self.config.task
        if not task.sample_tokens:
            return None
        tokenizer = Tokenizer(f"{self.config.data.prefix}.model")
        written = generate_tokens(
            self.trainer.executor,
            self.trainer.context,
            tokenizer.encode(task.sample_prompt) or [tokenizer.end_of_text],
            SampleConfig(max_tokens=task.sample_tokens, seed=self.config.train.seed),
            context_length=self.config.train.seq_length,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        )
        return task.sample_prompt + tokenizer.decode(written)

    def _engines(self) -> dict[str, dict[str, str]]:
        """What ran every tensor-parallel matmul of the model, by weight and direction; the same on every rank."""
        mesh = self.trainer.mesh
        texts = gather_texts(json.dumps(self.trainer.context.engines()), mesh["world"], mesh.device)
        return {name: ran for text in texts for name, ran in json.loads(text).items()}

    def _finish(self, writer: MetricsWriter, sample: str | None, engines: dict[str, dict[str, str]]) -> None:
        summary = self._summary() | {"tp_overlap": engines} | ({"sample": sample} if sample is not None else {})
        path = Path(self.config.out or self.folder / "summary.json")
        path.write_text(json.dumps(finite(summary), indent=1, allow_nan=False) + "\n")
        writer.close()
        print(summary_text(summary, self.config), file=console(), flush=True)

    def _summary(self) -> dict[str, Any]:
        """The run in a few figures; medians over all steps but the first, which warms up."""
        rows = self.rows[1:] or self.rows

        def middle(key: str, part: str | None = None) -> float:
            return median(row[key] if part is None else row[key][part] for row in rows)

        train = self.config.train
        return {
            "layout": dict(self.config.parallel.layout),
            "kernels": {kernel: backend_of(kernel, train.device, DTYPES[train.dtype]) for kernel in backends()},
            "steps": len(self.rows),
            "layers_per_stage": stage_layers(self.config),
            "skipped_steps": self.skipped,
            "loss": self.rows[-1]["loss"],
            "evaluations": self.evaluations,
            "tokens_per_s": middle("tokens_per_s"),
            "step_time_s": middle("step_time_s"),
            "compute_s": middle("compute_s"),
            "bubble": middle("bubble"),
            "bubble_ideal": self.rows[-1]["bubble_ideal"],
            "exposed_comm_s": {axis: middle("exposed_comm_s", axis) for axis in rows[0]["exposed_comm_s"]},
            "cores_per_rank": self.cores_per_rank,
            "dp_bytes_per_step": self.trainer.sync.sent // len(self.rows),
        }
