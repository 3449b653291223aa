"""`deep_ep.utils.refs`: combine against sums written out by hand; dispatch runs in `compat_program.py`."""

from __future__ import annotations

import torch

from deepep.compat.refs import combine, generate_pre_combine_data, ordered_accumulate

BIG = 2.0**30
"""In float32, 1 is lost beside it; in bf16, 1 is lost beside 256."""


def slots(*values: float) -> torch.Tensor:
    """One token, one bf16 channel, a value per top-k position: [1, K, 1]."""
    return torch.tensor(values).to(torch.bfloat16).view(1, -1, 1)


def test_ordered_accumulate() -> None:
    data = torch.tensor([[BIG], [1.0], [-BIG], [1.0]])
    assert ordered_accumulate(data).tolist() == [1.0]
    assert ordered_accumulate(data.flip(0), torch.tensor([0.5])).tolist() == [0.0]
    assert ordered_accumulate(data[:0]).tolist() == [0.0]
    assert ordered_accumulate(data.bfloat16()).dtype == torch.float32


def test_pre_combine_data() -> None:
    everything = generate_pre_combine_data(torch.arange(32), 8, 4, 64)
    assert everything.shape == (32, 4, 64)
    assert everything.dtype == torch.bfloat16
    assert everything.min() >= -1
    assert everything.max() <= 1
    assert torch.equal(generate_pre_combine_data(torch.tensor([9, 3]), 8, 4, 64), everything[[9, 3]])
    rows = {tuple(row) for row in everything.view(-1, 64).tolist()}
    assert len(rows) == 32 * 4


def test_terms_go_by_the_highest_position_of_their_rank() -> None:
    # Two experts per rank; ranks 1, 0, 1: rank 0's highest position is 1, rank 1's is 2.
    topk_idx = torch.tensor([[2, 0, 3]])
    y = slots(1.0, -BIG, BIG)
    # Rank 1 first: 1 + BIG rounds to BIG; then 0 - BIG + BIG = 0.
    assert combine(y, topk_idx, 1, 2, 4).item() == 0.0
    # Copy by copy in ascending position: 1 - BIG + BIG.
    assert combine(y, topk_idx, 1, 2, 4, reduce_in_local=False).item() == 0.0
    assert combine(slots(-BIG, BIG, 1.0), topk_idx, 1, 2, 4, reduce_in_local=False).item() == 1.0


def test_every_level_rounds() -> None:
    # Ranks 0, 1 | 2, 3; one expert each. 256 + 1 is no bf16.
    topk_idx = torch.tensor([[0, 1, 2, 3]])
    y = slots(256.0, 1.0, 1.0, 0.0)
    assert combine(y, topk_idx, 2, 2, 4, reduce_in_scaleup=True).item() == 256.0
    assert combine(y, topk_idx, 2, 2, 4, reduce_in_scaleup=False).item() == 258.0
    assert combine(y, topk_idx, 1, 4, 4, reduce_in_scaleup=True).item() == 258.0
    # Two experts on one rank round as well.
    assert combine(y, topk_idx, 1, 2, 4).item() == 256.0
    assert combine(y, topk_idx, 1, 2, 4, reduce_in_local=False).item() == 258.0


def test_bias_comes_first() -> None:
    one = torch.ones(1, 1).bfloat16()
    y = slots(-BIG)
    assert combine(y, torch.tensor([[0]]), 1, 1, 1, bias=BIG * one).item() == 0.0
    assert combine(slots(1.0), torch.tensor([[0]]), 1, 1, 1, bias=(one, 2 * one)).item() == 4.0
    # 1 is lost in BIG before -BIG comes.
    assert combine(y, torch.tensor([[0]]), 1, 1, 1, bias=(BIG * one, one)).item() == 0.0


def test_empty_slots_are_not_read() -> None:
    y = slots(float("nan"), 2.0, float("nan"))
    assert combine(y, torch.tensor([[-1, 0, -1]]), 1, 1, 1).item() == 2.0
    assert combine(y, torch.tensor([[-1, -1, -1]]), 1, 1, 1).item() == 0.0
    assert combine(y[:0], torch.zeros(0, 3).long(), 1, 1, 1).shape == (0, 1)
