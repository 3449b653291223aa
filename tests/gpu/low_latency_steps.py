"""What ranks do in the low-latency tests; each function runs on every rank."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from low_latency_decoder import HIDDEN, MAX_TOKENS, TOPK, Decoder, same_bits

import deepep


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
        num_wrong += not same_bits(got, decoder.expected())
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
        num_wrong += not same_bits(got, wanted)
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
            num_wrong += not same_bits(decoder.step(), first)
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
        num_wrong += not same_bits(got, want)
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


def take_back(group: Any, is_cleaned_without: bool) -> str:
    """A rank that was masked and is taken back in is left out until all ranks have cleaned their windows.

    That the others did, with it masked, is not enough.
    """
    back = group.size() - 1
    decoder = Decoder(group, enable_shrink=True)
    decoder.draw(1)
    assert torch.equal(decoder.step(), decoder.expected())
    torch.cuda.synchronize()
    dist.barrier(group)
    if decoder.rank != back:
        decoder.buffer.low_latency_update_mask_buffer(back, mask=True)
        assert torch.equal(decoder.step(), decoder.expected(gone=(back,)))
        if is_cleaned_without:
            decoder.buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, decoder.num_experts)
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


def clean_alone(group: Any) -> str:
    """A rank that cleaned alone is taken back: the barriers that it began then are no answer to those of all ranks."""
    alone = group.size() - 1
    decoder = Decoder(group, timeout=1.0, enable_shrink=True)
    decoder.draw(1)
    assert torch.equal(decoder.step(), decoder.expected())
    torch.cuda.synchronize()
    dist.barrier(group)
    if decoder.rank == alone:
        decoder.buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, decoder.num_experts)
        torch.cuda.synchronize()
        status = torch.zeros(decoder.num_ranks, dtype=torch.int32, device="cuda")
        decoder.buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(rank != alone) for rank in range(decoder.num_ranks)], status.tolist()
    dist.barrier(group)
    decoder.buffer.low_latency_clean_mask_buffer()
    for seed in range(5):
        if decoder.rank == alone:  # the others are not to go on before it has cleaned, too
            time.sleep(0.2)
        decoder.buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, decoder.num_experts)
        decoder.draw(seed)
        assert torch.equal(decoder.step(), decoder.expected()), f"seed {seed}"
    dist.barrier(group)
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
