"""Kernels: tensors in, tensors out. Installed as `megapar.kernels`; importing it imports nothing else.

Every kernel has a `torch` form, plain differentiable torch in any floating dtype. Some have a Triton form too, which
runs compiled on a GPU (`triton`) or, on any machine and slowly, in Triton's interpreter (`interpret`). Which there are
is for `registry` to find.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own would import it
if TYPE_CHECKING:
    from megapar.kernels.registry import Kernel

# of kernels/comm, which have no form in torch
NEEDS_TRITON = "its kernels are Triton's; use kernels.backend=interpret with fp32, bf16 or fp16, or a GPU with them"
REQUESTS = ("auto", "torch", "triton", "interpret")
TILE_SCHEDULERS = ("static", "dynamic")
INTERPRET = "TRITON_INTERPRET"  # Triton's own variable, which it reads when a kernel is defined

_requested = "auto"
_tile_scheduler = "static"


def use_backend(name: str) -> None:
    """Choose the backend of this process's kernels: auto, torch, triton or interpret.

    auto: Triton for tensors on a GPU, torch for others and for fp64; in a process that interprets its kernels, the
    interpreter instead of Triton. A kernel without a Triton form runs in torch under every name. Whether Triton
    interprets is fixed when the kernels are imported: before that, `interpret` sets TRITON_INTERPRET=1 in this
    process's environment.

    Raises ValueError for an unknown name and where it can't run.
    """
    global _requested
    if name not in REQUESTS:
        raise ValueError(f"kernels.backend={name}: use one of {', '.join(REQUESTS)}")
    if name in ("triton", "interpret"):
        _refuse_without_triton(name)
        if "triton.language" not in sys.modules and name == "interpret":
            os.environ[INTERPRET] = "1"
        if interprets() != (name == "interpret"):
            state, remedy = ("interprets", "unset") if interprets() else ("compiles", "set")
            value = "" if interprets() else "=1"
            raise ValueError(
                f"kernels.backend={name}: this process {state} its Triton kernels, which was settled when they were "
                f"imported; {remedy} {INTERPRET}{value} before it starts"
            )
    _requested = name


def requested_backend() -> str:
    """What `use_backend` chose: auto at first."""
    return _requested


def use_tile_scheduler(name: str) -> None:
    """Choose how the programs of a matmul in Triton come by their tiles: static, each by a fixed stride, or dynamic,
    from an atomic counter. The results are the same bits. Raises ValueError for an unknown name."""
    global _tile_scheduler
    if name not in TILE_SCHEDULERS:
        raise ValueError(f"kernels.tile_scheduler={name}: use one of {', '.join(TILE_SCHEDULERS)}")
    _tile_scheduler = name


def tile_scheduler() -> str:
    """What `use_tile_scheduler` chose: static at first."""
    return _tile_scheduler


def interprets() -> bool:
    """Whether Triton kernels of this process run in Triton's interpreter."""
    language = sys.modules.get("triton.language")
    if language is not None:  # its own functions were defined when it was imported, and show what was set then
        return type(language.sum).__name__ == "InterpretedFunction"
    return os.environ.get(INTERPRET, "0").lower() in ("1", "true", "on", "yes", "y")


def backends() -> dict[str, tuple[str, ...]]:
    """What each function with a form in torch can run in: torch alone, or torch, triton and interpret."""
    return {function: kernel.backends for function, kernel in _functions().items()}


def backend_of(function: str, device: str, dtype: object = None) -> str:
    """The backend that runs a kernel's function on tensors of a device type, under what `use_backend` chose.

    dtype: the tensors' torch dtype. Raises ValueError where the chosen backend can't take them.
    """
    kernel = _functions()[function]
    taken = dtype is None or kernel.takes(dtype)
    if _requested == "auto":
        return _automatic(kernel, device, taken)
    if _requested not in kernel.backends or _requested == "torch":
        return "torch"
    if not taken:
        from megapar.kernels.registry import name_of

        raise ValueError(f"kernels.backend={_requested}: {function} has no {name_of(dtype)} form in Triton; use torch")
    if _requested == "triton" and device not in kernel.devices:
        raise ValueError(f"kernels.backend=triton: {function} got tensors on the {device}; use a GPU, or torch")
    return _requested


def select_backends(requested: str, device: str = "cpu", dtype: str = "fp32") -> dict[str, str]:
    """The backend of each function under `kernels.backend=requested` on a device (cpu, cuda) in a dtype.

    Raises ValueError where no kernel with a Triton form can run in it as requested.
    """
    if requested in ("triton", "interpret"):
        _refuse_without_triton(requested)
        forms = [kernel for kernel in _functions().values() if kernel.triton]
        if not any(kernel.takes(dtype) for kernel in forms):
            raise ValueError("the Triton kernels take fp32, bf16 and fp16; use another dtype, or torch")
        if requested == "triton" and not any(device in kernel.devices for kernel in forms):
            raise ValueError("compiled Triton kernels need a GPU; use torch, or auto")
        if requested == "interpret" and device != "cpu":
            raise ValueError(f"Triton's interpreter runs on a CPU, not on {device}; use cpu, or another backend")
    if requested == "auto":
        return {function: _automatic(kernel, device, kernel.takes(dtype)) for function, kernel in _functions().items()}
    return {
        function: requested if requested in kernel.backends else "torch" for function, kernel in _functions().items()
    }


def _functions() -> "dict[str, Kernel]":
    from megapar.kernels.registry import FUNCTIONS  # not before it is asked for, see above

    return FUNCTIONS


def _automatic(kernel: "Kernel", device: str, taken: bool) -> str:
    """What auto is for a kernel. taken: whether its Triton form takes the dtype."""
    if not kernel.triton or device not in kernel.devices or not taken or not has_triton():
        return "torch"
    return "interpret" if interprets() else "triton"


def has_triton() -> bool:
    """Whether Triton is installed. Does not import it."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _refuse_without_triton(name: str) -> None:
    if not has_triton():
        raise ValueError(f"kernels.backend={name}: Triton is not installed; use torch, or auto")
