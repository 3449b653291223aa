"""Choosing a backend: names, `backend=` over `DEEPEP_BACKEND` over auto, entry points, and the table of reasons."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from deepep.backends import registry
from deepep.backends.base import Availability, Capabilities, Layout
from deepep.backends.reference.backend import ReferenceBackend
from deepep.errors import BackendUnavailable, InvalidArgument
from deepep.topology import Topology

ONE_HOST, TWO_HOSTS = Topology.split(2, 1), Topology.split(2, 2)


class OnGpus(ReferenceBackend):
    """Stands for the ipc backend: GPUs of one host, and available if `is_there`."""

    name = "ipc"
    is_there = True

    @classmethod
    def probe(cls) -> Availability:
        return Availability(cls.is_there, "" if cls.is_there else "no GPU", "" if cls.is_there else "buy one")

    @classmethod
    def capabilities(cls) -> Capabilities:
        return Capabilities(frozenset({"cuda"}), frozenset(Layout))


class OverTheNetwork(OnGpus):
    """Stands for the nvshmem backend."""

    name = "nvshmem"
    capabilities = ReferenceBackend.capabilities  # type: ignore[assignment]


class Raising(ReferenceBackend):
    """A backend whose probe breaks its promise."""

    name = "raising"

    @classmethod
    def probe(cls) -> Availability:
        raise OSError("driver fell over")


class Leaving(ReferenceBackend):
    """A backend whose probe ends the program."""

    name = "leaving"

    @classmethod
    def probe(cls) -> Availability:
        raise SystemExit(3)


class Mute(ReferenceBackend):
    """A backend that returns nothing where something is due."""

    name = "mute"
    capabilities = classmethod(lambda _cls: None)  # type: ignore[assignment]


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The usual names, with stand-ins for the GPU backends."""
    table = {"nvshmem": OverTheNetwork, "ipc": OnGpus, "reference": ReferenceBackend}
    for name, backend in table.items():
        monkeypatch.setitem(registry._BUILT_IN, name, f"{backend.__module__}:{backend.__name__}")
    monkeypatch.setattr(registry, "_plugins", list)
    monkeypatch.delenv("DEEPEP_BACKEND", raising=False)
    return registry._BUILT_IN


