"""`deep_ep.utils.math`."""

from deepep.compat.math import *  # noqa: F403
from deepep.compat.math import __all__ as __all__
