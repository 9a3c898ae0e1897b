"""Attention of one matrix of q, k and v: against fp64, and with the bits of rope and attention by themselves."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megapar.kernels import _operators, use_backend
from megapar.kernels.attention import UNLIMITED, attention
from megapar.kernels.attention import fused as module
from megapar.kernels.attention.fused import fused_attention_, fused_attention_backward_op
from megapar.kernels.rope import rope, rope_in_place_op, rope_table
from megapar.kernels.shapes import MODELS, Sizes
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import DTYPES, TILES, distance, poisoned_memory, starts, tiles
from tests.kernels.naive import naive_attention
from tests.train.counting import Counted, counted

BATCH, THETA = 2, 10000.0
FLOOR = 16 * torch.finfo(torch.float32).eps  # as in test_attention.py


@dataclass(frozen=True)
class Case:
    """One call. packed: lengths of sequences; some rows belong to none."""

    dtype: str
    heads: tuple[int, int]
    channels: int
    length: int
    rotates: bool = True
    packed: tuple[int, ...] | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    tiles: str = "square"
    recompute: bool = False
    bias: bool = False

    def options(self) -> dict[str, Any]:
        wide = torch.float64 if self.dtype == "fp64" else torch.float32
        table = rope_table(self.length + 3, self.channels, THETA, wide, torch.device("cpu")) if self.rotates else None
        begins = None if self.packed is None else starts(self.packed)
        return {"table": table, "starts": begins, "window": self.window, "softcap": self.softcap}

    def given(self) -> tuple[Tensor, Tensor]:
        """qkv [T, W] and the gradient of the result [T, N D], in fp64 with values that the dtype holds."""
        generator, rows = torch.Generator().manual_seed(self.length), BATCH * self.length
        columns = (self.heads[0] + 2 * self.heads[1], self.heads[0])
        made = [torch.randn(rows, n * self.channels, generator=generator).to(DTYPES[self.dtype]) for n in columns]
        return made[0].double(), made[1].double()

    def biases(self, dtype: torch.dtype) -> list[Tensor]:
        """[bias [N, S, S]], or none."""
        if not self.bias:
            return []
        generator, longest = torch.Generator().manual_seed(1), max(self.packed or (self.length,))
        made = torch.randn(self.heads[0], longest, longest, generator=generator)
        return [made.to(DTYPES[self.dtype]).to(dtype).requires_grad_()]


CASES = [
    Case("fp32", (4, 2), 16, 9),
    Case("bf16", (4, 2), 32, 37, recompute=True),
    Case("fp16", (3, 1), 6, 21, tiles="wide"),  # rows of 30 columns, no whole 16 bytes
    Case("bf16", (2, 2), 40, 33, tiles="tma"),
    Case("bf16", (4, 2), 64, 41, tiles="tma"),
    Case("fp32", (6, 2), 32, 40, packed=(33, 0, 40), tiles="tma"),
    Case("bf16", (4, 1), 16, 25, packed=(13, 30, 7), window=(5, None), softcap=4.0, recompute=True),
    Case("fp32", (2, 1), 128, 35, window=(7, None), tiles="one loop"),
    Case("bf16", (1, 1), 2, 1),
    Case("fp32", (4, 2), 16, 19, rotates=False),
    Case("bf16", (2, 1), 32, 20, rotates=False, packed=(11, 29), softcap=3.0),
    Case("fp32", (4, 2), 16, 37, rotates=False, bias=True),
    Case("bf16", (4, 1), 32, 25, packed=(13, 30, 7), window=(9, None), recompute=True, bias=True, tiles="tma"),
]


def run(call: Callable[..., Tensor], case: Case, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """[result, gradient of qkv, maybe that of the bias], where qkv is the result of something, as a linear layer's."""
    qkv, do = (x.to(dtype) for x in case.given())
    leaf, biases = qkv.requires_grad_(), case.biases(dtype)
    bias = {"bias": biases[0]} if biases else {}
    o = call(leaf * 1, *case.heads, case.length, **case.options() | bias | more)
    return [o.detach(), *torch.autograd.grad(o, [leaf, *biases], do)]


