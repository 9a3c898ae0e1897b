"""`megapar bench overlap`: time what overlapped communication hides."""

from pathlib import Path

from megapar.bench.config import BenchOverlapConfig
from megapar.cli.command import Call, Command


def run(config: BenchOverlapConfig, call: Call) -> int:
    """Time overlapped communication, write rows, tables and pictures, print the tables. Returns the exit code."""
    from megapar.bench import overlap, rows
    from megapar.cli.output import say
    from megapar.launch import rundir
    from megapar.report.pieces import draw_walks

    overlap.check(config)
    out = Path(config.out) if config.out is not None else rundir.default_folder("bench", key="out")
    rundir.make_writable(out, key="out")
    found = overlap.run(config, say)
    rows.write(found.rows, out / "bench.csv")
    for rate, walks in found.walks.items():
        where = f"{rate:g} Gbit/s" if rate else "not paced"
        picture = draw_walks(f"A tensor-parallel MLP, forward and backward, {where}", walks)
        (out / f"layer_{rate:g}.svg").write_text(picture, encoding="utf-8")
    tables = overlap.tables(found.rows)
    (out / "bench.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n", encoding="utf-8")
    print("\n\n".join(table.text() for table in tables))
    say(f"{out}: bench.csv, bench.md" + (f", {len(found.walks)} pictures" if found.walks else ""))
    return 0


COMMAND = Command(
    name="bench overlap",
    config=BenchOverlapConfig,
    run=run,
    order=8,
    about="time what overlapped communication hides, over links paced to a given rate",
    examples=[
        ("megapar bench overlap", "two ranks at 1 Gbit/s: a layer, a step, gradient reduction, a pipeline"),
        ("megapar bench overlap subject=[layer] rate=[0,0.1,1,10] pieces=8", "one subject over several links"),
    ],
    most_used=[
        *("subject", "rate", "pairs", "ranks", "tokens", "hidden", "ffn", "sequence_parallel", "pieces", "out"),
    ],
)
