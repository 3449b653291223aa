"""A backend that lives in another package: found through its entry point, and held to the contract."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepep.backends import registry
from deepep.errors import BackendUnavailable, InvalidArgument
from deepep.testing import contract
from deepep.testing.contract import Target
from deepep.testing.launch import Workers

HERE = Path(__file__).parent
# What the toy offers: compact rows of the first generation, on one host.
CHECKS = ("layout", "dispatch", "combine", "weights_round_trip", "async", "interleaved")
PAIRS = [(check, case) for check, case in contract.checks_and_cases() if check in CHECKS and "hosts" not in case]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toy as pip installs it; on `sys.path`, which spawned ranks inherit."""
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in [HERE / "pyproject.toml", *HERE.glob("deepep_toy/*.py")]:  # pip builds inside the tree it is given
        copy = source / file.relative_to(HERE)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, timeout=120)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    yield site
    sys.path.remove(str(site))
    importlib.invalidate_caches()


@pytest.fixture(scope="module", params=[1, 3], ids=lambda num_ranks: f"R{num_ranks}")
def toy_ranks(request: pytest.FixtureRequest, installed: Path) -> Iterator[Workers]:
    with Workers(request.param) as workers:
        assert str(installed) in sys.path
        yield workers


def test_without_the_package_the_name_is_unknown() -> None:
    with pytest.raises(InvalidArgument, match="'toy' is unknown; known are"):
        registry.load("toy")


def test_it_is_short() -> None:
    assert len((HERE / "deepep_toy/__init__.py").read_text().splitlines()) < 60


@pytest.mark.usefixtures("installed")
def test_it_is_known_by_its_entry_point() -> None:
    assert importlib.metadata.version("deepep-toy") == "1.0"
    assert registry.names()[-1] == "toy"
    assert registry.load("toy").__module__ == "deepep_toy"
    assert "toy: available" in registry.explain()
    assert "toy" not in registry._BUILT_IN


@pytest.mark.parametrize(("check", "case"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_contract(toy_ranks: Workers, check: str, case: str) -> None:
    assert toy_ranks.run(contract.run_check, check, case, Target("toy")) == [""] * toy_ranks.num_ranks


@pytest.mark.parametrize(("check", "case"), [("low_latency_dispatch", "uniform"), ("worst_case", "uniform")])
def test_what_it_cannot_do_is_refused_by_name(toy_ranks: Workers, check: str, case: str) -> None:
    for reason in toy_ranks.run(contract.run_check, check, case, Target("toy")):
        assert re.search("'toy'.*'reference'", reason)


@pytest.mark.parametrize("toy_ranks", [3], indirect=True)
def test_it_refuses_several_hosts(toy_ranks: Workers) -> None:
    with pytest.raises(BackendUnavailable, match="toy: not available: the group spans several hosts"):
        toy_ranks.run(contract.run_check, "dispatch", "hosts", Target("toy"))
