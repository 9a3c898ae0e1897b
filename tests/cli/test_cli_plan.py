"""`megapar plan`: what one rank would hold and do, on the terminal and as JSON."""

import json
import re
from pathlib import Path

import pytest

from megapar.cli import main
from megapar.cli.commands.plan import _runs, _size

LAYOUT = ("plan", "model=tiny", "parallel=tp2pp2dp2", "model.vocab_size=100", "parallel.zero=1")


def test_a_rank_on_the_terminal_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYOUT, "rank=5", f"out={tmp_path / 'plan.json'}"]) == 0
    shown = capsys.readouterr().out
    assert "5 of 8 in tp2pp2dp2: pp 1, dp 0, tp 1" in shown
    assert "head" in shown and "embedding" not in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["rank"] == 5
    assert plan["coordinates"] == {"pp": 1, "dp": 0, "tp": 1}
    assert plan["bytes"].keys() == {"weights", "gradients", "optimizer", "activations"}
    assert plan["messages"].keys() == {"tp", "pp", "dp", "world"}
    assert all(one["count"] > 0 and one["bytes"] > 0 for one in plan["messages"].values())
    assert plan["parts"]["1"][-1] == "head"
    assert plan["groups"]["tp"] == [4, 5]
    assert plan["row"][0] == "1RECV_F0"


def test_ranks_together_hold_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Without tensor parallelism, which repeats norms, pipeline ranks have every parameter once."""
    held = []
    for rank in range(4):
        assert (
            main(["plan", "model=tiny", "model.layers=8", "parallel=pp4", "model.vocab_size=100", f"rank={rank}"]) == 0
        )
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))
        mine, whole = (int(number.replace(",", "")) for number in re.findall(r"[0-9,]*[0-9]", line))
        held.append(mine)
    assert sum(held) == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rank=8"], "rank=8: tp2pp2dp2 has ranks 0 to 7"),
        (["devices=4"], "devices=4: the layout tp2pp2dp2 has 8 ranks"),
        (["rank=-1"], "rank=-1: must be at least 0"),
        (["parallel.tp=3"], "not divisible by parallel.tp=3"),
        (["pipeline.schedule=zb"], "no such schedule"),
        (["out=none/plan.json"], "there is no such folder"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYOUT, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_data_and_no_gpu_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "data.path=nowhere", "train.device=cuda", "parallel=dp64", "train.global_batch_size=256"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "dp: 64 ranks, 0 to 63" in shown.out
    assert "counted with data.vocab_size=1024" in shown.err


def test_kernels_that_this_process_could_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["kernels.backend=interpret", "parallel.tp_overlap=symmetric"]
    assert main([*LAYOUT, *arguments]) == 0


def test_parts_and_sizes_are_short() -> None:
    assert _runs(["embedding", "layers.0", "layers.1", "layers.2"]) == "embedding, layers.0-2"
    assert _runs(["layers.7", "head"]) == "layers.7, head"
    assert _runs(["layers.1", "layers.3"]) == "layers.1, layers.3"
    assert [_size(number) for number in (0, 999, 1000, 1.5e6, 2e9, 3e15)] == [
        "0 B", "999 B", "1 KB", "1.5 MB", "2 GB", "3e+03 TB"
    ]  # fmt: skip
