"""Who may depend on whom: the rules of docs/architecture.md, read off the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepep"
BACKENDS = sorted(path.name for path in (PACKAGE / "backends").iterdir() if (path / "__init__.py").exists())
FRONT_END = {"buffer", "elastic", "front", "low_latency", "handle", "stream", "event", "autograd", "compat", "demo"}
TRANSPORTS = {path.stem for path in (ROOT / "csrc/transports").glob("*.cuh")}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, names of `from` imports included; not those for type checking only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_knows_neither_other_backends_nor_the_front_end(backend: str) -> None:
    forbidden = {f"deepep.backends.{other}" for other in BACKENDS if other != backend}
    forbidden |= {f"deepep.{module}" for module in FRONT_END}
    for path in (PACKAGE / "backends" / backend).rglob("*.py"):
        for module in imports(path):
            assert not any(f"{module}.".startswith(f"{name}.") for name in forbidden), f"{path} imports {module}"


@pytest.mark.parametrize(
    "path", [PACKAGE / "backends/base.py", PACKAGE / "backends/registry.py", PACKAGE / "layout.py"]
)
def test_the_seam_imports_no_backend_and_no_front_end(path: Path) -> None:
    forbidden = {f"deepep.backends.{name}" for name in BACKENDS} | {f"deepep.{module}" for module in FRONT_END}
    for module in imports(path):
        assert not any(f"{module}.".startswith(f"{name}.") for name in forbidden), f"{path} imports {module}"


def test_the_front_end_meets_backends_through_the_registry_only() -> None:
    for name in FRONT_END - {"compat", "demo"}:
        for module in imports(PACKAGE / f"{name}.py"):
            assert not any(f"{module}.".startswith(f"deepep.backends.{backend}.") for backend in BACKENDS), name


def test_kernels_name_no_transport() -> None:
    names = re.compile(rf"transports/|\b({'|'.join(sorted(TRANSPORTS | {'nvshmem', 'ipc'}))})(\b|_)", re.IGNORECASE)
    for path in sorted((ROOT / "csrc/kernels").rglob("*.cu*")):
        found = names.search(path.read_text())
        assert found is None, f"{path.relative_to(ROOT)} names '{found and found.group()}'"


def test_importing_deepep_loads_nothing_heavy() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import deepep
print({name for name in sys.modules if name.startswith("deepep")} - {"deepep", "deepep.version"})
for name in deepep.__all__:
    getattr(deepep, name)
new = set(sys.modules) - before
seam = {"deepep.backends.base", "deepep.backends.registry"}
print({name for name in new if name.startswith("deepep.backends.")} - seam)
print(new & {"mpi4py", "cupy", "cuda.core", "cuda.bindings", "nvshmem", "deepep._runtime", "deepep.cuda"})
print(torch.cuda.is_initialized())
print([op for op in torch._C._dispatch_get_all_op_names() if op.startswith("deepep::")])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines() == ["set()", "set()", "set()", "False", "[]"]


def test_a_torch_namespace_deepep_is_left_to_others() -> None:
    registering = re.compile(r"""(Library|custom_op|define|TORCH_LIBRARY\w*)\(\s*["']?deepep\b""")
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]:
        assert not registering.search(path.read_text()), f"{path} registers torch ops in the namespace 'deepep'"
