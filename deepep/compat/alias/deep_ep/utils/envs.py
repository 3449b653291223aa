"""`deep_ep.utils.envs`."""

from deepep.compat.envs import *  # noqa: F403
from deepep.compat.envs import __all__ as __all__
