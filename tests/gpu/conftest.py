"""The acceptance as its users start it: in a process of its own, from a folder that is not the repository's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megapar.kernels import has_triton
from tests.gpu.statements import ROOT

collect_ignore_glob = [] if has_triton() else ["test_*"]
PLUGIN = Path(__file__).with_name("plugin")
EARLIER = [{"section": "of an earlier run"}]  # what is in DIR already
LIMIT_S = 600  # catches a hang, and judges no speed


@dataclass(frozen=True)
class Outcome:
    code: int
    rows: list[dict[str, Any]]
    said: str
    folder: Path

    def wrong(self) -> list[str]:
        return [f"{row['section']}: {row['check']}" for row in self.rows if row["ok"] is False]


Accept = Callable[..., Outcome]


@pytest.fixture(scope="session")
def accept(tmp_path_factory: pytest.TempPathFactory) -> Accept:
    """Run accept.py on the CPU; its arguments, and variables for the plugin."""

    def run(*arguments: str, root: Path = ROOT, **environment: str) -> Outcome:
        folder = tmp_path_factory.mktemp("accept")
        path = {"PYTHONPATH": str(PLUGIN)} if environment else {}
        given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
        command = [sys.executable, str(root / "experiments" / "gpu" / "accept.py"), "--device", "cpu", *arguments]
        if "--out" not in arguments:
            command += ["--out", str(folder / "out")]
            (folder / "out").mkdir()
            (folder / "out" / "accept.json").write_text(json.dumps(EARLIER))
        done = subprocess.run(
            command, cwd=folder, env=given | path | environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        path_of_rows = folder / "out" / "accept.json"
        rows = json.loads(path_of_rows.read_text()) if path_of_rows.exists() else []
        return Outcome(done.returncode, rows, done.stdout + done.stderr, path_of_rows.parent)

    return run
