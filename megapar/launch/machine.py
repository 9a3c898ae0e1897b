"""What this machine has: GPUs, cores, versions of software."""

import ctypes
import gc
import os
import platform
import resource
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megapar
from megapar.config.errors import UserError
from megapar.cores import num_cores

PACKAGES = (
    *("torch", "triton", "numpy", "hydra-core", "omegaconf", "sentencepiece", "tokenizers", "einops", "safetensors"),
    "wandb",
)


def num_gpus() -> int:
    """GPUs visible to torch. Imports torch only where a driver's device file says that there may be one."""
    if not any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "nvidia0", "dxg", "kfd")):
        return 0
    import torch

    return torch.cuda.device_count()


def threads_per_rank(local_ranks: int) -> int:
    """Threads of one rank if this many share the machine's cores."""
    return max(1, num_cores() // local_ranks)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default glibc gives large blocks back at once, and each step pays for the page faults of getting them anew:
    4 to 7% of a step of the demo's model (medians of alternating runs on two cores).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def spare_garbage_collector() -> None:
    """Collect garbage now, and exempt what is left from every later collection.

    For a process that has imported what it needs: a collection that looks at torch's 200,000 objects stops a rank for
    60 to 120 ms, and every rank that waits for it.
    """
    gc.collect()
    gc.freeze()


def out_of_memory_kills() -> int | None:
    """Processes that the kernel has killed for want of memory since the machine started; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def memory_bytes(device: str) -> int | None:
    """Memory that this process may have: of a GPU, the smallest, or of the machine, all its ranks'; None: not known."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            return min(int(line) for line in done.stdout.split()) << 20
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    found = []
    with suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such group, or "max"
            found.append(int(Path(path).read_text()))
    return min(found, default=None)


def environment(device: str, backends: Mapping[str, str]) -> dict[str, Any]:
    """What a result depends on besides its config, for `environment.json`. Neither the machine's name nor variables.

    device: the run's, cpu or cuda; backends: backend of each kernel by name
    """
    return {
        "megapar": megapar.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": num_cores()},
        "device": device,
        "gpus": _gpu_names(),
        "kernels": dict(backends),
    }


def git_revision() -> dict[str, Any] | None:
    """Revision of the checkout that megapar runs from and whether it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_names() -> list[str]:
    if not num_gpus():
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def who_kills(before: int | None, after: int | None) -> str:
    """Who sent a SIGKILL, as far as `out_of_memory_kills` before and after it tells."""
    if before is None or after is None:
        return " (kill -9, or the kernel for want of memory)"
    return " (the kernel's out-of-memory killer)" if after > before else " (kill -9: the kernel killed none for memory)"


OPEN_FILES = 1 << 16  # more would slow down programs that close all that there might be


def allow_open_files(ranks: int) -> None:
    """Have as many open files allowed as the system grants this process, and those that it starts, up to OPEN_FILES.

    Raises UserError where that is too few for so many ranks on one machine.
    """
    least = 64 + 16 * ranks  # measured: pp2 needs more than 40, tp2pp2dp2 more than 64
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < least:
        raise UserError(f"{most} open files are allowed, which is too few for {ranks} ranks; allow {least}: ulimit -n")
    enough = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
    if now != resource.RLIM_INFINITY and now < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))
