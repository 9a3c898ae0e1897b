"""docs/library.md runs as it stands, and prints what it says."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCRIPT = next(text for kind, text in BLOCKS if text.startswith("# train.py"))


def test_the_page_runs_from_top_to_bottom() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    compared = 0
    for (kind, code), (below, expected) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind != "python" or code is SCRIPT:
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, "docs/library.md", "exec"), names)
        assert said.getvalue() == (expected if below == "text" else "")
        compared += below == "text"
    assert compared == 4


def losses(script: str, folder: Path, *command: str) -> list[str]:
    (folder / "train.py").write_text(script)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *command, "train.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.split()


def torchrun() -> list[str]:
    [command] = [text.split() for kind, text in BLOCKS if kind == "sh"]
    assert command[0] == "torchrun" and command[-1] == "train.py"
    return ["-m", "torch.distributed.run", "--standalone", *command[1:-1]]


def test_the_script_has_the_losses_of_one_process(tmp_path: Path) -> None:
    found = losses(SCRIPT, tmp_path, *torchrun())
    expected = losses(SCRIPT.replace('"tp2pp2"', '"single"'), tmp_path)
    assert len(found) == 3
    assert [float(loss) for loss in found] == pytest.approx([float(loss) for loss in expected], rel=1e-12)


@pytest.mark.more
@pytest.mark.parametrize("layout", ["tp2dp2", "pp2dp2", "dp4"])
def test_other_layouts_have_them_too(layout: str, tmp_path: Path) -> None:
    found = losses(SCRIPT.replace("tp2pp2", layout), tmp_path, *torchrun())
    expected = losses(SCRIPT.replace('"tp2pp2"', '"single"'), tmp_path)
    assert [float(loss) for loss in found] == pytest.approx([float(loss) for loss in expected], rel=1e-12)


def test_a_layout_of_another_size_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("tp2pp2", "tp2"))
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("layout=tp2: has 2 ranks, and 4 were started; make them agree")
