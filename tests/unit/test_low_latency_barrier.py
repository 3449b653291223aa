"""A model of the barrier of `ll_clean.cu`: words that hold a number, the number seen, and the one met last.

It shows that nobody passes a barrier before all ranks that take part have begun it, whatever some of them began alone
before, and that all pass. With words that only have to change it goes red.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

NUM_RANKS = 3


class Rank:
    """One rank's window and counter, and how many barriers it began and passed."""

    def __init__(self) -> None:
        self.words = [(0, 0, 0)] * NUM_RANKS  # by the rank that writes: its number, its answer, whom it met last
        self.met = [0] * NUM_RANKS  # number of each rank at the last barrier with it that was passed
        self.last = [(0, 0, 0)] * NUM_RANKS
        self.number = self.begun = self.passed = 0


def barrier(ranks: list[Rank], own: int, with_answers: bool, patience: int) -> Iterator[None]:
    """As the kernel does it; gives up on whoever does not come in so many turns."""
    rank = ranks[own]
    rank.number += 1
    rank.begun += 1
    told: dict[int, int] = {}
    waits, met = set(range(NUM_RANKS)), list(rank.met)
    while waits and patience:
        patience -= 1
        for peer in sorted(waits):
            number, answer, met_last = rank.words[peer]
            fresh = number if number != rank.met[peer] else 0
            if peer not in told or told[peer] != fresh:
                told[peer] = fresh
                ranks[peer].words[own] = (rank.number, fresh, rank.met[peer])
            yield
            if not with_answers:
                if rank.words[peer] != rank.last[peer]:
                    rank.last[peer] = rank.words[peer]
                    waits.remove(peer)
            elif fresh and answer == rank.number:
                met[peer] = number
                waits.remove(peer)
            elif met_last == rank.number:
                met[peer] = 0  # at a barrier before the one it is in, whose number is still to come
                waits.remove(peer)
    rank.met = met
    rank.passed += not waits


def play(seed: int, with_answers: bool) -> None:
    """Some ranks try alone, then all clean several times; `AssertionError` if one passes too early or never."""
    rng = random.Random(seed)
    ranks = [Rank() for _ in range(NUM_RANKS)]
    for _ in range(rng.randrange(3)):
        for _ in barrier(ranks, rng.randrange(NUM_RANKS), with_answers, patience=rng.randrange(1, 6)):
            pass
    before = [(rank.begun, rank.passed) for rank in ranks]

    def clean(own: int) -> Iterator[None]:
        for _ in range(4):
            yield from barrier(ranks, own, with_answers, patience=20_000)
            done = ranks[own].passed - before[own][1]
            begun = [rank.begun - had for rank, (had, _) in zip(ranks, before, strict=True)]
            assert done == ranks[own].begun - before[own][0], "waits for ever"
            assert min(begun) >= done, "passed before all had come"

    turns = [clean(own) for own in range(NUM_RANKS)]
    while turns:
        turn = rng.randrange(len(turns))
        for _ in range(rng.choice((1, 1, 1, 30))):
            if next(turns[turn], "over") == "over":
                turns.pop(turn)
                break


@pytest.mark.parametrize("seed", range(60))
def test_nobody_passes_before_all_have_come(seed: int) -> None:
    play(seed, with_answers=True)


def test_the_model_would_notice_words_that_only_change() -> None:
    def fails(seed: int) -> bool:
        try:
            play(seed, with_answers=False)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(60))
