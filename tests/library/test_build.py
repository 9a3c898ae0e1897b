"""What `import megapar` costs, what `build` takes, and what it says to the rest."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megapar
from tests.library.models import SMALL, batch, ours


def run(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_import_is_light() -> None:
    """0.02 s where this was written; the command line's own start is in tests/test_packaging.py."""
    loaded = run("import sys, megapar; print(*sys.modules)")
    assert [name for name in loaded if name.startswith("megapar")] == ["megapar"]
    assert {"torch", "hydra", "numpy", "yaml", "triton"} & set(loaded) == set()
    assert "torch" not in run("import sys, megapar; megapar.ConfigError; print(*sys.modules)")


def test_schedules_come_without_torch_whatever_was_imported_before() -> None:
    asked = "megapar.schedule('zbv', ranks=2, microbatches=4).draw()"
    code = f"import sys, megapar; {asked}; import megapar.schedule.build; {asked}; print('torch' in sys.modules)"
    assert run(code) == ["False"]
    assert run(f"import megapar.config, sys, megapar; {asked}; print('hydra' in sys.modules)") == ["False"]


def test_a_model_comes_without_hydra() -> None:
    code = "import sys, megapar; megapar.build('tiny', layers=1, hidden=8); print('hydra' in sys.modules)"
    assert run(code) == ["False"]


def test_names_are_listed() -> None:
    assert set(megapar.__all__) <= set(dir(megapar))
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        megapar.biuld  # noqa: B018


def test_a_name_a_file_and_a_config_are_one_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("layers: 4\nhidden: 128\nheads: 4\nnorm_eps: 1e-6\n")
    named = megapar.build("tiny", norm_eps=1e-6)
    for other in (megapar.build(file), megapar.build(str(file)), megapar.build(named.config.model)):
        assert other.config == named.config
        assert all(torch.equal(value, named.weights()[name]) for name, value in other.weights().items())


def test_defaults() -> None:
    config = megapar.build("tiny", hidden=16, layers=1).config
    assert (config.model.vocab_size, config.train.dtype, config.train.seq_length) == (1024, "fp32", 128)
    assert megapar.build("verify").config.model.vocab_size == 1027  # the file's own


def test_ids_of_any_shape() -> None:
    model = ours()
    assert model(batch(samples=1, length=1)[0]).shape == (1, 1, 61)
    assert model(batch(samples=3, length=37)[0].int()).shape == (3, 37, 61)  # rotary: beyond seq_length, int32


def ids_of(value: Any) -> Callable[[], Any]:
    return lambda: ours("gpt2")(value)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: megapar.build("llama_smal"), "did you mean llama_small?"),
    "a file": (lambda: megapar.build("none.yaml"), "model=none.yaml: can't be read: No such file"),
    "a type": (lambda: megapar.build(3), "expects a name, a path or a megapar.ModelConfig, not int"),  # type: ignore[arg-type]
    "a keyword": (lambda: megapar.build("tiny", layres=2), "layres=2: unknown key; did you mean layers?"),
    "another program's": (lambda: megapar.build("tiny", n_layer=2), "n_layer=2: unknown key; did you mean layers?"),
    "a keyword of ours": (lambda: megapar.build("tiny", layuot="tp2"), "did you mean layout?"),
    "a value": (lambda: megapar.build("tiny", layers="two"), "model.layers=two: expects an integer"),
    "a range": (lambda: megapar.build("tiny", layers=0), "model.layers=0: must be at least 1"),
    "sizes": (lambda: megapar.build("tiny", heads=5), "model.hidden=128: not divisible by model.heads=5"),
    "a dtype": (lambda: megapar.build("tiny", dtype="fp16"), "expects one of fp64, fp32, bf16"),
    "a layout": (lambda: megapar.build("tiny", layout="zp2"), "layout=zp2: not a layout"),
    "no ranks": (lambda: megapar.build("tiny", layout="tp2"), "torchrun --nproc-per-node 2"),
    "long samples": (ids_of(torch.zeros(1, 9, dtype=torch.int64)), "build it with seq_length=9"),
    "ids too large": (ids_of(torch.full((1, 2), 61)), "ids: hold 61, and the model has vocab_size=61; ids are 0 to 60"),
    "ids below zero": (ids_of(torch.full((1, 2), -1)), "ids: hold -1"),
    "floats": (ids_of(torch.zeros(1, 2)), "expects int64 [B, S]"),
    "one dimension": (ids_of(torch.zeros(2, dtype=torch.int64)), "torch.int64 [2]"),
    "labels": (lambda: ours().forward_backward(batch()[0], batch()[1][:2]), "give a label for every token"),
    "no labels": (lambda: ours().evaluate(batch()[0], torch.full((4, 8), -100)), "nothing to learn"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_built_or_read_says_why(what: str) -> None:
    do, said = REFUSED[what]
    with pytest.raises((megapar.UserError, ValueError)) as refusal:
        do()
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_initial_values_go_by_the_seed() -> None:
    one, same, other = (megapar.build("tiny", **SMALL, seed=seed).weights()["head.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
