"""Which kernels there are, and how a launch of one is shaped."""

from __future__ import annotations

import functools

from deepep.cuda import ll_structs
from deepep.cuda.arguments import Cut
from deepep.cuda.jit import KernelSpec
from deepep.errors import UnsupportedOperation
from deepep.layout import align

NOTIFY = KernelSpec("deepep_notify", "kernels/notify.cu")
DISPATCH_COMPACT = KernelSpec("deepep_dispatch_compact", "kernels/dispatch.cu")
DISPATCH_EXPANDED = KernelSpec("deepep_dispatch_expanded", "kernels/dispatch.cu")
LAYOUT = KernelSpec("deepep_layout", "kernels/layout.cu")
BARRIER = KernelSpec("deepep_barrier", "kernels/barrier.cu")
COMBINE = {
    (kind, sums): KernelSpec(f"deepep_combine_{'sums_' if sums else ''}{kind}", "kernels/combine.cu")
    for kind in ("bf16", "fp16", "fp32")
    for sums in (False, True)
}

MAX_SLOTS_PER_WARP = 8
MAX_DISPATCH_WARPS = 14
NUM_CLERK_WARPS = 2
"""Warps of a dispatch kernel that write metadata while the others move rows."""
COMBINE_WARPS = {False: 20, True: 16}
"""Of combine as it is, and with sums at the owner: as many as have registers for what they load at once."""
MAX_STAGE_WARPS = 8
MAX_WALKERS = 16
"""Warps of notify that move rows, and that count."""
DISPATCH_PIECE_BYTES = 8192
COPY_PIECE_BYTES = 4096
BARRIER_THREADS = 128
STATIC_SMEM_BYTES = 12 << 10
"""More than any kernel's static shared memory."""
MOST_SMEM_BYTES = 208 << 10


def kernel_specs() -> list[KernelSpec]:
    """List every kernel of the CUDA backends, for compiling ahead of time."""
    normal = [NOTIFY, DISPATCH_COMPACT, DISPATCH_EXPANDED, *COMBINE.values(), BARRIER, LAYOUT]
    return [*normal, *ll_structs.NARROW, *ll_structs.WIDE]


@functools.cache
def cut_rows(row_bytes: int, extra_bytes: int, max_piece: int, max_warps: int, smem_bytes: int, op: str) -> Cut:
    """Divide shared memory among warps. What is returned is shared: assigning it to a member of a struct copies it.

    Args:
        row_bytes: of a row, a multiple of 16.
        extra_bytes: that travel in the same slot as the first piece (scale factors).
        max_piece: most bytes of a row moved at once.
        max_warps: of a CTA.
        smem_bytes: there are.
        op: what to call this in errors.

    Raises:
        UnsupportedOperation: not even two warps with two slots each fit.
    """
    num_pieces = -(-row_bytes // max_piece)
    piece = align(-(-row_bytes // num_pieces), 16)
    num_pieces = -(-row_bytes // piece)
    slot = align(piece + extra_bytes, 128)
    total = smem_bytes // slot
    if total < 4:
        raise UnsupportedOperation(
            f"{op}: {extra_bytes} bytes of scale factors per row do not fit this GPU's shared memory; "
            "use backend='reference'"
        )
    warps = min(max_warps, total // 2)
    return Cut(row_bytes, piece, num_pieces, slot, min(MAX_SLOTS_PER_WARP, total // warps), warps)


def pipe_bytes(cut: Cut) -> int:
    """Dynamic shared memory that a cut takes."""
    return int(cut.slot_bytes * cut.slots_per_warp * cut.num_warps)
