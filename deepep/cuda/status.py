"""What kernels report to the host, as errors with a name."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from deepep.cuda.arguments import Code, HostWord
from deepep.errors import CommTimeout, InvalidArgument

if TYPE_CHECKING:
    from deepep.cuda.host_words import HostWords

FIELDS = (
    "the operation",
    "num_experts",
    "num_topk",
    "hidden",
    "dtype",
    "number of scale factors",
    "num_max_tokens_per_rank",
)
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_OPS = ("nothing", "dispatch", "combine", "barrier")
_FLAGS = ("expanded rows", "a cached handle", "topk_weights", "top-k", "a reduction per copy", "weights of owners only")


def op_word(op: str, flags: Sequence[bool] = ()) -> int:
    """Pack an operation and its flags into the word that ranks compare; `flags` follow `_FLAGS`."""
    return _OPS.index(op) | sum(1 << (4 + i) for i, flag in enumerate(flags) if flag)


def dtype_word(dtype: torch.dtype, sf_dtype: torch.dtype | None = None) -> int:
    """Pack payload and scale factor types into the word that ranks compare."""
    known = DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES) + dtype.itemsize
    return known | (0 if sf_dtype is None else (DTYPES.index(sf_dtype) + 1) << 8)


def describe(field: int, word: int) -> str:
    """Say what a compared word means."""
    if field == 0:
        flags = [name for i, name in enumerate(_FLAGS) if word >> (4 + i) & 1]
        op = _OPS[word & 15] if word & 15 < len(_OPS) else f"operation {word & 15}"
        return op + (f" with {', '.join(flags)}" if flags else "")
    if field == FIELDS.index("dtype"):
        payload, sf = word & 255, word >> 8
        text = str(DTYPES[payload]) if payload < len(DTYPES) else f"a type of {payload - len(DTYPES)} bytes"
        return text + (f" with scale factors of {DTYPES[sf - 1]}" if sf else "")
    return str(word)


class Status:
    """The status page of one backend."""

    def __init__(self, words: HostWords, rank: int, num_ranks: int, timeout: float) -> None:
        self.words = words
        self.rank, self.num_ranks, self.timeout = rank, num_ranks, timeout
        self._last_op = "dispatch"

    def value(self, index: int) -> int:
        """Read the value half of a word."""
        return int(self.words.host[index]) & 0xFFFFFFFF

    def begin(self, op: str) -> None:
        """Raise what an earlier operation left behind, then remember the new one's name."""
        if int(self.words.host[HostWord.CODE]):
            self.raise_error()
        self._last_op = op

    def raise_error(self) -> None:
        """Raise the error that the page holds, if any; arguments may be mended, so those are cleared.

        Raises:
            CommTimeout: ranks did not arrive; stays on the page.
            InvalidArgument: ranks disagreed, one refused, or rows did not fit.
        """
        op, code = self._last_op, self.value(HostWord.CODE)
        if code == Code.OK:
            return
        if code == Code.TIMEOUT:
            first = HostWord.MISSING
            missing = [rank for rank in range(self.num_ranks) if int(self.words.host[first + rank])]
            raise CommTimeout(op, missing, self.timeout)
        field, other = self.value(HostWord.FIELD), self.value(HostWord.RANK)
        theirs, ours = self.value(HostWord.THEIRS), self.value(HostWord.OURS)
        for index in range(HostWord.MISSING):
            self.words.host[index] = 0
        if code == Code.REFUSED:
            raise InvalidArgument(f"{op}: rank {other} refused its arguments; see the error it raised")
        if code == Code.OVERFLOW:
            raise InvalidArgument(
                f"{op}: {theirs} rows arrive at rank {other}, which has room for {ours}; "
                f"num_worst_tokens must be at least {theirs}"
            )
        if code == Code.BAD_INDEX:
            raise InvalidArgument(
                f"{op}: index {ctypes.c_int32(theirs).value} is out of range; it must be below {ours} (found on the "
                "device)"
            )
        first_rank, second_rank = sorted((self.rank, other))
        said = {self.rank: describe(field, ours), other: describe(field, theirs)}
        raise InvalidArgument(
            f"{op}: ranks disagree about {FIELDS[field]}: rank {first_rank} has {said[first_rank]} and rank "
            f"{second_rank} has {said[second_rank]}; it must be equal on all ranks"
        )
