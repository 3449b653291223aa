"""Find backends by name, choose one, and explain the choice.

Built-ins are lazy "module:Class" names; others come through the entry-point group `deepep.backends`. The choice is
`backend=`, else `DEEPEP_BACKEND`, else automatic; an explicit choice never falls back.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from deepep import env
from deepep.backends.base import Availability, Backend, Capabilities
from deepep.errors import BackendUnavailable, InvalidArgument

if TYPE_CHECKING:
    from deepep.topology import Topology

_T = TypeVar("_T")

ENTRY_POINT_GROUP = "deepep.backends"

# nvshmem has its place in the order already; its module comes with a later version.
_BUILT_IN = {
    "nvshmem": "deepep.backends.nvshmem.backend:NvshmemBackend",
    "ipc": "deepep.backends.ipc.backend:IpcBackend",
    "reference": "deepep.backends.reference.backend:ReferenceBackend",
}


@dataclass(frozen=True)
class BackendStatus:
    """One line of the backend table; capabilities where the backend is available."""

    name: str
    availability: Availability
    capabilities: Capabilities | None = None

    def __str__(self) -> str:
        if self.availability.ok:
            return f"{self.name}: available"
        remedy = f"; {self.availability.remedy}" if self.availability.remedy else ""
        return f"{self.name}: not available: {self.availability.reason}{remedy}"


def names() -> list[str]:
    """List all known backends, in the order in which `auto` prefers them; plug-ins come last and only by name.

    Of several plug-ins of one name the first that Python finds counts.
    """
    return list(dict.fromkeys([*_BUILT_IN, *(point.name for point in _plugins())]))


def load(name: str) -> type[Backend]:
    """Import a backend's class.

    Raises:
        InvalidArgument: no backend has this name.
        BackendUnavailable: its module cannot be imported, whatever it is that fails there.
    """
    target = _BUILT_IN.get(name)
    try:
        if target is not None:
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in _plugins():
            if point.name == name:
                return point.load()
    except (Exception, SystemExit) as error:  # what other people's modules raise when imported is their choice
        raise BackendUnavailable(f"backend '{name}' cannot be imported: {_said(error)}") from error
    raise _unknown(name)


def probe(name: str, topology: Topology | None = None) -> BackendStatus:
    """Ask one backend whether it can run, here and (where given) for these ranks. Never raises."""
    try:
        backend = load(name)
    except (BackendUnavailable, InvalidArgument) as error:
        return BackendStatus(name, _why_not_imported(name, error))
    try:
        availability = _expect(Availability, "probe", backend.probe())
        if availability.ok and topology is not None:
            availability = _expect(Availability, "probe_topology", backend.probe_topology(topology))
        capabilities = _expect(Capabilities, "capabilities", backend.capabilities()) if availability.ok else None
    except (Exception, SystemExit) as error:  # noqa: BLE001  a probe must not raise, and one that does must not spoil the table
        availability = Availability(False, f"its probe failed with {type(error).__name__}: {error}")
        capabilities = None
    return BackendStatus(name, availability, capabilities)


def requested(backend: str | None) -> str:
    """Resolve what the user asked for: the argument, else `DEEPEP_BACKEND`, else "auto"."""
    return backend or env.backend() or "auto"


def requested_on(device: str, backend: str | None) -> str:
    """Resolve what the user asked for, where it is known that tensors will be on `device` ("cpu" or "cuda").

    "auto" judges by the machine alone: where there are GPUs, it would choose a backend that refuses tensors on the CPU.
    """
    name = requested(backend)
    return "reference" if name == "auto" and device == "cpu" else name


def select(backend: str, topology: Topology, *, on_cuda: bool) -> type[Backend]:
    """Choose a backend for a group.

    Args:
        backend: a name, or "auto": nvshmem when the group spans hosts, then ipc, then reference.
        topology: of the group.
        on_cuda: whether the ranks have GPUs; without them only CPU backends are considered by "auto".

    Raises:
        InvalidArgument: no backend has this name.
        BackendUnavailable: the named backend, or every candidate, cannot run; one line for each known backend.
    """
    if backend != "auto":
        if backend not in names():
            raise _unknown(backend)
        status = probe(backend, topology)
        if not status.availability.ok:
            raise BackendUnavailable(f"backend '{backend}' was asked for but cannot run here.\n{explain(topology)}")
        return load(backend)
    for name in _BUILT_IN:
        if name == "nvshmem" and not topology.spans_hosts:
            continue
        if probe(name, topology).availability.ok:
            chosen = load(name)
            if on_cuda or "cpu" in chosen.capabilities().devices:
                return chosen
    raise BackendUnavailable(f"no backend can run here.\n{explain(topology)}")


def explain(topology: Topology | None = None) -> str:
    """Give one line per backend: available, or why not and what mends it."""
    return "\n".join(f"  {probe(name, topology)}" for name in names())


def backends_with(op: str) -> list[str]:
    """Name the known backends whose class implements the optional operation `op`."""
    found = []
    for name in names():
        try:
            backend = load(name)
        except (BackendUnavailable, InvalidArgument):
            continue
        if getattr(backend, op, None) is not getattr(Backend, op, None):
            found.append(name)
    return found


def _unknown(name: str) -> InvalidArgument:
    return InvalidArgument(f"backend '{name}' is unknown; known are {', '.join(names())} and auto")


def _why_not_imported(name: str, error: Exception) -> Availability:
    module = _BUILT_IN.get(name, "").partition(":")[0]
    cause = error.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name and module.startswith(cause.name):
        return Availability(False, "not part of this version", "use ipc on one host, reference across hosts")
    return Availability(False, _said(cause) if cause else str(error))


def _said(error: BaseException) -> str:
    # The text of a SystemExit is only the status.
    return f"it raised {error!r}" if isinstance(error, SystemExit) else str(error)


def _expect(kind: type[_T], method: str, found: object) -> _T:
    if not isinstance(found, kind):
        raise TypeError(f"{method}() returned {found!r}, expected {kind.__name__}")
    return found


def _plugins() -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
