"""`deep_ep.utils.event`."""

from deepep.compat._lazy import lazy_names

_NAMES = {"EventHandle": "deepep", "EventOverlap": "deepep"}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
