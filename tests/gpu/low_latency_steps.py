"""What ranks do in the low-latency tests; each function runs on every rank."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepep

MAX_TOKENS, HIDDEN, TOPK = 48, 512, 4


class Decoder:
    """A buffer and the tensors of one decode step, whose experts give back what they get."""

    def __init__(self, group: Any, timeout: float = 5.0, enable_shrink: bool = False) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self.num_experts = 8 * self.num_ranks
        num_bytes = deepep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, self.num_ranks, self.num_experts)
        self.buffer = deepep.Buffer(
            group,
            0,
            num_bytes,
            low_latency_mode=True,
            backend="ipc",
            timeout=timeout,
            enable_shrink=enable_shrink,
            explicitly_destroy=True,
        )
        self.x = torch.empty(MAX_TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.topk_idx = torch.empty(MAX_TOKENS, TOPK, dtype=torch.int64, device="cuda")
        self.topk_weights = torch.empty(MAX_TOKENS, TOPK, device="cuda")
        self.left_out = torch.zeros(MAX_TOKENS, TOPK, dtype=torch.bool, device="cuda")  # of combine only
        self.num_tokens = MAX_TOKENS

    def draw(self, seed: int) -> None:
        """New tokens and routing in place, with some choices missing."""
        generator = torch.Generator().manual_seed(1000 * seed + self.rank)
        self.x.copy_(torch.randn(MAX_TOKENS, HIDDEN, generator=generator))
        scores = torch.rand(MAX_TOKENS, self.num_experts, generator=generator)
        missing = torch.rand(MAX_TOKENS, TOPK, generator=generator) < 0.2
        self.topk_idx.copy_(scores.topk(TOPK, dim=1).indices.masked_fill(missing, -1))
        self.topk_weights.copy_(torch.rand(MAX_TOKENS, TOPK, generator=generator))

    def step(
        self,
        *,
        weights_ahead: bool = False,
        use_hook: bool = False,
        is_async: bool = False,
        reduction: str = "per_rank",
    ) -> torch.Tensor:
        """Dispatch and combine once; returns [T, H]."""
        x, topk_idx, topk_weights = (part[: self.num_tokens] for part in (self.x, self.topk_idx, self.topk_weights))
        rows, _, handle, event, hook = self.buffer.low_latency_dispatch(
            x,
            topk_idx,
            MAX_TOKENS,
            self.num_experts,
            use_fp8=False,
            async_finish=is_async,
            return_recv_hook=use_hook,
            topk_weights=topk_weights if weights_ahead else None,
        )
        if hook is not None:
            hook()
        if is_async:
            event.current_stream_wait()
        assert isinstance(rows, torch.Tensor)
        if not weights_ahead:
            topk_idx = topk_idx.masked_fill(self.left_out[: self.num_tokens], -1)
        y, event, hook = self.buffer.low_latency_combine(
            rows,
            topk_idx,
            topk_weights,
            handle,
            async_finish=is_async,
            return_recv_hook=use_hook,
            reduction=reduction,
        )
        if hook is not None:
            hook()
        if is_async:
            event.current_stream_wait()
        return y

    def expected_copies(self) -> torch.Tensor:
        """What `step` gives with the reduction "per_copy", worked out from this rank's tokens alone: [T, H]."""
        counts = (self.topk_idx >= 0) & ~self.left_out
        total = torch.zeros(MAX_TOKENS, HIDDEN, device="cuda")
        for k in range(TOPK):
            total = torch.where(counts[:, k, None], total + self.topk_weights[:, k, None] * self.x.float(), total)
        return total.to(torch.bfloat16)[: self.num_tokens]

    def expected(self, gone: tuple[int, ...] = ()) -> torch.Tensor:
        """What `step` gives, worked out from this rank's tokens alone: [T, H]."""
        owner = self.topk_idx.div(self.num_experts // self.num_ranks, rounding_mode="floor")
        last = torch.full((MAX_TOKENS, self.num_ranks), -1, device="cuda")
        sums = torch.zeros(self.num_ranks, MAX_TOKENS, HIDDEN, device="cuda")
        for k in range(TOPK):
            for rank in range(self.num_ranks):
                here = (owner[:, k] == rank) & (self.topk_idx[:, k] >= 0)
                last[:, rank] = torch.where(here, k, last[:, rank])
                term = self.topk_weights[:, k, None] * self.x.float()
                counts = here & ~self.left_out[:, k]
                sums[rank] = torch.where(counts[:, None], sums[rank] + term, sums[rank])
        rounded, total = sums.to(torch.bfloat16).float(), torch.zeros(MAX_TOKENS, HIDDEN, device="cuda")
        for k in range(TOPK):
            for rank in set(range(self.num_ranks)) - set(gone):
                total = torch.where((last[:, rank] == k)[:, None], total + rounded[rank], total)
        return total.to(torch.bfloat16)[: self.num_tokens]


def replay_graphs(group: Any, num_replays: int) -> int:
    """Two captured steps and eager ones take turns over changing routing; returns how many results were wrong."""
    decoder = Decoder(group)
    decoder.draw(0)
    decoder.step()
    graphs, results = [], []
    for weights_ahead in (True, False):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(decoder.step(weights_ahead=weights_ahead))
        graphs.append(graph)
    num_wrong = 0
    for seed in range(num_replays):
        decoder.draw(seed)
        which = seed % 5 if seed % 5 < 2 else seed % 2
        graphs[which].replay()
        got = results[which]
        if seed % 5 >= 3:
            got = decoder.step(weights_ahead=seed % 2 == 0, use_hook=seed % 5 == 4)
        num_wrong += not torch.equal(got.view(torch.int16), decoder.expected().view(torch.int16))
    decoder.buffer.destroy()
    return num_wrong


def write_inputs_late(group: Any, writer: str, is_async: bool, num_seeds: int) -> int:
    """What a step reads is written right before it, and late; returns how many were wrong."""
    decoder = Decoder(group)
    inputs = (decoder.x, decoder.topk_idx, decoder.topk_weights)
    late = [torch.zeros_like(part) for part in inputs]

    def late_step() -> torch.Tensor:
        torch.cuda._sleep(100_000)
        for part, value in zip(inputs, late, strict=True):
            if writer == "copy":
                part.copy_(value)
            else:
                torch.add(value, 0, out=part)
        return decoder.step(is_async=is_async)

    late_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = late_step()
    num_wrong = 0
    for seed in range(num_seeds):
        decoder.draw(seed)
        for part, value in zip(inputs, late, strict=True):
            value.copy_(part)
        wanted = decoder.expected()
        decoder.draw(seed + num_seeds)  # what a step that does not wait would read
        if seed % 2 == 0:
            graph.replay()
        got = replayed if seed % 2 == 0 else late_step()
        num_wrong += not torch.equal(got.view(torch.int16), wanted.view(torch.int16))
    decoder.buffer.destroy()
    return num_wrong


def repeat_bitwise(group: Any, num_seeds: int, num_repeats: int) -> int:
    """The same step again and again; returns how many results differ from the first of their seed."""
    decoder = Decoder(group)
    num_wrong = 0
    for seed in range(num_seeds):
        decoder.draw(seed)
        first = decoder.step()
        for _ in range(num_repeats - 1):
            num_wrong += not torch.equal(decoder.step().view(torch.int16), first.view(torch.int16))
    decoder.buffer.destroy()
    return num_wrong


def mix_calls(group: Any, num_seeds: int) -> int:
    """Few and many tokens, both reductions, choices left out, phases; returns how many results were wrong."""
    decoder = Decoder(group)
    num_wrong = 0
    for seed in range(num_seeds):
        decoder.draw(seed)
        decoder.num_tokens = random.Random(f"{seed} {decoder.rank}").choice((0, 1, 8, 9, MAX_TOKENS // 2, MAX_TOKENS))
        weights_ahead, use_hook = seed % 5 == 0, seed % 3 == 0
        decoder.left_out.fill_(False)
        if not weights_ahead and seed % 2:
            decoder.left_out.random_(0, 2)
        if seed % 4 == 1:
            got, want = decoder.step(use_hook=use_hook, reduction="per_copy"), decoder.expected_copies()
        else:
            got, want = decoder.step(weights_ahead=weights_ahead, use_hook=use_hook), decoder.expected()
        num_wrong += not torch.equal(got.view(torch.int16), want.view(torch.int16))
    decoder.buffer.destroy()
    return num_wrong


def pass_on_any_bits(group: Any) -> int:
    """Every pattern of 16 bits is dispatched, all ones included; returns how many calls went wrong."""
    decoder = Decoder(group)
    room, num_wrong = decoder.num_ranks * MAX_TOKENS, 0
    patterns = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16).view(-1, HIDDEN)
    ones = torch.full((MAX_TOKENS, HIDDEN), -1, dtype=torch.int16, device="cuda")
    choices = torch.arange(MAX_TOKENS * TOPK, device="cuda") % decoder.num_experts
    decoder.topk_idx.copy_(choices.view(-1, TOPK))
    for first in range(0, patterns.shape[0], MAX_TOKENS):
        rows = patterns[first : first + MAX_TOKENS]
        for x in (rows, ones):
            got, counts, *_ = decoder.buffer.low_latency_dispatch(
                x.view(torch.bfloat16), decoder.topk_idx[: len(x)], MAX_TOKENS, decoder.num_experts, use_fp8=False
            )
            assert isinstance(got, torch.Tensor)
            assert got.shape[1] == room
            expert = decoder.rank * (decoder.num_experts // decoder.num_ranks)
            mine = (decoder.topk_idx[: len(x)] == expert).any(dim=1)
            bits, want = got[0, : int(counts[0])].view(torch.int16), x[mine].repeat(decoder.num_ranks, 1)
            if x is ones:  # two channels of them where a vector of eight ends lose a bit, and stay NaN
                want[:, 6::8] = -2
            num_wrong += not torch.equal(bits, want)
    decoder.buffer.destroy()
    return num_wrong


def shrink(group: Any, leave_before: str) -> str:
    """The last rank leaves before a phase; the others mask exactly it, in time, and go on with right results."""
    gone, timeout = group.size() - 1, 1.0
    decoder = Decoder(group, timeout=timeout, enable_shrink=True)
    decoder.draw(1)
    assert torch.equal(decoder.step(), decoder.expected())
    torch.cuda.synchronize()
    dist.barrier(group)
    if decoder.rank == gone:
        if leave_before == "combine":
            decoder.buffer.low_latency_dispatch(decoder.x, decoder.topk_idx, MAX_TOKENS, decoder.num_experts)
            torch.cuda.synchronize()
        dist.barrier(group)
        return "left"
    started = time.monotonic()
    if leave_before == "clean":
        decoder.buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, decoder.num_experts)
    else:
        decoder.step()
    torch.cuda.synchronize()
    assert time.monotonic() - started < 3 * timeout, f"took {time.monotonic() - started:.1f} s"
    status = torch.zeros(decoder.num_ranks, dtype=torch.int32, device="cuda")
    decoder.buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(rank == gone) for rank in range(decoder.num_ranks)], status.tolist()
    for seed in range(5):
        decoder.draw(seed)
        assert torch.equal(decoder.step(), decoder.expected(gone=(gone,))), f"seed {seed}"
    dist.barrier(group)
    decoder.buffer.destroy()
    return "went on"


def take_back(group: Any) -> str:
    """A rank that was masked and is taken back in is left out until all ranks have cleaned their windows."""
    back = group.size() - 1
    decoder = Decoder(group, enable_shrink=True)
    decoder.draw(1)
    assert torch.equal(decoder.step(), decoder.expected())
    torch.cuda.synchronize()
    dist.barrier(group)
    if decoder.rank != back:
        decoder.buffer.low_latency_update_mask_buffer(back, mask=True)
        assert torch.equal(decoder.step(), decoder.expected(gone=(back,)))
        decoder.buffer.low_latency_update_mask_buffer(back, mask=False)
        decoder.buffer.low_latency_dispatch(decoder.x, decoder.topk_idx, MAX_TOKENS, decoder.num_experts)
        torch.cuda.synchronize()
        with pytest.raises(deepep.InvalidArgument, match=rf"rank\(s\) \[{back}\] .* clean_low_latency_buffer"):
            decoder.step()
    dist.barrier(group)
    decoder.buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, decoder.num_experts)
    for seed in range(5):
        decoder.draw(seed)
        assert torch.equal(decoder.step(), decoder.expected()), f"seed {seed}"
    decoder.buffer.destroy()
    return "took it back"


def lose_without_masks(group: Any) -> str:
    """Without masks a missing rank is named by the next call, and the context lives."""
    gone = group.size() - 1
    decoder = Decoder(group, timeout=1.0)
    decoder.draw(1)
    decoder.step()
    torch.cuda.synchronize()
    dist.barrier(group)
    if decoder.rank != gone:
        decoder.step()
        torch.cuda.synchronize()
        with pytest.raises(deepep.CommTimeout) as caught:
            decoder.step()
        assert caught.value.missing_ranks == (gone,), str(caught.value)
        assert int(torch.ones(4, device="cuda").sum()) == 4
    dist.barrier(group)
    decoder.buffer.destroy()
    return "named it"
