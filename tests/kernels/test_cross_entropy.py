"""Cross entropy: both backends against torch's own in fp64, in parts of a vocabulary; what it moves and sends."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.config.layout import Layout
from megapar.kernels import use_backend
from megapar.kernels.cross_entropy import (
    Objective,
    cross_entropy_gradient_,
    cross_entropy_gradient_op,
    cross_entropy_statistics,
    cross_entropy_statistics_op,
    launch_gradient,
    launch_statistics,
    merge_statistics,
)
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.kernels.cases import DTYPES, poisoned_memory

IGNORED = -1
# tokens, vocabulary, parts
SIZES = [(1, 1, 1), (5, 7, 3), (3, 61, 4), (2, 4099, 1), (4, 9000, 2)]
OBJECTIVES = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.2, 1e-2)]


def given(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that the dtype holds, some around 30 and some around -30, targets of which every third is ignored,
    gradients of the losses."""
    generator = torch.Generator().manual_seed(tokens * vocabulary)
    logits = (4 * torch.randn(tokens, vocabulary, generator=generator) + (30 if tokens % 2 else -30)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[2::3] = IGNORED
    return logits, targets, torch.randn(tokens, generator=generator)


def exact(logits: Tensor, targets: Tensor, grad: Tensor, smoothing: float, z: float) -> tuple[Tensor, Tensor]:
    """Losses and gradient by torch's cross entropy in fp64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    losses = losses + z * torch.logsumexp(logits, 1).square() * (targets != IGNORED)
    return losses.detach(), torch.autograd.grad(losses, logits, grad.double())[0]


def in_parts(
    backend: str, logits: Tensor, targets: Tensor, grad: Tensor, parts: int, smoothing: float, z: float
) -> tuple[Tensor, Tensor]:
    """The same from slices of one matrix, as ranks would hold parts of the vocabulary."""
    use_backend(backend)
    objective = Objective(smoothing, z, logits.shape[1])
    slices, first = logits.clone().tensor_split(parts, 1), [0]
    for part in slices:
        first.append(first[-1] + part.shape[1])
    found = [cross_entropy_statistics(p, targets, f, total=smoothing > 0) for p, f in zip(slices, first, strict=False)]
    merged = merge_statistics(torch.stack(found))
    counts = targets != IGNORED
    for part, start in zip(slices, first, strict=False):
        cross_entropy_gradient_(part, targets, start, merged.log_sum, grad.where(counts, 0.0), objective)
    return merged.losses(objective).where(counts, 0.0), torch.cat(slices, 1)


def errors(rank: int, world_size: int, backend: str) -> list[tuple[str, float, float]]:
    """(case, error of losses in units of their rounding, of the gradient in units of its dtype's) of all cases."""
    found = []
    with poisoned_memory():
        for (name, dtype), (tokens, vocabulary, parts), (smoothing, z) in product(DTYPES.items(), SIZES, OBJECTIVES):
            logits, targets, grad = given(tokens, vocabulary, dtype)
            losses, gradient = exact(logits, targets, grad, smoothing, z)
            got, slope = in_parts(backend, logits, targets, grad, parts, smoothing, z)
            assert got.dtype == torch.float32 and slope.dtype == dtype
            wide, narrow = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
            in_losses = float(((got - losses).abs() / (wide * (1 + losses.abs() + 30))).max())
            # fp32's exp of a difference of numbers near 30 is off by some 30 of its roundings.
            allowed = 64 * wide * gradient.abs().max() + narrow * torch.finfo(dtype).smallest_normal
            excess = (slope - gradient).abs() - allowed
            in_gradient = float((excess / (narrow * gradient.abs() + 1e-30)).max())
            found.append((f"{name} {tokens}x{vocabulary} in {parts}, {smoothing}, {z}", in_losses, in_gradient))
    return found


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_parts_of_a_vocabulary_give_torchs_cross_entropy(backend: str, interpreter: WorkerPool) -> None:
    """Losses within a few of fp32's roundings of logits of about 30; gradients rounded once to nearest, to half of the
    dtype's epsilon, beyond what fp32 inside makes of them."""
    for case, in_losses, in_gradient in interpreter.run(errors, 1, backend, timeout=300)[0]:
        assert in_losses < 8 and in_gradient < 0.51, (case, in_losses, in_gradient)


def hidden(rank: int, world_size: int, backend: str) -> list[float]:
    """Largest errors, losses and gradient, of logits of which the first 4500 of 9000 are -inf, alone and in two parts.

    A token that counts for nothing has NaN for logits, and a gradient of 0.
    """
    found = []
    for (dtype, eps), parts in product([(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], (1, 2)):
        logits, targets, grad = given(3, 9000, dtype)
        logits[:, :4500] = -torch.inf
        targets[:2] = torch.tensor([4500, 8999])
        losses, gradient = exact(logits, targets, grad, 0.0, 1e-3)
        logits[2] = torch.nan
        with poisoned_memory():
            got, slope = in_parts(backend, logits, targets, grad, parts, 0.0, 1e-3)
        assert targets[2] == IGNORED and not slope[2].any() and got[2] == 0
        found += [float((got - losses).abs().max()) / 1e-4, float((slope - gradient).abs().max()) / eps]
    return found


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_hidden_logits_and_tokens(backend: str, interpreter: WorkerPool) -> None:
    """-inf fills the whole of a program's first tile, and the whole of a rank's part."""
    assert all(error < 1 for error in interpreter.run(hidden, 1, backend)[0])


def check_operators(rank: int, world_size: int) -> None:
    use_backend("interpret")
    logits, targets, grad = given(3, 9, torch.float32)
    statistics = cross_entropy_statistics(logits, targets, 0)
    assert statistics.shape == (3, 3)
    for total in (False, True):
        torch.library.opcheck(cross_entropy_statistics_op, (logits, targets, 0, total))
    log_sum = merge_statistics(statistics.unsqueeze(0)).log_sum
    torch.library.opcheck(cross_entropy_gradient_op, (logits, targets, 0, log_sum, grad, 0.1, 0.0, 9))


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


def collectives(rank: int, world_size: int) -> tuple[list[str], float]:
    """What a forward and a backward communicate, and how far the gradient of this rank's part is from fp64's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                seen.append(f"{func._overloadpacket.__name__} {list(args[1].shape)}")
            return func(*args, **(kwargs or {}))

    use_backend("interpret")
    mesh = Mesh(Layout(tp=2), rank)
    logits, targets, grad = given(6, 31, torch.float32)
    _, gradient = exact(logits, targets, grad, 0.0, 0.0)
    mine, wanted = (x.tensor_split(2, 1)[rank] for x in (logits, gradient))
    mine = mine.clone().requires_grad_()
    with Watch():
        losses = vocab_parallel_cross_entropy(mine * 1.0, targets, 16 * rank, mesh["tp"], ignored=IGNORED)
        losses.backward(grad)
    mesh.close()
    assert mine.grad is not None
    return seen, float((mine.grad - wanted).abs().max())


def test_one_collective(interpreter: WorkerPool) -> None:
    for seen, error in interpreter.run(collectives, 2):
        assert len(seen) == 1 and seen[0].endswith("[1, 6, 3]"), seen
        assert error < 1e-5


def test_six_bytes_per_logit() -> None:
    """In bf16: one pass reads, the other reads and writes. As the launches themselves tell a profiler."""
    with torch.device("meta"):
        logits, targets = torch.empty(8, 1000, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int64)
        column = torch.empty(8)
        launches = [
            launch_statistics(logits, targets, torch.empty(8, 3), 0),
            launch_gradient(logits, targets, column, column, 0, Objective()),
        ]
    named = SimpleNamespace(name="")
    moved = [one.kernel.launch_metadata(one.grid, named, one.arguments)["bytes"] for one in launches]
    assert sum(moved) == 6 * logits.numel()


def test_a_second_backward_is_refused() -> None:
    axis = Mesh()["tp"]
    logits = torch.randn(2, 5, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits * 1.0, torch.tensor([1, 2]), 0, axis).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_contradictions_are_refused() -> None:
    for logits, targets in (
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="need"):
            cross_entropy_statistics(logits, targets, 0)
    logits, targets, column = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for log_sum, grad in ((column[:1], column), (column, column[:1]), (column, column[:, None]), (column, targets)):
        with pytest.raises(ValueError, match=r"log_sum .* grad .*: need \[2\]"):
            cross_entropy_gradient_(logits, targets, 0, log_sum, grad, Objective())
