"""The bench: it measures what it says, and a wrong result has no time."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from deepep import InvalidArgument, ranks
from deepep.bench import checks, cli, report
from deepep.bench.checks import Scene, WrongResult
from deepep.bench.inputs import make_choice
from deepep.bench.measure import CudaClock
from deepep.bench.plan import Plan
from deepep.bench.run import RankReport, Timing


def plan_of(**changes: object) -> Plan:
    given = {
        "backend": "reference", "device": "cpu", "num_tokens": 50, "hidden": 256, "num_topk": 3, "num_experts": 8,
        "dtype": "bf16", "layouts": ("compact",), "routings": ("balanced",), "num_sms": (0,), "num_iters": 2, "seed": 0,
    }  # fmt: skip
    return Plan(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "args",
    [
        ["--layout", "compact", "expanded", "--dtype", "fp8"],
        ["--layout", "compact", "expanded", "--dtype", "fp32"],
        ["--low-latency"],
    ],
)
def test_the_command_measures_and_checks(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-ranks", "2", "--num-tokens", "40", "--hidden", "256", "--num-experts", "8", "--num-topk", "3"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert cli.main([*sizes, *args, *files, "--num-iters", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 ranks on 1 host(s), cpu, backend reference" in printed
    assert "bare calls" in printed
    found = json.loads((tmp_path / "b.json").read_text())
    assert {row["routing"] for row in found["results"]} == {"balanced", "unbalanced"}
    for row in found["results"]:
        assert row["wall_us"] > 0
        assert (row["bare_us"] is None) == (row["op"] == "layout")
        assert (row["remote_bytes"] == 0) == (row["op"] == "layout")
    assert (tmp_path / "b.png").stat().st_size > 5_000


def test_wrong_rows_are_noticed() -> None:
    scene = Scene(plan_of(), "balanced", 0, 1)
    checks.compact_rows(scene, scene.payload.clone())
    swapped = scene.payload.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(WrongResult, match="rows of rank 0"):
        checks.compact_rows(scene, swapped)
    with pytest.raises(WrongResult, match="rows"):
        checks.compact_rows(scene, scene.payload[:-1])


def test_wrong_sums_are_noticed() -> None:
    scene = Scene(plan_of(), "balanced", 1, 2)
    assert scene.mine.per_rank.sum(dim=1).tolist() == [3] * 50
    factor = ((scene.mine.per_rank > 0) * torch.tensor([1, 2])).sum(dim=1, keepdim=True)
    good = (scene.payload.float() * factor).bfloat16()
    checks.combined(scene, good)
    good[7, 9] *= 2
    with pytest.raises(WrongResult, match="combined_x"):
        checks.combined(scene, good)


def test_unbalanced_routing_prefers_the_lower_half() -> None:
    plan = plan_of(num_tokens=4000, num_topk=1)
    for routing, expected in (("balanced", 1 / 2), ("unbalanced", 2 / 3)):
        idx = make_choice(plan, routing, 0, 2).topk_idx
        assert float((idx < 4).float().mean()) == pytest.approx(expected, abs=0.03)


def test_the_slowest_rank_of_each_call_counts() -> None:
    def rank_with(wall: list[float], remote: int) -> RankReport:
        timing = Timing("dispatch", "compact", "balanced", 0, remote, wall=wall, bare=[2.0, 2.0, 2.0], bare_name="x")
        return RankReport("ipc", "NVIDIA H200", 1, 1, {}, [timing])

    (row,) = report.summarise([rank_with([1.0, 9.0, 1.0], 730), rank_with([4.0, 1.0, 5.0], 365)])
    assert row.wall_us == 5.0
    assert row.remote_bytes == 730
    assert row.floor_us == pytest.approx(730 / 365e9 * 1e6)
    assert row.ratio_to_floor == pytest.approx(5.0 * 365e9 / 730 / 1e6)
    assert row.bare_us == 2.0
    assert row.replay_us is None


def test_calls_in_a_row_share_the_time_of_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(CudaClock, "_between_events", lambda _self, _call: 48.0)
    clock, call = CudaClock(lambda: None, None, False), mock.Mock()
    assert clock.replay(call, 3) == [48.0] * 3
    assert call.call_count == 2  # one of them before the capture
    assert clock.replay(call, 3, 16) == [3.0] * 3
    assert call.call_count == 2 + 17


def test_no_floor_where_ranks_share_a_gpu() -> None:
    reports = [RankReport("ipc", "NVIDIA H200", 2, 1, {}, [Timing("combine", "compact", "balanced", 0, 9, [1.0])])] * 2
    assert report.summarise(reports)[0].floor_us is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"num_tokens": 0}, "num_tokens is 0"), ({"num_topk": 9}, "num_topk is 9"), ({"hidden": 7}, "16 bytes")],
)
def test_bad_plans_are_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        plan_of(**changes)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--num-tokens", "0"], "num_tokens is 0"),
        (["--num-iters", "0"], "num_iters is 0"),
        (["--low-latency", "--dtype", "fp32"], "--dtype does not go with --low-latency"),
        (["--low-latency", "--layout", "compact"], "--layout does not go with --low-latency"),
        (["--low-latency", "--num-sms", "8"], "--num-sms does not go with --low-latency"),
        (["--num-experts", "9", "--num-ranks", "2"], "num_experts is 9; it must be a multiple of 2 ranks"),
        (["--num-experts", "3", "--num-topk", "2"], "num_experts is 3; it must be a multiple of 4 ranks"),
        (["--json", "/nonexistent/x"], "--json /nonexistent/x: there is no folder /nonexistent"),
        (["--json", "/"], "--json /: this is a folder"),
        (["--plot", "/nonexistent/x.png"], "--plot /nonexistent/x.png: there is no folder /nonexistent"),
        (["--plot", "x.foo"], "--plot x.foo: the name must end in one of "),
    ],
)
def test_options_are_refused_rather_than_ignored(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(ranks, "run_on_ranks", side_effect=AssertionError("started")):
        assert cli.main(args) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--timeout", "nan"], ["--timeout", "0"], ["--timeout", "inf"], ["--seed", "1e9"],
                                  ["--seed", str(10**20)], ["--seed", "-1"]])  # fmt: skip
def test_numbers_out_of_range_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    assert f"argument {args[0]}: " in capsys.readouterr().err


def test_ranks_that_do_not_answer_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--num-ranks", "1", "--num-tokens", "8", "--timeout", "0.001"]) == 2
    printed = capsys.readouterr().err
    assert printed == "WorkerError: rank(s) 0 did not answer (limit 0.001 s)\n"


def test_the_largest_seed_is_good_for_every_rank() -> None:
    make_choice(plan_of(seed=2**32 - 1), "balanced", 7, 8)


def test_an_unknown_backend_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--num-ranks", "1", "--backend", "nonsense", "--num-iters", "1", "--num-tokens", "8"]) == 2
    assert "nonsense" in capsys.readouterr().err
