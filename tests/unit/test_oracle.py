"""The oracle against cases small enough to work out by hand; every expected number is a literal."""

from __future__ import annotations

import pytest
import torch

from deepep.testing import oracle, oracle_elastic, oracle_low_latency
from deepep.testing.oracle import Route
from deepep.testing.routing import PATTERNS, Case, Inputs, make_inputs, make_outputs

_BIG = 2.0**25  # in float32, _BIG + 1 is _BIG


def _inputs(choices: list[list[int]], weights: list[list[float]], hidden: int = 2, first: float = 0) -> Inputs:
    """Tokens whose payload is first, first + 1, ... in every channel."""
    x = (first + torch.arange(len(choices))).unsqueeze(1).expand(-1, hidden).to(torch.bfloat16).contiguous()
    return Inputs(x, None, torch.tensor(choices), torch.tensor(weights))


@pytest.fixture
def two_ranks() -> list[Inputs]:
    """Experts 0, 1 live on rank 0 and 2, 3 on rank 1."""
    return [
        _inputs([[0, 2], [3, -1], [-1, -1]], [[0.5, 0.25], [0.125, 9], [9, 9]]),
        _inputs([[2, 1], [1, 0]], [[2, 4], [8, 16]], first=10),
    ]


@pytest.fixture
def route(two_ranks: list[Inputs]) -> Route:
    return oracle.make_route(two_ranks, num_experts=4)


def _single_token(choice: list[int], num_ranks: int, num_experts: int) -> Route:
    """One token on rank 0, none elsewhere."""
    nothing = torch.empty(0, len(choice), dtype=torch.int64)
    others = [Inputs(torch.empty(0, 1), None, nothing, nothing.float())] * (num_ranks - 1)
    return oracle.make_route([_inputs([choice], [[1.0] * len(choice)]), *others], num_experts)


def test_rows_ascend_by_source_rank_and_token(route: Route) -> None:
    assert route.rows == [[(0, 0), (1, 0), (1, 1)], [(0, 0), (0, 1), (1, 0)]]
    assert route.copies == [[(0, 0, 0), (1, 1, 1)], [(1, 0, 1), (1, 1, 0)], [(0, 0, 1), (1, 0, 0)], [(0, 1, 0)]]


def test_layout_counts_a_token_once_per_rank(route: Route) -> None:
    layout = oracle.expected_layout(route, 0, ranks_per_host=1)
    assert layout.num_tokens_per_rank.tolist() == [1, 2]
    assert layout.num_tokens_per_rdma_rank.tolist() == [1, 2]
    assert layout.num_tokens_per_expert.tolist() == [1, 0, 1, 1]
    assert layout.is_token_in_rank.tolist() == [[True, True], [False, True], [False, False]]
    assert oracle.expected_layout(route, 1).num_tokens_per_rank.tolist() == [2, 1]
    assert oracle.expected_layout(route, 0).num_tokens_per_rdma_rank.tolist() == [2]


def test_compact(route: Route, two_ranks: list[Inputs]) -> None:
    rows = oracle.expected_compact(route, two_ranks, rank=0, expert_alignment=4)
    assert rows.x.tolist() == [[0, 0], [10, 10], [11, 11]]
    assert rows.topk_idx.tolist() == [[0, -1], [-1, 1], [1, 0]]
    assert rows.topk_weights.tolist() == [[0.5, 0], [0, 4], [8, 16]]
    assert rows.counts == [4, 4]
    assert rows.rank_prefix_matrix.tolist() == [[1, 2], [3, 3]]
    assert rows.src_token.tolist() == [0, 0, 1]


def test_combine_adds_by_the_highest_position_that_chose_the_rank() -> None:
    outputs = [torch.tensor([[_BIG]]), torch.tensor([[1.0]]), torch.tensor([[-_BIG]])]
    route = _single_token([2, 0, 1], num_ranks=3, num_experts=3)
    assert oracle.expected_combine(route, outputs, 0).tolist() == [[1]]
    assert oracle.expected_combine(route, outputs, 0, by_rank=True).tolist() == [[0]]
    # Two experts per rank: rank 0 comes first by its lowest position and last by its highest.
    route = _single_token([0, 5, 2, 1], num_ranks=3, num_experts=6)
    assert oracle.rank_terms(route, 0) == [[2, 1, 0]]
    assert oracle.rank_terms(route, 0, by_rank=True) == [[0, 1, 2]]


