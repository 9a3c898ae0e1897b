"""What `--help` and `--info` print, made from the schema and the files in `conf/`.

Imports neither Hydra nor torch, and nothing at all for `megapar --help`, which is to answer at once.
"""

from collections.abc import Mapping
from typing import Any

END = "...\n"  # what YAML writes after a bare scalar

ABOUT = {
    "train": "train a model in any tensor x pipeline x data-parallel layout",
    "verify": "train a few steps in many layouts and compare every gradient with one process",
    "generate": "let a trained model write",
    "schedule": "compare pipeline schedules by simulation, write or draw one",
    "data": "make token files from text, or check existing ones",
    "kernels": "compile the Triton kernels for GPUs that need not be here, and read the machine code",
    "bench kernels": "time the kernels beside those of other libraries, and beside what a GPU could do at most",
    "bench overlap": "time what overlapped communication hides, over links paced to a given rate",
}

EXAMPLES = {
    "train": [
        ("megapar train", "one process on a CPU, or dp over all visible GPUs"),
        ("megapar train parallel=tp2pp2dp2", "eight processes, started here"),
        ("megapar train parallel=auto devices=8", "choose the layout"),
        ("megapar train data.path=FOLDER model=gpt2_small", "your own text, another model"),
        ("megapar train experiment=demo train.steps=50", "a file of conf/experiment/, one key changed"),
        ("megapar train -m parallel=tp2,pp2,dp2 optim.lr=1e-3,3e-3", "a sweep: every combination"),
        ("torchrun --nproc-per-node 8 -m megapar.cli train parallel=tp2pp2dp2", "ranks started elsewhere"),
    ],
    "verify": [
        ("megapar verify", "every feasible layout of up to 8 ranks, in fp64"),
        ("megapar verify layouts=[tp2pp2dp2,tp4]", "two layouts"),
        ("megapar verify model=gpt2_tiny train.dtype=fp32", "another model, in single precision"),
    ],
    "generate": [
        ("megapar generate run.dir=runs/demo prompt='def main(): '", "continue a text"),
        ("megapar generate run.dir=runs/demo prompt=x sample.temperature=0", "greedily"),
        ("megapar generate run.dir=runs/demo prompt=x parallel=tp2", "on two ranks"),
    ],
    "schedule": [
        ("megapar schedule", "every schedule on 8 ranks with 32 micro-batches"),
        ("megapar schedule stages=4 microbatches=16 costs.I=2 costs.head=0.4", "with a slow backward and a heavy head"),
        (
            "megapar schedule pipeline.schedule=zbv csv=zbv.csv plot=zbv.html",
            "one schedule as a table and as a picture",
        ),
        ("megapar schedule pipeline.schedule=auto chunks=2 memory_limit=6", "the fastest order within a limit"),
    ],
    "data": [
        ("megapar data", "tokenize Python's standard library"),
        ("megapar data data.path=FOLDER data.vocab_size=4096 out=tokens/mine", "your own text"),
        ("megapar data data.path=PREFIX data.verify=full", "re-hash existing token files"),
    ],
    "kernels": [
        ("megapar kernels", "a table: every kernel on every target"),
        ("megapar kernels targets=[sm_90] kernel=[attention]", "one of each"),
        ("megapar kernels specs=specs.json", "what would be compiled, for another tool"),
    ],
    "bench kernels": [
        ("megapar bench kernels", "all kernels: measured on a GPU; on a CPU plain torch is timed and ours are read"),
        ("megapar bench kernels kernel=[attention] sweep=full out=bench", "one kernel, every shape, lengths up to 32k"),
        ("megapar bench kernels provider=[megapar,torch,flash_attn,liger_kernel]", "against every library (on a GPU)"),
        (
            "megapar bench kernels kernel=[rope] kernels.backend=interpret",
            "ours in the interpreter, to see that it runs",
        ),
    ],
    "bench overlap": [
        ("megapar bench overlap", "two ranks at 1 Gbit/s: a layer, a step, gradient reduction, a pipeline"),
        ("megapar bench overlap subject=[layer] rate=[0,0.1,1,10] pieces=8", "one subject over several links"),
    ],
}

MOST_USED = {
    "train": [
        *("parallel.tp", "parallel.pp", "parallel.dp", "parallel.sequence_parallel", "parallel.zero"),
        *("pipeline.schedule", "pipeline.partition", "model.layers", "model.hidden", "model.heads", "model.kv_heads"),
        *("train.steps", "train.seq_length", "train.micro_batch_size", "train.global_batch_size", "train.dtype"),
        *(
            "train.eval_every",
            "train.recompute",
            "train.trace",
            "optim.lr",
            "data.path",
            "checkpoint.every",
            "run.dir",
            "run.name",
        ),
        *("logger.wandb.mode", "kernels.backend", "devices", "out"),
    ],
    "verify": [
        "layouts",
        "train.dtype",
        "train.steps",
        "parallel.sequence_parallel",
        "parallel.zero",
        "run.dir",
        "out",
    ],
    "generate": [
        *("run.dir", "prompt", "sample.max_tokens", "sample.temperature", "sample.top_k", "sample.top_p"),
        *("sample.seed", "parallel.tp", "checkpoint.load", "out"),
    ],
    "schedule": [
        *("pipeline.schedule", "stages", "microbatches", "chunks", "memory_limit", "csv", "plot", "out"),
        *("costs.F", "costs.I", "costs.W", "costs.embedding", "costs.head", "costs.latency", "costs.transfer"),
        "costs.file",
    ],
    "data": ["data.path", "data.tokenizer", "data.vocab_size", "data.split", "data.verify", "out"],
    "kernels": ["kernel", "targets", "specs", "out"],
    "bench kernels": [
        *("kernel", "provider", "mode", "shape", "tokens", "sweep", "dtype", "device", "kernels.backend", "targets"),
        "out",
    ],
    "bench overlap": [
        *("subject", "rate", "pairs", "ranks", "tokens", "hidden", "ffn", "sequence_parallel", "pieces", "out"),
    ],
}


