"""Checks of what the user passes: each raises `InvalidArgument` naming the argument, what it is and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deepep.errors import InvalidArgument

if TYPE_CHECKING:
    from deepep.backends.base import DispatchResult

ROW_BYTES_MULTIPLE = 16
topk_idx_t = torch.int64
COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The order of checks and the way they look at a tensor are quick: every call makes them before its first kernel, and a
# look at a tensor from Python takes 0.1 us, at its shape or for a call of a function somewhat more.


class Bounds(NamedTuple):
    """What a buffer allows; the same for all of its calls.

    Attributes:
        num_ranks: R.
        num_scaleout_ranks: hosts.
        max_topk: most top-k positions the backend takes.
        is_debug: look at the values of CUDA tensors, too (`DEEPEP_DEBUG` when the buffer was built).
    """

    num_ranks: int
    num_scaleout_ranks: int
    max_topk: int
    is_debug: bool


Payload = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def split_payload(
    op: str, x: Payload, num_rows: int | None = None, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check `x`, or the pair `(x, sf)`, as CONTRACT 'Inputs' says and take it apart; see `check_rows` for the rest."""
    if isinstance(x, torch.Tensor):
        data, sf = x, None
    elif isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(t, torch.Tensor) for t in x):
        data, sf = x
    else:
        raise InvalidArgument(f"{op}: x is a {type(x).__name__}; pass a tensor [T, H] or a pair (x, sf) of tensors")
    check_rows(op, "x", data, num_rows, device)
    if sf is not None:
        if sf.dim() == 1:
            sf = sf.unsqueeze(1)
        if sf.dim() != 2 or sf.shape[0] != data.shape[0] or sf.element_size() != 4 or sf.device != data.device:
            raise InvalidArgument(
                f"{op}: sf is {describe(sf)}; it must be [T={data.shape[0]}, n] of 4-byte elements on {data.device}"
            )
    return data, sf


def received(result: DispatchResult, x: Payload) -> Payload:
    """Give received rows in the form of the payload that was passed: alone, or with `sf` of as many dimensions."""
    if result.sf is None:
        return result.x
    is_flat = isinstance(x, (tuple, list)) and x[1].dim() == 1
    return result.x, result.sf.squeeze(1) if is_flat else result.sf


def check_rows(
    op: str, name: str, x: torch.Tensor, num_rows: int | None = None, device: torch.device | None = None
) -> tuple[int, int]:
    """Check a contiguous [rows, H] payload whose rows are a multiple of 16 bytes; number and device as in a handle.

    Gives rows and H.
    """
    if not isinstance(x, torch.Tensor) or len(shape := x.shape) != 2 or not x.is_contiguous():
        raise InvalidArgument(f"{op}: {name} is {describe(x)}; it must be a contiguous [rows, H] tensor")
    rows, hidden = shape
    if num_rows is not None and rows != num_rows:
        raise InvalidArgument(f"{op}: {name} has {rows} rows; the handle's dispatch has {num_rows}")
    if device is not None and x.device != device:
        raise InvalidArgument(f"{op}: {name} is on {x.device} and the handle's dispatch on {device}; they must agree")
    row_bytes = hidden * x.element_size()
    if row_bytes == 0 or row_bytes % ROW_BYTES_MULTIPLE:
        raise InvalidArgument(
            f"{op}: a row of {name} is {hidden} x {x.element_size()} = {row_bytes} bytes; "
            f"it must be a multiple of {ROW_BYTES_MULTIPLE}"
        )
    return rows, hidden


def whole_number(op: str, name: str, value: object, least: int) -> int:
    """Give a whole number as Python's own, be it numpy's or of another kind; at least `least`."""
    if type(value) is int and value >= least:
        return value
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise InvalidArgument(f"{op}: {name} is {value!r}; it must be a whole number, at least {least}")
    return number


def raise_unless_equal(op: str, name: str, values: list[Any]) -> None:
    """Raise `InvalidArgument`, the same on every rank, when ranks disagree; names the ranks and both values."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise InvalidArgument(
                f"{op}: ranks disagree about {name}: rank 0 has {values[0]!r} and rank {rank} has {value!r}; "
                "it must be equal on all ranks"
            )


def wrong_kind(op: str, error: Exception) -> InvalidArgument:
    """Name what a check tripped over, because an argument is of a kind that nobody thought of."""
    return InvalidArgument(f"{op}: an argument is of a wrong kind: {type(error).__name__}: {error}")


def check_experts(op: str, num_experts: int, num_ranks: int) -> int:
    """Check that E is a positive multiple of R, and give it as Python's own number."""
    number = whole_number(op, "num_experts", num_experts, 1)
    if number % num_ranks:
        raise InvalidArgument(f"{op}: num_experts is {number}; it must be a positive multiple of the {num_ranks} ranks")
    return number


