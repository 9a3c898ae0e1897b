"""`megapar verify` begins with the gradients of every operation, ours and a user's, and names a wrong one."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megapar import verify
from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.kernels import rope
from megapar.models import attention, layer, mlp
from megapar.operations import Report, check_operations
from megapar.parallel import cross_entropy, norms, overlap
from megapar.parallel.weight_grad import AddBias, Lookup, WeightGrads
from megapar.train.trainer import Trainer
from tests.cli.conftest import clean_environment
from tests.parallel import wrong_models
from tests.parallel.layouts import STYLES, verify_config
from tests.tiny import tiny_config

REPOSITORY = Path(__file__).parents[2]
SMALL = {"model.layers": 2, "model.kv_heads": 4, "model.heads": 4, "model.hidden": 16}
BIASES = {"model.bias": True}
SPLIT = {"parallel.sequence_parallel": True}


def report(prefix: str, style: str = "llama", build: Any = None, **values: Any) -> Report:
    return check_operations(verify_config(prefix, ["tp2"], **(STYLES[style] | SMALL | values)), build)


def named(found: Report) -> str:
    assert found.wrong
    return "\n".join(map(str, found.wrong))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model.dropout": 0.1, "model.tied": True, "parallel.sequence_parallel": True, "train.recompute": "full"},
        {"model.activation": "geglu", "model.kv_heads": 1, "train.recompute": "selective", "model.bias": True},
    ],
)
def test_ours_are_right(style: str, values: dict[str, Any], prefix: str) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = report(prefix, style, **values)
    assert found.wrong == [] and found.error < 5e-7
    assert found.checked >= 15 and found.gradients >= 25
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------------------- mutants
class Scaled(torch.autograd.Function):
    """function(x, *rest), and its gradient of x times 1.01."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], rest: Any, options: Any) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = function(ctx.x, *rest, **options)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        [dx] = torch.autograd.grad(ctx.y, ctx.x, grad)
        return 1.01 * dx, None, None, None


