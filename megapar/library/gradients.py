"""Main gradients as `.grad`: what lets torch's optimizers train a model whose weight gradients are explicit.

An op adds its weight gradient to the parameter's main gradient, a view of a flat buffer, and autograd knows nothing of
it. Here that view becomes the parameter's `.grad`. What `.grad` says holds: None means that there is no gradient, so
the next one starts from zero, whatever is left in the buffer; a tensor that somebody has put there is added to.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.parallel.weight_grad import LocalParameter, Submitted, WeightGrads


class VisibleGrads(WeightGrads):
    """WeightGrads that shows every main gradient as `.grad`, a view where the dtypes are equal.

    In bf16 they are not: torch refuses a fp32 gradient of a bf16 parameter. There `.grad` stays None, `owned` says
    whether an optimizer of ours will read the main gradients, and without one a backward is refused.
    alone: whether this process has the whole model. Of a part of it a backward makes partial sums, and is refused.
    """

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone, self.owned = alone, False
        self._filled: set[LocalParameter] = set()  # those with a gradient that `.grad` can't show
        self._stepping = False

    def has(self, parameter: LocalParameter) -> bool:
        """Whether the parameter has a gradient."""
        return parameter.tensor.grad is not None or parameter in self._filled

    def show(self, parameters: Iterable[LocalParameter]) -> None:
        """Make the main gradients of these, which are complete, their gradients."""
        for parameter in parameters:
            if not parameter.tensor.requires_grad:
                continue
            if parameter.grad.dtype == parameter.tensor.dtype:
                parameter.tensor.grad = parameter.grad
            else:
                self._filled.add(parameter)

    def settle(self, parameter: LocalParameter) -> None:
        """Let the main gradient hold what the parameter's gradient is: zeros for none."""
        given: Tensor | None = parameter.tensor.grad
        if given is None:
            if parameter not in self._filled:
                parameter.grad.zero_()
        elif given.data_ptr() != parameter.grad.data_ptr():
            parameter.grad.copy_(given)

    def clear(self) -> None:
        """Forget the gradients that `.grad` does not show."""
        self._filled.clear()

    def refuse_hidden(self, dtype: torch.dtype) -> None:
        """Raise UserError where gradients would be made that no optimizer sees."""
        if dtype == torch.bfloat16 and not self.owned:
            raise UserError(
                "dtype=bf16: its gradients are fp32, which torch's optimizers don't take; make "
                "`optimizer = megapar.AdamW(model, lr=...)` before the first backward, or build with dtype='fp32'"
            )

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Inside, gradients are added as in training: main gradients alone, with what `on_added` does."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            self._queued.clear()
            self.defer(None)

    def _run(self, submitted: Submitted) -> None:
        if self._stepping:
            super()._run(submitted)
            return
        self._refuse()
        add_to, parameters = submitted.add_to, submitted.parameters
        wanted = [parameter.tensor.requires_grad for parameter in parameters]
        if not any(wanted):
            return
        for parameter in parameters:
            self.refuse_hidden(parameter.tensor.dtype)
            self.settle(parameter)
        add_to(*(p.grad if want else torch.zeros_like(p.grad) for p, want in zip(parameters, wanted, strict=True)))
        self.show(parameters)

    def _refuse(self) -> None:
        if not self.alone:
            raise UserError(
                "backward: this rank has a part of the model, and its gradients are parts of sums; "
                "call model.forward_backward(ids, labels), which adds them up over the ranks"
            )
        if torch.is_grad_enabled():
            raise UserError("backward: weight gradients have no gradients of their own; leave out create_graph=True")
