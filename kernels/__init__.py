"""Kernels: tensors in, tensors out. Installed as `megapar.kernels`; importing it imports nothing else.

Every kernel has a `torch` implementation, plain differentiable torch in any floating dtype.
"""

BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("torch",),
    "rope": ("torch",),
    "swiglu": ("torch",),
    "dropout": ("torch",),
}


def select_backends(requested: str) -> dict[str, str]:
    """The implementation that runs for each kernel under `kernels.backend=requested`.

    Raises ValueError where a kernel has no such implementation; nothing is replaced silently.
    """
    chosen = "torch" if requested == "auto" else requested
    missing = [name for name, backends in BACKENDS.items() if chosen not in backends]
    if missing:
        raise ValueError(f"no {chosen} implementation of {', '.join(missing)}; use torch or auto")
    return dict.fromkeys(BACKENDS, chosen)