def wrong(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *rest, **options: Scaled.apply(x, function, rest, options)


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What it returns, times 1.01."""

    def times(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        return tuple(1.01 * one for one in result) if isinstance(result, tuple) else 1.01 * result

    return times


def backward_of(cls: Any) -> Any:
    """The function's input gradient, transposed back and forth over its first two rows: those change places."""
    original = cls.backward

    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx, *rest = original(ctx, *grads)
        return dx[[1, 0, *range(2, len(dx))]], *rest

    return mock.patch.object(cls, "backward", staticmethod(backward))


def no_residual(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None = None) -> Tensor:
    return RMSNORM_INPUT_GRAD(dy, h, weight, rstd, None)


def no_mean_term(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None = None) -> Tensor:
    return dy * weight * rstd.unsqueeze(1) + (0 if dh is None else dh)


RMSNORM_INPUT_GRAD = norms.rmsnorm_input_grad


def into_transposed(self: Any, into: Tensor, accumulate: bool) -> None:
    product = (self.dy.t() @ self.x).flatten().view(into.shape[1], into.shape[0]).t()
    into.copy_(product + into if accumulate else product)


def into_when(accumulates: bool) -> Callable[..., None]:
    def into(self: Any, into: Tensor, accumulate: bool) -> None:
        scale = 1.01 if accumulate == accumulates else 1.0
        product = scale * (self.dy.t() @ self.x)
        into.copy_(product + into if accumulate else product)

    return into


def one_is_lost(self: WeightGrads, stage: int, microbatch: int) -> None:
    self.run_all(self.withdraw(stage, microbatch)[1:])


def first_row_lost(grad: Tensor, x: Tensor, into: Tensor) -> None:
    Lookup_add(grad[1:], x[1:], into)


Lookup_add = Lookup.add_weight_grad


def static(owner: Any, name: str, value: Any) -> Any:
    return mock.patch.object(owner, name, staticmethod(value))


def patched(where: Any, name: str, make: Callable[..., Any]) -> Any:
    return mock.patch.object(where, name, make(getattr(where, name)))


def activation(name: str) -> Any:
    return mock.patch.dict(mlp.ACTIVATIONS, {name: wrong(mlp.ACTIVATIONS[name])})


# name -> (what breaks it, style, keys, what is named first)
MUTANTS: dict[str, tuple[Callable[[], Any], str, dict[str, Any], str]] = {
    "copy_matmul input": (
        lambda: backward_of(overlap._CopyMatmul), "llama", {}, r"^layers\.0\.attention\.qkv \(CopyMatmul\): .*its inp",
    ),
    "matmul_all_reduce input": (
        lambda: backward_of(overlap._MatmulAllReduce), "llama", {}, r"attention\.out \(MatmulAllReduce\): .*input",
    ),
    "all_gather_matmul input": (
        lambda: backward_of(overlap._AllGatherMatmul), "llama", SPLIT, r"attention\.qkv \(AllGatherMatmul\): .*input",
    ),
    "matmul_reduce_scatter input": (
        lambda: backward_of(overlap._MatmulReduceScatter), "llama", SPLIT, r"attention\.out \(MatmulReduceScatter\)",
    ),
    "matmul weight transposed": (
        lambda: mock.patch.object(overlap._WeightGradient, "_into", into_transposed), "llama", {},
        r"^layers\.0\.attention\.qkv \(CopyMatmul\): the gradient of layers\.0\.attention\.q\.weight",
    ),
    "matmul weight written": (
        lambda: mock.patch.object(overlap._WeightGradient, "_into", into_when(False)), "llama", {},
        r"attention\.q\.weight .*\(finite differences, at once and deferred\)",
    ),
    "matmul weight added": (
        lambda: mock.patch.object(overlap._WeightGradient, "_into", into_when(True)), "llama", {},
        r"attention\.k\.weight .*, at once, added to an earlier one and deferred, added to an earlier one\)",
    ),
    "weight lost in W": (
        lambda: mock.patch.object(WeightGrads, "run", one_is_lost), "llama", {},
        r"^embedding\.tokens \(Lookup\): .*embedding\.weight .*differences, deferred and deferred, added",
    ),
    "lookup weight": (
        lambda: static(Lookup, "add_weight_grad", first_row_lost), "llama", {},
        r"^embedding\.tokens \(Lookup\): the gradient of embedding\.weight",
    ),
    "positions weight": (
        lambda: static(Lookup, "add_weight_grad", first_row_lost), "gpt2", {},
        r"embedding\.positions \(Lookup\): the gradient of positions\.weight",
    ),
    "bias input": (
        lambda: static(AddBias, "input_grad", lambda grad, x, weight: 1.01 * grad), "gpt2", {},
        r"^layers\.0\.attention\.qkv \(AddBias\): the gradient of its input ",
    ),
    "bias weight": (
        lambda: static(AddBias, "add_weight_grad", lambda grad, x, into: into.add_(grad.mean(0))), "llama", BIASES,
        r"^layers\.0\.attention\.qkv \(AddBias\): the gradient of layers\.0\.attention\.q\.bias",
    ),
    "rmsnorm input": (
        lambda: mock.patch.object(norms, "rmsnorm_input_grad", no_mean_term), "llama", {},
        r"^layers\.0\.norm1 \(RMSNorm\): the gradient of its input ",
    ),
    "rmsnorm residual": (
        lambda: mock.patch.object(norms, "rmsnorm_input_grad", no_residual), "llama", {},
        r"^layers\.0\.norm2 \(RMSNorm\): the gradient of its input 1 .*\n.*its input 2 ",
    ),
    "rmsnorm weight": (
        lambda: patched(norms, "rmsnorm_weight_grad", scaled), "llama", {},
        r"^layers\.0\.norm1 \(RMSNorm\): the gradient of layers\.0\.norm1\.weight",
    ),
    "layernorm input": (
        lambda: patched(norms, "layernorm_input_grad", scaled), "gpt2", {},
        r"^layers\.0\.norm1 \(LayerNorm\): the gradient of its input ",
    ),
    "layernorm weight and bias": (
        lambda: patched(norms, "layernorm_weight_grad", scaled), "gpt2", {},
        r"^layers\.0\.norm1 \(LayerNorm\): .*layers\.0\.norm1\.weight .*\n.*layers\.0\.norm1\.bias",
    ),
    "attention": (
        lambda: patched(attention, "attend_", wrong), "llama", {},
        r"^layers\.0\.attention \(Scaled\): the gradient of its input ",
    ),
    "rope": (lambda: patched(rope, "_turn", wrong), "llama", {}, r"^layers\.0\.attention \(Scaled\): .*its input "),
    "swiglu": (lambda: activation("swiglu"), "llama", {}, r"^layers\.0\.mlp \(Scaled\)"),
    "geglu": (lambda: activation("geglu"), "llama", {"model.activation": "geglu"}, r"^layers\.0\.mlp \(Scaled\)"),
    "gelu": (lambda: activation("gelu"), "gpt2", {}, r"^layers\.0\.mlp \(Scaled\)"),
    "dropout": (
        lambda: patched(layer, "dropout", wrong), "llama", {"model.dropout": 0.1}, r"^embedding\.dropout \(Scaled\)",
    ),
    "cross entropy": (
        lambda: patched(cross_entropy, "cross_entropy_gradient_", scaled), "llama", {},
        r"^VocabParallelCrossEntropy: the gradient of its input ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_backward_of_ours_is_named(name: str, prefix: str) -> None:
    breaks, style, values, words = MUTANTS[name]
    with breaks():
        found = named(report(prefix, style, **values))
    assert re.search(words, found), found


def test_a_small_mistake_is_seen_by_autograd(prefix: str) -> None:
    """Below what finite differences tell from rounding."""
    slight = lambda grad, x, weight: (1 + 1e-8) * grad  # noqa: E731
    with static(AddBias, "input_grad", slight):
        found = named(report(prefix, "gpt2"))
    assert re.match(r"layers\.0\.attention\.qkv \(AddBias\): .* input is off by 1.0e-08 .*\(autograd\)", found), found


# ------------------------------------------------------------------------------------------------------- a user's own
@pytest.mark.parametrize("build", [wrong_models.right, wrong_models.right_in_fp32])
def test_a_users_right_model_is_right(build: Any, prefix: str) -> None:
    assert report(prefix, build=build).wrong == []


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            wrong_models.wrong_function,
            r"^layers\.0 \(WrongCube\): the gradient of its input is off by 6.*\(finite diff",
        ),
        (wrong_models.wrong_in_fp32, r"^layers\.0 \(WrongSingle\): the gradient of its input "),
        (wrong_models.detached, r"^layers\.0 \(Adapter\): the gradient of its input "),
        (wrong_models.one_layer_wrong, r"^layers\.1\.mlp \(Times\): the gradient of layers\.1\.scale\.weight "),
    ],
)
def test_a_users_wrong_model_is_named(build: Any, words: str, prefix: str) -> None:
    found = named(report(prefix, build=build))
    assert re.search(words, found), found


