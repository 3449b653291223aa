"""The doctor: what it finds is data first and text second."""

from __future__ import annotations

import json

import pytest

from deepep import doctor
from deepep.topology import Topology

_TOPOLOGY_MATRIX = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tNODE\t0-47\t0
GPU1\tNV18\t X \tSYS\tNODE\t0-47\t0
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1

Legend:
  X    = Self
"""


def test_json_and_text_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["deepep"]
    assert [backend["name"] for backend in found["backends"]][:3] == ["nvshmem", "ipc", "reference"]
    for backend in found["backends"]:
        assert backend["ok"] or backend["reason"]
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "reference  available" in printed
    for backend in found["backends"]:
        assert backend["reason"] in printed
    reference = found["backends"][2]["capabilities"]
    assert (reference["devices"], reference["layouts"]) == (["cpu", "cuda"], ["compact", "expanded", "padded"])
    assert "cpu and cuda tensors; compact, expanded, padded rows; up to 64 experts per token; any number" in printed
    assert all((backend["capabilities"] is not None) == backend["ok"] for backend in found["backends"])


def test_places_of_ranks_are_told() -> None:
    topology = Topology(("a/1", "a/1", "b/2", "b/2"), ("GPU-x", "GPU-x", "GPU-y", None))
    found = doctor.examine(topology)
    assert [place["ranks_per_gpu"] for place in found["ranks"]["places"]] == [2, 2, 1, 1]
    printed = doctor.as_text(found)
    assert "ranks: 4 on 2 host(s)" in printed
    assert "1: a, GPU GPU-x, 2 rank(s) on it" in printed
    assert "3: b, no GPU" in printed


def test_links_are_read_from_the_matrix() -> None:
    links = doctor.parse_links(_TOPOLOGY_MATRIX)
    assert links == {
        "GPU0": {"GPU1": "NV18", "GPU2": "SYS"},
        "GPU1": {"GPU0": "NV18", "GPU2": "SYS"},
        "GPU2": {"GPU0": "SYS", "GPU1": "SYS"},
    }
    assert doctor.parse_links("") == doctor.parse_links("nvidia-smi: no devices were found") == {}
