"""Time normal-mode operations of one backend on the GPUs there are: 4096 x 7168, top-8 of 256 experts.

Three clocks per operation, in microseconds, slowest rank, median: kernels (profiler, all kernels summed), events around
the call with every rank released by a barrier on the device, and graph replay where shapes are worst-case.

    python benchmarks/ipc_normal.py --ranks 2 --num-sms 24 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from deepep.testing import launch

L2_BYTES = 256 << 20


def _flush(scratch: torch.Tensor) -> None:
    scratch.zero_()


def _inputs(args: argparse.Namespace, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(rank)
    shape = (args.tokens, args.hidden)
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)
    odds = torch.rand((args.tokens, args.experts), device="cuda", generator=generator)
    topk_idx = odds.topk(args.topk, dim=1).indices.to(torch.int64)
    weights = torch.rand((args.tokens, args.topk), device="cuda", generator=generator)
    x8 = x.to(torch.float8_e4m3fn)
    sf = torch.rand((args.tokens, args.hidden // 128), device="cuda", generator=generator)
    return {"x": x, "x8": x8, "sf": sf, "topk_idx": topk_idx, "weights": weights}


def _events(call: Callable[[], Any], backend: Any, scratch: torch.Tensor, count: int) -> float:
    """Median time between events around the call; a barrier on the device lets all ranks begin together."""
    times = []
    for _ in range(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush(scratch)
        torch.cuda._sleep(400_000)
        backend.barrier()
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _kernel_times(call: Callable[[], Any], backend: Any, scratch: torch.Tensor, count: int) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(count):
            _flush(scratch)
            torch.cuda._sleep(400_000)
            backend.barrier()
            call()
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in prof.events():
        if event.name.startswith("deepep_") and event.name != "deepep_barrier":
            times.setdefault(event.name, []).append(event.device_time)
    return {name: statistics.median(values) for name, values in times.items()}


def _graph(call: Callable[[], Any], backend: Any, scratch: torch.Tensor, count: int) -> float:
    """Median replay time of a graph that holds the one operation."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return _events(graph.replay, backend, scratch, count)


