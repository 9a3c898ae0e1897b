"""The process of one section."""

import faulthandler
import json
import os
import signal
import threading
import traceback
from pathlib import Path
from typing import Any

from experiments.gpu.rows import Row
from experiments.gpu.run import Run
from experiments.gpu.section import read


def child(text: str) -> int:
    """Run one section. text: JSON of what `children.Child` gives it. 0: it went through; 3: the device failed."""
    given: dict[str, Any] = json.loads(text)
    threading.Thread(target=end_with_parent, daemon=True).start()
    faulthandler.dump_traceback_later(given["seconds"] + 5, exit=False)  # where it hangs, for the log

    def send(row: Row) -> None:
        os.write(given["pipe"], json.dumps(row).encode() + b"\n")

    run = Run(
        given["file"], Path(given["out"]), given["seconds"], given["device"], given["seed"], given["versions"], send
    )
    try:
        section = read(given["file"]).SECTION
        run.section = section.name
        section.run(run)
    except Exception as error:
        traceback.print_exc()
        run.failed("section", error)
    return 0


def end_with_parent() -> None:
    """Nothing is ever written to the standard input: that it ends means that its writer has."""
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)  # card-only
