"""TorchTitan, unchanged, on deepep: its DeepEP module from the installed wheel, against a single process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from prepared_workers import PreparedWorkers

from deepep.testing.launch import Workers

WANTED = "0.3.0"
CLIENT = "torchtitan/distributed/deepep/deepep.py"
MODULE = "torchtitan_deepep_client"
HIDDEN, NUM_TOPK, NUM_LOCAL_EXPERTS = 64, 3, 4
MAX_TOKENS = 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number


@pytest.fixture(scope="module", params=[2, 4], ids=lambda num_ranks: f"R{num_ranks}")
def workers(request: pytest.FixtureRequest, kernels: None) -> Iterator[Workers]:  # noqa: ARG001
    try:
        path = Path(str(distribution("torchtitan").locate_file(CLIENT)))
    except PackageNotFoundError:
        pytest.skip(f"TorchTitan is not installed: pip install --no-deps torchtitan=={WANTED}")
    device = request.config.getoption("--device")
    backend = request.config.getoption("--backend").split(",")[0]
    with PreparedWorkers(request.param, prepare, path, backend, device, device=device) as running:
        yield running


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training(workers: Workers, request: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    workers.run(check_training, request.config.getoption("--device"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inference(workers: Workers, request: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    workers.run(check_inference, request.config.getoption("--device"), dtype)


def test_inference_inside_a_cuda_graph(workers: Workers, request: pytest.FixtureRequest) -> None:
    device, backend = request.config.getoption("--device"), request.config.getoption("--backend").split(",")[0]
    if device != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    reasons = workers.run(check_graph, device)
    if any(reasons):
        pytest.skip(f"backend {backend}: {reasons[0]}")


def test_buffer_is_kept_until_it_is_too_small(workers: Workers, request: pytest.FixtureRequest) -> None:
    workers.run(check_growing_buffer, request.config.getoption("--device"))


def prepare(group: Any, path: Path, backend: str, device: str) -> None:
    """Load the client from its file: its package would import much that has nothing to do with it."""
    from deepep import compat

    os.environ["DEEPEP_BACKEND"] = backend  # the client builds its buffer itself and knows no such argument
    if device == "cuda":
        os.environ["DEEPEP_TIMEOUT"] = "10"  # less than `Workers` waits for the peers of a rank that failed
    compat.install()
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    client = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    if device == "cpu":
        # It registers its two operators for CUDA tensors alone; the same functions serve CPU tensors as they are.
        torch.library.impl(client._lib, "dispatch", "CPU")(client._dispatch_op_impl)
        torch.library.impl(client._lib, "combine", "CPU")(client._combine_op_impl)
    client.get_buffer(group, hidden=HIDDEN, num_max_tokens_per_rank=MAX_TOKENS, num_topk=NUM_TOPK)


def check_training(group: Any, device: str, dtype: torch.dtype) -> None:
    """Forward and backward of the compact path: outputs, and gradients of tokens, scores and experts."""
    client, scene = sys.modules[MODULE], Scene(group.size(), dtype, seed=1)
    rank, num_local = group.rank(), NUM_LOCAL_EXPERTS
    mine = scene.batches[rank].to(device)
    x, scores = mine.x.requires_grad_(), mine.scores.requires_grad_()
    experts = scene.experts[rank * num_local : (rank + 1) * num_local].to(device).requires_grad_()
    rows, counts, state = client.dispatch_tokens(
        x, mine.topk_idx, scores, num_local, scene.num_experts, num_tokens_per_rank=MAX_TOKENS, cudagraphable=True
    )
    assert counts.tolist() == scene.counts(rank)
    chunks = rows.split(counts.tolist())
    outputs = torch.cat([chunk @ expert for chunk, expert in zip(chunks, experts, strict=True)])
    y = client.combine_tokens(outputs, state)
    client.sync_combine()
    y.backward(mine.grad)
    assert not client._handle_cache

    # The weights' gradient here is the sum over the tokens of all ranks.
    expected = scene.alone()
    close("output", y, expected[rank].y, dtype)
    close("gradient of x", x.grad, expected[rank].x.grad, dtype)
    close("gradient of scores", scores.grad, expected[rank].scores.grad, dtype)
    want = scene.experts.grad
    assert want is not None
    close("gradient of experts", experts.grad, want[rank * num_local : (rank + 1) * num_local], dtype)


def check_inference(group: Any, device: str, dtype: torch.dtype) -> None:
    """The expanded path: static shapes, no host synchronisation."""
    scene = Scene(group.size(), dtype, seed=2)
    mine = scene.batches[group.rank()].to(device)
    experts = scene.local_experts(group.rank()).to(device)
    with torch.no_grad():
        y, counts = infer(scene, mine, experts)
    assert counts.tolist() == scene.counts(group.rank())
    close("output", y, scene.alone()[group.rank()].y, dtype)
    assert not sys.modules[MODULE]._handle_cache


def check_graph(group: Any, device: str) -> str:
    """Capture the expanded path once and replay it with other tokens and another routing; gives a reason to skip."""
    from deepep.backends import registry

    client, dtype = sys.modules[MODULE], torch.bfloat16
    if not registry.load(client._buffer.backend).capabilities().graph_capture:
        return "it cannot be captured in a CUDA graph"
    scenes = [Scene(group.size(), dtype, seed=seed, is_uneven=False) for seed in (3, 4, 5)]
    static = scenes[0].batches[group.rank()].to(device)
    experts = scenes[0].local_experts(group.rank()).to(device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            infer(scenes[0], static, experts)  # kernels compile before the capture
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y, _ = infer(scenes[0], static, experts)
        for scene in scenes:
            static.copy_(scene.batches[group.rank()])
            experts.copy_(scene.local_experts(group.rank()))
            graph.replay()
            close("output of a replay", y, scene.alone()[group.rank()].y, dtype)
    return ""


def check_growing_buffer(group: Any, device: str) -> None:
    """A larger shape gets a larger buffer, and the client goes on with that."""
    client = sys.modules[MODULE]
    kept = client._buffer
    shape = {"hidden": HIDDEN, "num_topk": NUM_TOPK}
    assert client.get_buffer(group, num_max_tokens_per_rank=MAX_TOKENS, **shape) is kept
    grown = client.get_buffer(group, num_max_tokens_per_rank=1 << 16, **shape)
    assert grown is not kept
    assert grown.num_bytes > kept.num_bytes
    assert grown.num_max_tokens_per_rank == 1 << 16
    kept.destroy()
    check_inference(group, device, torch.float32)


@dataclass
class Batch:
    """Tokens of one rank: x and grad [T, H], topk_idx and scores [T, K]."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    scores: torch.Tensor
    grad: torch.Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.detach().clone().to(device) for tensor in vars(self).values()))

    def copy_(self, other: Batch) -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))


