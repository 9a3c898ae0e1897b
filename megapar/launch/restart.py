"""A run whose rank failed goes on by itself, from its newest checkpoint."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megapar.launch.failure import GoingOn, RankFailure
from megapar.launch.local import launch
from megapar.launch.rank import Job
from megapar.launch.rundir import RESTARTS
from megapar.launch.signals import stopped_between


def launch_until_done(
    job: Job,
    restarts: int,
    again: Callable[[str], Job | None],
    say: Callable[[str], None],
    quiet: bool = False,
    changed: Callable[[int], str | None] | None = None,
) -> None:
    """`launch`, up to `restarts` times more where a rank fails. What a user must mend is raised at once.

    again: the job that goes on in a run directory, which is held; None: the run is done. May raise UserError.
    changed: of an elastic run: what has changed so that another layout than this one of so many ranks is better
    A signal that asks to stop while no ranks run raises Stopped, as it does where they have begun no step.
    """
    with stopped_between():
        _until_done(job, restarts, again, say, quiet, changed)


def _until_done(
    job: Job,
    restarts: int,
    again: Callable[[str], Job | None],
    say: Callable[[str], None],
    quiet: bool,
    changed: Callable[[int], str | None] | None,
) -> None:
    following: Job | None = job
    events: list[dict[str, Any]] = []
    while following is not None:
        job = following
        try:
            return launch(job, quiet, None if changed is None else partial(changed, job.ranks))
        except RankFailure as failure:
            if failure.asked or len(events) == restarts:
                raise
            events.append({"time": time.time(), "restart": len(events) + 1, "failure": failure.line})
            say(str(failure))
            say(f"run: restart {len(events)} of {restarts}")
            try:
                following = again(job.folder)  # where there is no checkpoint yet, that clears the directory
            finally:
                with open(Path(job.folder) / RESTARTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(events[-1]) + "\n")
        except GoingOn:
            following = again(job.folder)
    return None
