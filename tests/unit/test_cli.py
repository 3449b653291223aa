"""`python -m deepep` and where its ranks come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from deepep import InvalidArgument, cli, ranks
from deepep.__main__ import main
from deepep.group import Group


def test_usage_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("doctor", "demo", "bench", "compile"):
        assert f"\n  {name} " in printed


def test_an_unknown_subcommand_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dance"]) == 2
    assert "'dance' is no subcommand" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("deepep ")


@pytest.mark.parametrize("name", ["doctor", "demo", "bench", "compile"])
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"python -m deepep {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpi"),
        ({"PMI_SIZE": "4"}, "mpi"),
    ],
)
def test_launchers_are_told_apart(environ: dict[str, str], expected: str | None) -> None:
    assert ranks.launcher(environ) == expected


def who(group: Group, greeting: str) -> str:
    return f"{greeting} {group.rank} of {group.num_ranks}"


def test_local_ranks_are_spawned() -> None:
    assert ranks.run_on_ranks(who, "rank", num_ranks=2) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="sees no GPU"):
        ranks.run_on_ranks(who, "rank", num_ranks=2, device="cuda")


def test_only_the_rank_that_reports_needs_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "launcher", lambda: "torchrun")
    monkeypatch.setenv("RANK", "1")
    cli.check_output("--json", Path("/nonexistent/x"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InvalidArgument, match="no folder /nonexistent"):
        cli.check_output("--json", Path("/nonexistent/x"))


def test_a_file_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli.check_output("--json", None)
    cli.check_output("--json", tmp_path / "x")
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(InvalidArgument, match="may not write"):
        cli.check_output("--json", tmp_path / "x")


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise OSError(28, "No space left on device")

    assert cli.exit_status(work, {}) == 2
    assert capsys.readouterr().err == "OSError: [Errno 28] No space left on device\n"
