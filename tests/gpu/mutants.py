"""One kernel's output scaled by 1.001: what a rehearsal must see, whichever it is."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

FACTOR = 1.001
# A kernel that writes to memory of other ranks has its input scaled, of which the output is a multiple.
INPUTS = {"push_kernel": "x", "product_push_kernel": "a"}
# Constants by which a kernel writes elsewhere: a form with one is scaled by itself.
FORMS = ("FUSED", "IN_PLACE")
# The kernels (functions of triton.jit), with the form, and the section that checks each.
SECTIONS = {
    "attention_forward_kernel": "attention32",
    "attention_statistics_kernel": "attention32",
    "attention_dkdv_kernel": "attention32",
    "attention_dq_kernel": "attention32",
    "attention_dbias_kernel": "attention32",
    "attention_dkdv_kernel FUSED": "attention32",
    "attention_dq_kernel FUSED": "attention32",
    "rmsnorm_forward_kernel": "rows",
    "rmsnorm_input_grad_kernel": "rows",
    "rmsnorm_weight_grad_kernel": "rows",
    "layernorm_forward_kernel": "rows",
    "layernorm_input_grad_kernel": "rows",
    "layernorm_weight_grad_kernel": "rows",
    "rope_kernel": "rows",
    "rope_kernel IN_PLACE": "attention32",
    "activation_forward_kernel": "rows",
    "activation_backward_kernel": "rows",
    "cross_entropy_statistics_kernel": "rows",
    "cross_entropy_gradient_kernel": "rows",
    "dropout_kernel": "rows",
    "matmul_kernel": "matmul",
    "push_kernel": "pair",
    "reduce_kernel": "pair",
    "collect_kernel": "pair",
    "product_push_kernel": "pair",
    "gathered_product_kernel": "pair",
}


def kernels_of_registry() -> Iterator[str]:
    """Every kernel that some launch of the registry's kernels runs."""
    from megapar.kernels.registry import KERNELS

    for name, kernel in KERNELS.items():
        assert kernel.specs is not None, f"{name} has no form in Triton: it needs a mutant of another kind"
        yield from {name_of(launch) for launch in kernel.specs("sm_90").values()}


def name_of(launch: Any) -> str:
    return " ".join([launch.kernel.fn.__name__, *(form for form in FORMS if launch.arguments.get(form))])


def apply(name: str) -> Any:
    """Make a kernel wrong in this process for as long as it lives; the started patch, for those who end it sooner."""
    from megapar.kernels._common import Launch

    patch: Any = mock.patch.object(Launch, "run", _scaled(name, Launch.run))
    patch.start()
    return patch


def _scaled(name: str, right: Any) -> Any:
    def run(launch: Any) -> None:
        if name_of(launch) != name:
            right(launch)
        elif name in INPUTS:
            given = launch.arguments[INPUTS[name]]
            kept = given.clone()
            given.mul_(FACTOR)
            right(launch)
            given.copy_(kept)
        else:
            outputs = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
            before = [x.clone() for x in outputs]
            right(launch)
            for x, old in zip(outputs, before, strict=True):
                if not bool(((x == old) | (x.isnan() & old.isnan())).all()):
                    x.mul_(FACTOR)

    return run
