"""`deep_ep.buffers.elastic`: the second generation."""

from deepep.compat._lazy import lazy_names

_NAMES = {"EPHandle": "deepep", "ElasticBuffer": "deepep", "EventHandle": "deepep", "EventOverlap": "deepep"}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
