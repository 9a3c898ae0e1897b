"""What the fork server imports once, so that sections forked from it start at once: no threads, no CUDA."""

import gc
import importlib
import pkgutil
from contextlib import suppress

from experiments.gpu.section import FOLDER

# torch._dynamo: torch imports it at the first call of an operator of ours, in every section.
for _name in ("torch._dynamo", "torch.distributed", *(one.name for one in pkgutil.iter_modules([str(FOLDER)]))):
    # A broken module must fail in its section, and not here, unseen.
    with suppress(Exception):
        importlib.import_module(_name if _name.startswith("torch.") else f"experiments.gpu.sections.{_name}")

gc.freeze()  # a collection in a section would copy every page it looks at
