"""Found by every Python process of a rehearsal under test, through PYTHONPATH: notes which statements of
`experiments/gpu` run, and makes one kernel wrong.

MEGAPAR_STATEMENTS: the file that gets a line `file:line` when a statement is first reached, so that nothing is lost
however a process ends. MEGAPAR_MUTANT: the name of `tests/gpu/mutants.py` that is applied to the kernels.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import CodeType, ModuleType
from typing import Any

NOTES, MUTANT = os.environ.get("MEGAPAR_STATEMENTS"), os.environ.get("MEGAPAR_MUTANT")
WATCHED = "experiments.gpu"


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with a call before every statement."""

    def source_to_code(self, data: Any, path: Any = "<string>", *args: Any) -> CodeType:  # type: ignore[override]
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            for field in ("body", "orelse", "finalbody"):
                body = getattr(node, field, None)
                if isinstance(body, list):
                    setattr(node, field, self.watched(body))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def watched(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for one in body:
            text = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
            if not text and not (isinstance(one, ast.ImportFrom) and one.module == "__future__"):
                call = ast.Call(ast.Name("__reached__", ast.Load()), [ast.Constant(one.lineno)], [])
                found.append(ast.copy_location(ast.Expr(ast.fix_missing_locations(ast.copy_location(call, one))), one))
            found.append(one)
        return found

    def get_code(self, fullname: str) -> CodeType:
        """Past the cache of bytecode, which has no calls."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        path, seen = self.path, set[int]()
        assert NOTES is not None
        descriptor = os.open(NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

        def reached(line: int) -> None:
            if line not in seen:
                seen.add(line)
                os.write(descriptor, f"{path}:{line}\n".encode())

        module.__dict__["__reached__"] = reached
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(f"{WATCHED}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return None
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=Loader(fullname, spec.origin))


class Mutator(importlib.abc.MetaPathFinder):
    """Applies the mutant once the kernels have been imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "megapar.kernels._common":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            from tests.gpu.mutants import apply

            assert MUTANT is not None
            apply(MUTANT)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if NOTES:
    sys.meta_path.insert(0, Finder())
if MUTANT:
    sys.meta_path.insert(0, Mutator())
