"""`deep_ep.utils.refs`."""

from deepep.compat.refs import *  # noqa: F403
from deepep.compat.refs import __all__ as __all__
