"""A run whose rank failed goes on by itself, from its newest checkpoint."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from megapar.launch.failure import RankFailure
from megapar.launch.local import launch
from megapar.launch.rank import Job
from megapar.launch.rundir import RESTARTS


def launch_until_done(
    job: Job, restarts: int, again: Callable[[str], Job | None], say: Callable[[str], None], quiet: bool = False
) -> None:
    """`launch`, up to `restarts` times more where a rank fails. What a user must mend is raised at once.

    again: the job that goes on in a run directory, which is held; None: the run is done. May raise UserError.
    """
    for number in range(1, restarts + 2):
        try:
            return launch(job, quiet)
        except RankFailure as failure:
            if number > restarts:
                raise
            say(str(failure))
            say(f"run: restart {number} of {restarts}")
            event = {"time": time.time(), "restart": number, "failure": failure.line}
            with open(Path(job.folder) / RESTARTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        following = again(job.folder)
        if following is None:
            return None
        job = following
    return None
