"""What is learned: a task makes batches, the loss and the figures of an evaluation.

Each is a file of `kinds/` with one object: `TASK = TaskKind(...)`, and `task.name` is the file's name.
"""

import importlib

from megapar.config.errors import UserError
from megapar.tasks.kind import Figure, Task, TaskKind

__all__ = ["Figure", "Task", "TaskKind", "task_kind"]


def task_kind(name: str) -> TaskKind:
    """The task of that name; `megapar.config.check` has refused any other. Raises UserError for a faulty file."""
    module = importlib.import_module(f"megapar.tasks.kinds.{name}")
    if not isinstance(found := getattr(module, "TASK", None), TaskKind):
        raise UserError(f"{module.__file__}: declares no task; write TASK = TaskKind(...)")
    return found