def _bench(group: Any, args: argparse.Namespace) -> dict[str, Any]:
    import deepep

    rank, num_ranks = group.rank(), group.size()
    data = _inputs(args, rank)
    scratch = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    buffer = deepep.Buffer(group, args.bytes, explicitly_destroy=True, backend=args.backend, timeout=10)
    elastic = deepep.ElasticBuffer(
        group, num_max_tokens_per_rank=args.tokens, hidden=args.hidden, num_topk=args.topk, explicitly_destroy=True,
        backend=args.backend, timeout=10,
    )  # fmt: skip
    backend: Any = buffer._backend
    expanding: Any = elastic._backend
    config = deepep.Buffer.get_dispatch_config(num_ranks)
    config = type(config)(args.num_sms)
    layout = buffer.get_dispatch_layout(data["topk_idx"], args.experts)
    counts: dict[str, Any] = {
        "num_tokens_per_rank": layout[0],
        "num_tokens_per_expert": layout[2],
        "is_token_in_rank": layout[3],
    }
    topk: dict[str, Any] = {"topk_idx": data["topk_idx"], "topk_weights": data["weights"]}
    worst = num_ranks * args.tokens

    def compact(payload: Any, **more: Any) -> Any:
        return buffer.dispatch(payload, **counts, **topk, config=config, **more)

    def expanded(payload: Any, **more: Any) -> Any:
        return elastic.dispatch(
            payload,
            **topk,
            num_experts=args.experts,
            expert_alignment=128,
            do_expand=True,
            num_sms=args.num_sms,
            **more,
        )

    fp8, bf16 = (data["x8"], data["sf"]), data["x"]
    got, handle = (result := compact(bf16))[0], result[4]
    spread = expanded(bf16)
    spread_x, spread_handle = spread[0], spread[3]
    inside = backend.combine_input_buffer(tuple(got.shape), got.dtype) if args.zero_copy else got
    if args.zero_copy:
        inside.copy_(got)
    jobs: dict[str, tuple[Callable[[], Any], Any]] = {
        "dispatch fp8 compact": (lambda: compact(fp8), backend),
        "dispatch fp8 expanded": (lambda: expanded(fp8), expanding),
        "dispatch bf16 compact": (lambda: compact(bf16), backend),
        "dispatch fp8 compact cached": (lambda: buffer.dispatch(fp8, handle=handle, config=config), backend),
        "combine bf16 compact": (lambda: buffer.combine(got, handle, config=config), backend),
        "combine bf16 expanded": (
            lambda: elastic.combine(spread_x, spread_handle, num_sms=args.num_sms),
            expanding,
        ),
    }
    if args.zero_copy:
        jobs["combine bf16 compact in window"] = (lambda: buffer.combine(inside, handle, config=config), backend)
        published = backend.dispatch_input_buffer(tuple(bf16.shape), bf16.dtype)
        published.copy_(bf16)
        jobs["dispatch bf16 compact cached in window"] = (
            lambda: buffer.dispatch(published, handle=handle, config=config),
            backend,
        )
        jobs["dispatch bf16 compact cached"] = (lambda: buffer.dispatch(bf16, handle=handle, config=config), backend)
    graphs: dict[str, tuple[Callable[[], Any], Any]] = {
        "dispatch fp8 compact": (lambda: compact(fp8, num_worst_tokens=worst), backend),
        "dispatch bf16 compact": (lambda: compact(bf16, num_worst_tokens=worst), backend),
        "dispatch fp8 expanded": (lambda: expanded(fp8, do_cpu_sync=False), expanding),
        "combine bf16 compact": jobs["combine bf16 compact"],
        "combine bf16 expanded": jobs["combine bf16 expanded"],
    }
    out: dict[str, Any] = {}
    for name, (call, over) in jobs.items():
        if args.only and not any(word in name for word in args.only):
            continue
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        row: dict[str, Any] = {"events": _events(call, over, scratch, args.count)}
        if not args.no_profiler:
            # Without a wait on the CPU in between, so that ranks stay in step.
            row["kernels"] = _kernel_times(graphs.get(name, (call, over))[0], over, scratch, args.count)
        if name in graphs and not args.no_graphs:
            row["graph"] = _graph(graphs[name][0], over, scratch, args.count)
        out[name] = row
    torch.cuda.synchronize()
    dist.barrier()
    buffer.destroy()
    elastic.destroy()
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--num-sms", type=int, nargs="+", default=[24])
    parser.add_argument("--bytes", type=int, default=200 << 20)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--backend", default="ipc")
    parser.add_argument("--zero-copy", action="store_true")
    parser.add_argument("--no-profiler", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("ipc_normal.py needs NVIDIA GPUs that torch can use; there are none")
    results = {}
    with launch.Workers(args.ranks, device="cuda") as workers:
        for num_sms in args.num_sms:
            args_one = argparse.Namespace(**{**vars(args), "num_sms": num_sms})
            rows = workers.run(_bench, args_one, timeout=100.0)
            results[num_sms] = _slowest(rows)
            for name, row in results[num_sms].items():
                kernels = " + ".join(f"{key[7:]} {value:.1f}" for key, value in row.get("kernels", {}).items())
                total = sum(row.get("kernels", {}).values())
                graph = f"{row['graph']:.1f}" if "graph" in row else "-"
                print(
                    f"SMs {num_sms:3} {name:32} events {row['events']:7.1f}  graph {graph:>7}  "
                    f"kernels {total:7.1f} = {kernels}",
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


def _slowest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in rows[0]:
        every = [row[name] for row in rows]
        merged[name] = {key: max(row[key] for row in every) for key in every[0] if key != "kernels"}
        if "kernels" in every[0]:
            merged[name]["kernels"] = {key: max(row["kernels"][key] for row in every) for key in every[0]["kernels"]}
    return merged


if __name__ == "__main__":
    main()
