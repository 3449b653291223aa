"""Run the contract's checks on GPUs, all ranks on the GPUs there are (start MPS first where they share one).

python tests/gpu/run_contract.py --ranks 1 2 4 8 --seconds 60
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from deepep.progress import progress_bar
from deepep.testing import contract, launch
from deepep.testing.routing import Case
from deepep.testing.target import Target


def larger_cases(num_ranks: int) -> dict[str, Case]:
    """What the portable cases leave out: many top-k positions, several laps of the window, many tokens."""
    wide = Case((40,) * num_ranks, hidden=256, num_experts=64 * num_ranks, num_topk=48, pattern="holes", seed=90)
    many = Case((2100,) * num_ranks, hidden=1024, num_experts=16 * num_ranks, num_topk=8, expert_alignment=16, seed=91)
    return {
        "k33": replace(wide, num_topk=33),
        "k48": wide,
        "k64": replace(wide, num_topk=64, pattern="uniform"),
        "many": replace(many, num_tokens=tuple(2100 - 613 * (rank % 3) for rank in range(num_ranks))),
        "many_fp8": replace(many, dtype=torch.float8_e4m3fn, num_sf=8),
        "laps": replace(many, hidden=16384, num_topk=4, num_tokens=(700,) * num_ranks, num_max_tokens_per_rank=700),
        "unequal_laps": replace(
            many, hidden=16384, num_topk=4, num_tokens=(1200, *(90,) * (num_ranks - 1)), num_max_tokens_per_rank=1200
        ),
    }


LARGER = ("dispatch", "combine", "worst_case", "elastic_combine", "expanded_dispatch", "expanded_combine")


class SmallWindow(Target):
    """Buffers with the least window, so that rows go round it several times."""

    def buffer(self, group: Any, case: Case, *, low_latency_mode: bool = False, **options: Any) -> Any:
        import deepep

        del low_latency_mode, case
        return deepep.Buffer(
            group, 1 << 20, explicitly_destroy=True, backend=self.backend, timeout=self.timeout, **options
        )


def run_larger(group: Any, check: str, case: str, target: Target) -> str:
    cases = larger_cases(group.size())
    if case.endswith("laps") and check in ("dispatch", "combine", "worst_case"):
        target = SmallWindow(target.backend, target.device, target.timeout)
    contract.CHECKS[check].run(group, target, cases[case])
    return ""


def run_faults(group: Any, check: str, case: str, target: Target) -> str:
    """Ranks that disagree, refuse, have too little room or do not come: errors with a name, and life goes on."""
    import deepep

    del check, case
    rank, num_ranks = group.rank(), group.size()
    if num_ranks < 2:
        return "needs 2 ranks"
    buffer: Any = deepep.Buffer(group, 8 << 20, explicitly_destroy=True, backend=target.backend, timeout=3.0)
    x = torch.randn(40, 256, device="cuda").to(torch.bfloat16)
    idx = torch.stack([torch.randperm(4 * num_ranks)[:4] for _ in range(40)]).cuda()
    layout = buffer.get_dispatch_layout(idx, 4 * num_ranks)
    known: dict[str, Any] = {
        "num_tokens_per_rank": layout[0],
        "num_tokens_per_expert": layout[2],
        "is_token_in_rank": layout[3],
    }

    def good() -> None:
        recv, *_, handle, _ = buffer.dispatch(x, topk_idx=idx, **known)
        buffer.combine(recv, handle)
        torch.cuda.synchronize()

    def fails(kind: type[Exception], call: Any) -> str:
        try:
            call()
        except kind as error:
            return str(error)
        raise AssertionError(f"rank {rank}: {kind.__name__} was not raised")

    good()
    narrow = x[:, : 256 - 128 * (rank == 1)].contiguous()
    text = fails(deepep.InvalidArgument, lambda: buffer.dispatch(narrow, topk_idx=idx, **known))
    assert all(word in text for word in ("hidden", "128", "256")), text
    good()
    bad_idx = idx if rank else idx.int()
    text = fails(deepep.InvalidArgument, lambda: buffer.dispatch(x, topk_idx=bad_idx, **known))
    good()
    buffer.dispatch(x, topk_idx=idx, num_worst_tokens=2, **known)
    torch.cuda.synchronize()
    text = fails(deepep.InvalidArgument, good)
    assert "room for 2" in text, text
    good()
    buffer._backend.barrier()
    torch.cuda.synchronize()
    started = time.monotonic()
    if rank == 1:
        time.sleep(5.0)
    else:
        text = fails(deepep.CommTimeout, lambda: buffer.dispatch(x, topk_idx=idx, **known))
        assert "rank(s) 1 " in text, text
        assert 2.0 < time.monotonic() - started < 6.0, time.monotonic() - started
    assert float((x.float() * 0 + 1).sum()) == x.numel()
    torch.distributed.barrier()
    buffer.destroy()
    return ""


def run_graph(group: Any, check: str, case: str, target: Target) -> str:
    """A captured dispatch and combine follow their inputs: other tokens and routing give what eager calls give."""
    import deepep

    del check
    rank, num_ranks = group.rank(), group.size()
    num_tokens, num_experts = 600, 8 * num_ranks
    buffer: Any = deepep.Buffer(group, 8 << 20, explicitly_destroy=True, backend=target.backend, timeout=5.0)
    if case == "alone":
        # As if this rank had its GPU for itself: rows are staged by both kernels of a dispatch.
        buffer._backend._engine.ranks_per_gpu = 1
    generator = torch.Generator().manual_seed(rank)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        odds = torch.rand(num_tokens, num_experts, generator=generator)
        x = torch.randn(num_tokens, 512, generator=generator)
        return x.to("cuda", torch.bfloat16), odds.topk(4, dim=1).indices.cuda()

    x, idx = draw()
    layout = buffer.get_dispatch_layout(idx, num_experts)
    known: dict[str, Any] = {"num_tokens_per_expert": layout[2]}
    worst = num_ranks * num_tokens

    def both() -> tuple[torch.Tensor, ...]:
        recv, recv_idx, _, _, handle, _ = buffer.dispatch(x, topk_idx=idx, num_worst_tokens=worst, **known)
        return recv_idx, buffer.combine(recv, handle)[0]

    both()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(5):
        for old, new in zip((x, idx), draw(), strict=True):
            old.copy_(new)
        torch.cuda.synchronize()
        torch.distributed.barrier()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for got, want in zip(replayed, both(), strict=True):
            assert torch.equal(got, want), f"rank {rank}: a replay differs from eager calls"
    torch.cuda.synchronize()
    buffer.destroy()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backend", default="ipc")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--low-latency", action="store_true")
    parser.add_argument("--failures", type=int, default=6)
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="in random order: a fair sample if time is short")
    args = parser.parse_args()
    target = Target(args.backend, "cuda", 10.0)
    num_failed = 0
    for num_ranks in args.ranks:
        jobs = [(contract.run_check, check, case) for check, case in contract.checks_and_cases()]
        jobs = [job for job in jobs if args.low_latency or not job[1].startswith("low_latency")]
        jobs += [(run_larger, check, case) for case in larger_cases(1) for check in LARGER]
        jobs += [(run_graph, "graph", "shared"), (run_graph, "graph", "alone"), (run_faults, "faults", "")]
        jobs = [job for job in jobs if not job[2].startswith("hosts")]
        jobs = [job for job in jobs if not args.only or job[1] in args.only or job[2] in args.only]
        if args.shuffle is not None:
            random.Random(args.shuffle).shuffle(jobs)
        num_failed += _run_jobs(num_ranks, jobs, target, args.seconds, args.failures)
    return 1 if num_failed else 0


def _run_jobs(num_ranks: int, jobs: list[Any], target: Target, seconds: float, most_failures: int) -> int:
    passed = failed = skipped = 0
    with (
        launch.Workers(num_ranks, device="cuda") as workers,
        progress_bar(len(jobs), f"R={num_ranks}", "check") as bar,
    ):
        started = time.monotonic()  # starting ranks is not part of the time given
        for run, check, case in jobs:
            if (time.monotonic() - started > seconds or failed >= most_failures) and run not in (run_faults, run_graph):
                continue
            bar.set_postfix_str(f"{check}-{case}")
            bar.update()
            try:
                reasons = workers.run(run, check, case, target, timeout=120.0)
            except Exception as error:  # noqa: BLE001 (whatever a rank raises is a finding)
                failed += 1
                print(f"R={num_ranks} FAILED {check}-{case}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
                continue
            if any(reasons):
                skipped += 1
                print(f"R={num_ranks} skipped {check}-{case}: {next(filter(None, reasons))[:120]}", flush=True)
            else:
                passed += 1
    took = time.monotonic() - started
    print(
        f"R={num_ranks}: {passed} passed, {failed} failed, {skipped} skipped, of {len(jobs)} in {took:.1f} s",
        flush=True,
    )
    return failed or int(passed + skipped == 0)  # that nothing ran is no success


if __name__ == "__main__":
    sys.exit(main())
