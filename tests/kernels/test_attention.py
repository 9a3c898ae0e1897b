"""Attention: torch's form against the definition, the interpreted kernels against torch in fp64, and their promises."""

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar import kernels
from megapar.kernels import attention as module
from megapar.kernels._common import Launch
from megapar.kernels.attention import attention, merge_attention
from megapar.kernels.shapes import MODELS, Sizes
from megapar.launch.pool import WorkerPool
from tests.kernels import cases
from tests.kernels.cases import Case, Outcome
from tests.kernels.naive import naive_attention
from tests.pairwise import pairwise

# ------------------------------------------------------------------------------- the torch form against the definition

MASKS: dict[str, tuple[bool, Any]] = {
    "causal": (True, None),
    "all": (False, None),
    "around": (False, (5, 3)),
    "sliding": (True, (4, None)),
    "ahead": (False, (None, 2)),
    "self": (True, (0, 0)),
}
LENGTHS = {"one": (1, 1), "square": (7, 7), "long": (3, 8), "short": (8, 3), "no keys": (4, 0), "no queries": (0, 5)}
PLAIN = pairwise(
    {
        "mask": list(MASKS),
        "lengths": list(LENGTHS),
        "heads": [(1, 1), (4, 2), (3, 1)],
        "softcap": [None, 2.0],
        "wide": [3, 5],
        "bias": [False, True],
    }
)
PLAIN = [case for case in PLAIN if not (case["bias"] and case["softcap"])]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: "-".join(map(str, case.values())))
def test_the_torch_form_is_the_definition(case: dict[str, Any]) -> None:
    (causal, window), (length, keys), (heads, groups) = MASKS[case["mask"]], LENGTHS[case["lengths"]], case["heads"]
    q, k, v = (
        random(2, length, heads, 3),
        random(2, keys, groups, 3, seed=1),
        random(2, keys, groups, case["wide"], seed=2),
    )
    bias = random(heads, length, keys, seed=5).requires_grad_() if case["bias"] else None
    options = {"causal": causal, "softcap": case["softcap"], "scale": 0.7, "bias": bias}
    inputs = [x.requires_grad_() for x in (q, k, v)] + ([] if bias is None else [bias])
    o, lse = attention(q, k, v, window=window, return_lse=True, **options)
    parts = [
        naive_attention(a, b, c, window=window or (None, None), **options) for a, b, c in zip(q, k, v, strict=True)
    ]
    expected = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    compare(inputs, (o, lse), expected)


