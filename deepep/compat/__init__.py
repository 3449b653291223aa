"""The `deep_ep` alias: programs written for `deep_ep` run on deepep unchanged.

`install()` makes `import deep_ep` find the small package under `deepep/compat/alias`, an ordinary package on `sys.path`
whose modules forward to deepep, so specs, paths and `importlib` behave as for any package. `multiprocessing` hands
`sys.path` to the children it spawns, which therefore have the alias as well. `python -m deepep.compat script.py ...`
(or `-m module`) runs a whole program with it, and passes it to every Python process it starts, through PYTHONPATH.

The modules beside this one are `deep_ep.utils.*`: helpers that tests and benchmarks of `deep_ep` programs call.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from deepep.errors import DeepEPError

__all__ = ["ALIAS_PATH", "AliasConflict", "install"]

ALIAS_PATH = Path(__file__).resolve().parent / "alias"
"""The folder that holds the package `deep_ep`; the entry for `sys.path` or PYTHONPATH."""


class AliasConflict(DeepEPError, ImportError):
    """Another `deep_ep` is already imported. Call `deepep.compat.install()` before the first `import deep_ep`."""


def install() -> None:
    """Make `deep_ep` and its submodules importable in this process and in the processes it spawns. Idempotent.

    An installed but not yet imported `deep_ep` is shadowed from here on.

    Raises:
        AliasConflict: a `deep_ep` that is not this alias is already imported.
    """
    _check(sys.modules.get("deep_ep"))
    if str(ALIAS_PATH) not in sys.path:
        sys.path.insert(0, str(ALIAS_PATH))
        importlib.invalidate_caches()
    # Imported at once, so that later changes of sys.path cannot bring in another one. It is cheap: its names are lazy.
    _check(importlib.import_module("deep_ep"))


def _check(module: ModuleType | None) -> None:
    """Raise `AliasConflict` when `module` is a `deep_ep` from elsewhere."""
    if module is None:
        return
    origin = getattr(module, "__file__", None)
    if origin is None or Path(origin).resolve().parent != ALIAS_PATH / "deep_ep":
        raise AliasConflict(
            f"deep_ep is already imported from {origin or 'an unknown place'}; "
            "call deepep.compat.install() before anything imports deep_ep, or run `python -m deepep.compat script.py`"
        )
