"""What the fork server imports once, so that ranks forked from it start at once. Only imports: no threads, no CUDA."""

import importlib
import os
import signal
from contextlib import suppress

from megapar.launch.machine import spare_garbage_collector
from megapar.stop import STOPPING

# Ctrl-C reaches every process of the terminal, and others send TERM, USR1 and USR2 to all. None may end these imports,
# or the parent of ranks that are to save: the launcher, which has blocked them for us so far, says what happens.
_SERVER = os.getpid()


def _not_here(number: int, frame: object) -> None:
    """Not in the fork server. Who is forked from it and not yet a rank has nothing to save."""
    if os.getpid() != _SERVER:
        os._exit(128 + number)


for _one in STOPPING:
    signal.signal(_one, signal.SIG_IGN if _one == signal.SIGINT else _not_here)
signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

# torch._dynamo: torch.optim imports it when the first optimizer is made, in every rank at once.
for _name in ("torch", "torch.distributed", "torch._dynamo", "numpy", "yaml", "megapar.train.loop"):
    # A broken module must fail in the rank, with its traceback, and not here, unseen.
    with suppress(Exception):
        importlib.import_module(_name)

spare_garbage_collector()  # here rather than in each rank, whose collection would copy every page it looks at
