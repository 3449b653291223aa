"""FP8 / UE8M0 / LogFMT casts in plain torch: the oracle of the fused GPU kernels.

Every step is an IEEE-754 operation rounded to nearest even or an integer operation, so CPU, GPU and a CUDA kernel agree
bit for bit. Two traps are avoided on purpose: torch on CUDA turns `tensor / scalar` into a product with a reciprocal
(here both operands of a division are tensors; a kernel uses `__fdiv_rn`), and log/exp differ between maths libraries
(LogFMT uses integer tables instead). Inputs must be finite where a scale is computed from them.
"""

from __future__ import annotations

import enum
import functools
import math

import torch

from deepep.errors import InvalidArgument

GROUP_SIZE = 128
"""Channels that share one scale factor, or one LogFMT range."""
FP8_MAX = 448.0
"""Largest finite e4m3 magnitude."""
FP8_AMAX_MIN = 1e-4
"""Group maxima are raised to at least this (as float32), so that an all-zero group has a scale."""
FP8_DTYPE = torch.float8_e4m3fn
"""Payload type of every FP8 cast."""

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SfFormat(enum.Enum):
    """How scale factors are kept (CONTRACT, 'Low latency')."""

    FLOAT32 = "float32"
    """One float32 `amax / 448` per group."""
    POW2 = "pow2"
    """The same, rounded up to a power of two (`round_scale`)."""
    UE8M0 = "ue8m0"
    """The biased exponents of POW2, one byte each; four neighbours packed little-endian in one int32 (`use_ue8m0`)."""

    __hash__ = object.__hash__  # of enum, it would be a Python function, and plans are looked up by format at each call

    @classmethod
    def from_flags(cls, round_scale: bool, use_ue8m0: bool) -> SfFormat:
        """Translate the flags of `low_latency_dispatch`; `InvalidArgument` for UE8M0 without `round_scale`."""
        if use_ue8m0 and not round_scale:
            raise InvalidArgument("use_ue8m0=True needs round_scale=True: UE8M0 can only hold powers of two")
        if use_ue8m0:
            return cls.UE8M0
        return cls.POW2 if round_scale else cls.FLOAT32

    @property
    def hidden_multiple(self) -> int:
        """What the hidden size must be a multiple of."""
        return 4 * GROUP_SIZE if self is SfFormat.UE8M0 else GROUP_SIZE

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the scale factors, 4 bytes each."""
        return torch.int32 if self is SfFormat.UE8M0 else torch.float32


def fp8_cast(x: torch.Tensor, sf_format: SfFormat = SfFormat.FLOAT32) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast to e4m3 with one scale factor per 128 channels.

    In float32, per group: `amax = max(max |x|, 1e-4)`; `scale = amax / 448`, for POW2 and UE8M0 then rounded up to a
    power of two; `factor = 448 / amax`, or the exact `1 / scale` for powers of two; `payload = x * factor`, rounded to
    nearest even, saturating at +-448. One division each for scale and factor, one product per channel; nothing fused.

    Args:
        x: `[.., H]` bfloat16, float16 or float32, finite; H a multiple of 128 (512 for UE8M0).
        sf_format: what the scale factors are.

    Returns:
        Payload `[.., H]` float8_e4m3fn, and `[.., H/128]` float32 or (UE8M0) `[.., H/512]` int32.

    Raises:
        InvalidArgument: another dtype or hidden size.
    """
    if x.dtype not in _FLOAT_DTYPES:
        raise InvalidArgument(f"fp8_cast: x must be bfloat16, float16 or float32, got {x.dtype}")
    groups = _split_groups(x, "fp8_cast", sf_format.hidden_multiple).float()
    amax = groups.abs().amax(dim=-1).clamp(min=FP8_AMAX_MIN)
    limit = torch.full_like(amax, FP8_MAX)
    if sf_format is SfFormat.FLOAT32:
        sf, factor = amax / limit, limit / amax
    else:
        exponent = _ceil_exponent(amax / limit)
        sf, factor = _float_from_exponent(exponent), _float_from_exponent(254 - exponent)
        if sf_format is SfFormat.UE8M0:
            sf = exponent.to(torch.uint8).view(torch.int32)
    scaled = groups * factor.unsqueeze(-1)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).view(x.shape), sf


