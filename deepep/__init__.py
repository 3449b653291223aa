"""Mixture-of-experts dispatch and combine behind one portable front end.

Importing this package imports no backend and touches no GPU; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepep.version import __version__

if TYPE_CHECKING:
    from deepep.buffer import Buffer
    from deepep.config import Config
    from deepep.elastic import ElasticBuffer
    from deepep.elastic_handle import EPHandle
    from deepep.elastic_sizes import get_logical_domain_size, get_physical_domain_size
    from deepep.errors import (
        BackendUnavailable,
        BufferDestroyed,
        CommTimeout,
        DeepEPError,
        InvalidArgument,
        UnsupportedOperation,
    )
    from deepep.event import EventHandle, EventOverlap
    from deepep.topology import Topology
    from deepep.validate import topk_idx_t

_HOMES = {
    "BackendUnavailable": "errors",
    "Buffer": "buffer",
    "BufferDestroyed": "errors",
    "CommTimeout": "errors",
    "Config": "config",
    "DeepEPError": "errors",
    "EPHandle": "elastic_handle",
    "ElasticBuffer": "elastic",
    "EventHandle": "event",
    "EventOverlap": "event",
    "InvalidArgument": "errors",
    "Topology": "topology",
    "UnsupportedOperation": "errors",
    "get_logical_domain_size": "elastic_sizes",
    "get_physical_domain_size": "elastic_sizes",
    "topk_idx_t": "validate",
}

__all__ = [
    "BackendUnavailable",
    "Buffer",
    "BufferDestroyed",
    "CommTimeout",
    "Config",
    "DeepEPError",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "InvalidArgument",
    "Topology",
    "UnsupportedOperation",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deepep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deepep.{_HOMES[name]}"), name)
