"""Whether the very results that were timed are right, worked out from the seeds of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from deepep.bench.inputs import Choice, make_choice, make_payload
from deepep.bench.plan import EXPERT_ALIGNMENT, Plan
from deepep.errors import DeepEPError
from deepep.layout import align
from deepep.quant import fp8_cast, fp8_uncast


class WrongResult(DeepEPError, ArithmeticError):
    """A result that was timed is wrong: its time means nothing."""


class Scene:
    """The routing of all ranks and the payload of this one.

    Experts of rank r multiply rows by r + 1, in the payload's dtype, so that sums tell which rank returned what.
    """

    def __init__(self, plan: Plan, routing: str, rank: int, num_ranks: int) -> None:
        self.plan, self.rank, self.num_ranks = plan, rank, num_ranks
        self.choices: list[Choice] = [make_choice(plan, routing, peer, num_ranks) for peer in range(num_ranks)]
        self.mine = self.choices[rank]
        self.payload, self.sf = make_payload(plan, rank)

    def rows_to_ranks(self) -> list[int]:
        """Rows this rank sends to each rank, itself included."""
        return (self.mine.per_rank > 0).sum(dim=0).tolist()

    def rows_from_ranks(self) -> list[int]:
        """Rows this rank receives from each rank, itself included."""
        return [int((choice.per_rank[:, self.rank] > 0).sum()) for choice in self.choices]

    def row_bytes(self, num_rows: list[int]) -> list[int]:
        """Bytes of so many rows of dispatch, scale factors included."""
        size = self.payload[:1].nbytes + (0 if self.sf is None else self.sf[:1].nbytes)
        return [n * size for n in num_rows]

    def combine_bytes(self, num_rows: list[int]) -> list[int]:
        """Bytes of so many rows of combine."""
        return [n * self.plan.hidden * self.plan.combine_dtype.itemsize for n in num_rows]

    def remote(self, num_bytes: list[int]) -> int:
        """Those of the bytes per rank that concern other ranks."""
        return sum(num_bytes) - num_bytes[self.rank]

    def expert_outputs(self, recv: Any) -> torch.Tensor:
        """Make what this rank's experts return for received rows; FP8 rows without their scale factors."""
        rows = recv[0] if isinstance(recv, tuple) else recv
        return (rows.to(self.plan.combine_dtype) * (self.rank + 1)).to(self.plan.combine_dtype)


def compact(scene: Scene, out: Any) -> None:
    """Check rows, top-k and counts of a compact dispatch."""
    recv, topk_idx, topk_weights, counts, _, _ = out
    compact_rows(scene, recv)
    num_local = scene.plan.num_experts // scene.num_ranks
    first = scene.rank * num_local
    idx = torch.cat([c.topk_idx[c.per_rank[:, scene.rank] > 0] for c in scene.choices]) - first
    weights = torch.cat([c.topk_weights[c.per_rank[:, scene.rank] > 0] for c in scene.choices])
    here = (idx >= 0) & (idx < num_local)
    _expect("recv_topk_idx", topk_idx, torch.where(here, idx, -1))
    _expect("recv_topk_weights", topk_weights, torch.where(here, weights, 0.0))
    if counts != torch.bincount(idx[here], minlength=num_local).tolist():
        raise WrongResult("num_recv_tokens_per_expert_list is wrong")


def compact_rows(scene: Scene, recv: Any) -> None:
    """Check compact rows: ascending source rank, then source token."""
    rows, sf = recv if isinstance(recv, tuple) else (recv, None)
    first = 0
    for peer, choice in enumerate(scene.choices):
        chosen = choice.per_rank[:, scene.rank] > 0
        expected, expected_sf = make_payload(scene.plan, peer)
        place = slice(first, first + int(chosen.sum()))
        _expect(f"rows of rank {peer}", _bits(rows)[place], _bits(expected)[chosen])
        if sf is not None and expected_sf is not None:
            _expect(f"scale factors of rank {peer}", sf[place], expected_sf[chosen])
        first = place.stop
    if first != rows.shape[0]:
        raise WrongResult(f"{rows.shape[0]} rows arrived, expected {first}")


