"""Ranks whose low-latency kernels run on the emulator, and what their calls have to give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulator import Emulator

from deepep.backends.base import CombineRequest, CombineResult, DispatchRequest, DispatchResult, Layout, Reduction
from deepep.cuda import driver, jit, ll_engine
from deepep.cuda.ll_engine import LowLatencyEngine, Settings
from deepep.cuda.ll_structs import LlState, Shape, divide
from deepep.quant import SfFormat, fp8_cast, logfmt_roundtrip


class FakeKernel:
    """A kernel as grids and launches see it."""

    shared_bytes = 16 << 10

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def set_max_smem(self, num_bytes: int) -> None:
        """Shared memory is as large as asked for."""

    def blocks_per_sm(self, _num_threads: int, _smem: int) -> int:
        return 1


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
        limits = {"CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": num_sms}
        monkeypatch.setattr(jit, "load", lambda spec, _device: FakeKernel(emulator.handle(spec.name)))
        monkeypatch.setattr(driver, "device_attribute", lambda name, _device: limits.get(name, 227 << 10))
        monkeypatch.setattr(driver, "can_start_early", lambda _device: False)
        monkeypatch.setattr(driver, "ensure_context", lambda _device: None)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0, raising=False)
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
    """A dispatch and a combine of every rank, and what they have to give by plain loops.

    Args:
        world: where.
        num_tokens: T of each rank.
        seed: of tokens, choices and expert outputs.
        density: how many choices are experts at all.
    """

    def __init__(self, world: World, num_tokens: list[int], seed: int, density: float = 0.8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.world, shape = world, world.shape
        self.x, self.topk_idx, self.topk_weights = [], [], []
        for count in num_tokens:
            scores = torch.rand((count, shape.num_experts), generator=generator)
            missing = torch.rand((count, shape.num_topk), generator=generator) >= density
            self.x.append(torch.randn((count, shape.hidden), generator=generator).bfloat16())
            self.topk_idx.append(scores.topk(shape.num_topk, dim=1).indices.masked_fill(missing, -1))
            self.topk_weights.append(torch.rand((count, shape.num_topk), generator=generator))
        room = shape.num_ranks * shape.num_max_tokens
        self.y = torch.randn((shape.num_experts, room, shape.hidden), generator=generator).bfloat16()

    def dispatch(
        self, rank: int, sf_format: SfFormat | None = None, weights_ahead: bool = False, split: bool = False
    ) -> DispatchResult:
        """Launch a rank's dispatch."""
        request = DispatchRequest(
            self.x[rank],
            None,
            self.topk_idx[rank],
            self.topk_weights[rank] if weights_ahead else None,
            self.world.shape.num_experts,
            num_max_tokens_per_rank=self.world.shape.num_max_tokens,
            layout=Layout.PADDED,
            sf_format=sf_format,
            split_phases=split,
        )
        return self.world.on(rank).dispatch(request)

    def combine(
        self,
        rank: int,
        dispatched: DispatchResult,
        reduction: Reduction = Reduction.PER_RANK,
        split: bool = False,
        use_logfmt: bool = False,
    ) -> CombineResult:
        """Launch a rank's combine."""
        num_local = self.world.shape.num_local_experts
        x = self.y[rank * num_local : (rank + 1) * num_local]
        request = CombineRequest(
            x,
            dispatched.routing,
            scale_topk_idx=self.topk_idx[rank],
            scale_topk_weights=self.topk_weights[rank],
            reduction=reduction,
            use_logfmt=use_logfmt,
            split_phases=split,
        )
        return self.world.on(rank).combine(request, x)

    def rows(self, expert: int, gone: tuple[int, ...] = ()) -> list[tuple[int, int]]:
        """The (source, token) that come to an expert, in order."""
        return [
            (source, token)
            for source in range(self.world.shape.num_ranks)
            if source not in gone
            for token in range(len(self.x[source]))
            if expert in self.topk_idx[source][token]
        ]

    def check_dispatch(
        self, rank: int, got: DispatchResult, sf_format: SfFormat | None = None, gone: tuple[int, ...] = ()
    ) -> None:
        """Compare what a rank received, bit for bit."""
        num_local = self.world.shape.num_local_experts
        for local in range(num_local):
            rows = self.rows(rank * num_local + local, gone)
            tensors: Any = (got.num_recv_tokens_per_expert, got.src_info, got.layout_range)
            counts, src_info, layout_range = tensors
            assert int(counts[local]) == len(rows)
            assert src_info[local, : len(rows)].tolist() == [token for _, token in rows]
            for source in range(self.world.shape.num_ranks):
                begin, count = int(layout_range[local, source]) >> 32, int(layout_range[local, source]) & 0xFFFFFFFF
                assert rows[begin : begin + count] == [row for row in rows if row[0] == source]
            if not rows:
                continue
            want = torch.stack([self.x[source][token] for source, token in rows])
            if sf_format is None:
                assert torch.equal(got.x[local, : len(rows)].view(torch.int16), want.view(torch.int16))
                continue
            want_x, want_sf = fp8_cast(want, sf_format)
            assert got.sf is not None
            assert torch.equal(got.x[local, : len(rows)].view(torch.uint8), want_x.view(torch.uint8))
            assert torch.equal(got.sf[local, : len(rows)].view(torch.int32), want_sf.view(torch.int32))

    def expected_combine(
        self,
        rank: int,
        reduction: Reduction = Reduction.PER_RANK,
        gone: tuple[int, ...] = (),
        use_logfmt: bool = False,
    ) -> torch.Tensor:
        """What a rank's combine gives: per owner in fp32 and rounded, then in the order of each owner's last choice."""
        per_rank = reduction is Reduction.PER_RANK
        num_local = self.world.shape.num_local_experts
        out = torch.zeros_like(self.x[rank])
        for token, choices in enumerate(self.topk_idx[rank].tolist()):
            sums: dict[int, torch.Tensor] = {}
            for k, expert in enumerate(choices):
                owner = expert // num_local
                if expert < 0 or owner in gone:
                    continue
                place = self.rows(expert, gone).index((rank, token))
                row = self.y[expert, place]
                sent = logfmt_roundtrip(row[None])[0] if use_logfmt and not per_rank else row
                term = self.topk_weights[rank][token, k] * sent.float()
                key = owner if per_rank else k
                before = sums.pop(key, torch.zeros(self.world.shape.hidden))
                sums[key] = before + term
            total = torch.zeros(self.world.shape.hidden)
            for part in sums.values():
                rounded = logfmt_roundtrip(part.bfloat16()[None])[0] if use_logfmt else part.bfloat16()
                total = total + (rounded.float() if per_rank else part)
            out[token] = total.bfloat16()
        return out
