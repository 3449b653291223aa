"""`deep_ep.utils`: events, and helpers for tests and benchmarks."""

from deepep.compat._lazy import lazy_names

_NAMES = {"EventHandle": "deepep", "EventOverlap": "deepep"}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES, ["envs", "event", "gate", "math", "refs", "testing"])
