"""The documents say what is there: every name of the compatibility tables, the README's sample, links, commands."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import deepep
from deepep import __main__ as command_line
from deepep.compat import ALIAS_PATH
from deepep.group import Group, Limit
from deepep.testing.launch import Workers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STATES = ("kept", "extended", "new", "refused", "absent", "gone")


class Alone(Group):
    """A group of one rank, which has nobody to talk to."""

    def __init__(self) -> None:
        super().__init__(None, 0, 1, torch.device("cpu"))

    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit
    ) -> None:
        raise AssertionError(f"there is nobody to exchange {send} and {recv} with ({op}, {limit})")


def table(title: str) -> list[tuple[str, str, str]]:
    """The rows of a section of the compatibility page: names, state, note."""
    page = (ROOT / "docs/compatibility.md").read_text()
    section = page.split(f"\n### {title}\n")[1].split("\n### ")[0]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if line[:1] == "|"
    ]
    return [(names, state, note) for names, state, note in rows[2:]]


def names_in(cell: str) -> list[str]:
    """The names in backticks, `{a,b}` written out; none of a constructor's arguments."""
    if cell.startswith("constructor:"):
        return []
    found = re.findall(r"`([^`]+)`", cell)
    parts = [re.split(r"\{(.*)\}", name) for name in found]
    return ["".join(pick) for split in parts for pick in itertools.product(*(part.split(",") for part in split))]


@functools.cache
def owner_of(title: str) -> Any:
    """What the names of a section are attributes of."""
    if title == "`Buffer`":
        return deepep.Buffer(Alone(), backend="reference")
    if title in ("`ElasticBuffer`", "`EPHandle`"):
        buffer = deepep.ElasticBuffer(Alone(), num_max_tokens_per_rank=4, hidden=8, backend="reference")
        if title == "`ElasticBuffer`":
            return buffer
        x, topk_idx = torch.ones(2, 8), torch.tensor([[0], [1]])
        return buffer.dispatch(x, topk_idx, num_experts=2)[3]
    return deepep


TITLES = ("Module", "Events", "`Config`", "`Buffer`", "`ElasticBuffer`", "`EPHandle`")
NAMES = [(title, state, name) for title in TITLES for cell, state, _ in table(title) for name in names_in(cell)]


@pytest.mark.parametrize(("title", "state", "name"), NAMES, ids=[f"{title}-{name}" for title, _, name in NAMES])
def test_every_name_is_what_the_table_says(title: str, state: str, name: str) -> None:
    if name.startswith("deep_ep."):
        assert (ALIAS_PATH / name.replace(".", "/")).with_suffix(".py").exists()
        return
    owner = owner_of(title)
    if state == "absent":
        assert not hasattr(owner, name)
        return
    found = functools.reduce(getattr, name.split("."), owner)
    if state == "refused":
        with pytest.raises(deepep.UnsupportedOperation, match=name):
            found()


def test_states_are_those_of_the_legend() -> None:
    assert {state for title in TITLES for _, state, _ in table(title)} <= set(STATES)
    assert len(NAMES) > 100, "the tables are read"


@pytest.mark.parametrize("title", ["Module", "`Buffer`", "`ElasticBuffer`", "`EPHandle`"])
def test_no_public_name_is_left_out(title: str) -> None:
    listed = {name for cell, _, _ in table(title) for name in names_in(cell)}
    public = set(deepep.__all__) - {"__version__"} if title == "Module" else {
        name for name in dir(owner_of(title)) if not name.startswith("_")
    }  # fmt: skip
    assert public - listed == set()


@pytest.mark.parametrize("kind", [deepep.Buffer, deepep.ElasticBuffer])
def test_every_argument_of_a_constructor_is_listed(kind: type) -> None:
    cells = [cell for cell, _, _ in table(f"`{kind.__name__}`") if cell.startswith("constructor:")]
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(inspect.signature(kind).parameters)


def test_fields_that_nothing_needs_are_none() -> None:
    handle = owner_of("`EPHandle`")
    assert handle.token_metadata_at_forward is None
    assert handle.channel_linked_list is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"python -m deepep (\w+)", text):
        assert name in command_line._COMMANDS
    for module in re.findall(r"python -m (deepep\.\w+)", text):
        assert module == "deepep.compat"
    for path in re.findall(r"`((?:deepep|tests|examples|csrc|benchmarks)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_picture_of_the_demo_has_one_name() -> None:
    from deepep.demo.cli import _parser

    picture = str(_parser().get_default("plot"))
    assert f"`{picture}`" in (ROOT / "README.md").read_text()
    assert f"/{picture}" in (ROOT / ".gitignore").read_text().split()


def test_every_environment_variable_is_described() -> None:
    read = set(re.findall(r'"(DEEPEP_\w+)"', (ROOT / "deepep/env.py").read_text()))
    described = re.findall(r"^\| `(DEEPEP_\w+)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(read)


def sample() -> str:
    """The Python code of the README."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ast.parse(code)
    return code


def run_sample(group: Any, code: str) -> bool:
    """What stands around the sample in a model: tokens, their experts, and a layer that scales rows."""
    num_experts = 2 * group.size()
    generator = torch.Generator().manual_seed(group.rank())
    x = torch.randn(5, 64, generator=generator)
    topk_weights, topk_idx = torch.rand(5, num_experts, generator=generator).topk(2)

    def experts(recv_x: torch.Tensor, recv_topk_idx: torch.Tensor, recv_topk_weights: torch.Tensor) -> torch.Tensor:
        factors = (recv_topk_idx + 2 * group.rank() + 1) * recv_topk_weights * (recv_topk_idx >= 0)
        return recv_x * factors.sum(dim=1, keepdim=True)

    known: dict[str, Any] = {
        "x": x,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "num_experts": num_experts,
        "experts": experts,
    }
    with mock.patch("torch.distributed.init_process_group"):  # the workers have one already
        exec(compile(code, "README.md", "exec"), known)
    expected = x * ((topk_idx + 1) * topk_weights).sum(dim=1, keepdim=True)
    return torch.allclose(known["combined"], expected, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sample with tensors on the CPU, where auto is reference")
def test_the_sample_of_the_readme_runs() -> None:
    with Workers(2) as workers:
        assert workers.run(run_sample, sample()) == [True, True]