def add_plugins(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    points = [
        importlib.metadata.EntryPoint(name, target, registry.ENTRY_POINT_GROUP) for name, target in targets.items()
    ]
    monkeypatch.setattr(registry, "_plugins", lambda: points)


def choose(backend: str = "auto", topology: Topology = ONE_HOST, on_cuda: bool = True) -> str:
    return registry.select(backend, topology, on_cuda=on_cuda).name


def test_names_come_in_the_order_of_preference(built_in: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.names() == list(built_in) == ["nvshmem", "ipc", "reference"]
    add_plugins(monkeypatch, mine="somewhere:Mine", reference="somewhere:Else")
    assert registry.names() == ["nvshmem", "ipc", "reference", "mine"]
    assert registry.load("reference") is ReferenceBackend  # a plug-in does not take a built-in's place


@pytest.mark.usefixtures("built_in")
def test_auto_takes_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose() == "ipc"
    assert choose(topology=TWO_HOSTS) == "nvshmem"
    assert choose(on_cuda=False) == "reference"
    monkeypatch.setattr(OnGpus, "is_there", False)
    assert choose() == choose(topology=TWO_HOSTS) == "reference"


@pytest.mark.usefixtures("built_in")
def test_auto_never_takes_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    add_plugins(monkeypatch, mine=f"{__name__}:OnGpus")
    monkeypatch.setattr(OnGpus, "is_there", False)
    monkeypatch.setattr(ReferenceBackend, "probe", lambda: Availability(False, "broken"))
    with pytest.raises(BackendUnavailable, match="no backend can run here"):
        choose()


@pytest.mark.usefixtures("built_in")
def test_an_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose(name) for name in ("reference", "ipc", "nvshmem")] == ["reference", "ipc", "nvshmem"]
    monkeypatch.setattr(OnGpus, "is_there", False)
    with pytest.raises(BackendUnavailable) as caught:
        choose("ipc")
    assert str(caught.value).splitlines() == [
        "backend 'ipc' was asked for but cannot run here.",
        "  nvshmem: not available: no GPU; buy one",
        "  ipc: not available: no GPU; buy one",
        "  reference: available",
    ]


@pytest.mark.usefixtures("built_in")
def test_a_backend_of_one_host_is_not_for_two() -> None:
    with pytest.raises(BackendUnavailable, match="ipc: not available: the group spans several hosts; choose a backend"):
        choose("ipc", TWO_HOSTS)


@pytest.mark.usefixtures("built_in")
def test_an_unknown_name_lists_the_known() -> None:
    for call in (registry.load, choose):
        with pytest.raises(InvalidArgument, match="'nope' is unknown; known are nvshmem, ipc, reference and auto"):
            call("nope")


def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPEP_BACKEND", raising=False)
    assert registry.requested(None) == "auto"
    monkeypatch.setenv("DEEPEP_BACKEND", " ")
    assert registry.requested(None) == "auto"
    monkeypatch.setenv("DEEPEP_BACKEND", "ipc")
    assert registry.requested(None) == "ipc"
    assert registry.requested("reference") == "reference"
    assert registry.requested("auto") == "auto"
    assert registry.requested_on("cpu", None) == "ipc"  # refused there by name, rather than replaced
    assert registry.requested_on("cpu", "auto") == "reference"
    assert registry.requested_on("cuda", "auto") == "auto"


@pytest.mark.usefixtures("built_in")
def test_an_entry_point_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    add_plugins(monkeypatch, mine=f"{__name__}:OnGpus")
    assert registry.load("mine") is OnGpus
    assert choose("mine") == "ipc"
    assert "  mine: available" in registry.explain().splitlines()


@pytest.mark.usefixtures("built_in")
def test_broken_plugins_become_lines_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    add_plugins(
        monkeypatch, absent="no_such_module:Backend", empty=f"{__name__}:NoSuchClass", raising=f"{__name__}:Raising"
    )
    lines = registry.explain(ONE_HOST).splitlines()[-3:]
    assert lines[0] == "  absent: not available: No module named 'no_such_module'"
    assert lines[1].startswith("  empty: not available: module 'test_registry' has no attribute 'NoSuchClass'")
    assert lines[2] == "  raising: not available: its probe failed with OSError: driver fell over"
    for name in ("absent", "empty", "raising"):
        with pytest.raises(BackendUnavailable, match=f"{name}: not available"):
            choose(name)
    with pytest.raises(BackendUnavailable, match="'absent' cannot be imported: No module named"):
        registry.load("absent")
    assert registry.backends_with("update_mask") == ["nvshmem", "ipc", "reference", "raising"]


@pytest.mark.usefixtures("built_in")
def test_no_plugin_ends_the_program_or_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "leaves_at_import.py").write_text("import sys; sys.exit(4)")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = {"early": "leaves_at_import:Backend", "late": f"{__name__}:Leaving", "mute": f"{__name__}:Mute"}
    add_plugins(monkeypatch, **plugins)
    assert registry.explain(ONE_HOST).splitlines()[-3:] == [
        "  early: not available: it raised SystemExit(4)",
        "  late: not available: its probe failed with SystemExit: 3",
        "  mute: not available: its probe failed with TypeError: capabilities() returned None, expected Capabilities",
    ]
    for name in plugins:
        with pytest.raises(BackendUnavailable, match=f"{name}: not available"):
            choose(name)


def test_a_name_given_twice_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("mine", f"{__name__}:{target}", registry.ENTRY_POINT_GROUP)
        for target in ("OnGpus", "Raising")
    ]
    monkeypatch.setattr(registry, "_plugins", lambda: points)
    assert registry.names()[-2:] == ["reference", "mine"]
    assert registry.load("mine") is OnGpus


def test_the_table_asks_every_real_backend() -> None:
    lines = registry.explain().splitlines()
    assert [line.split(":")[0].strip() for line in lines][:3] == ["nvshmem", "ipc", "reference"]
    assert "  reference: available" in lines
    assert all("available" in line for line in lines)


def test_backends_with_names_who_can() -> None:
    def supported(op: str) -> bool:
        return "reference" in registry.backends_with(op)

    assert supported("update_mask")
    assert supported("local_buffer")
    assert not supported("combine_input_buffer")
    assert not supported("no_such_operation")


def test_status_lines() -> None:
    status: Any = registry.BackendStatus
    assert str(status("x", Availability(True))) == "x: available"
    assert str(status("x", Availability(False, "why"))) == "x: not available: why"
    assert str(status("x", Availability(False, "why", "do this"))) == "x: not available: why; do this"
