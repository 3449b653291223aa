"""The situations the contract checks run in. Every function gives the same names for every rank count."""

from __future__ import annotations

from dataclasses import replace

import torch

from deepep.testing.routing import Case

_E4M3 = torch.float8_e4m3fn


def routing_cases(num_ranks: int) -> dict[str, Case]:
    """Every routing pattern and distribution of tokens; small, bf16."""
    even, uneven = (13,) * num_ranks, tuple(5 + 7 * rank for rank in range(num_ranks))
    # Odd ranks idle; with one rank, that one.
    idle = tuple(11 if rank % 2 == 0 and num_ranks > 1 else 0 for rank in range(num_ranks))
    base = Case(even, num_experts=4 * num_ranks, seed=1)
    return {
        "uniform": base,
        "unbalanced": replace(base, pattern="unbalanced", seed=2),
        "one_expert": replace(base, pattern="one_expert", seed=3),
        "one_rank": replace(base, pattern="one_rank", seed=4),
        "self_only": replace(base, pattern="self_only", seed=5),
        "spread": replace(base, pattern="spread", seed=6),
        "none": replace(base, pattern="none", seed=7),
        "holes": replace(base, pattern="holes", seed=8),
        "unequal_tokens": replace(base, num_tokens=uneven, num_max_tokens_per_rank=max(uneven) + 3, seed=9),
        "idle_ranks": replace(base, num_tokens=idle, num_max_tokens_per_rank=11, seed=10),
        "no_tokens": replace(base, num_tokens=(0,) * num_ranks, num_max_tokens_per_rank=4, seed=11),
        "one_token": replace(base, num_tokens=(1,) * num_ranks, num_max_tokens_per_rank=1, seed=12),
        "top1": replace(base, num_topk=1, seed=13),
        "all_experts": replace(base, num_experts=2 * num_ranks, num_topk=2 * num_ranks, seed=14),
        "one_expert_per_rank": replace(base, num_experts=num_ranks, num_topk=min(num_ranks, 2), seed=15),
        "aligned": replace(base, expert_alignment=8, pattern="holes", seed=16),
        "many_experts": replace(base, num_experts=48 * num_ranks, num_topk=8, expert_alignment=3, seed=17),
    }


def payload_cases(num_ranks: int) -> dict[str, Case]:
    """Every payload: element types, scale factors of both types in any layout, row widths."""
    base = Case((19,) * num_ranks, num_experts=4 * num_ranks, expert_alignment=4, pattern="holes", seed=30)
    fp8 = replace(base, dtype=_E4M3, hidden=256, num_sf=2)
    return {
        "fp16": replace(base, dtype=torch.float16, seed=31),
        "fp32": replace(base, dtype=torch.float32, seed=32),
        "odd_width": replace(base, hidden=136, seed=33),  # rows of 17 x 16 bytes
        "narrow": replace(base, hidden=8, seed=34),  # rows of 16 bytes
        "wide": replace(base, hidden=7168, num_tokens=(5,) * num_ranks, num_max_tokens_per_rank=5, seed=35),
        "fp8_float_sf": replace(fp8, seed=36),
        "fp8_int_sf": replace(fp8, sf_dtype=torch.int32, num_sf=1, seed=37),
        "fp8_column_major_sf": replace(fp8, sf_column_major=True, seed=38),
        "fp8_int_column_major_sf": replace(fp8, sf_dtype=torch.int32, num_sf=5, sf_column_major=True, seed=39),
        "fp8_without_sf": replace(fp8, num_sf=0, seed=40),
        "bf16_with_sf": replace(base, num_sf=3, seed=41),
    }


def size_cases(num_ranks: int) -> dict[str, Case]:
    """Enough rows to fill several chunks, warps and blocks of a GPU backend."""
    mid = Case((300,) * num_ranks, hidden=512, num_experts=16 * num_ranks, num_topk=8, expert_alignment=16, seed=50)
    return {"mid": replace(mid, num_tokens=tuple(300 - 41 * (rank % 3) for rank in range(num_ranks)))}


def host_cases(num_ranks: int) -> dict[str, Case]:
    """One host stands for several: two where the ranks divide evenly, else one host per rank."""
    ranks_per_host = num_ranks // 2 if num_ranks % 2 == 0 else 1
    pairs = 2 if num_ranks % 2 == 0 and num_ranks > 2 else 1
    base = Case((23,) * num_ranks, num_experts=4 * num_ranks, ranks_per_host=ranks_per_host, seed=60)
    return {
        "hosts": base,
        "hosts_holes": replace(base, pattern="holes", num_topk=3, seed=61),
        # In float32 the order of two hosts shows beside a bias; with more than two it always does.
        "hosts_fp32": replace(base, dtype=torch.float32, ranks_per_host=pairs, seed=63),
        "hosts_single_ranks": replace(base, ranks_per_host=1, pattern="unbalanced", seed=62),
    }


def low_latency_cases(num_ranks: int) -> dict[str, Case]:
    """Decode-sized cases; hidden sizes allow every FP8 format, all but UE8M0, or none."""
    base = Case((6,) * num_ranks, hidden=512, num_experts=4 * num_ranks, num_max_tokens_per_rank=8, seed=70)
    uneven = tuple(8 - 3 * (rank % 3) for rank in range(num_ranks))
    idle = tuple(8 if rank % 2 == 0 and num_ranks > 1 else 0 for rank in range(num_ranks))
    return {
        "uniform": base,
        "one_expert": replace(base, pattern="one_expert", seed=71),
        "one_rank": replace(base, pattern="one_rank", seed=72),
        "holes": replace(base, pattern="holes", num_topk=3, seed=73),
        "none": replace(base, pattern="none", seed=74),
        "spread": replace(base, pattern="spread", seed=75),
        "unequal_tokens": replace(base, num_tokens=uneven, seed=76),
        "idle_ranks": replace(base, num_tokens=idle, seed=77),
        "no_tokens": replace(base, num_tokens=(0,) * num_ranks, seed=78),
        "top1": replace(base, num_topk=1, seed=79),
        "top8": replace(base, num_experts=8 * num_ranks, num_topk=8, seed=80),
        "narrow": replace(base, hidden=128, seed=81),
        "wide": replace(base, hidden=7168, num_tokens=(3,) * num_ranks, num_max_tokens_per_rank=4, seed=82),
        "batch": replace(base, num_tokens=(64,) * num_ranks, num_max_tokens_per_rank=64, seed=83),
        "large_batch": replace(base, num_tokens=(150,) * num_ranks, num_max_tokens_per_rank=160, seed=84),
        "top16": replace(base, num_experts=16 * num_ranks, num_topk=16, pattern="holes", seed=85),
        "top40": replace(base, num_experts=48 * num_ranks, num_topk=40, pattern="holes", seed=92),
        "top64_batch": replace(
            base,
            hidden=256,
            num_experts=64 * num_ranks,
            num_topk=64,
            num_tokens=(150,) * num_ranks,
            num_max_tokens_per_rank=160,
            seed=93,
        ),
        "hidden_2048": replace(base, hidden=2048, seed=86),
        "hidden_2880": replace(base, hidden=2880, seed=87),
        "hidden_5376": replace(base, hidden=5376, seed=88),
        "hidden_8192": replace(base, hidden=8192, seed=89),
    }