def by_parts(qkv: Tensor, heads: int, kv_heads: int, length: int, table: Any, starts: Any, **options: Any) -> Tensor:
    """The same of `rope` and `attention`, whose gradients autograd puts together."""
    columns = qkv.shape[1] // (heads + 2 * kv_heads)
    sizes = [n * columns for n in (heads, kv_heads, kv_heads)]
    q, k, v = (x.unflatten(0, (-1, length)).unflatten(2, (-1, columns)) for x in qkv.split(sizes, 1))
    if table is not None:
        q, k = rope(q, k, table)
    if starts is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, **options).flatten(-2).view(len(qkv), -1)


# ------------------------------------------------------------------------------------------------- the torch form


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_torch_form_is_the_definition(recompute: bool) -> None:
    """Angles by complex numbers, softmax written out, in fp64; gradients against differences of values."""
    torch.manual_seed(0)
    heads, kv_heads, channels, length = 4, 2, 6, 5
    qkv = torch.randn(2 * length, (heads + 2 * kv_heads) * channels, dtype=torch.float64, requires_grad=True)
    table = rope_table(length, channels, THETA, torch.float64, qkv.device)

    def ours(qkv: Tensor) -> Tensor:
        return fused_attention_(qkv, heads, kv_heads, length, table=table, window=(3, None), recompute=recompute)

    angle = torch.arange(length)[:, None, None] * THETA ** (-torch.arange(0, channels, 2).double() / channels)
    turns = torch.polar(torch.ones_like(angle), angle)
    parts = qkv.detach().view(2, length, -1, channels).split([heads, kv_heads, kv_heads], 2)
    exact = []
    for q, k, v in zip(*parts, strict=True):
        turned = [torch.complex(*x.chunk(2, -1)) * turns for x in (q, k)]
        q, k = (torch.cat([x.real, x.imag], -1) for x in turned)
        o, _ = naive_attention(q, k, v, causal=True, window=(3, None), scale=channels**-0.5, softcap=None)
        exact.append(o.flatten(1))
    torch.testing.assert_close(ours(qkv).detach(), torch.cat(exact), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (qkv,))
    assert recompute or torch.autograd.gradgradcheck(ours, (qkv,), atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"qkv": torch.zeros(6, 33)}, "multiples of both"),
    "rows": ({"length": 4}, "multiples of both"),
    "samples of nothing": ({"length": 0}, "multiples of both"),
    "dimensions": ({"qkv": torch.zeros(2, 3, 32)}, "multiples of both"),
    "no heads": ({"kv_heads": 0}, "multiples of both"),
    "groups": ({"heads": 3, "kv_heads": 2, "qkv": torch.zeros(6, 28)}, "multiple of kv heads"),
    "a short table": ({"table": torch.zeros(2, 8)}, "P >= S"),
    "a narrow table": ({"table": torch.zeros(3, 4)}, "P >= S"),
    "integers": ({"qkv": torch.zeros(6, 32, dtype=torch.int64)}, "need one floating dtype"),
    "starts": ({"starts": torch.tensor([0, 7], dtype=torch.int32)}, "numbers that never fall"),
    "window": ({"window": (-1, 2)}, "at least 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    changes, words = REFUSED[name]
    arguments: dict[str, Any] = {"qkv": torch.zeros(6, 32), "heads": 2, "kv_heads": 1, "length": 3}
    with pytest.raises(ValueError, match=words):
        fused_attention_(**arguments | changes)


# ------------------------------------------------------------------------------------- jobs of interpreting processes


def errors(rank: int, world_size: int, case: Case) -> list[tuple[str, float, float]]:
    """(what, its error, the most that is right): twice torch's in the same dtype."""
    with poisoned_memory(), tiles(TILES[case.tiles]):
        use_backend("torch")
        exact, plain = (run(fused_attention_, case, dtype) for dtype in (torch.float64, DTYPES[case.dtype]))
        use_backend("interpret")
        found = run(fused_attention_, case, DTYPES[case.dtype], recompute=case.recompute)
    rows = []
    for name, a, b, c in zip(("o", "gradient", "of bias")[: len(exact)], found, plain, exact, strict=True):
        bound = 2 * distance(b.double(), c) + FLOOR * max(1.0, float(c.abs().max()))
        rows.append((name, distance(a.double(), c), bound))
    return rows


def same_bits(rank: int, world_size: int, case: Case) -> bool:
    use_backend("interpret")
    with poisoned_memory(), tiles(TILES[case.tiles]):
        found = run(fused_attention_, case, DTYPES[case.dtype], recompute=case.recompute)
        expected = run(by_parts, case, DTYPES[case.dtype])
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


def matrix(case: Case) -> Tensor:
    return case.given()[0].to(DTYPES[case.dtype])


class Result(torch.autograd.Function):
    """x again, as a result of autograd's that costs nothing in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def counts(rank: int, world_size: int, case: Case) -> tuple[list[Any], list[Any]]:
    """Launches and torch's kernels of forward and of backward, those inside of operators too."""
    use_backend("interpret")
    qkv, options, found, o = Result.apply(matrix(case).requires_grad_()), case.options(), list[Counted](), Tensor()

    def forward() -> None:
        nonlocal o
        o = fused_attention_(qkv, *case.heads, case.length, **options, recompute=case.recompute)

    with mock.patch.object(_operators, "_watched", lambda arguments: False):
        found.append(counted(forward))
        do = torch.ones_like(o)
        found.append(counted(lambda: o.backward(do)))
    forward_, backward = ([dict(one.launches), dict(one.kernels)] for one in found)
    return forward_, backward


def in_place(rank: int, world_size: int) -> None:
    """q and k are turned where they were, v is as it was; in a row's gaps nothing changes. What needs the place is
    copied: leaves, views, columns apart. A value kept before is known to be gone."""
    use_backend("interpret")
    case = Case("fp32", (2, 1), 16, 5)
    plain, options = matrix(case), case.options()
    q, k, v = plain.view(BATCH, 5, 4, 16).split([2, 1, 1], 2)
    turned = torch.cat([*rope(q, k, options["table"]), v], 2).view(plain.shape)
    o = by_parts(plain, 2, 1, 5, **options)
    for gap in (0, 3):
        wide = torch.full((10, 64 + gap), 7.0)
        own = wide[:, :64]
        own.copy_(plain)
        assert torch.equal(fused_attention_(own, 2, 1, 5, **options), o)
        assert torch.equal(own, turned) and bool((wide[:, 64:] == 7).all())
    own = plain.clone().requires_grad_() * 1
    pointer = own.data_ptr()
    assert torch.equal(fused_attention_(own, 2, 1, 5, **options), o)
    assert torch.equal(own, turned) and own.data_ptr() == pointer
    leaf = plain.clone().requires_grad_()
    view = torch.cat([leaf, leaf])[:10]
    apart = torch.empty(64, 10).t().copy_(plain)
    every_second = torch.zeros(10, 128)[:, ::2].copy_(plain)
    repeated = plain[:1].expand(10, 64)
    for copied in (leaf, view, apart, every_second, repeated):
        before = copied.detach().clone()
        assert torch.equal(fused_attention_(copied, 2, 1, 5, **options), by_parts(before, 2, 1, 5, **options))
        assert torch.equal(copied, before)
    own = leaf * 1
    square = own * own
    fused_attention_(own, 2, 1, 5, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def used_afterwards(rank: int, world_size: int) -> None:
    """What is read of qkv behind the call is what was turned, and its gradient arrives; with or without that of o."""
    use_backend("interpret")
    case = Case("fp32", (2, 1), 16, 5)
    table, weights = case.options()["table"], torch.randn(10, 64)
    leaf = matrix(case).requires_grad_()
    q, k, v = leaf.view(BATCH, 5, 4, 16).split([2, 1, 1], 2)
    turned = torch.cat([*rope(q, k, table), v], 2).view(10, 64)
    attended = by_parts(leaf, 2, 1, 5, table, None)
    for share in (0.0, 1.0):
        own = leaf * 1
        o = fused_attention_(own, 2, 1, 5, table=table)
        loss = (own * weights).sum()
        [found] = torch.autograd.grad(loss + o.sum() if share else loss, leaf)
        expected = (turned * weights).sum() + share * attended.sum()
        [exact] = torch.autograd.grad(expected, leaf, retain_graph=True)
        assert distance(found, exact) < 1e-5
    o = fused_attention_(leaf * 1, 2, 1, 5, table=table)
    [first] = torch.autograd.grad(o.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


class Linear(torch.autograd.Function):
    """A product whose backward needs what it read and not what it made, as `megapar.parallel.overlap` has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w, dy.t() @ x


def recomputed(rank: int, world_size: int) -> tuple[list[bool], list[int]]:
    """Whether gradients are the same bits with everything kept, attention recomputed, and the projection too; elements
    that the first two keep for backward."""
    use_backend("interpret")
    torch.manual_seed(0)
    case = Case("bf16", (4, 2), 16, 13)
    x, w = (torch.randn(n, 24, dtype=torch.bfloat16).requires_grad_() for n in (26, 128))
    options, kept = case.options(), list[int]()

    def layer(x: Tensor, w: Tensor, recompute: bool) -> Tensor:
        return fused_attention_(Linear.apply(x, w), 4, 2, 13, **options, recompute=recompute)

    def keep(x: Tensor) -> Tensor:
        kept[-1] += x.numel()
        return x

    gradients = []
    for way in range(3):
        kept.append(0)
        with saved_tensors_hooks(keep, lambda x: x):
            o = checkpoint(layer, x, w, False, use_reentrant=False) if way == 2 else layer(x, w, way == 1)
        gradients.append([o.detach(), *torch.autograd.grad(o.float().square().sum(), [x, w])])
    return [all(map(torch.equal, gradients[0], other)) for other in gradients[1:]], kept[:2]


def check_operators(rank: int, world_size: int) -> None:
    """torch's own checks; torch.compile, which takes rope and attention apart; nothing at all."""
    use_backend("interpret")
    for case in (Case("fp32", (2, 1), 6, 5), Case("fp32", (2, 1), 6, 5, packed=(4, 6))):
        qkv, options = matrix(case), case.options()
        table, begins, sizes = options["table"], options["starts"], (2, 1, 5)
        torch.library.opcheck(rope_in_place_op, (qkv.clone(), table, *sizes, False))
        settings = (0.3, UNLIMITED, 0, None, None)
        o, lse = module.attention_op(*module._parts(qkv, sizes, begins), begins, begins, *settings)
        given = (torch.randn_like(o), qkv, o, lse, begins, *sizes, *settings)
        torch.library.opcheck(fused_attention_backward_op, given)
        compiled = torch.compile(fused_attention_, backend="aot_eager", fullgraph=True)
        results = [run(call, case, torch.float32) for call in (compiled, fused_attention_)]
        assert all(distance(a, b) < 1e-5 for a, b in zip(*results, strict=True))
        empty = torch.zeros(0, 24, requires_grad=True)
        if begins is None:
            o = fused_attention_(empty * 1, 2, 1, 5, table=table)
            assert o.shape == (0, 12) and torch.autograd.grad(o.sum(), empty)[0].shape == (0, 24)


# -------------------------------------------------------------------------------------------- the interpreted kernels


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: Case, interpreter: WorkerPool) -> None:
    for name, error, bound in interpreter.run(errors, 1, case, timeout=300)[0]:
        assert error <= bound, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_are_those_of_rope_and_attention(case: Case, interpreter: WorkerPool) -> None:
    assert interpreter.run(same_bits, 1, case, timeout=300) == [True]


@pytest.mark.parametrize(("rotates", "recompute", "packed"), list(itertools.product((False, True), repeat=3)))
def test_nothing_is_copied_or_put_together(
    rotates: bool, recompute: bool, packed: bool, interpreter: WorkerPool
) -> None:
    """Only rows that belong to no packed sequence are cleared: the result's, its log-sum-exp's and the gradient's."""
    case = Case("bf16", (4, 2), 16, 6, rotates=rotates, recompute=recompute, packed=(12,) if packed else None)
    [((launches, kernels), (back, back_kernels))] = interpreter.run(counts, 1, case)
    turn, again = {"rope_kernel": 1} if rotates else {}, {"attention_forward_kernel": 1} if recompute else {}
    cleared = {"zero_": 1, "fill_": 1} if packed else {}
    assert launches == turn | {"attention_forward_kernel": 1} and kernels == cleared
    assert back == turn | again | {f"attention_{name}_kernel": 1 for name in ("statistics", "dkdv", "dq")}
    expected = {"zero_": 2, "fill_": 1} if recompute else {"zero_": 1}
    assert back_kernels == (expected if packed else {})


def test_q_and_k_are_turned_where_they_are(interpreter: WorkerPool) -> None:
    interpreter.run(in_place, 1)


def test_what_was_turned_can_be_used_afterwards(interpreter: WorkerPool) -> None:
    interpreter.run(used_afterwards, 1)


def test_recomputed(interpreter: WorkerPool) -> None:
    """Without it o and its log-sum-exp are kept too."""
    same, (everything, less) = interpreter.run(recomputed, 1)[0]
    assert same == [True, True] and everything - less == 26 * 4 * 16 + 26 * 4


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


# ------------------------------------------------------------------------------------------------------------ launches


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_what_is_inspected_is_what_is_launched(arch: str, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_attention.py; the rotation back differs from that forth by a sign."""
    from megapar.kernels import attention as package
    from megapar.kernels import rope as rotary
    from megapar.kernels._common import Launch

    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    monkeypatch.setattr(package, "target_arch", lambda: arch)
    monkeypatch.setattr(module, "target_arch", lambda: arch)
    monkeypatch.setattr(package, "backend_of", lambda *_: "triton")
    dtype, heads, kv_heads, channels = sizes.torch_dtype, sizes.heads, sizes.kv_heads, sizes.head_dim
    qkv = torch.zeros(32, (heads + 2 * kv_heads) * channels, dtype=dtype, requires_grad=True)
    table = torch.zeros(16, channels)
    fused_attention_(qkv * 1, heads, kv_heads, 16, table=table).sum().backward()
    specs = package.aot_specs(arch)
    kinds = {"fwd": "_causal", "statistics": "_fused", "dkdv": "_fused", "dq": "_fused"}
    names = [f"attention_{name}_d{channels}{end}" for name, end in kinds.items()]
    turn, *attending, back = launched
    for launch, name in zip(attending, names, strict=True):
        assert launch.kernel is specs[name].kernel
        assert launch.specialisation()[:2] == specs[name].specialisation()[:2]
        assert launch.options == specs[name].options
        assert set(specs[name].specialisation()[2]) <= {*launch.specialisation()[2], "total_q"}
    assert {**turn.specialisation()[1], "INVERSE": True} == back.specialisation()[1]
    name = f"rope_in_place_d{channels}"
    if name in (compiled := rotary.aot_specs(arch)):
        assert turn.specialisation() == compiled[name].specialisation() and turn.options == compiled[name].options
