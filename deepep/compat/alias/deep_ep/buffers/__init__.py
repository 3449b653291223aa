"""`deep_ep.buffers`: the two generations of buffers by module."""

from deepep.compat._lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {}, ["elastic", "legacy"])
