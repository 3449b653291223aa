"""A model of low latency's rows on the wire, whose parts say themselves whether they are there.

Stores land in any order, ranks look when a random scheduler lets them, what was taken leaves zeros behind, and there
are two banks and credits. It shows that no part of an earlier call is taken for a new one, that none is wiped away, and
that nobody waits for ever. With one bank and no credits, or without zeros, it goes red.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from deepep.cuda import ll_structs

NUM_RANKS, NUM_PARTS = 3, 2


class World:
    """Windows of all ranks, and stores on their way to them."""

    def __init__(self, rng: random.Random, num_banks: int, lag: int, leaves_zeros: bool) -> None:
        self.rng, self.num_banks, self.lag, self.leaves_zeros = rng, num_banks, lag, leaves_zeros
        self.windows: list[dict[object, object]] = [{} for _ in range(NUM_RANKS)]
        self.flying: list[tuple[int, object, object]] = []

    def store(self, rank: int, where: object, value: object) -> None:
        self.flying.append((rank, where, value))

    def land(self) -> None:
        rank, where, value = self.flying.pop(self.rng.randrange(len(self.flying)))
        self.windows[rank][where] = value

    def run(self, rank: int, num_calls: int) -> Iterator[None]:
        """Calls of one rank: credits, then what it sends, then what it waits for."""
        window, read = self.windows[rank], [0] * self.num_banks
        for epoch in range(1, num_calls + 1):
            bank = epoch % self.num_banks
            for peer in range(NUM_RANKS):
                for b, last in enumerate(read):
                    self.store(peer, ("credit", b, rank), last)
            for peer in range(NUM_RANKS):
                while int(str(window.get(("credit", bank, peer), 0))) < epoch - self.lag:
                    yield
            yield from self.send(rank, epoch, bank)
            yield from self.receive(rank, epoch, bank)
            read[bank] = epoch

    def send(self, rank: int, epoch: int, bank: int) -> Iterator[None]:
        num_tokens = self.rng.randrange(4)
        for peer in range(NUM_RANKS):
            self.store(peer, ("header", bank, rank), (epoch, num_tokens))
            for token in range(num_tokens):
                for part in range(NUM_PARTS):
                    self.store(peer, (bank, rank, token, part), (rank, epoch, token, part))
                yield

    def receive(self, rank: int, epoch: int, bank: int) -> Iterator[None]:
        window = self.windows[rank]
        for source in range(NUM_RANKS):
            num_tokens = None
            while num_tokens is None:
                header = window.get(("header", bank, source))
                if isinstance(header, tuple) and header[0] == epoch:
                    num_tokens = header[1]
                yield
            for token in range(num_tokens):
                for part in range(NUM_PARTS):
                    where = (bank, source, token, part)
                    while window.get(where) is None:
                        yield
                    assert window[where] == (source, epoch, token, part), "a part of another call"
                    if self.leaves_zeros:
                        window[where] = None


def play(seed: int, num_banks: int, lag: int, leaves_zeros: bool = True, num_calls: int = 12) -> None:
    """Run the ranks to their end; `AssertionError` if a part is of another call or all wait for ever."""
    rng = random.Random(seed)
    world = World(rng, num_banks, lag, leaves_zeros)
    ranks = [world.run(rank, num_calls) for rank in range(NUM_RANKS)]
    for _ in range(50_000):
        if world.flying and rng.random() < 0.6:
            world.land()
            continue
        turn = rng.randrange(len(ranks))
        if next(ranks[turn], "over") == "over":
            ranks.pop(turn)
        if not ranks:
            return
    raise AssertionError("ranks wait for ever")


@pytest.mark.parametrize("seed", range(40))
def test_ranks_that_run_ahead_never_meet_parts_of_another_call(seed: int) -> None:
    play(seed, ll_structs.NUM_BANKS, lag=ll_structs.NUM_BANKS)


@pytest.mark.parametrize(
    ("num_banks", "lag", "leaves_zeros"), [(1, 1000, True), (ll_structs.NUM_BANKS, ll_structs.NUM_BANKS, False)]
)
def test_the_model_would_notice(num_banks: int, lag: int, leaves_zeros: bool) -> None:
    def fails(seed: int) -> bool:
        try:
            play(seed, num_banks, lag, leaves_zeros)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(20))