def compare(inputs: list[Tensor], found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Outputs and gradients agree to fp64's rounding, which here is under 1e-14 of values around 1."""
    upstream = [random(*x.shape, seed=3 + number) for number, x in enumerate(found)]
    gradients = []
    for outputs in (found, expected):
        some = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
        gradients.append(
            torch.autograd.grad(
                [x for x, _ in some], inputs, [g for _, g in some], allow_unused=True, materialize_grads=True
            )
            if some
            else [torch.zeros_like(x) for x in inputs]
        )
    for a, b in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_packed_sequences_are_sequences() -> None:
    lengths_q, lengths_k = (3, 0, 5, 1), (3, 2, 4, 0)
    q, k, v = random(11, 4, 3), random(10, 2, 3, seed=1), random(10, 2, 5, seed=2)
    bias = random(4, 6, 4, seed=3)  # longer than the longest
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    options: dict[str, Any] = {"causal": True, "window": (2, None), "bias": bias}
    starts_q, starts_k = cases.starts(lengths_q), cases.starts(lengths_k)
    found = attention(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True, **options)
    parts = [
        naive_attention(a, b, c, scale=3**-0.5, softcap=None, **options)
        for a, b, c in zip(q[:9].split(lengths_q), k[:9].split(lengths_k), v[:9].split(lengths_k), strict=True)
    ]
    behind = torch.zeros(2, 4, 5, dtype=torch.float64), torch.full((2, 4), -math.inf, dtype=torch.float64)
    expected = tuple(torch.cat([*(part[i] for part in parts), behind[i]]) for i in (0, 1))
    compare(inputs, found, expected)


@pytest.mark.parametrize("empty", ["neither", "left", "right", "both"])
def test_merge(empty: str) -> None:
    """The merged result is attention over all keys, also where one side or both saw no key; gradients too."""
    q, k, v = random(1, 3, 2, 4), random(1, 6, 2, 4, seed=1), random(1, 6, 2, 4, seed=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    cuts = {"neither": (0, 2, 6), "left": (0, 0, 6), "right": (0, 6, 6), "both": (6, 6, 6)}[empty]
    parts = [attention(q, k[:, a:b], v[:, a:b], causal=False, return_lse=True) for a, b in itertools.pairwise(cuts)]
    whole = attention(q, k[:, cuts[0] :], v[:, cuts[0] :], causal=False, return_lse=True)
    compare(inputs, merge_attention(*parts[0], *parts[1]), whole)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"q": (1, 4, 3, 8)}, "multiple of kv heads"),
    "channels": ({"q": (1, 4, 2, 6)}, "same channels"),
    "positions": ({"v": (1, 5, 2, 8)}, "same positions"),
    "batch": ({"q": (2, 4, 2, 8)}, "same positions"),
    "dimensions": ({"q": (4, 2, 8)}, "4 dimensions"),
    "window": ({"window": (-1, 2)}, "at least 0"),
    "window of one number": ({"window": 3}, "window=3: two whole numbers"),
    "window of fractions": ({"window": (1.5, None)}, "two whole numbers"),
    "scale": ({"scale": 0.0}, "positive"),
    "softcap": ({"softcap": -1.0}, "positive"),
    "bias of other heads": (
        {"bias": torch.zeros(1, 4, 4)},
        r"bias \[1, 4, 4\] .* need \[2, 4, 4\] in a floating dtype",
    ),
    "bias of other lengths": ({"bias": torch.zeros(2, 5, 4)}, r"need \[2, 4, 4\]"),
    "bias of integers": ({"bias": torch.zeros(2, 4, 4, dtype=torch.int64)}, "floating"),
    "bias and softcap": ({"bias": torch.zeros(2, 4, 4), "softcap": 2.0}, "no model has both"),
    "one of two": ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "both, or neither"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    changes, words = REFUSED[name]
    shapes = {"q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "v": (1, 4, 2, 8)} | {
        x: y for x, y in changes.items() if x in "qkv"
    }
    tensors: dict[str, Any] = {x: torch.zeros(shape) for x, shape in shapes.items()}
    with pytest.raises(ValueError, match=words):
        attention(**tensors, **{x: y for x, y in changes.items() if x not in "qkv"})


@pytest.mark.parametrize("numbers", [(0, 5), (-1, 4), (1, 4), (0, 3, 2, 4)])
def test_starts_that_are_none_are_refused(numbers: tuple[int, ...]) -> None:
    """Of 4 rows: past the last, before the first, not from the first on, falling."""
    q, wrong = torch.zeros(4, 2, 8), torch.tensor(numbers, dtype=torch.int32)
    right = torch.linspace(0, 4, len(numbers)).int()
    for starts in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match=r"cu_seqlens .*: need 0 first"):
            attention(q, q, q, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])


def test_merging_integers_is_refused() -> None:
    o, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2)
    for arguments in ((o.int(), lse, o, lse), (o, lse.int(), o, lse), (o, lse, o.int(), lse), (o, lse, o, lse.int())):
        with pytest.raises(ValueError, match="need floating dtypes"):
            merge_attention(*arguments)


# ---------------------------------------------------------------------------- the interpreted kernels against torch

OPTIONS: dict[str, list[Any]] = {
    "lengths": [
        *((1, 1), (1, 41), (41, 1), (53, 53), (64, 64), (31, 67), (67, 31)),
        *(((5, 0, 47, 1), (5, 3, 47, 0)), ((33, 17), (33, 17))),
    ],
    "channels": [(32, 32), (64, 64), (40, 40), (16, 48), (128, 128)],
    "mask": [(True, None), (False, None), (False, (19, 6)), (True, (13, None))],
    "dtype": ["fp32", "bf16", "fp16"],
    "heads": [(1, 1), (4, 2), (3, 1)],
    "softcap": [None, 5.0],
    "tiles": list(cases.TILES),
    "bias": [False, True],
}
CASES = [Case(**options) for options in pairwise(OPTIONS) if not (options["bias"] and options["softcap"])]
# Rounding in fp32 that torch's own error need not show, as where its sums happen to be exact: a few of fp32's last bits
# for each of the sums that lead to a value. 16-bit errors are far above it.
FLOOR = 16 * torch.finfo(torch.float32).eps