def test_combine_starts_from_the_biases(route: Route) -> None:
    outputs = [torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[8.0], [16.0], [32.0]])]
    assert oracle.expected_combine(route, outputs, 0).tolist() == [[9], [16], [0]]
    bias = torch.tensor([[100.0], [200.0], [300.0]])
    assert oracle.expected_combine(route, outputs, 0, bias=[bias]).tolist() == [[109], [216], [300]]
    assert oracle.expected_combine(route, outputs, 0, bias=[bias, bias]).tolist() == [[209], [416], [600]]
    assert oracle.expected_combine(route, outputs, 1).tolist() == [[34], [4]]


def test_two_levels_round_twice() -> None:
    route = _single_token([0, 1, 2, 3], num_ranks=4, num_experts=4)
    outputs = [torch.tensor([[value]], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 0.0)]
    assert oracle.expected_combine(route, outputs, 0).tolist() == [[258]]
    assert oracle.expected_combine(route, outputs, 0, ranks_per_host=2).tolist() == [[256]]
    assert oracle.expected_combine(route, outputs, 0, ranks_per_host=4).tolist() == [[258]]  # one host, one level


def test_hosts_come_in_the_order_of_their_last_rank() -> None:
    rows = [(0, torch.tensor([_BIG])), (2, torch.tensor([-_BIG])), (4, torch.tensor([1.0])), (1, torch.tensor([0.0]))]
    assert [row.item() for row in oracle.reduce_hosts(rows, 2)] == [-_BIG, 1, _BIG]


def test_combined_weights_are_summed_over_ranks(route: Route) -> None:
    weights = [torch.tensor([[1.0, 2.0], [3, 4], [5, 6]]), torch.tensor([[10.0, 20.0], [30, 40], [50, 60]])]
    assert oracle.expected_combined_weights(route, weights, 0).tolist() == [[11, 22], [30, 40], [0, 0]]
    assert oracle.expected_combined_weights(route, weights, 1).tolist() == [[53, 64], [5, 6]]


def test_padded(route: Route, two_ranks: list[Inputs]) -> None:
    rows = oracle_low_latency.expected_padded(route, two_ranks, 0, num_max_tokens_per_rank=3)
    assert rows.x[:, :, 0].tolist() == [[0, 11, 0, 0, 0, 0], [10, 11, 0, 0, 0, 0]]
    assert rows.recv_count.tolist() == [2, 2]
    assert rows.src_info[:, :2].tolist() == [[0, 1], [0, 1]]
    assert rows.layout_range.tolist() == [[1, (1 << 32) + 1], [0, 2]]
    assert rows.sf is None


def test_masked_ranks_neither_send_nor_receive(two_ranks: list[Inputs]) -> None:
    masked = oracle_low_latency.mask_ranks(two_ranks, 4, [1])
    assert [one.topk_idx.tolist() for one in masked] == [[[0, -1], [-1, -1], [-1, -1]], [[-1, -1], [-1, -1]]]


def test_fp8_rows() -> None:
    x = torch.zeros(1, 512)
    x[0, :8] = torch.tensor([448, 1, -1, 17, 19, 0.0009765625, 2.0**-9, 0])
    payload, sf = oracle_low_latency.fp8_rows(x, "float32")
    assert payload.view(torch.uint8)[0, :8].tolist() == [0x7E, 0x38, 0xB8, 0x58, 0x5A, 0x00, 0x01, 0x00]
    assert sf[0, 0] == 1
    assert sf[0, 1] == torch.tensor(1e-4) / torch.tensor(448.0)
    x[0, 0] = 450
    assert oracle_low_latency.fp8_rows(x, "pow2")[1].tolist() == [[2, 2.0**-22, 2.0**-22, 2.0**-22]]
    assert oracle_low_latency.fp8_rows(x, "ue8m0")[1].tolist() == [[0x69696980]]


