"""`deep_ep.utils.testing`."""

from deepep.compat.testing import *  # noqa: F403
from deepep.compat.testing import __all__ as __all__