def fp8_uncast(x: torch.Tensor, sf: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Undo `fp8_cast`: one float32 product per channel, then one rounding to `dtype`.

    Args:
        x: `[.., H]` float8_e4m3fn.
        sf: `[.., H/128]` float32, or `[.., H/512]` int32 (UE8M0); any strides.
        dtype: element type of the result.

    Returns:
        `[.., H]` of `dtype`.

    Raises:
        InvalidArgument: dtypes or shapes that do not belong together.
    """
    if x.dtype != FP8_DTYPE or sf.dtype not in (torch.float32, torch.int32):
        raise InvalidArgument(
            f"fp8_uncast: x must be float8_e4m3fn and sf float32 or int32 (UE8M0), got {x.dtype} and {sf.dtype}"
        )
    groups = _split_groups(x, "fp8_uncast", GROUP_SIZE)
    scale = ue8m0_to_float(sf) if sf.dtype == torch.int32 else sf
    if scale.shape != groups.shape[:-1]:
        raise InvalidArgument(
            f"fp8_uncast: x {tuple(x.shape)} needs {tuple(groups.shape[:-1])} scale factors, got {tuple(scale.shape)}"
        )
    return (groups.float() * scale.unsqueeze(-1)).to(dtype).view(x.shape)


def ue8m0_to_float(sf: torch.Tensor) -> torch.Tensor:
    """Unpack UE8M0 scale factors: int32 `[.., n]` of any strides to float32 `[.., 4n]`, byte b is group `4*j + b`."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=sf.device)
    return _float_from_exponent(((sf.unsqueeze(-1) >> shifts) & 0xFF).flatten(-2))


def _ceil_exponent(x: torch.Tensor) -> torch.Tensor:
    """Biased exponent (int32) of the smallest power of two that is at least x; x positive, normal float32."""
    bits = x.view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()


def _float_from_exponent(exponent: torch.Tensor) -> torch.Tensor:
    """`2 ** (exponent - 127)` as float32, exact; the subnormal exponent 0 included, 255 is NaN as UE8M0 has it."""
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def _split_groups(x: torch.Tensor, op: str, multiple: int) -> torch.Tensor:
    """View `[.., H]` as `[.., H/128, 128]`, contiguous."""
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % multiple:
        raise InvalidArgument(f"{op}: hidden must be a positive multiple of {multiple}, got x {tuple(x.shape)}")
    return x.contiguous().view(*x.shape[:-1], x.shape[-1] // GROUP_SIZE, GROUP_SIZE)


# LogFMT-10. A magnitude is handled as its logarithm in fixed point with 16 fraction bits. A bf16 has 7 mantissa bits,
# so the logarithm is its biased exponent plus an entry of a table of 128 integers, and the way back is a search among
# the 128 midpoints between neighbouring mantissas. Logarithms meet float32 only as whole numbers below 2**24.
LOGFMT_BITS = 10
"""One sign bit over a 9-bit code."""
LOGFMT_MAX_OCTAVES = 32
"""Magnitudes further than this many powers of two below the group's largest are rounded to that floor or to zero."""

_CODE_MASK = 0x1FF
_NUM_STEPS = 510  # code 0 is zero, codes 1..511 span the range
_OCTAVE = 1 << 16  # one power of two in fixed point
_BF16_ONE, _BF16_MIN_NORMAL = 0x3F80, 0x0080


def logfmt_cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast bf16 to LogFMT-10: per 128 channels, a sign and one of 511 evenly spaced logarithms, or zero.

    Per group, with `log` the fixed-point log2 of a magnitude (16 fraction bits, table-exact):

    1. Subnormal bf16 count as zero, signs are kept. `amin`, `amax`: smallest and largest magnitude that is not zero
       (both 0 in an all-zero group).
    2. A group whose amax is 1 or more, infinite or NaN stays bf16: large values keep their accuracy.
    3. `hi = log(amax)`, `lo = max(log(amin), hi - 32 octaves)`, `range = max(hi - lo, 1)`.
    4. `code = 1 + rint(float(log(x) - lo) * (510.0 / float(range)))`, at least 1; 0 for zero and for magnitudes more
       than one octave below `lo`. Division and product are float32, rounded to nearest even, `rint` ties to even.

    Args:
        x: `[.., H]` bfloat16, H a multiple of 128.

    Returns:
        Words `[.., H]` int16: `sign << 9 | code` in cast groups, the bits of the bf16 in the others (how a transport
        packs ten bits is its own business); and `[.., H/128, 2]` bfloat16 `(amin, amax)`, whose amax tells which groups
        were cast.

    Raises:
        InvalidArgument: another dtype or hidden size.
    """
    if x.dtype != torch.bfloat16:
        raise InvalidArgument(f"logfmt_cast: x must be bfloat16, got {x.dtype}")
    raw = _split_groups(x, "logfmt_cast", GROUP_SIZE).view(torch.int16)
    magnitude = raw.int() & 0x7FFF
    is_zero = magnitude < _BF16_MIN_NORMAL
    amax = magnitude.masked_fill(is_zero, 0).amax(dim=-1, keepdim=True)
    amin = torch.minimum(magnitude.masked_fill(is_zero, 0x7FFF).amin(dim=-1, keepdim=True), amax)
    lo, width = _log_range(amin, amax)
    offset = _log_of(magnitude) - lo
    inv_step = torch.full_like(width, _NUM_STEPS) / width
    code = 1 + torch.round(offset.float() * inv_step).int().clamp(min=0)
    code.masked_fill_(is_zero | (offset < -_OCTAVE), 0)
    words = torch.where(amax < _BF16_ONE, (raw.int() < 0).int() << 9 | code, raw.int()).to(torch.int16)
    return words.view(x.shape), torch.cat([amin, amax], dim=-1).to(torch.int16).view(torch.bfloat16)


def logfmt_uncast(words: torch.Tensor, amin_amax: torch.Tensor) -> torch.Tensor:
    """Undo `logfmt_cast`: `log = lo + rint(float(code - 1) * (float(range) / 510.0))`, then the nearest bf16.

    Zeros, amin (where it is within 32 octaves of amax) and amax come back exactly. The relative error of the rest is at
    most half a step (`2 ** (octaves / 1020) - 1`, 2.2 % at 32 octaves, 0.7 % at 10) plus one bf16 rounding.

    Args:
        words: `[.., H]` int16 as `logfmt_cast` returns them.
        amin_amax: `[.., H/128, 2]` bfloat16.

    Returns:
        `[.., H]` bfloat16.

    Raises:
        InvalidArgument: dtypes or shapes that do not belong together.
    """
    if words.dtype != torch.int16 or amin_amax.dtype != torch.bfloat16:
        raise InvalidArgument(
            f"logfmt_uncast: needs int16 words and bfloat16 amin_amax, got {words.dtype}, {amin_amax.dtype}"
        )
    raw = _split_groups(words, "logfmt_uncast", GROUP_SIZE)
    if amin_amax.shape != (*raw.shape[:-1], 2):
        raise InvalidArgument(
            f"logfmt_uncast: words {tuple(words.shape)} need amin_amax {(*raw.shape[:-1], 2)}, "
            f"got {tuple(amin_amax.shape)}"
        )
    amin, amax = amin_amax.contiguous().view(torch.int16).int().split(1, dim=-1)
    lo, width = _log_range(amin, amax)
    code = raw.int() & _CODE_MASK
    step = width / torch.full_like(width, _NUM_STEPS)
    log = lo + torch.round((code - 1).clamp(min=0).float() * step).int()
    magnitude = _magnitude_of(log).masked_fill_(code == 0, 0)
    sign = ((raw.int() >> 9) & 1) << 15
    return (
        torch.where(amax < _BF16_ONE, sign | magnitude, raw.int())
        .to(torch.int16)
        .view(torch.bfloat16)
        .view(words.shape)
    )


def logfmt_roundtrip(x: torch.Tensor) -> torch.Tensor:
    """What a receiver sees of bf16 `x` `[.., H]` sent as LogFMT-10: cast and uncast, bf16 `[.., H]`."""
    return logfmt_uncast(*logfmt_cast(x))


def _log_range(amin: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-point floor (int32) and width (float32, at least 1, exact) of a group from the bits of amin and amax."""
    hi = _log_of(amax)
    lo = torch.maximum(_log_of(amin), hi - LOGFMT_MAX_OCTAVES * _OCTAVE)
    return lo, (hi - lo).clamp(min=1).float()


def _log_of(magnitude: torch.Tensor) -> torch.Tensor:
    """Fixed-point log2 (exponent still biased, int32) of normal bf16 magnitudes given as their bits."""
    logs, _ = _log_tables(magnitude.device)
    return (magnitude >> 7 << 16) + logs[magnitude & 0x7F]


def _magnitude_of(log: torch.Tensor) -> torch.Tensor:
    """Bits of the bf16 nearest to a fixed-point logarithm; a carry of the mantissa lands in the exponent."""
    _, midpoints = _log_tables(log.device)
    mantissa = torch.searchsorted(midpoints, log & (_OCTAVE - 1), right=True, out_int32=True)
    return (log >> 16 << 7) + mantissa


@functools.cache
def _log_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`round(2**16 * log2(1 + m / 128))` and the same at `m + 1/2`, for the 128 mantissas m, int32.

    A kernel embeds the same numbers. No entry is near a rounding tie, so any maths library gives them.
    """
    logs = [round(_OCTAVE * math.log2(1 + m / 128)) for m in range(128)]
    midpoints = [round(_OCTAVE * math.log2(1 + (m + 0.5) / 128)) for m in range(128)]
    return (
        torch.tensor(logs, dtype=torch.int32, device=device),
        torch.tensor(midpoints, dtype=torch.int32, device=device),
    )
