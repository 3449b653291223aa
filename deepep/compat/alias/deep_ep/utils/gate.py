"""`deep_ep.utils.gate`."""

from deepep.compat.gate import *  # noqa: F403
from deepep.compat.gate import __all__ as __all__
