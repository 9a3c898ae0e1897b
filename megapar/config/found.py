"""What is found by itself: modules of a package, by name and without importing one."""

from importlib.util import find_spec
from pkgutil import iter_modules


def modules_of(package: str) -> set[str]:
    """Names of the modules in a package."""
    found = find_spec(package)
    assert found is not None and found.submodule_search_locations is not None
    return {module.name for module in iter_modules(found.submodule_search_locations)}
