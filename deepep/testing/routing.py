"""Test data from seeds: any rank computes any rank's data alone, so expected answers need no communication."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Numbers of the independent random streams of one rank.
_PAYLOAD, _SF, _ROUTING, _WEIGHTS, _OUTPUTS, _BIAS = range(6)


@dataclass(frozen=True)
class Case:
    """One situation to test: shapes, element types, a routing pattern and a seed. Equal on all ranks.

    Attributes:
        num_tokens: T of each rank, so `len(num_tokens)` is R.
        hidden: H, elements.
        num_experts: E, a multiple of R.
        num_topk: K.
        num_max_tokens_per_rank: M; 0 stands for the largest of `num_tokens` (at least 1).
        dtype: of the payload.
        num_sf: S, scale factors per token; 0 sends the payload alone.
        sf_dtype: float32, or int32 for packed UE8M0.
        sf_column_major: hand the scale factors over transposed.
        pattern: how tokens choose experts, one of `PATTERNS`.
        expert_alignment: rows each expert's group is aligned to.
        ranks_per_host: lets one host stand for several; 0 for one host.
        seed: of every random number.
    """

    num_tokens: tuple[int, ...]
    hidden: int = 64
    num_experts: int = 8
    num_topk: int = 4
    num_max_tokens_per_rank: int = 0
    dtype: torch.dtype = torch.bfloat16
    num_sf: int = 0
    sf_dtype: torch.dtype = torch.float32
    sf_column_major: bool = False
    pattern: str = "uniform"
    expert_alignment: int = 1
    ranks_per_host: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts % self.num_ranks or not 1 <= self.num_topk <= self.num_experts:
            raise ValueError(f"{self.num_experts} experts, top-{self.num_topk}, {self.num_ranks} ranks do not fit")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern '{self.pattern}' is not one of {', '.join(PATTERNS)}")
        if self.num_max_tokens_per_rank == 0:
            object.__setattr__(self, "num_max_tokens_per_rank", max(1, *self.num_tokens))
        if max(self.num_tokens) > self.num_max_tokens_per_rank:
            raise ValueError(f"num_tokens {self.num_tokens} exceed M = {self.num_max_tokens_per_rank}")
        if self.ranks_per_host and self.num_ranks % self.ranks_per_host:
            raise ValueError(f"{self.num_ranks} ranks do not fill hosts of {self.ranks_per_host}")

    @property
    def num_ranks(self) -> int:
        """R, ranks of the group."""
        return len(self.num_tokens)

    @property
    def num_local_experts(self) -> int:
        """L, experts of one rank."""
        return self.num_experts // self.num_ranks

    @property
    def num_hosts(self) -> int:
        """Hosts the ranks are spread over."""
        return self.num_ranks // self.ranks_per_host if self.ranks_per_host else 1

    @property
    def combine_dtype(self) -> torch.dtype:
        """Type of the rows that experts hand back."""
        return self.dtype if self.dtype in _FLOATS else torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """What one rank sends.

    Attributes:
        x: [T, H] payload.
        sf: [T, S] scale factors, or None.
        topk_idx: [T, K] int64, -1 for no expert.
        topk_weights: [T, K] float32.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def make_inputs(case: Case, rank: int) -> Inputs:
    """Make what `rank` sends in this case, on the CPU; the same on whichever process it is called."""
    num_tokens = case.num_tokens[rank]
    x = make_payload(case, rank).to(case.dtype)
    sf = _make_sf(case, rank) if case.num_sf else None
    chooser = np.random.default_rng([case.seed, rank, _ROUTING])
    choose = PATTERNS[case.pattern]
    choices = [choose(case, rank, chooser) for _ in range(num_tokens)]
    topk_idx = torch.tensor(choices, dtype=torch.int64).reshape(num_tokens, case.num_topk)
    return Inputs(x, sf, topk_idx, _make_weights(case, rank))


def make_all_inputs(case: Case) -> list[Inputs]:
    """Make the inputs of every rank."""
    return [make_inputs(case, rank) for rank in range(case.num_ranks)]


def make_payload(case: Case, rank: int) -> torch.Tensor:
    """Make [T, H] float32 values of mixed magnitude, with some all-zero and some tiny stretches of 128 channels."""
    generator = _generator(case, rank, _PAYLOAD)
    num_tokens, num_groups = case.num_tokens[rank], math.ceil(case.hidden / 128)
    values = torch.randn(num_tokens, case.hidden, generator=generator)
    values *= 2.0 ** torch.randint(-5, 4, values.shape, generator=generator)
    kind = torch.randint(0, 16, (num_tokens, num_groups), generator=generator)
    scale = torch.where(kind == 0, 0.0, torch.where(kind == 1, 1e-6, 1.0))
    return values * scale.repeat_interleave(128, dim=1)[:, : case.hidden]


