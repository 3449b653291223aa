"""What every rank must get from low-latency dispatch and combine; see `oracle`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from deepep.quant import logfmt_roundtrip
from deepep.testing.oracle import Route, add_terms, bits, gather_tokens, rank_terms, round_sum
from deepep.testing.routing import Inputs

_GROUP_SIZE = 128
_E4M3_DTYPE = torch.float8_e4m3fn
#: The 127 finite magnitudes of e4m3 by code: 4 bits of exponent, 3 of mantissa, no infinity.
_E4M3 = np.array([(c % 8) * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(127)])


@dataclass(frozen=True)
class PaddedRows:
    """What one rank receives in the padded layout; rows past `recv_count` hold zeros here and anything in an outcome.

    Attributes:
        x: [L, R*M, H] of the payload's type, or float8_e4m3fn.
        sf: [L, R*M, H/128] float32 or [L, R*M, H/512] int32, None without FP8.
        recv_count: [L] int32.
        src_info: [L, R*M] int32, token number at the source.
        layout_range: [L, R] int64, `begin << 32 | count`.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    recv_count: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor


def mask_ranks(inputs: Sequence[Inputs], num_experts: int, masked: Collection[int]) -> list[Inputs]:
    """Leave ranks out: they choose nothing and nobody chooses their experts."""
    num_local_experts = num_experts // len(inputs)
    result = []
    for rank, one in enumerate(inputs):
        owner = one.topk_idx.div(num_local_experts, rounding_mode="floor")
        gone = torch.full_like(owner, rank in masked, dtype=torch.bool)
        for other in masked:
            gone |= owner == other
        result.append(replace(one, topk_idx=one.topk_idx.masked_fill(gone, -1)))
    return result


def expected_padded(
    route: Route, inputs: Sequence[Inputs], rank: int, num_max_tokens_per_rank: int, *, sf_format: str | None = None
) -> PaddedRows:
    """Work out the padded rows of `rank`; `sf_format` is None (no FP8 cast), 'float32', 'pow2' or 'ue8m0'."""
    num_rows = route.num_ranks * num_max_tokens_per_rank
    if sf_format is not None:
        cast = [fp8_rows(one.x, sf_format) for one in inputs]
        inputs = [replace(one, x=x, sf=sf) for one, (x, sf) in zip(inputs, cast, strict=True)]
    x, sf, counts, src_info, ranges = [], [], [], [], []
    for expert in route.local_experts(rank):
        tokens = [(src, token) for src, token, _ in route.copies[expert]]
        counts.append(len(tokens))
        src_info.append([token for _, token in tokens] + [0] * (num_rows - len(tokens)))
        ranges.append([_range_word([src for src, _ in tokens], src) for src in range(route.num_ranks)])
        rows, row_sf = gather_tokens(inputs, tokens)
        x.append(_pad(rows, num_rows))
        if row_sf is not None:
            sf.append(_pad(row_sf, num_rows))
    return PaddedRows(
        torch.stack(x),
        torch.stack(sf) if sf else None,
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(src_info, dtype=torch.int32),
        torch.tensor(ranges, dtype=torch.int64),
    )


def expected_low_latency_combine(
    route: Route,
    inputs: Sequence[Inputs],
    outputs: Sequence[torch.Tensor],
    rank: int,
    *,
    reduction: str = "per_rank",
    use_logfmt: bool = False,
) -> torch.Tensor:
    """Weigh and sum the padded rows `outputs[dst]` [L, R*M, H] for the tokens of `rank`: [T, H].

    A weighted row is a float32 product, rounded before it is added (no fused multiply-add). With LogFMT whatever goes
    from owner to home passes the cast, also where both are one rank: sums with `per_rank`, rows with `per_copy`.
    """
    if reduction not in ("per_rank", "per_copy"):
        raise ValueError(f"reduction must be 'per_rank' or 'per_copy', got {reduction!r}")
    travel = logfmt_roundtrip if use_logfmt else _as_is
    dtype = outputs[0].dtype
    terms = []
    for token, ranks in enumerate(rank_terms(route, rank)):
        copies: list[tuple[int, torch.Tensor]] = []
        for k, expert in enumerate(route.choices[rank][token]):
            if expert >= 0:
                dst = route.owner(expert)
                row = outputs[dst][expert - route.local_experts(dst).start, route.place_of[rank, token, k]]
                sent = travel(row) if reduction == "per_copy" else row
                copies.append((dst, inputs[rank].topk_weights[token, k] * sent.float()))
        if reduction == "per_rank":
            sums = [round_sum([row for owner, row in copies if owner == dst]).to(dtype) for dst in ranks]
            terms.append([travel(row) for row in sums])
        else:
            terms.append([row for _, row in copies])
    return add_terms(terms, outputs[0])


def fp8_rows(x: torch.Tensor, sf_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast [N, H] to e4m3 with one scale factor per 128 channels, written apart from `deepep.quant` to check it.

    Returns:
        [N, H] float8_e4m3fn and [N, H/128] float32 or, for 'ue8m0', [N, H/512] int32.
    """
    groups = x.float().numpy().reshape(len(x), x.shape[1] // _GROUP_SIZE, _GROUP_SIZE)
    amax = np.maximum(np.abs(groups).max(axis=2), np.float32(1e-4))
    if sf_format == "float32":
        scale, factor = amax / np.float32(448), np.float32(448) / amax
    else:
        mantissa, exponent = np.frexp(amax / np.float32(448))
        power = exponent - (mantissa == 0.5)
        scale, factor = np.ldexp(np.float32(1), power), np.ldexp(np.float32(1), -power)
        if sf_format == "ue8m0":
            bytes_ = (power + 127).astype(np.uint8)
            scale = np.ascontiguousarray(bytes_).view("<i4")
    codes = _e4m3_codes(groups * factor[:, :, None]).reshape(x.shape)
    return torch.from_numpy(codes).view(_E4M3_DTYPE), torch.from_numpy(scale)


def _e4m3_codes(values: np.ndarray) -> np.ndarray:
    """Find the nearest e4m3 number of each value, on a tie the one with the even code; too large becomes 448."""
    magnitude = np.abs(values).astype(np.float64)
    above = np.clip(np.searchsorted(_E4M3, magnitude), 1, len(_E4M3) - 1)
    below = above - 1
    up, down = _E4M3[above] - magnitude, magnitude - _E4M3[below]
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (nearest | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def _range_word(sources: list[int], src: int) -> int:
    """Pack where the rows of one source begin and how many they are; a source without rows begins where they would."""
    begin = sum(1 for other in sources if other < src)
    return begin << 32 | sources.count(src)


def _pad(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    padded = torch.zeros(num_rows, rows.shape[1], dtype=bits(rows).dtype)
    padded[: len(rows)] = bits(rows)
    return padded.view(rows.dtype)


def _as_is(row: torch.Tensor) -> torch.Tensor:
    return row
