"""How the window of normal mode and shared memory are divided."""

from __future__ import annotations

import pytest
import torch

from deepep.backends.base import BackendOptions
from deepep.cuda import kernels, status, window
from deepep.cuda.arguments import CONTROL_BYTES, Code, HostWord
from deepep.cuda.status import Status
from deepep.errors import CommTimeout, InvalidArgument

REGIONS = ("header", "matrix", "counts", "ready", "done", "flags", "credits", "finished", "metadata", "payload")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("num_bytes", [0, 1 << 20, 300 << 20])
def test_regions_follow_each_other(num_ranks: int, num_bytes: int) -> None:
    found = window.map_window(num_ranks, BackendOptions(num_bytes=num_bytes))
    offsets = [getattr(found.struct, name) for name in REGIONS]
    assert offsets == sorted(offsets)
    assert offsets[0] >= CONTROL_BYTES
    assert all(offset % 4096 == 0 for offset in offsets)
    assert found.payload + found.payload_bytes == found.num_bytes >= num_bytes


def test_a_window_is_no_larger_than_ranks_can_tell_each_other() -> None:
    largest = 64 << 30
    window.map_window(2, BackendOptions(num_bytes=largest - (1 << 20)))
    with pytest.raises(InvalidArgument, match=f"at most {largest} can be addressed"):
        window.map_window(2, BackendOptions(num_bytes=largest + 1))


def test_eight_ranks_need_less_than_half_of_the_rivals_memory() -> None:
    options = BackendOptions(num_max_tokens_per_rank=4096, hidden=7168, num_topk=8)
    found = window.map_window(8, options)
    assert found.num_bytes < 237 * 10**6
    # Every token's row at once for dispatch, and 32 rows per home for combine.
    assert found.payload_bytes >= 4096 * 7168 * 2
    assert found.payload_bytes >= 8 * 32 * 7168 * 2


@pytest.mark.parametrize("row_bytes", [16, 272, 2064, 7168, 14336, 131072])
@pytest.mark.parametrize("smem_bytes", [87 << 10, 208 << 10])
@pytest.mark.parametrize("max_piece", [2048, 8192])
def test_pieces_cover_a_row(row_bytes: int, smem_bytes: int, max_piece: int) -> None:
    cut = kernels.cut_rows(row_bytes, 224, max_piece, 14, smem_bytes, "dispatch")
    assert (cut.num_pieces - 1) * cut.piece_bytes < row_bytes <= cut.num_pieces * cut.piece_bytes
    assert cut.piece_bytes % 16 == 0
    assert cut.piece_bytes + 224 <= cut.slot_bytes
    assert 2 <= cut.slots_per_warp <= kernels.MAX_SLOTS_PER_WARP
    assert kernels.pipe_bytes(cut) <= smem_bytes


class Page:
    """Stands in for the page-locked words."""

    def __init__(self, **words: int) -> None:
        self.host = [0] * 64
        for name, value in words.items():
            self.host[HostWord[name]] = 7 << 32 | value

    def __setitem__(self, index: int, value: int) -> None:
        self.host[index] = value


def status_of(page: Page) -> Status:
    found = Status(page, rank=0, num_ranks=4, timeout=2.0)  # type: ignore[arg-type]
    found._last_op = "dispatch"
    return found


def test_a_disagreement_names_both_ranks_and_values() -> None:
    field = status.FIELDS.index("dtype")
    theirs, ours = status.dtype_word(torch.float8_e4m3fn, torch.float32), status.dtype_word(torch.bfloat16)
    page = Page(CODE=Code.DISAGREE, FIELD=field, RANK=2, THEIRS=theirs, OURS=ours)
    with pytest.raises(InvalidArgument, match=r"rank 0 has torch.bfloat16 and rank 2 has torch.float8_e4m3fn with"):
        status_of(page).raise_error()


def test_a_timeout_names_the_missing_ranks() -> None:
    page = Page(CODE=Code.TIMEOUT)
    page[HostWord.MISSING + 1] = page[HostWord.MISSING + 3] = 1
    with pytest.raises(CommTimeout) as found:
        status_of(page).begin("combine")
    assert found.value.missing_ranks == (1, 3)


def test_too_little_room_names_the_number() -> None:
    with pytest.raises(InvalidArgument, match="at least 19"):
        status_of(Page(CODE=Code.OVERFLOW, RANK=1, THEIRS=19, OURS=4)).raise_error()