def test_a_plain_modules_gradient_that_is_moved_wrongly(prefix: str) -> None:
    original = WeightGrads.add

    def twice(self: WeightGrads, parameter: Any, grad: Tensor) -> None:
        original(self, parameter, 2 * grad)

    with mock.patch.object(WeightGrads, "add", twice):
        found = named(report(prefix, build=wrong_models.right))
    assert re.search(r"^layers\.0\.down \(Linear\): the gradient of layers\.0\.down\.weight", found), found


# --------------------------------------------------------------------------------------------------------- the command
def config_in(folder: Path, prefix: str, layouts: list[str]) -> Any:
    return changed(verify_config(prefix, layouts, **(SMALL | {"train.steps": 1})), {"run.dir": str(folder)})


def test_a_wrong_one_ends_verify_before_any_layout(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "WorkerPool", None)  # no process is started
    assert verify.run(config_in(tmp_path, prefix, ["tp2"]), wrong_models.wrong_function) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("FAIL  layers.0 (WrongCube): the gradient of its input is off by ")
    assert out[-2].startswith("no layout was compared")
    written = json.loads((tmp_path / "verify.json").read_text())
    assert written["layouts"] == [] and written["operations"]["wrong"][0]["what"] == "WrongCube"


def test_verify_compares_layouts_of_a_users_model(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.run(config_in(tmp_path, prefix, ["tp2"]), wrong_models.right) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ gradients of \d+ operations and modules in fp64 .* pass", out[0])
    assert out[-2] == "1 of 1 layouts agree with the one-process run"
    written = json.loads((tmp_path / "verify.json").read_text())
    assert written["operations"]["wrong"] == [] and written["operations"]["error"] < written["operations"]["bound"]


def test_what_cannot_run_alone_is_said(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run(config_in(tmp_path, prefix, []), wrong_models.not_alone) == 0
    assert " (1 more can't run alone: layers.1.leans (Leans)) in fp64 " in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "verify.json").read_text())["operations"]["not_alone"] == ["layers.1.leans (Leans)"]


