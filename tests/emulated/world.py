"""Ranks whose low-latency kernels run on the emulator, and what their calls have to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from emulator import Emulator
from fake_gpu import FakeKernel, fake_gpu

from deepep.backends.base import CombineRequest, CombineResult, DispatchRequest, DispatchResult, Layout, Reduction
from deepep.cuda import driver, jit, ll_engine
from deepep.cuda.ll_engine import LowLatencyEngine, Settings
from deepep.cuda.ll_structs import LlState, Shape, divide
from deepep.handle import make_low_latency_handle
from deepep.quant import SfFormat
from deepep.testing.checks_buffer import Scene
from deepep.testing.checks_low_latency import compare, padded_outputs
from deepep.testing.oracle import make_route
from deepep.testing.oracle_low_latency import expected_low_latency_combine, mask_ranks
from deepep.testing.routing import Case
from deepep.testing.target import Findings


class World:
    """R engines over windows of the same process.

    Args:
        monkeypatch: puts the emulator where the driver was.
        emulator: of the build that the shape needs.
        shape: of all calls.
        num_sms: multiprocessors of each rank.
        timeout: seconds, by a clock that only runs while kernels do.
        is_shrinkable: ranks that do not come are masked.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        emulator: Emulator,
        shape: Shape,
        num_sms: int,
        timeout: float = 1e6,
        is_shrinkable: bool = False,
    ) -> None:
        fake_gpu(monkeypatch, num_sms)
        monkeypatch.setattr(jit, "load", lambda spec, _device: FakeKernel(emulator.handle(spec.name)))
        monkeypatch.setattr(driver, "can_start_early", lambda _device: emulator.is_hopper)
        monkeypatch.setattr(driver, "ensure_context", lambda _device: None)
        monkeypatch.setattr(ll_engine, "current_stream", lambda _device: 0)
        monkeypatch.setattr(ll_engine, "runtime", lambda: emulator)
        self.emulator, self.shape, self._division = emulator, shape, divide(shape)
        self.windows = [torch.zeros(self._division.num_bytes, dtype=torch.uint8) for _ in range(shape.num_ranks)]
        self.status = torch.zeros((shape.num_ranks, 2 + shape.num_ranks), dtype=torch.int64)
        self._table = torch.tensor([window.data_ptr() for window in self.windows])
        self.engines = [
            LowLatencyEngine(
                SimpleNamespace(peer_table=self._table.data_ptr(), base=window.data_ptr()),
                self._division,
                Settings(
                    shape=shape,
                    rank=rank,
                    device=0,
                    ranks_per_gpu=1,
                    status_address=self.status[rank].data_ptr(),
                    timeout=timeout,
                    is_shrinkable=is_shrinkable,
                ),
            )
            for rank, window in enumerate(self.windows)
        ]

    def on(self, rank: int) -> LowLatencyEngine:
        """Give a rank's engine; what is launched from now on is launched by this rank."""
        self.emulator.queue = rank
        return self.engines[rank]

    def mask(self, rank: int) -> torch.Tensor:
        """The ranks that a rank leaves out: [R] int32, in its window."""
        at = LlState.mask.offset
        return self.windows[rank][at : at + 4 * self.shape.num_ranks].view(torch.int32)


class Step:
    """A dispatch and a combine of every rank, and what the oracle says of them.

    Args:
        world: where.
        num_tokens: T of each rank.
        seed: of tokens, choices and expert outputs.
        pattern: how tokens choose experts, one of `deepep.testing.routing.PATTERNS`.
    """

    def __init__(self, world: World, num_tokens: Sequence[int], seed: int, pattern: str = "holes") -> None:
        shape = world.shape
        case = Case(
            tuple(num_tokens),
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            num_topk=shape.num_topk,
            num_max_tokens_per_rank=shape.num_max_tokens,
            pattern=pattern,
            seed=seed,
        )
        self.world, self._scene = world, Scene.of(case, 0)
        self._inputs, self._outputs = self._scene.inputs, padded_outputs(self._scene)

    def dispatch(
        self,
        rank: int,
        sf_format: SfFormat | None = None,
        weights_ahead: bool = False,
        split: bool = False,
        wait_stats: torch.Tensor | None = None,
    ) -> DispatchResult:
        """Launch a rank's dispatch."""
        mine, shape = self._inputs[rank], self.world.shape
        request = DispatchRequest(
            mine.x,
            None,
            mine.topk_idx,
            mine.topk_weights if weights_ahead else None,
            shape.num_experts,
            num_max_tokens_per_rank=shape.num_max_tokens,
            layout=Layout.PADDED,
            sf_format=sf_format,
            split_phases=split,
            wait_recv_cost_stats=wait_stats,
        )
        return self.world.on(rank).dispatch(request, len(mine.x))

    def combine(
        self,
        rank: int,
        dispatched: DispatchResult,
        reduction: Reduction = Reduction.PER_RANK,
        split: bool = False,
        use_logfmt: bool = False,
        wait_stats: torch.Tensor | None = None,
    ) -> CombineResult:
        """Launch a rank's combine."""
        mine, x = self._inputs[rank], self._outputs[rank]
        request = CombineRequest(
            x,
            dispatched.routing,
            scale_topk_idx=mine.topk_idx,
            scale_topk_weights=mine.topk_weights,
            reduction=reduction,
            use_logfmt=use_logfmt,
            split_phases=split,
            wait_recv_cost_stats=wait_stats,
        )
        return self.world.on(rank).combine(request, x)

    def check_dispatch(
        self, rank: int, got: DispatchResult, sf_format: SfFormat | None = None, gone: tuple[int, ...] = ()
    ) -> None:
        """Compare what a rank received with the oracle, bit for bit."""
        found = Findings(rank)
        payload = got.x if got.sf is None else (got.x, got.sf)
        handle = make_low_latency_handle(got, self.world.shape.hidden, owner=0)
        received = (payload, got.num_recv_tokens_per_expert, handle)
        compare(found, self._seen_by(rank, gone), received, sf_format and sf_format.value)
        found.finish()

    def expected_combine(
        self,
        rank: int,
        reduction: Reduction = Reduction.PER_RANK,
        gone: tuple[int, ...] = (),
        use_logfmt: bool = False,
    ) -> torch.Tensor:
        """What a rank's combine gives: [T, H]."""
        scene = self._seen_by(rank, gone)
        return expected_low_latency_combine(
            scene.route, scene.inputs, self._outputs, rank, reduction=reduction.value, use_logfmt=use_logfmt
        )

    def _seen_by(self, rank: int, gone: tuple[int, ...]) -> Scene:
        inputs, num_experts = self._inputs, self.world.shape.num_experts
        if gone:
            inputs = mask_ranks(inputs, num_experts, gone)
        return replace(self._scene, rank=rank, inputs=inputs, route=make_route(inputs, num_experts))
