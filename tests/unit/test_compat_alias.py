"""The `deep_ep` alias: specs, names, conflicts, and whole programs in their own processes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import deepep
from deepep.compat import ALIAS_PATH, AliasConflict, install

ROOT = str(Path(deepep.__file__).resolve().parents[1])
PROGRAM = Path(__file__).with_name("compat_program.py")
MODULES = [
    "deep_ep",
    "deep_ep.buffers",
    "deep_ep.buffers.elastic",
    "deep_ep.buffers.legacy",
    "deep_ep.utils",
    "deep_ep.utils.envs",
    "deep_ep.utils.event",
    "deep_ep.utils.gate",
    "deep_ep.utils.math",
    "deep_ep.utils.refs",
    "deep_ep.utils.testing",
]
PUBLIC_NAMES = [
    ("deep_ep", "Buffer"),
    ("deep_ep", "Config"),
    ("deep_ep", "EPHandle"),
    ("deep_ep", "ElasticBuffer"),
    ("deep_ep", "EventHandle"),
    ("deep_ep", "EventOverlap"),
    ("deep_ep", "topk_idx_t"),
    ("deep_ep.buffers.elastic", "EPHandle"),
    ("deep_ep.buffers.elastic", "ElasticBuffer"),
    ("deep_ep.buffers.legacy", "Buffer"),
    ("deep_ep.utils", "EventHandle"),
    ("deep_ep.utils", "EventOverlap"),
    ("deep_ep.utils.event", "EventHandle"),
    ("deep_ep.utils.event", "EventOverlap"),
]


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deep_ep"]:
        del sys.modules[name]
    if str(ALIAS_PATH) in sys.path:
        sys.path.remove(str(ALIAS_PATH))


@pytest.fixture
def clean() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def alias(clean: None) -> ModuleType:  # noqa: ARG001
    install()
    return importlib.import_module("deep_ep")


def run_compat(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    env = {**kept, "PYTHONPATH": ROOT, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepep.compat", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=cwd, check=False)


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("name", MODULES)
def test_modules_have_real_specs(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.name == name
    module = importlib.import_module(name)
    assert module.__spec__ is not None
    assert module.__spec__.name == name
    assert hasattr(module, "__path__") == (name in ("deep_ep", "deep_ep.buffers", "deep_ep.utils"))


def test_submodules_are_reached_through_attributes(alias: ModuleType) -> None:
    assert alias.utils.math.ceil_div(7, 2) == 4
    assert "Buffer" in dir(alias)


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize(("module", "name"), PUBLIC_NAMES)
def test_names_are_those_of_deepep(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is getattr(deepep, name)


def test_utilities_are_those_of_deepep(alias: ModuleType) -> None:
    for short in ("envs", "gate", "math", "refs", "testing"):
        ours = importlib.import_module(f"deepep.compat.{short}")
        theirs = importlib.import_module(f"deep_ep.utils.{short}")
        for name in ours.__all__:
            assert getattr(theirs, name) is getattr(ours, name)
    assert alias.get_physical_domain_size is alias.utils.envs.get_physical_domain_size


def test_hybrid_buffer_is_absent(alias: ModuleType) -> None:
    with pytest.raises(ImportError, match="HybridEPBuffer"):
        exec("from deep_ep import HybridEPBuffer")
    assert not hasattr(alias, "HybridEPBuffer")


def test_version_serves_every_comparison(alias: ModuleType) -> None:
    version = pytest.importorskip("packaging.version")
    assert version.parse(alias.__version__) >= version.parse("2.1.0")
    assert [int(part) for part in alias.__version__.split(".")] == [2, 1, 0]


def test_install_is_idempotent(alias: ModuleType) -> None:
    install()
    assert sys.modules["deep_ep"] is alias
    assert sys.path.count(str(ALIAS_PATH)) == 1


@pytest.mark.usefixtures("clean")
def test_another_deep_ep_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    with pytest.raises(AliasConflict, match="before anything imports deep_ep"):
        install()


@pytest.mark.usefixtures("clean")
def test_another_deep_ep_that_is_only_installed_is_shadowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deep_ep.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    install()
    assert importlib.import_module("deep_ep").__version__ == "2.1.0"


@pytest.mark.usefixtures("clean")
def test_install_looks_up_nothing() -> None:
    code = (
        "import sys, deepep.compat; deepep.compat.install(); "
        "import deep_ep, deep_ep.utils.event, deep_ep.buffers.legacy; "
        "print([name for name in sys.modules if name.startswith(('deepep.backends', 'deepep.buffer'))])"
    )
    env = {**os.environ, "PYTHONPATH": ROOT}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert result.stdout == "[]\n"


def test_script_and_its_children(tmp_path: Path) -> None:
    result = run_compat(str(PROGRAM), "--flag", "value", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n")
    for line in ("grandchild 2.1.0", "rank 0 is done", "rank 1 is done", "printed once", "program finished"):
        assert lines.count(line) == 1


def test_module_and_its_children(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys, multiprocessing\n"
        "from deep_ep import __version__\n"
        "def child(queue): queue.put(__version__)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.SimpleQueue()\n"
        "    process = context.Process(target=child, args=(queue,))\n"
        "    process.start(); process.join()\n"
        "    print(sys.argv[1:], queue.get())\n"
    )
    result = run_compat("-m", "program", "a", "b", cwd=tmp_path)
    assert result.stdout == "['a', 'b'] 2.1.0\n", result.stderr


def test_exit_status_and_usage(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import sys, helper; sys.exit(helper.STATUS)\n")
    (tmp_path / "helper.py").write_text("STATUS = 7\n")
    assert run_compat(str(tmp_path / "fails.py")).returncode == 7
    nothing = run_compat()
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "usage" in nothing.stderr
    assert "usage" in run_compat("--help").stdout


def test_a_program_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for args, text in (
        (["nofile.py"], "no such program: nofile.py"),
        (["."], "no such program: ."),
        (["--version"], "unknown option --version"),
        (["-m", "no_such_module"], "no module named no_such_module"),
        (["-m", "no_such_package.module"], "no module named no_such_package.module"),
    ):
        result = run_compat(*args, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"python -m deepep.compat: {text}; --help shows the usage\n"