def make_outputs(case: Case, rank: int, num_rows: int, *, cancelling: bool = True, stream: int = 0) -> torch.Tensor:
    """Make [num_rows, H] rows that `rank`'s experts hand back, of `case.combine_dtype`.

    With `cancelling`, half of the values are plus or minus one large number and the rest are small: whether a small
    value survives depends on when the large ones cancel, so a sum in another order, in another precision or with fused
    multiply-adds has other bits. Without it they are normals around 1, some rows above it and some below.
    """
    generator = _generator(case, rank, _OUTPUTS + 16 * (stream + 1))
    shape = (num_rows, case.hidden)
    small = torch.randn(shape, generator=generator)
    if not cancelling:
        return (small * 2.0 ** torch.randint(-6, 2, (num_rows, 1), generator=generator)).to(case.combine_dtype)
    # float16 overflows early: sums of 16 terms must stay finite. In float32, what is lost beside `large` must show.
    large, scale = {
        torch.float16: (1.375 * 2.0**11, 2.0**-4),
        torch.bfloat16: (1.375 * 2.0**26, 1.0),
        torch.float32: (1.375 * 2.0**26, 4.0),
    }[case.combine_dtype]
    kind = torch.randint(0, 4, shape, generator=generator)
    signed = torch.where(kind == 0, large, -large)
    return torch.where(kind < 2, signed, small * scale).to(case.combine_dtype)


def make_bias(case: Case, rank: int, number: int) -> torch.Tensor:
    """Make the [T, H] bias number 0 or 1 of `rank`, of `case.combine_dtype`."""
    generator = _generator(case, rank, _BIAS + 16 * number)
    return torch.randn(case.num_tokens[rank], case.hidden, generator=generator).to(case.combine_dtype)


def _generator(case: Case, rank: int, stream: int) -> torch.Generator:
    seed = np.random.SeedSequence([case.seed, rank, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def _make_sf(case: Case, rank: int) -> torch.Tensor:
    """Any bit pattern is a scale factor: they are opaque to whoever moves them."""
    bits = torch.randint(-(2**31), 2**31, (case.num_tokens[rank], case.num_sf), generator=_generator(case, rank, _SF))
    sf = bits.to(torch.int32).view(case.sf_dtype)
    return sf.t().contiguous().t() if case.sf_column_major else sf


def _make_weights(case: Case, rank: int) -> torch.Tensor:
    """Half of the weights are equal, so that weighted terms of opposite sign cancel exactly now and then."""
    generator = _generator(case, rank, _WEIGHTS)
    weights = torch.rand(case.num_tokens[rank], case.num_topk, generator=generator) + 0.01
    return torch.where(torch.rand(weights.shape, generator=generator) < 0.5, torch.tensor(0.7), weights)


def _uniform(case: Case, _rank: int, rng: np.random.Generator) -> list[int]:
    return rng.choice(case.num_experts, case.num_topk, replace=False).tolist()


def _unbalanced(case: Case, _rank: int, rng: np.random.Generator) -> list[int]:
    """The lower half of the experts is chosen twice as readily as the upper."""
    odds = np.where(np.arange(case.num_experts) < case.num_experts / 2, 2.0, 1.0)
    return rng.choice(case.num_experts, case.num_topk, replace=False, p=odds / odds.sum()).tolist()


def _one_expert(case: Case, _rank: int, rng: np.random.Generator) -> list[int]:
    """Everything to the last expert but one, from whichever position."""
    return _place(case, [max(case.num_experts - 2, 0)], rng)


def _one_rank(case: Case, _rank: int, rng: np.random.Generator) -> list[int]:
    """All choices on the last rank, as many as it has experts."""
    first = case.num_experts - case.num_local_experts
    count = min(case.num_topk, case.num_local_experts)
    return _place(case, (first + rng.choice(case.num_local_experts, count, replace=False)).tolist(), rng)


def _none(case: Case, _rank: int, _rng: np.random.Generator) -> list[int]:
    return [-1] * case.num_topk


def _holes(case: Case, rank: int, rng: np.random.Generator) -> list[int]:
    """Each choice is missing at random; one token in eight has none at all."""
    missing = rng.random(case.num_topk) < (1.0 if rng.random() < 0.125 else 0.4)
    return [-1 if gone else expert for gone, expert in zip(missing, _uniform(case, rank, rng), strict=True)]


def _spread(case: Case, _rank: int, rng: np.random.Generator) -> list[int]:
    """Every choice on another rank, as far as there are ranks; the rest empty."""
    ranks = rng.choice(case.num_ranks, min(case.num_topk, case.num_ranks), replace=False)
    local = rng.integers(case.num_local_experts, size=len(ranks))
    return _place(case, (ranks * case.num_local_experts + local).tolist(), rng)


def _self_only(case: Case, rank: int, rng: np.random.Generator) -> list[int]:
    """All choices on the token's own rank."""
    count = min(case.num_topk, case.num_local_experts)
    local = rng.choice(case.num_local_experts, count, replace=False)
    return _place(case, (rank * case.num_local_experts + local).tolist(), rng)


def _place(case: Case, experts: list[int], rng: np.random.Generator) -> list[int]:
    """Put a few experts at random top-k positions, -1 at the others."""
    choice = [-1] * case.num_topk
    for position, expert in zip(rng.choice(case.num_topk, len(experts), replace=False).tolist(), experts, strict=True):
        choice[position] = expert
    return choice


#: How a token chooses its experts: name -> function of (case, rank, random numbers) giving K experts or -1.
PATTERNS: dict[str, Callable[[Case, int, np.random.Generator], list[int]]] = {
    "uniform": _uniform,
    "unbalanced": _unbalanced,
    "one_expert": _one_expert,
    "one_rank": _one_rank,
    "none": _none,
    "holes": _holes,
    "spread": _spread,
    "self_only": _self_only,
}
