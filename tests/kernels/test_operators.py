"""Operators skip torch's dispatcher where nothing listens, and only there."""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.kernels import _operators
from megapar.kernels._operators import call, custom_op
from megapar.kernels.registry import KERNELS, PACKAGE


@custom_op("megapar_test::doubled")
def doubled_op(x: Tensor, more: Tensor | None) -> Tensor:
    return 2 * x


@custom_op("megapar_test::double_", mutates_args=("x",))
def double_op(factor: float, x: Tensor) -> None:
    x.mul_(factor)


@doubled_op.register_fake
def _(x, more):
    return x.new_empty(x.shape)


class Listening(TorchDispatchMode):
    """The operators that torch's dispatcher was given."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that went past the dispatcher."""
    passed: list[str] = []
    for op in (doubled_op, double_op):
        function, places = _operators._IMPLEMENTATIONS[op]

        def watched(*arguments: Any, function: Any = function) -> Any:
            passed.append(function.__name__)
            return function(*arguments)

        monkeypatch.setitem(_operators._IMPLEMENTATIONS, op, (watched, places))
    yield passed


def test_nobody_listens(direct: list[str]) -> None:
    x = torch.arange(3.0)
    with torch.no_grad():
        assert call(doubled_op, x, None).tolist() == [0, 2, 4]
        assert call(doubled_op, nn.Parameter(x), x).tolist() == [0, 2, 4]
        assert call(double_op, 3.0, x) is None and x.tolist() == [0, 3, 6]
    assert direct == ["doubled_op", "doubled_op", "double_op"]


def test_inside_of_an_autograd_function_nobody_listens(direct: list[str]) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return call(doubled_op, x, None)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return call(doubled_op, dy, None)

    x = torch.ones(2, requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2] and direct == ["doubled_op"] * 2


@pytest.mark.parametrize("listener", ["gradients", "a mode", "fake tensors", "meta", "a compiler"])
def test_somebody_listens(listener: str, direct: list[str]) -> None:
    x, listening = torch.ones(2), Listening()
    with ExitStack() as stack:
        if listener != "gradients":
            stack.enter_context(torch.no_grad())
        if listener == "a mode":
            stack.enter_context(listening)
        if listener == "fake tensors":
            fakes = FakeTensorMode()
            x = fakes.from_tensor(x)  # the mode itself is not on
        if listener == "meta":
            x = x.to("meta")
        function = lambda x: call(doubled_op, x, None)  # noqa: E731
        if listener == "a compiler":
            function = torch.compile(function, backend="eager", fullgraph=True)
        y = function(x)
    assert direct == [] and y.shape == x.shape and type(y) is type(x)
    assert listener != "a mode" or listening.heard[0] == "megapar_test.doubled.default"


def test_what_is_overwritten_is_not_used_again(direct: list[str]) -> None:
    """As by the dispatcher: a backward that needs what was there is refused."""
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    z = y * y
    with torch.no_grad():
        call(double_op, 2.0, y)
    assert direct == ["double_op"] and y._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_every_operator_of_a_kernel_can_be_called() -> None:
    found = 0
    for kernel in KERNELS:
        for value in vars(importlib.import_module(f"{PACKAGE}.{kernel}")).values():
            if isinstance(value, type(doubled_op)):
                assert value in _operators._IMPLEMENTATIONS
                found += 1
    assert found >= 22