def test_low_latency_reductions() -> None:
    route = _single_token([0, 1, 2], num_ranks=2, num_experts=4)
    inputs = [_inputs([[0, 1, 2]], [[0.5, 2.0, 1.0]]), _inputs([[-1, -1, -1]], [[0.0, 0.0, 0.0]])]
    outputs = [torch.zeros(2, 2, 128, dtype=torch.bfloat16) for _ in range(2)]
    outputs[0][0, 0], outputs[0][1, 0], outputs[1][0, 0] = 512, 0.5, 1
    for use_logfmt in (
        False,
        True,
    ):  # nothing here is below 1 and cast, except zeros and the one half, whose group is even
        per_rank = oracle_low_latency.expected_low_latency_combine(route, inputs, outputs, 0, use_logfmt=use_logfmt)
        assert per_rank[0].unique().tolist() == [256]
        per_copy = oracle_low_latency.expected_low_latency_combine(
            route, inputs, outputs, 0, reduction="per_copy", use_logfmt=use_logfmt
        )
        assert per_copy[0].unique().tolist() == [258]
    with pytest.raises(ValueError, match="reduction"):
        oracle_low_latency.expected_low_latency_combine(route, inputs, outputs, 0, reduction="other")


def test_expanded(route: Route, two_ranks: list[Inputs]) -> None:
    rows = oracle_elastic.expected_expanded(route, two_ranks, rank=0, expert_alignment=4)
    assert rows.x[:, 0].tolist() == [0, 11, 0, 0, 10, 11, 0, 0]
    assert rows.topk_weights.tolist() == [0.5, 16, 0, 0, 4, 8, 0, 0]
    assert rows.is_padding.tolist() == [False, False, True, True] * 2
    assert rows.counts == [4, 4]
    assert rows.expanded_row.tolist() == [[0, -1], [-1, 4], [5, 1]]
    assert oracle_elastic.worst_case_rows(route, num_max_tokens_per_rank=3, expert_alignment=4) == 20


def test_handle(route: Route) -> None:
    handle = oracle_elastic.expected_handle(route, 0, num_max_tokens_per_rank=3, expert_alignment=4)
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [1, 3]
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [4, 8]
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == [2, 2]
    assert handle.num_recv_tokens_per_expert_list == [4, 4]
    assert handle.src_token_global_idx.tolist() == [0, 3, 4]
    assert handle.dst_buffer_slot_idx.tolist() == [[0, 0], [1, -1], [-1, -1]]
    expanded = oracle_elastic.expected_handle(route, 1, 3, expert_alignment=4, do_expand=True)
    assert expanded.psum_num_recv_tokens_per_expert.tolist() == [2, 5]
    assert expanded.dst_buffer_slot_idx.tolist() == [[2, 1], [-1, 2]]


def test_expanded_combine() -> None:
    route = _single_token([0, 2, 1], num_ranks=2, num_experts=4)
    outputs = [torch.tensor([[256.0], [1.0]]).bfloat16(), torch.tensor([[1.0]]).bfloat16()]
    once = oracle_elastic.expected_expanded_combine(route, outputs, 0, allow_multiple_reduction=False)
    assert once.tolist() == [[258]]
    assert oracle_elastic.expected_expanded_combine(route, outputs, 0).tolist() == [[256]]
    weights = [torch.tensor([0.5, 0.25]), torch.tensor([0.125])]
    assert oracle_elastic.expected_expanded_weights(route, weights, 0).tolist() == [[0.5, 0.125, 0.25]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_choose_distinct_experts_and_repeat(pattern: str) -> None:
    case = Case((20, 0, 7, 3), num_experts=16, num_topk=6, pattern=pattern)
    for rank, num_tokens in enumerate(case.num_tokens):
        one, again = make_inputs(case, rank), make_inputs(case, rank)
        assert one.topk_idx.shape == (num_tokens, 6)
        for choice in one.topk_idx.tolist():
            chosen = [expert for expert in choice if expert >= 0]
            assert len(set(chosen)) == len(chosen)
            assert all(expert < 16 for expert in chosen)
        assert all(
            torch.equal(a, b) for a, b in zip(vars(one).values(), vars(again).values(), strict=True) if a is not None
        )


def test_cases_are_checked() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Case((1, 1, 1), num_experts=8)
    with pytest.raises(ValueError, match="pattern"):
        Case((1,), pattern="other")
    with pytest.raises(ValueError, match="exceed"):
        Case((9,), num_max_tokens_per_rank=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_tell_one_order_from_another(dtype: torch.dtype) -> None:
    case = Case((64,) * 4, num_experts=16, dtype=dtype)
    route = oracle.make_route([make_inputs(case, rank) for rank in range(4)], 16)
    outputs = [make_outputs(case, rank, len(rows)) for rank, rows in enumerate(route.rows)]
    right, wrong = (oracle.expected_combine(route, outputs, 0, by_rank=by_rank) for by_rank in (False, True))
    assert right.isfinite().all()
    assert (right != wrong).float().mean() > 0.05
