"""Upstream's other uses of `ElasticBuffer`, which exist here by name only, so that programs learn why they stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from deepep.errors import UnsupportedOperation

_ALL_GATHER = "all-gather sessions", "torch.distributed.all_gather_into_tensor"
_PIPELINE = "pipeline send and receive", "torch.distributed.send and recv"
_ENGRAM = "Engram storage and fetch", "a torch embedding on the GPU or in pinned memory"


def absent(name: str, what: tuple[str, str]) -> Callable[..., NoReturn]:
    """Make a callable that raises `UnsupportedOperation` whatever it is given."""

    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise UnsupportedOperation(
            f"ElasticBuffer.{name}: {what[0]} are not part of this library, on any backend; use {what[1]}"
        )

    refuse.__name__, refuse.__doc__ = name, f"Not here: {what[0]}. Raises `UnsupportedOperation`."
    return refuse


class AbsentMixin:
    """The names."""

    create_agrs_session = absent("create_agrs_session", _ALL_GATHER)
    destroy_agrs_session = absent("destroy_agrs_session", _ALL_GATHER)
    agrs_new_session = absent("agrs_new_session", _ALL_GATHER)
    agrs_set_config = absent("agrs_set_config", _ALL_GATHER)
    agrs_get_inplace_tensor = absent("agrs_get_inplace_tensor", _ALL_GATHER)
    all_gather = absent("all_gather", _ALL_GATHER)
    pp_set_config = absent("pp_set_config", _PIPELINE)
    pp_send = absent("pp_send", _PIPELINE)
    pp_recv = absent("pp_recv", _PIPELINE)
    engram_write = absent("engram_write", _ENGRAM)
    engram_fetch = absent("engram_fetch", _ENGRAM)
    get_agrs_num_max_session_bytes = staticmethod(absent("get_agrs_num_max_session_bytes", _ALL_GATHER))
    get_agrs_buffer_size_hint = staticmethod(absent("get_agrs_buffer_size_hint", _ALL_GATHER))
    get_pp_buffer_size_hint = staticmethod(absent("get_pp_buffer_size_hint", _PIPELINE))
    get_engram_storage_size_hint = staticmethod(absent("get_engram_storage_size_hint", _ENGRAM))


refuse_cpu_bytes = absent("__init__(num_cpu_bytes)", _ENGRAM)
