"""Starting ranks for a finished configuration, and ending them. No Hydra here, and no torch until something starts.

`situation` says who starts the ranks: we (`local`), or torchrun or srun (`external`). Either way each rank ends in
`rank.run`, which redirects its output, joins the process group and calls the entry. `rundir` makes the run directory.
`pool` keeps processes for many short distributed jobs.
"""

from megapar.console import console
from megapar.launch.situation import situation

__all__ = ["console", "situation"]
