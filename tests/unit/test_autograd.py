"""`deepep.autograd` against the same mixture of experts in one process, in float64, and that against differences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from deepep import Buffer, InvalidArgument, autograd
from deepep.testing.launch import Workers
from deepep.testing.routing import Case, make_all_inputs

HIDDEN = 16
Tensors = dict[str, torch.Tensor]


def case_of(num_ranks: int, pattern: str = "holes") -> Case:
    num_tokens = tuple((5, 0, 9, 3)[:num_ranks])
    return Case(num_tokens, HIDDEN, 3 * num_ranks, 3, dtype=torch.float32, pattern=pattern, seed=7)


def leaves_of(case: Case) -> Tensors:
    """All tokens of all ranks and all experts, in float64, gradients wanted."""
    generator = torch.Generator().manual_seed(case.seed)
    inputs = make_all_inputs(case)
    num_tokens = sum(case.num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).double()

    leaves = {
        "x": normal(num_tokens, HIDDEN),
        "topk_weights": torch.cat([one.topk_weights for one in inputs]).double(),
        "expert": normal(case.num_experts, HIDDEN, HIDDEN) / HIDDEN**0.5,
        "bias": normal(num_tokens, HIDDEN),
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def experts(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor | None, expert: torch.Tensor) -> torch.Tensor:
    """Sum over a row's experts of weight times tanh(x W)."""
    total = torch.zeros_like(x)
    for number, matrix in enumerate(expert):
        row, slot = (idx == number).nonzero(as_tuple=True)
        out = torch.tanh(x[row] @ matrix)
        total = total.index_add(0, row, out if weights is None else out * weights[row, slot].unsqueeze(1))
    return total


def single_loss(case: Case, leaves: Tensors, with_weights: bool) -> torch.Tensor:
    idx = torch.cat([one.topk_idx for one in make_all_inputs(case)])
    weights = leaves["topk_weights"] if with_weights else None
    y = experts(leaves["x"], idx, weights, leaves["expert"]) + leaves["bias"]
    return (y * torch.sin(torch.arange(y.numel(), dtype=y.dtype).view_as(y))).sum()


def rank_gradients(group: Any, case: Case, with_weights: bool, num_worst_tokens: int) -> Tensors:
    """The same loss, each rank holding its tokens and its experts; gradients of these."""
    rank, per_rank = group.rank(), case.num_local_experts
    first = sum(case.num_tokens[:rank])
    tokens = slice(first, first + case.num_tokens[rank])
    part = {"expert": slice(rank * per_rank, (rank + 1) * per_rank)}
    mine = {
        name: leaf.detach()[part.get(name, tokens)].float().requires_grad_() for name, leaf in leaves_of(case).items()
    }
    buffer = Buffer(group, backend="reference")
    idx = make_all_inputs(case)[rank].topk_idx
    recv_x, recv_idx, recv_weights, counts, handle = autograd.dispatch(
        buffer,
        mine["x"],
        idx,
        mine["topk_weights"] if with_weights else None,
        case.num_experts,
        num_worst_tokens=num_worst_tokens,
    )
    assert not num_worst_tokens or (counts == [] and recv_x.shape[0] == num_worst_tokens)
    # Gradients of weights whose expert lives elsewhere must not leak home.
    extra = 0.0 if recv_weights is None else (recv_weights * 100.0)[recv_idx < 0].sum()
    out = experts(recv_x, recv_idx, recv_weights, mine["expert"])
    y = autograd.combine(buffer, out, handle, bias=mine["bias"])
    factor = torch.sin(torch.arange(sum(case.num_tokens) * HIDDEN).view(-1, HIDDEN).double())[tokens].float()
    ((y * factor).sum() + extra).backward()
    buffer.destroy()
    return {name: torch.zeros(0) if leaf.grad is None else leaf.grad for name, leaf in mine.items()}


@pytest.fixture(scope="module", params=[1, 4])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with Workers(request.param) as started:
        yield started


@pytest.mark.parametrize(
    ("with_weights", "num_worst_tokens", "pattern"),
    [(True, 0, "holes"), (False, 0, "uniform"), (True, 64, "holes"), (True, 0, "one_rank")],
)
def test_gradients_equal_those_of_one_process(
    workers: Workers, with_weights: bool, num_worst_tokens: int, pattern: str
) -> None:
    case = case_of(workers.num_ranks, pattern)
    leaves = leaves_of(case)
    single_loss(case, leaves, with_weights).backward()
    per_rank = workers.run(rank_gradients, case, with_weights, num_worst_tokens)
    for name in leaves if with_weights else ["x", "expert", "bias"]:
        found, grad = torch.cat([grads[name] for grads in per_rank]), leaves[name].grad
        assert grad is not None
        torch.testing.assert_close(found.double(), grad, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("name", ["x", "topk_weights", "expert", "bias"])
def test_the_single_process_gradients_follow_differences(name: str) -> None:
    case = case_of(4)
    leaves = leaves_of(case)
    single_loss(case, leaves, True).backward()
    direction = torch.randn(leaves[name].shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ahead, behind = (
            single_loss(case, {**leaves, name: leaves[name] + step * direction}, True) for step in (1e-6, -1e-6)
        )
    grad = leaves[name].grad
    assert grad is not None
    torch.testing.assert_close((ahead - behind) / 2e-6, (grad * direction).sum(), rtol=1e-6, atol=1e-6)


def a_pair_is_refused(group: Any) -> str:
    buffer = Buffer(group, backend="reference")
    pair: Any = (torch.zeros(2, 16), torch.zeros(2, 1))
    with pytest.raises(InvalidArgument) as caught:
        autograd.dispatch(buffer, pair, torch.zeros(2, 1, dtype=torch.int64), None, 4)
    return str(caught.value)


def test_a_pair_with_scale_factors_is_refused(workers: Workers) -> None:
    assert all("without sf" in text for text in workers.run(a_pair_is_refused))


def one_rank_errs(group: Any) -> list[str]:
    """Rank 0 passes what is wrong, in turn; the others must hear of it at once."""
    buffer = Buffer(group, backend="reference", timeout=20)
    x, idx = torch.zeros(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
    errs = group.rank() == 0
    texts = []
    wrong: list[tuple[Any, Any]] = [(x, idx.int()), (x, idx + 99), (None, idx)]
    for arguments in wrong:
        tokens, choices = arguments if errs else (x, idx)
        with pytest.raises(InvalidArgument) as caught:
            autograd.dispatch(buffer, tokens, choices, None, 4)
        texts.append(str(caught.value))
    recv_x, _, _, _, handle = autograd.dispatch(buffer, x, idx, None, 4)
    bias: Any = 3 if errs else None
    with pytest.raises(InvalidArgument) as caught:
        autograd.combine(buffer, recv_x, handle, bias=bias)
    return [*texts, str(caught.value)]


def test_what_one_rank_does_wrong_is_refused_on_all(workers: Workers) -> None:
    first, *others = workers.run(one_rank_errs)
    for own, *texts in zip(first, *others, strict=True):
        assert all(text.endswith(f"rank 0 refused: {own}") for text in texts)


def test_no_torch_operator_is_registered() -> None:
    assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("deepep::")]
