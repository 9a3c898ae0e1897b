"""The registry reads what the files declare, without running them."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from megapar.kernels import registry


def test_what_is_read_is_what_the_files_declare() -> None:
    assert "attention" in registry.KERNELS and "comm.matmul" in registry.compiled()
    for name, read in registry.KERNELS.items():
        declared = import_module(f"{registry.PACKAGE}.{name}").KERNEL
        assert replace(read, specs=None) == replace(declared, specs=None)
        assert (read.specs is None) == (declared.specs is None)


def test_the_list_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from megapar.kernels import backends, registry, select_backends; "
        "select_backends('auto'); registry.compiled(); "
        "print(len(backends()), {'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(registry.FUNCTIONS)), "set()"]


REFUSED = {
    "KERNEL = Kernel(NAME)": "must be written out",
    "KERNEL = Kernel('new', form=True)": "unexpected keyword argument 'form'",
    "KERNEL = Kernel('new'": "never closed",
    "KERNEL = Kernel('old')": "KERNEL's name is old; use the file's, new",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_declaration_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(f"raise AssertionError('it was run')\n{text}\n")
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])):
        registry.find([str(tmp_path)])


def test_two_kernels_of_one_function() -> None:
    with pytest.raises(ValueError, match="one and two both declare same"):
        registry.by_function(registry.Kernel(name, functions=("same",)) for name in ("one", "two"))
