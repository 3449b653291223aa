"""That the emulator notices what a GPU would not forgive."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from broken import compile_broken
from emulator import COMPILER, EmulationError, Emulator, watch_options
from translate import translate
from world import Step, World

from deepep.cuda.ll_structs import Shape

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C++ compiler")


def test_inline_ptx_becomes_what_it_means() -> None:
    source = 'asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at(0, b)), "r"(x ? 1 : 2) : "memory");'
    assert translate(source) == "{ emu::store((at(0, b)), (x ? 1 : 2)); }"
    source = "__shared__ Rows listed[kTeams][2];"
    assert translate(source) == "auto& listed = emu::shared<Rows[kTeams][2]>(__COUNTER__);"


def test_ptx_that_nobody_explained_fails_when_it_runs() -> None:
    assert "emu::fail" in translate('asm("brkpt;");')


RACE = "race for shared memory: .* at ll_.*, then ll_" if shutil.which("addr2line") else "race for shared memory"
EARLY = "memory is touched before the launch's turn"
_RANKS = "ranks_of(call, choices)"
_COUNTS = "await_counts(args, call, threadIdx.x + kLlThreads"


@pytest.mark.parametrize(
    ("line", "instead", "message", "num_sms"),
    [
        ("*global(part_at[i]) = {};", "", None, 24),
        ("    call.count_reader();\n", "", "no end in sight", 24),
        ("slots[at[t]] = {};", "", None, 24),
        ("slot[place.vec[i]] = {};", "", None, 2),
        ("call.state->num_drawn[(call.epoch + kLlBanks) % kLlDrawings] = 0;", "", None, 2),
        (f"= {_RANKS}", f"= threadIdx.x % 2 ? 0 : {_RANKS}", "meet at different places", 24),
        ("turn ^= 1", "turn ^= 0", RACE, 2),
        ("if (awaits_weights) team.sync();\n            awaits", "awaits", RACE, 2),
        ("debt, terms);\n            team.sync();", "debt, terms);", RACE, 24),
        ("sync_first_threads(team);\n    const", "const", RACE, 2),
        ("await_previous_kernel();\n        first.choice", "first.choice", EARLY, 2),
        ("await_previous_kernel();  // nothing", "// nothing", EARLY, 2),
        (_COUNTS, f"if (threadIdx.x == 7) return;\n{_COUNTS}", "wait for each other", 24),
    ],
)
def test_broken_kernels_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, instead: str, message: str | None, num_sms: int
) -> None:
    if message in (RACE, EARLY) and not watch_options():
        pytest.skip("the compiler cannot announce accesses to memory")
    emulator = compile_broken(monkeypatch, line, instead, lambda: Emulator(tmp_path, is_hopper=True))
    world = World(monkeypatch, emulator, Shape(2, 4, 2, 9, 256), num_sms)
    with pytest.raises((EmulationError, AssertionError), match=message):
        _run_steps(world)


def _run_steps(world: World) -> None:
    for seed in range(0, 12, 2):  # two at a time, so that launches of the second may start early
        steps = [Step(world, [3, 1], seed), Step(world, [9, 9], seed + 1)]
        results = []
        for step in steps:
            dispatched = [step.dispatch(rank) for rank in range(2)]
            results.append((dispatched, [step.combine(rank, dispatched[rank]) for rank in range(2)]))
        world.emulator.run(seed, most_rounds=10_000)
        for step, (dispatched, combined) in zip(steps, results, strict=True):
            for rank in range(2):
                step.check_dispatch(rank, dispatched[rank])
                assert torch.equal(combined[rank].x, step.expected_combine(rank))