def overview() -> str:
    """`megapar --help`"""
    lines = [
        "Train Transformers in tensor x pipeline x data parallel, on CPUs and GPUs, and check that layouts agree.",
        "",
    ]
    lines += ["usage: megapar COMMAND [group=file] [key=value] ...", "", "commands:"]
    lines += _table(list(ABOUT.items()))
    lines += ["", "options:"]
    lines += _table(
        [
            ("COMMAND --help", "groups, most used keys and examples of a command"),
            ("COMMAND --info config", "every key of the composed configuration, with a description"),
            ("train -m ...", "a sweep over every combination of key=a,b; started again, it goes on where it stopped"),
            ("--version", "print the version"),
        ]
    )
    return "\n".join([*lines, "", "Start with: megapar train"])


def command_help(command: str, files: Mapping[str, list[str]]) -> str:
    """`megapar COMMAND --help`; `files`: the names in each group of the command."""
    from megapar.config.keys import keys
    from megapar.config.schema import COMMANDS

    known = keys(COMMANDS[command])
    lines = [f"megapar {command}: {ABOUT[command]}", "", f"usage: megapar {command} [group=file] [key=value] ...", ""]
    lines += ["examples:"]
    for line, text in EXAMPLES[command]:
        lines += [f"  {line}", f"      {text}"]
    if files:
        lines += ["", "groups, and the files to choose from:"]
        choices = {name: " ".join(names) or "(none yet)" for name, names in files.items()}
        if "parallel" in choices:
            choices["parallel"] += ", or a layout such as tp2pp2dp2"
        lines += _table(list(choices.items()), width=92)
    lines += ["", "most used keys:"]
    lines += _table([(key, known[key].help) for key in MOST_USED[command]])
    verbatim = [key for key, facts in known.items() if facts.verbatim]
    lines += ["", "Every key: " + f"megapar {command} --info config"]
    lines += [f"Taken as they stand after the first =: {', '.join(verbatim)}. Lists are written [a,b]."]
    return "\n".join(lines)


def subjects_help(command: str) -> str:
    """`megapar bench --help`: what a command of several subjects does to each."""
    rows = [(f"{name} --help", text) for name, text in ABOUT.items() if name.startswith(f"{command} ")]
    return "\n".join([f"usage: megapar {command} SUBJECT [key=value] ...", "", "subjects:", *_table(rows)])


def config_with_help(config: Any) -> str:
    """A config as YAML that can be read back, the description of each key as an aligned comment beside it."""
    from megapar.config.keys import groups, keys
    from megapar.config.parse import to_dict

    lines: list[tuple[str, str]] = []
    _render(to_dict(config), "", keys(type(config)), groups(type(config)), lines)
    width = min(44, max(len(text) for text, comment in lines if comment))
    return "\n".join(f"{text:<{width}}  # {comment}" if comment else text for text, comment in lines)


def key_table(command: str) -> str:
    """Every key of a command with its description, without values."""
    from megapar.config.keys import keys
    from megapar.config.schema import COMMANDS

    return "\n".join(_table([(key, facts.help) for key, facts in keys(COMMANDS[command]).items()]))


def _render(
    node: Mapping[str, Any], prefix: str, known: Mapping[str, Any], described: Mapping[str, str], lines: list[Any]
) -> None:
    import yaml

    indent = "  " * prefix.count(".")
    for name, value in node.items():
        key = prefix + name
        if isinstance(value, dict):
            lines += [(f"{indent}# {described[key]}", ""), (f"{indent}{name}:", "")]
            _render(value, key + ".", known, described, lines)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 30)
            lines.append((f"{indent}{name}: {text.removesuffix(END).strip()}", known[key].help))


def _table(rows: list[tuple[str, str]], width: int = 0) -> list[str]:
    """Two aligned columns; the second is wrapped at `width` characters, 0: never."""
    import textwrap

    first = max(len(name) for name, _ in rows)
    lines = []
    for name, text in rows:
        parts = textwrap.wrap(text, width) if width and text else [text]
        lines.append(f"  {name:<{first}}  {parts[0]}")
        lines += [f"  {'':<{first}}  {part}" for part in parts[1:]]
    return lines