def check_topk(
    op: str, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, num_tokens: int | None, num_experts: int,
    bounds: Bounds, device: torch.device | None = None,
) -> int:  # fmt: skip
    """Check `topk_idx` [T, K] int64 and `topk_weights` [T, K] float32; give K.

    The values (range, the same expert twice) are checked on CPU tensors always, on CUDA tensors when debugging, since
    looking at them there waits for the GPU.
    """
    if not isinstance(topk_idx, torch.Tensor) or len(shape := topk_idx.shape) != 2 or not topk_idx.is_contiguous():
        raise InvalidArgument(f"{op}: topk_idx is {describe(topk_idx)}; it must be a contiguous [T, K] tensor")
    if topk_idx.dtype is not topk_idx_t:
        raise InvalidArgument(f"{op}: topk_idx is {topk_idx.dtype}; it must be {topk_idx_t} (deepep.topk_idx_t)")
    if device is not None and topk_idx.device != device:
        raise InvalidArgument(f"{op}: topk_idx is on {topk_idx.device} and x on {device}; they must be on one device")
    rows, num_topk = shape
    if num_tokens is not None and rows != num_tokens:
        raise InvalidArgument(f"{op}: topk_idx has {rows} rows and x has {num_tokens}; they must agree")
    if not 1 <= num_topk <= bounds.max_topk:
        raise InvalidArgument(f"{op}: topk_idx has K = {num_topk} columns; 1 to {bounds.max_topk} are allowed")
    if topk_weights is not None:
        check_weights(op, topk_weights, shape, device or topk_idx.device)
    if values_are_checked(topk_idx, bounds):
        _check_topk_values(op, topk_idx, num_experts)
    return num_topk


def values_are_checked(tensor: torch.Tensor, bounds: Bounds) -> bool:
    """Say whether values may be looked at: reading a CUDA tensor would wait for the GPU, so only when debugging."""
    return not tensor.is_cuda or (bounds.is_debug and not torch.cuda.is_current_stream_capturing())


def check_weights(
    op: str, topk_weights: torch.Tensor, shape: tuple[int, ...], device: torch.device | None = None
) -> None:
    """Check contiguous float32 weights of a given shape and (where given) device."""
    if (
        not isinstance(topk_weights, torch.Tensor)
        or topk_weights.dtype is not torch.float32
        or topk_weights.shape != shape
        or not topk_weights.is_contiguous()
        or (device is not None and topk_weights.device != device)
    ):
        raise InvalidArgument(
            f"{op}: topk_weights is {describe(topk_weights)}; it must be contiguous float32 {list(shape)}{_on(device)}"
        )


def check_bias(
    op: str, bias: torch.Tensor | Sequence[torch.Tensor] | None, like: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, ...]:
    """Check none, one or two biases [T, H] of the payload's dtype and give them as a tuple."""
    if bias is None:
        return ()
    given = (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    if len(given) > 2:
        raise InvalidArgument(f"{op}: bias has {len(given)} tensors; none, one or two are allowed")
    wanted = (num_tokens, like.shape[-1])
    for tensor in given:
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.shape != wanted
            or (tensor.dtype, tensor.device) != (like.dtype, like.device)
            or not tensor.is_contiguous()
        ):
            raise InvalidArgument(
                f"{op}: bias is {describe(tensor)}; it must be contiguous {like.dtype} {list(wanted)} on {like.device}"
            )
    return given


def check_tensor(
    op: str, name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device | None = None
) -> None:
    """Check dtype, shape and (where given) device of an auxiliary tensor."""
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.dtype is not dtype
        or tensor.shape != shape
        or (device is not None and tensor.device != device)
    ):
        raise InvalidArgument(f"{op}: {name} is {describe(tensor)}; it must be {dtype} {list(shape)}{_on(device)}")


def check_written(
    op: str, name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device | None = None
) -> None:
    """The same of a tensor that results are written to, which must be contiguous."""
    check_tensor(op, name, tensor, dtype, shape, device)
    if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
        raise InvalidArgument(f"{op}: {name} is {describe(tensor)}; it must be contiguous")


def _on(device: torch.device | None) -> str:
    return "" if device is None else f" on {device}"


def describe(value: object) -> str:
    """Say in a few words what was passed."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    note = "" if value.is_contiguous() else " (not contiguous)"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}{note}"


def _check_topk_values(op: str, topk_idx: torch.Tensor, num_experts: int) -> None:
    if topk_idx.numel() == 0:
        return
    low, high = int(topk_idx.min()), int(topk_idx.max())
    if low < -1 or high >= num_experts:
        raise InvalidArgument(
            f"{op}: topk_idx holds values from {low} to {high}; allowed are -1 (none) and 0 to {num_experts - 1}"
        )
    ordered = topk_idx.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)
    if bool(twice.any()):
        token = int(twice.nonzero()[0])
        raise InvalidArgument(
            f"{op}: token {token} names the same expert twice in topk_idx ({topk_idx[token].tolist()}); "
            "each choice of a token must be another expert, or -1"
        )