def hold(case: Case, outcome: Outcome) -> None:
    """No error is more than twice torch's in the same dtype."""
    for name in outcome.error:
        bound = 2 * outcome.torch_error[name] + FLOOR * max(1.0, outcome.size[name])
        assert outcome.error[name] <= bound, f"{name}: {outcome.error[name]:.2e}, torch {outcome.torch_error[name]:.2e}"


@pytest.mark.parametrize("attention_case", CASES, ids=lambda case: "-".join(str(x) for x in vars(case).values()))
def test_interpreted(attention_case: Case, outcomes: dict[Case, Outcome]) -> None:
    hold(attention_case, outcomes[attention_case])


LENGTH = st.integers(1, 40)
PACKED = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4).map(
    lambda pairs: tuple(zip(*pairs, strict=True))
)


@settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    lengths=st.tuples(LENGTH, LENGTH) | PACKED,
    channels=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 2)).map(lambda pair: (pair[0] * pair[1], pair[1])),
    mask=st.tuples(
        st.booleans(), st.none() | st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40))
    ),
    softcap=st.none() | st.floats(1.0, 20.0),
    dtype=st.sampled_from(["fp32", "bf16"]),
    tiles=st.sampled_from(list(cases.TILES)),
)
def test_any_shape(interpreter: WorkerPool, **options: Any) -> None:
    for bias in (False, True) if options["softcap"] is None else (False,):
        case = Case(**options, bias=bias)
        hold(case, interpreter.run(cases.run_one, 1, case)[0])


@pytest.mark.parametrize("tile", ["square", "tma"])
def test_the_backward_is_bitwise_reproducible(interpreter: WorkerPool, tile: str) -> None:
    case = Case("bf16", (32, 32), (4, 2), ((37, 20), (37, 20)), (True, None), None, tile, bias=True)
    assert interpreter.run(cases.repeat, 2, case) == [True, True]


@pytest.mark.parametrize("tile", list(cases.TILES))
def test_a_sequence_full_of_nan_touches_no_other(interpreter: WorkerPool, tile: str) -> None:
    assert interpreter.run(cases.isolated, 1, tile)[0] == [True, False, True]


@pytest.mark.parametrize("cut", [4, 7])
def test_merged_kernels(interpreter: WorkerPool, cut: int) -> None:
    """Values are around 1, sums of a dozen fp32 products."""
    assert max(interpreter.run(cases.merged, 1, cut)[0].values()) < 1e-5