@dataclass
class Alone:
    """What a single process computes for one rank's tokens; gradients are in `x` and `scores`."""

    x: torch.Tensor
    scores: torch.Tensor
    y: torch.Tensor


class Scene:
    """Everyone's tokens and experts; every rank makes the same ones."""

    def __init__(self, num_ranks: int, dtype: torch.dtype, seed: int, is_uneven: bool = True) -> None:
        random = torch.Generator().manual_seed(seed)
        self.num_experts = NUM_LOCAL_EXPERTS * num_ranks
        self.experts = (torch.randn(self.num_experts, HIDDEN, HIDDEN, generator=random) / HIDDEN**0.5).to(dtype)
        self.batches = []
        for rank in range(num_ranks):
            # The last rank has no tokens at all.
            num_tokens = MAX_TOKENS - 5 * (rank % 3) if rank < num_ranks - 1 else 0
            num_tokens = num_tokens if is_uneven else MAX_TOKENS
            x, grad = (torch.randn(num_tokens, HIDDEN, generator=random).to(dtype) for _ in range(2))
            scores = torch.rand(num_tokens, NUM_TOPK, generator=random)
            scores[torch.rand(scores.shape, generator=random) < 0.2] = 0  # the client sends nothing for these
            topk_idx = torch.rand(num_tokens, self.num_experts, generator=random).topk(NUM_TOPK).indices
            self.batches.append(Batch(x, topk_idx, scores, grad))

    def local_experts(self, rank: int) -> torch.Tensor:
        return self.experts[rank * NUM_LOCAL_EXPERTS : (rank + 1) * NUM_LOCAL_EXPERTS]

    def counts(self, rank: int) -> list[int]:
        """Tokens of each local expert."""
        chosen = torch.cat([batch.topk_idx[batch.scores > 0] for batch in self.batches])
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        return counts[rank * NUM_LOCAL_EXPERTS : (rank + 1) * NUM_LOCAL_EXPERTS]

    @torch.enable_grad()
    def alone(self) -> list[Alone]:
        """Compute everything here in float32, gradients too; those of the experts are left in `self.experts`."""
        self.experts = self.experts.float().requires_grad_()
        results = []
        for batch in self.batches:
            x, scores = batch.x.float().requires_grad_(), batch.scores.clone().requires_grad_()
            # A score of 0 is no choice, for gradients too.
            factor = scores * (scores > 0)
            y = torch.einsum("tk,tkij,ti->tj", factor, self.experts[batch.topk_idx], x)
            y.backward(batch.grad.float())
            results.append(Alone(x, scores, y))
        return results


def infer(scene: Scene, batch: Batch, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dispatch, apply experts to every row there is room for, combine; never asks the device for anything."""
    client: ModuleType = sys.modules[MODULE]
    rows, counts, state = client.dispatch_tokens(
        batch.x, batch.topk_idx, batch.scores, NUM_LOCAL_EXPERTS, scene.num_experts,
        num_tokens_per_rank=MAX_TOKENS, cudagraphable=True,
    )  # fmt: skip
    place = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(counts.cumsum(0), place, right=True).clamp(max=NUM_LOCAL_EXPERTS - 1)
    outputs = torch.bmm(rows.unsqueeze(1), experts[expert]).squeeze(1)
    y = client.combine_tokens(outputs, state)
    client.sync_combine()
    return y, counts


def close(what: str, got: torch.Tensor | None, want: torch.Tensor | None, dtype: torch.dtype) -> None:
    assert got is not None, what
    assert want is not None, what
    assert got.shape == want.shape, what
    if want.numel():
        error = (got.detach().cpu().float() - want.detach()).abs().max() / want.detach().abs().max()
        assert error < TOLERANCE[dtype], f"{what}: relative error {error:.1e}"
