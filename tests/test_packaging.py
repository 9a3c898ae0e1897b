"""What gets installed, and what an import costs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_megapar_imports_no_heavy_package() -> None:
    code = "import sys, megapar, megapar.kernels, megapar.config, megapar.cli; print(*sys.modules)"
    loaded = set(run(code).split())
    assert loaded & {"torch", "hydra", "omegaconf", "triton", "wandb", "numpy", "sentencepiece"} == set()


def test_the_kernels_folder_is_inert_under_its_bare_name() -> None:
    """A project that looks for Hugging Face's `kernels` from our folder finds ours: no version, nothing imported."""
    code = "import sys; before = set(sys.modules); import kernels; print(hasattr(kernels, '__version__'), "
    assert run(code + "len([m for m in set(sys.modules) - before if not m.startswith('kernels')]))") == "False 0"


@pytest.mark.slow
def test_the_wheel_installs_one_top_level_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True)
    [wheel] = tmp_path.glob("megapar-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"megapar"}
    assert {"megapar/kernels/attention/forward.py", "megapar/conf/train.yaml", "megapar/conf/model/demo.yaml"} <= set(
        names
    )
    assert {"megapar/py.typed", "megapar/conf/experiment/demo.yaml"} <= set(names)


def test_kernels_run_in_torch_where_triton_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from megapar import kernels; "
        "from megapar.kernels.attention import attention; from megapar.kernels.swiglu import swiglu; "
        "x = torch.ones(1, 2, 1, 16); swiglu(attention(x, x, x)[0, 0], x[0, 0]); "
        "print(kernels.backend_of('attention', 'cuda'), kernels.has_triton())"
    )
    assert run(code) == "torch False"