# Few in every run: padded heads, and of those one whose last full tile ends with the tensors.
PADDED = [Case("fp32", (40, 40), (2, 1), (64, 64), (False, None), None, "square")]
PADDED += [case for case in CASES if case.channels == (40, 40)][:3]
GUARDED = [*PADDED, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in PADDED)]


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("case", GUARDED, ids=lambda case: "-".join(str(x) for x in vars(case).values()))
def test_nothing_outside_the_tensors_is_touched(interpreter: WorkerPool, case: Case) -> None:
    interpreter.run(cases.run_guarded, 1, case, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_wrong_starts_touch_nothing_outside_the_tensors(interpreter: WorkerPool) -> None:
    """On a GPU nobody reads them before the kernels do."""
    interpreter.run(cases.run_wrong_starts, 1, "tma", timeout=300)


@pytest.mark.parametrize("shapes", [(257, 16), (16, 257)])
def test_wide_heads_are_refused(interpreter: WorkerPool, shapes: tuple[int, int]) -> None:
    """By the kernels; torch takes any."""
    q, v = (torch.zeros(1, 2, 1, channels) for channels in shapes)
    assert attention(q, q, v).shape == v.shape
    assert "the kernels take up to 256" in interpreter.run(cases.refusal, 1, q, v)[0]


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(cases.check_operators, 1, timeout=300)


def test_compiled_by_torch(interpreter: WorkerPool) -> None:
    """The operators are opaque: tracing changes no bit of theirs. What is traced around them sums in another order."""
    difference, dtypes = interpreter.run(cases.compiled, 1, timeout=300)[0]
    assert difference < 1e-4
    assert dtypes == [torch.bfloat16] * 3


# ------------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_what_is_inspected_is_what_is_launched(arch: str, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, its constants and the types of its arguments, for each model's heads."""
    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    monkeypatch.setattr(module, "target_arch", lambda: arch)
    monkeypatch.setattr(module, "backend_of", lambda *_: "triton")
    dtype, heads, kv_heads, channels = sizes.torch_dtype, sizes.heads, sizes.kv_heads, sizes.head_dim
    # q, k and v as a fused projection leaves them: views whose rows lie far apart
    qkv = torch.zeros(2, 16, heads + 2 * kv_heads, channels, dtype=dtype, requires_grad=True)
    attention(*qkv.split([heads, kv_heads, kv_heads], 2)).sum().backward()
    specs = module.aot_specs(arch)
    names = [f"attention_{name}_d{channels}" for name in ("fwd", "statistics", "dkdv", "dq")]
    names[0] += "_causal"
    for launch, name in zip(launched, names, strict=True):
        assert launch.kernel is specs[name].kernel
        assert launch.specialisation()[:2] == specs[name].specialisation()[:2]
        assert launch.options == specs[name].options
        assert set(specs[name].specialisation()[2]) <= {*launch.specialisation()[2], "total_q"}


def test_useful_flops_and_bytes() -> None:
    """What a profiler is told: of 4 queries under a causal mask 10 pairs of each head, 2 D FLOPs for each product."""
    with torch.device("meta"):
        q, k = torch.empty(1, 4, 2, 16), torch.empty(1, 4, 1, 16)
    call = module.Call.of(q, k, k, None, None, 1.0, module.UNLIMITED, 0, None)
    o, lse = module.outputs(q, k)
    launch = call.forward("sm_90", module.matrix(o), lse)
    described = launch.kernel.launch_metadata(launch.grid, SimpleNamespace(name="forward"), launch.arguments)
    assert described["flops32"] == 2 * 10 * (2 * 16 + 2 * 16)
    assert described["bytes"] == 4 * (2 * q.numel() + 2 * k.numel() + lse.numel())


# ------------------------------------------------------------------------------------------------------- backends


@pytest.fixture
def backend() -> Any:
    yield
    kernels.use_backend("auto")


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_auto_where_kernels_are_interpreted(interpreter: WorkerPool, dtype: str) -> None:
    """It says what would run, and both who are asked say the same: what a GPU would compile is interpreted here."""
    ran, planned = interpreter.run(cases.auto_backends, 1, dtype)[0]
    assert ran == planned
    assert ran["cuda"]["attention"] == ("interpret" if dtype == "fp32" else "torch")
    assert set(ran["cpu"].values()) == {"torch"}


@pytest.mark.usefixtures("backend")
def test_backends() -> None:
    assert kernels.backend_of("attention", "cpu") == "torch"
    assert kernels.backend_of("attention", "cuda") == "triton"
    assert kernels.backend_of("attention", "cuda", torch.float64) == "torch"
    assert kernels.backend_of("dropout", "cuda") == "triton"
    kernels.use_backend("torch")
    assert kernels.backend_of("attention", "cuda") == "torch"
    kernels.use_backend("triton")
    assert kernels.backend_of("dropout", "cuda") == "triton"
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="tensors on the cpu; use a GPU, or torch"):
        attention(q, q, q)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 before"):
        kernels.use_backend("interpret")
    with pytest.raises(ValueError, match="use one of auto"):
        kernels.use_backend("cuda")
    assert kernels.select_backends("interpret")["attention"] == "interpret"
    assert set(kernels.select_backends("interpret").values()) == {"interpret"}
    assert kernels.select_backends("auto", "cuda", "fp64")["attention"] == "torch"
