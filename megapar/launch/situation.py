"""Who starts the ranks: this command itself, torchrun, or srun."""

import os
from collections.abc import Mapping
from typing import Literal

Situation = Literal["worker", "torchrun", "srun", "local"]
WORKER = "MEGAPAR_WORKER"  # set in every rank that megapar started


def situation(env: Mapping[str, str] | None = None) -> Situation:
    """What the environment says: `worker` (inside a rank), `torchrun`, `srun`, or `local` (we start the ranks).

    SLURM_PROCID alone says nothing: a batch script, which is one process, has it too, beside the whole job's
    SLURM_NTASKS. Only srun's step has more than one task of its own.
    """
    env = os.environ if env is None else env
    if WORKER in env:
        return "worker"
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        return "torchrun"
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return "srun"
    return "local"
