"""Module-level `__getattr__` for the alias: names are looked up on first use, so importing it imports no backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    module: str, names: Mapping[str, str], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Build `__getattr__` and `__dir__` of a module that forwards.

    Args:
        module: `__name__` of the forwarding module.
        names: public name → module that really holds it under the same name.
        submodules: names imported as submodules on first use, so that `deep_ep.utils.math` needs only `import deep_ep`.

    Returns:
        The pair `(__getattr__, __dir__)`. A name in neither list raises AttributeError, which `from module import name`
        turns into ImportError.
    """

    def get(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(names[name]), name)
        if name in submodules:
            return importlib.import_module(f"{module}.{name}")
        raise AttributeError(f"module {module!r} (the deepep alias) has no attribute {name!r}")

    def listing() -> list[str]:
        return sorted((*names, *submodules))

    return get, listing
