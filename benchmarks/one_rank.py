"""One rank, no peers: the kernels alone, for ncu and compute-sanitizer.

ncu --clock-control none -k regex:deepep_combine --launch-skip 2 -c 1 python benchmarks/one_rank.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist


def main() -> None:
    """Run each operation a few times."""
    import deepep

    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--num-sms", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--profile-host", action="store_true", help="where Python spends a call's time")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("one_rank.py needs an NVIDIA GPU that torch can use; there is none")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    num_tokens, hidden, experts, topk = args.tokens, args.hidden, 256, 8
    x = torch.randn(num_tokens, hidden, device="cuda").to(torch.bfloat16)
    fp8: Any = (x.to(torch.float8_e4m3fn), torch.rand(num_tokens, hidden // 128, device="cuda"))
    topk_idx = torch.rand(num_tokens, experts, device="cuda").topk(topk, dim=1).indices
    buffer = deepep.ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=num_tokens, hidden=hidden, num_topk=topk, backend="ipc", timeout=5
    )
    for _ in range(args.repeats):
        for do_expand in (False, True):
            for payload in (fp8, x):
                got: Any = buffer.dispatch(
                    payload, topk_idx=topk_idx, num_experts=experts, expert_alignment=128, do_expand=do_expand,
                    num_sms=args.num_sms,
                )  # fmt: skip
            buffer.combine(got[0], got[3], num_sms=args.num_sms)
    torch.cuda.synchronize()
    if args.profile_host:
        _profile_host(lambda: buffer.dispatch(x, topk_idx=topk_idx, num_experts=experts, num_sms=args.num_sms))
    buffer.destroy()


def _profile_host(call: Callable[[], Any]) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    for _ in range(200):
        torch.cuda.synchronize()
        profile.enable()
        call()
        profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    times = []
    for _ in range(100):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    print(f"host time of a call: {statistics.median(times) * 1e6:.1f} us")


if __name__ == "__main__":
    main()
