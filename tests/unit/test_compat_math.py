"""`deep_ep.utils.math` and `deep_ep.utils.gate`, against literal values."""

from __future__ import annotations

import pytest
import torch

from deepep.compat.gate import get_unbalanced_scores
from deepep.compat.math import (
    align,
    calc_diff,
    ceil_div,
    count_bytes,
    create_grouped_scores,
    hash_tensor,
    hash_tensors,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
    safe_div,
)
from deepep.errors import InvalidArgument
from deepep.quant import SfFormat, fp8_cast


def test_integers() -> None:
    assert [ceil_div(value, 4) for value in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [align(value, 4) for value in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert safe_div(1, 4) == 0.25
    assert safe_div(1, 0) == 0


def test_calc_diff() -> None:
    x = torch.tensor([0.0, 1.0])
    assert calc_diff(x, x) == 0
    # (1, 2) against (2, 1): 1 - 2 * 4 / 10.
    assert calc_diff(x, torch.tensor([1.0, 0.0])) == pytest.approx(0.2)
    assert calc_diff(x.bfloat16(), x) == 0
    assert calc_diff(x[:0], x[:0]) == 0


@pytest.mark.parametrize("hidden", [64, 128, 300, 1024])
def test_casts_of_any_width(hidden: int) -> None:
    x = torch.randn(7, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    payload, sf = per_token_cast_to_fp8(x)
    assert payload.shape == (7, hidden)
    assert payload.dtype == torch.float8_e4m3fn
    assert sf.shape == (7, -(-hidden // 128))
    assert sf.dtype == torch.float32
    back = per_token_cast_back(payload, sf)
    assert back.shape == (7, hidden)
    assert back.dtype == torch.bfloat16
    assert calc_diff(back, x) < 1e-3


def test_cast_back_from_ue8m0() -> None:
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    payload, sf = fp8_cast(x, SfFormat.UE8M0)
    assert torch.equal(per_token_cast_back(payload, sf), per_token_cast_back(*fp8_cast(x, SfFormat.POW2)))
    # The first 300 channels need three of the four exponents of the first word.
    part = per_token_cast_back(payload[:, :300].contiguous(), sf[:, :1])
    assert torch.equal(part, per_token_cast_back(payload, sf)[:, :300])


def test_cast_of_no_rows() -> None:
    payload, sf = per_token_cast_to_fp8(torch.zeros(0, 256))
    assert per_token_cast_back(payload, sf).shape == (0, 256)


def test_inplace_unique() -> None:
    x = torch.tensor([[3, 1, 3, -1], [0, 0, 0, 0], [-1, -1, -1, -1], [0, 1, 2, 3]])
    inplace_unique(x, 4)
    assert x.tolist() == [[3, 1, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1], [3, 2, 1, 0]]
    with pytest.raises(InvalidArgument, match="num_slots=3"):
        inplace_unique(x, 3)
    inplace_unique(x[:0], 1)


def test_create_grouped_scores() -> None:
    scores = torch.arange(1.0, 9.0).view(2, 4)
    grouped = create_grouped_scores(scores, torch.tensor([[0], [1]]), 2)
    assert grouped.tolist() == [[1, 2, 0, 0], [0, 0, 7, 8]]
    assert scores[0, 3] == 4


def test_hashes() -> None:
    words = torch.tensor([1, -2, 5], dtype=torch.int32)
    assert hash_tensor(words) == 4
    assert hash_tensor(torch.tensor(7, dtype=torch.int32)) == 7
    assert hash_tensor(torch.tensor([1, 2, 255], dtype=torch.uint8)) == 258
    assert hash_tensor(torch.tensor([1.0])) == 0x3F800000
    assert hash_tensor(torch.zeros(0)) == 0
    odd_start = torch.arange(9, dtype=torch.uint8)[1:]
    assert hash_tensor(odd_start) == hash_tensor(odd_start.clone())
    assert hash_tensor(torch.zeros(8).to(torch.float8_e4m3fn)) == 0
    assert hash_tensors(words, (None, [words])) == 8


def test_count_bytes() -> None:
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert count_bytes(x, (x, [None, {"sf": torch.zeros(2)}]), None, 5) == 24 + 24 + 8


class TestUnbalancedScores:
    @pytest.mark.parametrize(("ratio", "expected"), [(1.0, 500), (1.5, 750), (3.0, 1500), (100.0, 2000)])
    def test_precise(self, ratio: float, expected: int) -> None:
        # 1000 tokens, top-2, 4 ranks: 500 choices per rank on average; at most 2 per token.
        torch.manual_seed(0)
        topk_idx = get_unbalanced_scores(1000, 16, 4, 2, ratio, True).topk(2).indices
        load = torch.bincount(topk_idx.flatten() // 4, minlength=4)
        assert load[0] == expected
        assert (load[1:] - (2000 - expected) / 3).abs().max() < 100
        assert all(len(set(row)) == 2 for row in topk_idx.tolist())

    def test_in_expectation(self) -> None:
        torch.manual_seed(0)
        topk_idx = get_unbalanced_scores(4000, 16, 4, 4, 2.5, False).topk(4).indices
        assert (topk_idx < 4).sum().item() == pytest.approx(4000 * 2.5, rel=0.02)

    def test_experts_of_the_hot_rank_share_its_load(self) -> None:
        torch.manual_seed(0)
        topk_idx = get_unbalanced_scores(4000, 16, 4, 2, 2.0, True).topk(2).indices
        assert (torch.bincount(topk_idx[topk_idx < 4]) - 1000).abs().max() < 150

    def test_shape_and_range(self) -> None:
        scores = get_unbalanced_scores(5, 8, 1, 8, 1.0, True)
        assert scores.shape == (5, 8)
        assert scores.dtype == torch.float32
        assert 0 <= scores.min() <= scores.max() < 3
        assert get_unbalanced_scores(0, 8, 2, 2, 1.0, True).shape == (0, 8)

    def test_bad_input(self) -> None:
        with pytest.raises(InvalidArgument, match="num_experts=7"):
            get_unbalanced_scores(1, 7, 2, 1, 1.0, True)
        with pytest.raises(InvalidArgument, match="num_topk=9"):
            get_unbalanced_scores(1, 8, 2, 9, 1.0, True)
        with pytest.raises(InvalidArgument, match="ratio"):
            get_unbalanced_scores(1, 8, 2, 2, 0.5, True)
