"""Kernels: tensors in, tensors out. Installed as `megapar.kernels`; importing it imports nothing else.

Every kernel has a `torch` form, plain differentiable torch in any floating dtype. Some have a Triton form too, which
runs compiled on a GPU (`triton`) or, on any machine and slowly, in Triton's interpreter (`interpret`).
"""

import os
import sys

BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("torch", "triton", "interpret"),
    "rmsnorm": ("torch", "triton", "interpret"),
    "layernorm": ("torch", "triton", "interpret"),
    "rope": ("torch", "triton", "interpret"),
    "swiglu": ("torch", "triton", "interpret"),
    "geglu": ("torch", "triton", "interpret"),
    "gelu": ("torch", "triton", "interpret"),
    "cross_entropy": ("torch", "triton", "interpret"),
    "matmul": ("torch", "triton", "interpret"),
    "dropout": ("torch",),
}
# of kernels/comm, which have no form in torch
NEEDS_TRITON = "its kernels are Triton's; use kernels.backend=interpret with fp32, bf16 or fp16, or a GPU with them"
REQUESTS = ("auto", "torch", "triton", "interpret")
INTERPRET = "TRITON_INTERPRET"  # Triton's own variable, which it reads when a kernel is defined

_requested = "auto"


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


def interprets() -> bool:
    """Whether Triton kernels of this process run in Triton's interpreter."""
    language = sys.modules.get("triton.language")
    if language is not None:  # its own functions were defined when it was imported, and show what was set then
        return type(language.sum).__name__ == "InterpretedFunction"
    return os.environ.get(INTERPRET, "0").lower() in ("1", "true", "on", "yes", "y")


def backend_of(kernel: str, device: str, dtype: object = None) -> str:
    """The backend that runs a kernel on tensors of a device type, under what `use_backend` chose.

    dtype: the tensors' torch dtype. Raises ValueError where the chosen backend can't take them.
    """
    narrow = str(dtype) != "torch.float64"
    if _requested == "auto":
        return _automatic(device, narrow) if "triton" in BACKENDS[kernel] else "torch"
    if _requested == "torch" or _requested not in BACKENDS[kernel]:
        return "torch"
    if not narrow:
        raise ValueError(f"kernels.backend={_requested}: {kernel} has no fp64 form in Triton; use torch")
    if _requested == "triton" and device != "cuda":
        raise ValueError(f"kernels.backend=triton: {kernel} got tensors on the {device}; use a GPU, or torch")
    return _requested


def select_backends(requested: str, device: str = "cpu", dtype: str = "fp32") -> dict[str, str]:
    """The backend that runs each kernel under `kernels.backend=requested` on a device (cpu, cuda) in a dtype.

    Raises ValueError where the kernels that have a Triton form can't run in it as requested.
    """
    if requested in ("triton", "interpret"):
        _refuse_without_triton(requested)
        if dtype == "fp64":
            raise ValueError("the Triton kernels take fp32, bf16 and fp16; use another dtype, or torch")
        if requested == "triton" and device != "cuda":
            raise ValueError("compiled Triton kernels need a GPU; use torch, or auto")
    chosen = requested
    if requested == "auto":
        chosen = _automatic(device, dtype != "fp64")
    return {kernel: chosen if chosen in backends else "torch" for kernel, backends in BACKENDS.items()}


def _automatic(device: str, narrow: bool) -> str:
    """What auto is, for kernels that have a Triton form."""
    if device != "cuda" or not narrow or not has_triton():
        return "torch"
    return "interpret" if interprets() else "triton"


def has_triton() -> bool:
    """Whether Triton is installed. Does not import it."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _refuse_without_triton(name: str) -> None:
    if not has_triton():
        raise ValueError(f"kernels.backend={name}: Triton is not installed; use torch, or auto")
