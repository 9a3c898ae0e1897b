"""Nothing that is read can run code: no pickle, no YAML objects, no eval, in the whole repository."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("megapar", "kernels", "conf", "tests", "experiments", "docs")
ALLOWED = {
    # Functions and results of the pool's jobs, between our own processes, over a pipe that nothing else can write to.
    "megapar/launch/pool.py": "pickle.loads",
    # Lines of this repository's own docs and tables.
    "tests/gpu/test_tune.py": "eval",
    "tests/interpret/test_probe.py": "eval",
    "tests/test_howtos.py": "eval",
}
WORDS = re.compile("load|eval|Unpickler|shelve")  # a file without any of them has no such call


def sources() -> list[Path]:
    top = sorted(ROOT.glob("*.py"))
    return top + sorted(
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts
    )


def forbidden(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every call that could run what it reads, whatever names modules were imported by."""
    tree = ast.parse(text)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                first = name.name.partition(".")[0]
                known[name.asname or first] = name.name if name.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (what := called(node.func, known)):
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if refused(what, options):
                yield node.lineno, what


def called(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted name of what is called; empty for what has none."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([known.get(node.id, node.id), *reversed(parts)]) if isinstance(node, ast.Name) else ""


def refused(name: str, options: dict[str | None, str]) -> bool:
    module, _, function = name.rpartition(".")
    if module in ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"):
        return function in ("load", "loads", "Unpickler", "open")
    if name == "torch.load":
        return options.get("weights_only") != "True"
    if module == "yaml":
        unsafe = options.get("Loader") not in ("yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader", "CSafeLoader")
        return function in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all") or (
            function in ("load", "load_all") and unsafe
        )
    if name == "numpy.load":
        return options.get("allow_pickle", "False") != "False"
    return name in ("eval", "builtins.eval")


@pytest.mark.more
def test_nothing_here_reads_code() -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sources()}
    assert len(texts) > 500
    found = [
        f"{name}:{line}: {what}"
        for name, text in texts.items()
        if WORDS.search(text)
        for line, what in forbidden(text)
        if ALLOWED.get(name) != what
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import pickle\npickle.loads(data)", "pickle.loads"),
        ("import pickle as p\np.load(file)", "pickle.load"),
        ("from pickle import loads as read\nread(data)", "pickle.loads"),
        ("import pickle\npickle.Unpickler(file).load()", "pickle.Unpickler"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch as t\nt.load(path, weights_only=False)", "torch.load"),
        ("from torch import load\nload(path)", "torch.load"),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("import yaml\nyaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load"),
        ("eval(text)", "eval"),
    ],
)
def test_what_it_finds(text: str, what: str) -> None:
    assert [found for _, found in forbidden(text)] == [what]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.CSafeLoader)",
        "model.eval()",
        "import pickle\npickle.dumps(value)",
    ],
)
def test_what_it_lets_pass(text: str) -> None:
    assert not list(forbidden(text))
