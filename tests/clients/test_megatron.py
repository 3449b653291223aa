"""Megatron-Core, unchanged, on deepep: its `fused_a2a` functions, and its MoE layer against its own all-gather."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prepared_workers import PreparedWorkers

from deepep.testing.launch import Workers

WANTED = "0.16.1"
HIDDEN, NUM_TOPK = 64, 4


@pytest.fixture(scope="module", params=[2, 4], ids=lambda num_ranks: f"R{num_ranks}")
def workers(request: pytest.FixtureRequest, kernels: None) -> Iterator[Workers]:  # noqa: ARG001
    try:
        version("megatron-core")
    except PackageNotFoundError:
        pytest.skip(f"Megatron-Core is not installed: pip install --no-deps megatron-core=={WANTED}")
    device = request.config.getoption("--device")
    # NCCL serves the client's own collectives; it takes one rank per GPU.
    has_gpus = device == "cuda" and torch.cuda.device_count() >= request.param
    collectives = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    backend = request.config.getoption("--backend").split(",")[0]
    with PreparedWorkers(request.param, prepare, backend, device, backend=collectives, device=device) as running:
        yield running


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_fused_a2a(workers: Workers, request: pytest.FixtureRequest, is_async: bool) -> None:
    workers.run(check_fused_a2a, request.config.getoption("--device"), is_async)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_topk", [1, 2, NUM_TOPK], ids=lambda num_topk: f"top{num_topk}")
def test_moe_layer(workers: Workers, request: pytest.FixtureRequest, num_topk: int, dtype: torch.dtype) -> None:
    device = request.config.getoption("--device")
    if device == "cuda" and torch.cuda.device_count() < workers.num_ranks:
        pytest.skip(f"the client's all-gather dispatcher needs NCCL, and NCCL {workers.num_ranks} GPUs")
    workers.run(check_moe_layer, device, num_topk, dtype)


def prepare(group: Any, backend: str, device: str) -> None:
    """Make a rank ready for the client: the alias, and on a machine without GPU what the client takes for granted."""
    from deepep import compat

    os.environ["DEEPEP_BACKEND"] = backend  # the client builds its buffer itself and knows no such argument
    if device == "cuda":
        os.environ["DEEPEP_TIMEOUT"] = "10"  # less than `Workers` waits for the peers of a rank that failed
    compat.install()
    warnings.filterwarnings("ignore")  # it warns of every optional package that is missing
    # It compiles small functions with torch.compile, which here costs minutes and shows nothing.
    torch._dynamo.config.disable = True
    if device == "cpu":
        # Its router and its collectives allocate on "the current GPU" without asking where their inputs are.
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        # Without Transformer Engine it forgets to define this name and then compares it with None.
        moe_utils.te_general_gemm = None
    parallel_state.initialize_model_parallel(expert_model_parallel_size=group.size())


def check_fused_a2a(group: Any, device: str, is_async: bool) -> None:
    """Every number is a small multiple of 1/8, so sums are exact in any order and equality can be asked for."""
    from megatron.core.transformer.moe import fused_a2a

    rank, num_ranks = group.rank(), group.size()
    num_local, num_tokens = 3, 0 if rank == num_ranks - 1 else 20 + rank
    num_experts = num_local * num_ranks
    random = torch.Generator().manual_seed(rank)
    x, grad = (torch.randint(-8, 9, (num_tokens, HIDDEN), generator=random).float() for _ in range(2))
    probs = torch.randint(1, 9, (num_tokens, NUM_TOPK), generator=random) / 8
    topk_idx = torch.rand(num_tokens, num_experts, generator=random).topk(NUM_TOPK).indices
    topk_idx[torch.rand(topk_idx.shape, generator=random) < 0.2] = -1  # dropped choices

    def expert_factor(idx: torch.Tensor) -> torch.Tensor:
        return torch.where(idx >= 0, idx % 5 + 1, 0).to(torch.float32)

    x, grad, probs, topk_idx = (tensor.to(device) for tensor in (x, grad, probs, topk_idx))
    inputs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    recv_x, recv_idx, recv_probs, tokens_per_expert, handle = fused_a2a.fused_dispatch(
        inputs[0], topk_idx, inputs[1], num_experts, group, async_finish=is_async, allocate_on_comm_stream=is_async
    )
    global_idx = torch.where(recv_idx >= 0, recv_idx + rank * num_local, -1)
    y = recv_x * (recv_probs * expert_factor(global_idx)).sum(dim=1, keepdim=True)
    combined, _ = fused_a2a.fused_combine(y, group, handle, async_finish=is_async, allocate_on_comm_stream=is_async)
    combined.backward(grad)

    alone = x.clone().requires_grad_(), probs.clone().requires_grad_()
    expected = alone[0] * (alone[1] * expert_factor(topk_idx)).sum(dim=1, keepdim=True)
    expected.backward(grad)
    same("output", combined, expected)
    same("gradient of x", inputs[0].grad, alone[0].grad)
    same("gradient of probs", inputs[1].grad, alone[1].grad)
    here = torch.bincount(recv_idx[recv_idx >= 0], minlength=num_local)
    same("tokens_per_expert", tokens_per_expert, here)


def check_moe_layer(group: Any, device: str, num_topk: int, dtype: torch.dtype) -> None:
    """The whole layer through both dispatchers, from the same weights and input.

    A token with at most two destination ranks is one sum of two terms, which no order can change: bitwise equality.
    With more, the client's reduce-scatter adds the ranks in another order, and in the payload's type on the way back,
    where CONTRACT adds in float32: a few roundings of that type.
    """
    num_experts = 2 * group.size()
    flex = run_layer(device, "flex", num_experts, num_topk, dtype)
    if sys.modules["megatron.core.transformer.moe.fused_a2a"]._buffer is None:
        raise AssertionError("the layer did not use deepep")
    gathered = run_layer(device, "allgather", num_experts, num_topk, dtype)
    if flex.keys() != gathered.keys():
        raise AssertionError(f"{flex.keys()} and {gathered.keys()}")
    is_exact = min(num_topk, group.size()) <= 2
    for name, value in flex.items():
        same(name, value, gathered[name], 0.0 if is_exact else 8 * torch.finfo(dtype).eps)


def run_layer(
    device: str, dispatcher: str, num_experts: int, num_topk: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Run forward and backward of one layer; its output, and the gradients of input and weights."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=96, num_moe_experts=num_experts,
        expert_model_parallel_size=dist.get_world_size(), moe_router_topk=num_topk, moe_router_dtype="fp32",
        moe_router_load_balancing_type="none", moe_router_pre_softmax=True,
        moe_token_dispatcher_type=dispatcher,
        moe_flex_dispatcher_backend="deepep", moe_grouped_gemm=False, add_bias_linear=False,
        use_cpu_initialization=True, params_dtype=dtype, bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    rank = dist.get_rank()
    torch.manual_seed(rank)
    spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules).to(device)
    with torch.no_grad():
        random = torch.Generator().manual_seed(7)  # the router is one and the same on all ranks
        layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=random))
    random = torch.Generator().manual_seed(100 + rank)
    hidden_states, grad = (torch.randn(12, 2, HIDDEN, generator=random).to(device, dtype) for _ in range(2))
    hidden_states.requires_grad_()
    output, _ = layer(hidden_states)
    output.backward(grad)
    grads = {f"weight {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    if hidden_states.grad is None or not grads:
        raise AssertionError("no gradients")
    return {"output": output.detach(), "gradient of the input": hidden_states.grad, **grads}


def same(what: str, got: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float = 0.0) -> None:
    """Ask for equality, bit by bit where no tolerance is given."""
    if got is None or expected is None:
        raise AssertionError(f"{what}: got {got}, expected {expected}")
    message = partial("{}: {}".format, what)
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance, msg=message)
