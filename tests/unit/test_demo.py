"""The demo: it learns, its curve is that of a single process, and it says so."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from deepep import InvalidArgument, ranks
from deepep.demo import cli, report
from deepep.demo.options import Options
from deepep.demo.train import Outcome, run_alone, run_rank
from deepep.group import make_group
from deepep.testing.launch import Workers

pytest.importorskip("sklearn", reason="pip install 'deepep[demo]'")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_group(group: Any, options: Options) -> Outcome:
    return run_rank(make_group(group), options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_reads_held_out_digits(seed: int) -> None:
    assert run_alone(Options(seed=seed)).accuracy >= 0.95


def test_ranks_learn_what_one_process_learns() -> None:
    with Workers(3) as workers:
        for options in (Options(epochs=4, num_experts=6), Options(epochs=1, num_experts=6, num_topk=4, batch_size=700)):
            alone = run_alone(options)
            for outcome in workers.run(on_group, options):
                assert report.agrees(options, outcome, alone)
                assert outcome.accuracy == pytest.approx(alone.accuracy, abs=0.01)
                assert outcome.expert_load == alone.expert_load or options.num_topk > 2
                assert outcome.num_bytes == outcome.num_rows * options.hidden * 4 > 0


def test_the_command_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert cli.main(["--num-ranks", "2", "--epochs", "2", "--digest", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^test accuracy: \d+\.\d %$", printed, re.M)
    assert re.search(r"loss curve equals .* largest difference \S+ over 12 steps \(tolerance 1e-09\)", printed)
    assert len(re.findall(r"^rank \d rows [0-9a-f]{64}$", printed, re.M)) == 2
    assert picture.stat().st_size > 10_000


def test_another_curve_is_noticed() -> None:
    options = Options()
    assert not report.agrees(options, Outcome(losses=[1.0, 0.5]), Outcome(losses=[1.0, 0.5 + 1e-6]))
    assert "DIFFERS" in report.text(
        options,
        [Outcome(losses=[1.0, 0.5], expert_load=[1] * 8)],
        Outcome(losses=[1.0, 0.6], expert_load=[1] * 8),
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main([]) == 2
    assert "this needs scikit-learn: pip install 'deepep[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--num-experts", "6", "--num-topk", "7"], "num_topk is 7"),
        (["--epochs", "0"], "epochs is 0"),
        (["--num-ranks", "0"], "num_ranks is 0"),
        (["--num-ranks", "3", "--epochs", "1"], "multiple of 3 ranks"),
    ],
)
def test_bad_options_are_named(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*args, "--no-plot"]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        ("/nonexistent/a.png", "--plot /nonexistent/a.png: there is no folder /nonexistent"),
        ("a.foo", "--plot a.foo: the name must end in one of "),
    ],
)
def test_the_picture_is_looked_at_first(picture: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(ranks, "run_on_ranks", side_effect=AssertionError("started")):
        assert cli.main(["--plot", picture]) == 2
    assert text in capsys.readouterr().err


def test_rows_of_sixteen_bytes_only() -> None:
    with pytest.raises(InvalidArgument, match="multiple of 4"):
        Options(hidden=66)
