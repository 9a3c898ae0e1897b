"""`megapar kernels`: compile the Triton kernels for GPUs that need not be here, and read the machine code."""

from dataclasses import asdict, dataclass
from pathlib import Path

from megapar.cli.command import Call, Command
from megapar.config.errors import UserError
from megapar.config.keys import option


@dataclass(frozen=True)
class InspectConfig:
    """`megapar kernels`: compile the Triton kernels for GPUs that need not be here, and read the machine code."""

    kernel: list[str] | None = option(None, "kernels to compile; default: all")
    targets: list[str] = option(
        ["sm_80", "sm_90", "sm_100", "gfx942"], "GPUs to compile for: A100, H100, B200, MI300 by their architecture"
    )
    specs: str | None = option(
        None, "file to write what would be compiled to, as JSON, and compile nothing", verbatim=True, path=True
    )
    out: str | None = option(
        None, "file for the figures as JSON; default: only the table", verbatim=True, path=True, identity=False
    )


def run(config: InspectConfig, call: Call) -> int:
    """Compile kernels for GPUs that need not be here and print what the machine code shows. Returns the exit code."""
    import json

    from megapar.cli.output import refuse_bad_out, say
    from megapar.inspect.compile import TARGETS, choose, compile_all, specs_of
    from megapar.inspect.table import table
    from megapar.kernels import has_triton
    from megapar.kernels.registry import compiled

    chosen, targets = choose("kernel", config.kernel, compiled()), choose("targets", config.targets, TARGETS)
    refuse_bad_out(config.specs, None, "specs")
    refuse_bad_out(config.out, None)
    if not has_triton():
        raise UserError("kernels: Triton is not installed, and it is the compiler; install it: pip install triton")
    specs = specs_of(chosen, targets)
    if config.specs is not None:
        entries = [spec.batch_entry() for spec in specs if spec.target.startswith("sm_")]
        Path(config.specs).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        say(f"{config.specs}: {len(entries)} kernels, nothing compiled")
        return 0
    say(f"compiling {len(specs)} kernels; Triton's cache keeps them")
    figures = compile_all(specs)
    print(table(figures))
    if config.out is not None:
        lines = ",\n".join(json.dumps(asdict(one)) for one in figures)
        Path(config.out).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 1 if any(one.error for one in figures) else 0


COMMAND = Command(
    name="kernels",
    config=InspectConfig,
    run=run,
    order=6,
    about="compile the Triton kernels for GPUs that need not be here, and read the machine code",
    examples=[
        ("megapar kernels", "a table: every kernel on every target"),
        ("megapar kernels targets=[sm_90] kernel=[attention]", "one of each"),
        ("megapar kernels specs=specs.json", "what would be compiled, for another tool"),
    ],
    most_used=["kernel", "targets", "specs", "out"],
)
