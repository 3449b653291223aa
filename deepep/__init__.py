"""Mixture-of-experts dispatch and combine behind one portable front end."""

from deepep.version import __version__

__all__ = ["__version__"]
