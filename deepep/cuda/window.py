"""How the window of normal mode is divided. The same on every rank, since its arguments are."""

from __future__ import annotations

from dataclasses import dataclass

from deepep.backends.base import BackendOptions
from deepep.cuda.arguments import CONTROL_BYTES, HEADER_WORDS, Window
from deepep.errors import InvalidArgument
from deepep.layout import align

MAX_LOCAL_EXPERTS = 2048
NUM_FLAGS = 16384
NUM_PASSES = 16384
MIN_METADATA_BYTES = 1 << 20
MIN_PAYLOAD_BYTES = 16 << 20
_ALIGNMENT = 4096
_MOST_BYTES = 16 << 32
"""Ranks tell each other where rows are in units of 16 bytes, as 32-bit numbers."""


@dataclass(frozen=True)
class WindowMap:
    """Offsets as kernels know them, and the whole size in bytes."""

    struct: Window
    num_bytes: int

    @property
    def payload(self) -> int:
        """Offset of the payload region."""
        return int(self.struct.payload)

    @property
    def payload_bytes(self) -> int:
        """Size of the payload region."""
        return int(self.struct.payload_bytes)


def map_window(num_ranks: int, options: BackendOptions) -> WindowMap:
    """Lay regions side by side; `options.num_bytes` is the least size of the whole."""
    struct = Window(num_ranks=num_ranks)
    struct.max_local_experts, struct.num_flags, struct.num_passes = MAX_LOCAL_EXPERTS, NUM_FLAGS, NUM_PASSES
    struct.metadata_bytes = _metadata_bytes(num_ranks, options)
    word, banks = 8, 2
    sizes = {
        "header": banks * num_ranks * HEADER_WORDS * word,
        "matrix": banks * num_ranks * num_ranks * word,
        "counts": banks * num_ranks * MAX_LOCAL_EXPERTS * word,
        "ready": banks * num_ranks * word,
        "done": num_ranks * word,
        "flags": num_ranks * NUM_FLAGS * word,
        "credits": num_ranks * NUM_PASSES * word,
        "finished": NUM_PASSES * 4,
        "metadata": banks * num_ranks * int(struct.metadata_bytes),
    }
    offset = CONTROL_BYTES
    for name, size in sizes.items():
        setattr(struct, name, offset)
        offset = align(offset + size, _ALIGNMENT)
    payload_bytes = max(options.num_bytes - offset, MIN_PAYLOAD_BYTES, _rows_bytes(options))
    struct.payload, struct.payload_bytes = offset, align(payload_bytes, _ALIGNMENT)
    num_bytes = offset + int(struct.payload_bytes)
    if num_bytes > _MOST_BYTES:
        raise InvalidArgument(f"backend 'ipc': a window of {num_bytes} bytes; at most {_MOST_BYTES} can be addressed")
    return WindowMap(struct, num_bytes)


def metadata_row_bytes(num_topk: int) -> int:
    """Bytes of metadata a row travels with: its token, and an entry and a weight per top-k position."""
    return 4 + 8 * num_topk


def _metadata_bytes(num_ranks: int, options: BackendOptions) -> int:
    if options.num_max_tokens_per_rank and options.num_topk:
        needed = align(options.num_max_tokens_per_rank, 4) * metadata_row_bytes(options.num_topk)
    else:
        needed = max(MIN_METADATA_BYTES, options.num_bytes // (16 * num_ranks))
    return align(needed, 256)


def _rows_bytes(options: BackendOptions) -> int:
    """Room for every token's row at once, so that dispatch needs one pass."""
    return options.num_max_tokens_per_rank * (options.hidden * 2 + 4 * (options.hidden // 128))
