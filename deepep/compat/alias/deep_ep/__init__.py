"""deepep under the name `deep_ep`: the public names of its release 2.1.0, kept and looked up on first use.

`HybridEPBuffer` is absent on purpose: clients take its presence as a promise.
"""

from deepep.compat._lazy import lazy_names

# Clients compare this with packaging, by splitting at dots, or as text: a plain release number serves all three.
__version__ = "2.1.0"

_NAMES = {
    "Buffer": "deepep",
    "Config": "deepep",
    "EPHandle": "deepep",
    "ElasticBuffer": "deepep",
    "EventHandle": "deepep",
    "EventOverlap": "deepep",
    "get_logical_domain_size": "deepep",
    "get_physical_domain_size": "deepep",
    "topk_idx_t": "deepep",
}
__all__ = [*_NAMES, "__version__"]  # noqa: PLE0604 - all are strings
__getattr__, __dir__ = lazy_names(__name__, _NAMES, ["buffers", "utils"])