def expanded_rows(scene: Scene, recv: Any) -> None:
    """Check expanded rows: grouped by expert, inside one as compact rows."""
    rows, sf = recv if isinstance(recv, tuple) else (recv, None)
    payloads = [make_payload(scene.plan, peer) for peer in range(scene.num_ranks)]
    num_local = scene.plan.num_experts // scene.num_ranks
    first = 0
    for expert in range(scene.rank * num_local, (scene.rank + 1) * num_local):
        chosen = [(choice.topk_idx == expert).any(dim=1) for choice in scene.choices]
        expected = torch.cat([_bits(x)[pick] for (x, _), pick in zip(payloads, chosen, strict=True)])
        _expect(f"rows of expert {expert}", _bits(rows)[first : first + len(expected)], expected)
        if sf is not None:
            factors = torch.cat([f[pick] for (_, f), pick in zip(payloads, chosen, strict=True) if f is not None])
            _expect(f"scale factors of expert {expert}", sf[first : first + len(factors)], factors)
        first += align(len(expected), EXPERT_ALIGNMENT)


def combined(scene: Scene, y: torch.Tensor, is_expanded: bool = False) -> None:
    """Check the sum over ranks. Its terms are small multiples of one value, so that fp32 adds them exactly."""
    x = scene.payload.to(scene.plan.combine_dtype)
    total = torch.zeros(x.shape, device=x.device)
    for rank in range(scene.num_ranks):
        count = scene.mine.per_rank[:, rank : rank + 1]
        returned = (x * (rank + 1)).to(x.dtype)
        if is_expanded:
            returned = (returned.float() * count).to(x.dtype)
        total += torch.where(count > 0, returned.float(), 0.0)
    _expect("combined_x", y, total.to(x.dtype), is_exact=x.dtype != torch.float32)


def padded(scene: Scene, _x: torch.Tensor, out: Any) -> None:
    """Check padded FP8 rows and their counts."""
    (recv, sf), count, _, _, _ = out
    num_local = scene.plan.num_experts // scene.num_ranks
    payloads = [fp8_cast(make_payload(scene.plan, peer)[0].bfloat16()) for peer in range(scene.num_ranks)]
    for local in range(num_local):
        expert = scene.rank * num_local + local
        chosen = [(choice.topk_idx == expert).any(dim=1) for choice in scene.choices]
        rows = torch.cat([_bits(x)[pick] for (x, _), pick in zip(payloads, chosen, strict=True)])
        factors = torch.cat([f[pick] for (_, f), pick in zip(payloads, chosen, strict=True)])
        if int(count[local]) != len(rows):
            raise WrongResult(f"expert {expert} got {int(count[local])} rows, expected {len(rows)}")
        _expect(f"rows of expert {expert}", _bits(recv[local])[: len(rows)], rows)
        _expect(f"scale factors of expert {expert}", sf[local][: len(rows)], factors)


def low_latency_combined(scene: Scene, x: torch.Tensor, y: torch.Tensor) -> None:
    """Check the weighted sum, up to the roundings that its order leaves open."""
    rows = fp8_uncast(*fp8_cast(x)).float()
    mine = scene.mine
    factor = (mine.topk_idx // (scene.plan.num_experts // scene.num_ranks) + 1) * mine.topk_weights
    expected = rows * factor.sum(dim=1, keepdim=True)
    # Three bf16 roundings at most: of the expert's output, of the sum on its rank, of the result.
    if not torch.allclose(y.float(), expected, rtol=3 * 2.0**-8, atol=1e-6):
        raise WrongResult("combined_x is wrong beyond rounding")


def _expect(what: str, found: torch.Tensor, expected: torch.Tensor, is_exact: bool = True) -> None:
    if found.shape != expected.shape:
        raise WrongResult(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    same = torch.equal(_bits(found), _bits(expected)) if is_exact else torch.allclose(found, expected, rtol=1e-5)
    if not same:
        raise WrongResult(f"{what}: wrong values")


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """Rows as integers: float8 knows few operations, and NaN equals NaN here."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return rows.contiguous().view(kinds[rows.element_size()])