def test_a_model_that_cannot_be_checked_is_one_line(prefix: str, tmp_path: Path) -> None:
    config = config_in(tmp_path, prefix, ["tp2"])
    with pytest.raises(UserError, match=r"^build_stage: ranks can't find it; use a function at the top level"):
        verify.run(config, lambda config, context: wrong_models.right(config, context))
    with pytest.raises(UserError, match=r"^the model can't run in one process: .*no such width"):
        verify.run(config, wrong_models.fails)


def test_a_run_trains_what_model_module_names(tokens: str) -> None:
    trainer = Trainer(tiny_config(tokens, **{"model.module": f"{wrong_models.__name__}:right"}), 0)
    before = trainer.step(1).loss
    assert type(trainer.stages[0].layers["1"]) is wrong_models.Adapter  # type: ignore[attr-defined]
    assert trainer.step(2).loss != before
    trainer.close()


# ------------------------------------------------------------------------------------------------------ docs/howto
GUIDE = (REPOSITORY / "docs" / "howto" / "add-a-layer.md").read_text()
SOURCE = "\n\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
[MISTAKE] = re.findall(r"```py\n(.*?)```", GUIDE, re.DOTALL)
OFF = r"off by \S+"
[SHOWN] = re.findall(r"```text\n(FAIL.*?)\n```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("mistaken", [pytest.param(False, marks=pytest.mark.more), True])
def test_the_guides_layer_and_its_mistake(mistaken: bool, prefix: str, tmp_path: Path) -> None:
    """From its folder, by the command, as the guide says."""
    source = SOURCE.replace("        return grad * weight\n", MISTAKE) if mistaken else SOURCE
    assert (source != SOURCE) == mistaken
    (tmp_path / "my_model.py").write_text(source)
    [command] = re.findall(r"\nmegapar (verify model\.module=.*)\n", GUIDE)
    words = command.replace("layouts=[tp2,pp2,dp2,tp2pp2dp2]", "layouts=[tp2]").split()
    words += [f"data.path={prefix}", "run.dir=run", "train.steps=1"]
    script = "import sys; sys.path.remove(''); from megapar.cli import main; sys.exit(main())"  # as `megapar` has it
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if mistaken:
        assert done.returncode == 1 and re.sub(OFF, "", lines[0]) == re.sub(OFF, "", SHOWN), done
        assert lines[1:] == ["no layout was compared: the one-process run would have the same gradients", lines[-1]]
    else:
        assert done.returncode == 0 and "1 of 1 layouts agree with the one-process run" in lines, done
