"""What a finished run leaves and says."""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

from megapar.config.schema import TrainConfig
from megapar.config.stacks import stacks
from megapar.console import console
from megapar.data.corpus import skipped_text
from megapar.files import write_atomic
from megapar.tasks import task_kind
from megapar.train.metrics import MetricsWriter, finite


def leave_summary(summary: dict[str, Any], config: TrainConfig, writer: MetricsWriter) -> None:
    """Write the figures of a finished run, end its rows, and say it on the terminal."""
    assert config.run.dir is not None
    text = json.dumps(finite(summary), indent=1, allow_nan=False) + "\n"
    try:
        write_atomic(Path(config.run.dir) / "summary.json", text)
        if config.out is not None:  # its folder may have gone
            write_atomic(Path(config.out), text)
    finally:  # also if there is no room for it
        writer.close()
        print(summary_text(summary, config), file=console(), flush=True)


def summary_text(summary: dict[str, Any], config: TrainConfig) -> str:
    """Layout, speed, where the time of a step went, and what the run left behind."""
    layout, step, task = summary["layout"], summary["step_time_s"], task_kind(config.task.name)
    ranks = prod(layout.values())
    names = " ".join(f"{axis}={size}" for axis, size in layout.items())
    sample = summary.get("sample")
    lines = ["", "the model writes:", *(f"    {line}" for line in sample.splitlines())] if sample else []
    if problem := summary.get("sample_problem"):
        lines += ["", f"the model writes nothing: {problem}"]
    lines += [
        "",
        f"layout      {names}: {ranks} rank{'s' if ranks > 1 else ''}, {config.train.dtype} on {config.train.device}",
        f"kernels     {_backends(summary['kernels'])}",
        *engine_lines(summary["tp_overlap"]),
        *_graph_lines(summary["cuda_graphs"], config),
        f"speed       {summary['tokens_per_s']:,.0f} tokens/s, {1000 * step:.0f} ms per step (median)",
        f"loss        {task.loss.text(summary['loss'])} after {summary['steps']} steps"
        + (f", {summary['skipped_steps']} skipped" if summary["skipped_steps"] else ""),
    ]
    if summary["skipped_text"]:
        lines.append(f"data        {skipped_text(summary['skipped_text'])}")
    if len(summary["evaluations"]) > 1:
        lines.append(f"validation  {task.change(summary['evaluations'][0], summary['evaluations'][-1])}")
    if layout["pp"] > 1:
        of_stages = ", ".join(map(str, summary["layers_per_stage"])) + " layers"
        if len(stacks(config.model)) > 1:
            of_stages = " | ".join(summary["stages"])
        lines.append(f"stages      {of_stages}, {config.pipeline.schedule} schedule")
    if layout["dp"] > 1:
        method = config.parallel.grad_compression
        way = "exact" if method == "none" else method
        lines.append(f"gradients   {summary['dp_bytes_per_step'] / 1e6:.3g} MB to dp peers per step and rank, {way}")
    lines += _time_lines(summary, config)
    lines += [f"left in     {config.run.dir}: metrics.jsonl, summary.json, config.yaml, logs/, checkpoints/"]
    return "\n".join(lines)


def _graph_lines(graphs: dict[str, Any], config: TrainConfig) -> list[str]:
    if config.train.cuda_graphs == "off":
        return []
    said = f"none: {graphs['why_not']}" if graphs["why_not"] else f"{graphs['captured']} on rank 0"
    return [f"CUDA graphs {said}"]


def _backends(kernels: dict[str, str]) -> str:
    """`torch` where that ran every kernel, else each backend and its kernels."""
    names = dict.fromkeys(kernels.values())
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{name}: {', '.join(k for k in kernels if kernels[k] == name)}" for name in names)


def engine_lines(engines: dict[str, dict[str, str]]) -> list[str]:
    """Which engine ran the matmuls that have a collective, in which layers."""
    lines = []
    for direction in ("forward", "backward"):
        ran = {weight: of[direction] for weight, of in engines.items() if direction in of}
        for engine in dict.fromkeys(ran.values()):
            lines.append(f"{direction} {engine}: {_places([weight for weight in ran if ran[weight] == engine])}")
    return [f"{'' if number else 'tp matmuls':<12}{line}" for number, line in enumerate(lines)]


def _places(weights: list[str]) -> str:
    """Names of weights, those of layers together: `attention.out, mlp.down of layers 0-3; head`."""
    layers: dict[str, list[int]] = {}
    for weight in weights:
        number = re.search(r"\blayers\.(\d+)\.", weight)
        layers.setdefault(re.sub(r"\blayers\.\d+\.|\.weight\b", "", weight), []).extend(
            [int(number[1])] if number else []
        )
    names: dict[str, list[str]] = {}
    for name, numbers in layers.items():
        names.setdefault(_of_layers(sorted(numbers)), []).append(name)
    return "; ".join(", ".join(of) + where for where, of in names.items())


def _of_layers(numbers: list[int]) -> str:
    """Ascending numbers, neighbours as a range: ` of layers 0-3, 6`; nothing for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f" of layer{'s' if len(numbers) > 1 else ''} {text}" if text else ""


def _time_lines(summary: dict[str, Any], config: TrainConfig) -> list[str]:
    step, exposed = summary["step_time_s"], summary["exposed_comm_s"]
    parts = [f"{axis} {seconds / step:.0%}" for axis, seconds in exposed.items() if summary["layout"].get(axis, 1) > 1]
    time = f"time        of a step: compute {summary['compute_s'] / step:.0%}"
    lines = [time + (f", exposed communication {', '.join(parts)}" if parts else "")]
    if "gpu_idle" in summary:
        lines.append(f"idle        {summary['gpu_idle']:.0%} of a step at most: GPUs without work from the host")
    if summary["layout"]["pp"] > 1:
        lines.append(
            f"bubble      {summary['bubble']:.1%} of the pipeline phase; the {config.pipeline.schedule} schedule's "
            f"ideal is {summary['bubble_ideal']:.1%}"
        )
    if slow := summary.get("stragglers"):
        named = ", ".join(f"rank {rank} in {share:.0%} of steps" for rank, share in slow.items())
        lines.append(f"slow ranks  {named}")
    if summary["cores_per_rank"] < 1 and config.train.device == "cpu":
        lines.append(
            f"cores       {summary['cores_per_rank']:.2g} per rank: ranks take turns on a core, so times and bubble "
            "don't carry over"
        )
    return lines
