"""A model of combine's rings: who waits for whom, without the bytes. Ranks must never wait for each other in a circle.

Warps are generators that yield whenever they would poll; a random scheduler runs them. Owner warps stage batches of one
home's rows, in token order, homes side by side, and publish a batch once the next one is on its way; home warps sum
tokens in order. Ring slots are given back when a home is through with a pass of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from deepep.cuda.arguments import PASS_TOKENS


class Rings:
    """R ranks, T tokens each, and which token has a row at which owner."""

    def __init__(
        self, rng: random.Random, num_ranks: int, num_tokens: int, ring: int, density: list[list[float]]
    ) -> None:
        self.rng, self.num_ranks, self.num_tokens, self.ring = rng, num_ranks, num_tokens, ring
        # rows[owner][home]: tokens of the home with a row there, ascending.
        self.rows = [
            [[t for t in range(num_tokens) if rng.random() < density[owner][home]] for home in range(num_ranks)]
            for owner in range(num_ranks)
        ]
        self.published: set[tuple[int, int, int]] = set()  # owner, home, row
        self.passed: set[tuple[int, int]] = set()  # home, pass
        self.left = [
            {p: min(PASS_TOKENS, num_tokens - PASS_TOKENS * p) for p in range(-(-num_tokens // PASS_TOKENS))}
            for _ in range(num_ranks)
        ]
        self.next_stage, self.next_job, self.done = [0] * num_ranks, [0] * num_ranks, [0] * num_ranks

    def take_batch(self, owner: int) -> tuple[int, list[int]] | None:
        """The next batch with rows: its home and row numbers."""
        while True:
            ticket = self.next_stage[owner]
            self.next_stage[owner] += 1
            block, home = ticket // self.num_ranks, (ticket + owner) % self.num_ranks
            if block * PASS_TOKENS >= self.num_tokens:
                return None
            tokens = self.rows[owner][home]
            found = [j for j, t in enumerate(tokens) if t // PASS_TOKENS == block]
            if found and home != owner:
                return home, found

    def has_space(self, owner: int, home: int, row: int) -> bool:
        """Whether the home is through with what the row's slot held a lap ago."""
        if row < self.ring:
            return True
        return (home, self.rows[owner][home][row - self.ring] // PASS_TOKENS) in self.passed

    def own(self, owner: int, publishes_first: bool) -> Iterator[None]:
        """An owner warp; afterwards it is a home warp."""
        finished: tuple[int, list[int]] | None = None
        current = self.take_batch(owner)
        while current is not None:
            following = self.take_batch(owner)
            home, rows = current
            if publishes_first and finished is not None and rows[-1] >= self.ring:
                self.publish(owner, finished)
                finished = None
            while not all(self.has_space(owner, home, row) for row in rows):
                yield
            yield
            if finished is not None:
                self.publish(owner, finished)
            finished, current = current, following
        if finished is not None:
            self.publish(owner, finished)
        yield from self.sum_up(owner)

    def publish(self, owner: int, batch: tuple[int, list[int]]) -> None:
        self.published.update((owner, batch[0], row) for row in batch[1])

    def sum_up(self, home: int) -> Iterator[None]:
        """A home warp."""
        while self.next_job[home] < self.num_tokens:
            token = self.next_job[home]
            self.next_job[home] += 1
            for owner in range(self.num_ranks):
                if owner == home or token not in self.rows[owner][home]:
                    continue
                while (owner, home, self.rows[owner][home].index(token)) not in self.published:
                    yield
            yield
            self.left[home][token // PASS_TOKENS] -= 1
            if self.left[home][token // PASS_TOKENS] == 0:
                self.passed.add((home, token // PASS_TOKENS))
            self.done[home] += 1

    def run(self, num_owner_warps: int, num_home_warps: int, publishes_first: bool = True) -> bool:
        """Whether everything ends."""
        warps = [self.own(rank, publishes_first) for rank in range(self.num_ranks) for _ in range(num_owner_warps)]
        warps += [self.sum_up(rank) for rank in range(self.num_ranks) for _ in range(num_home_warps)]
        idle_rounds = 0
        while warps and idle_rounds < 3:
            before = (len(self.published), sum(self.done), sum(self.next_stage), sum(self.next_job))
            self.rng.shuffle(warps)
            warps = [warp for warp in warps if next(warp, "over") != "over"]
            after = (len(self.published), sum(self.done), sum(self.next_stage), sum(self.next_job))
            idle_rounds = idle_rounds + 1 if before == after else 0
        return self.done == [self.num_tokens] * self.num_ranks


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ring", [passes * PASS_TOKENS for passes in (2, 3, 8)])
def test_skewed_rings_never_stop(seed: int, ring: int) -> None:
    rng = random.Random(seed)
    num_ranks = rng.choice([2, 3, 4])
    density = [[rng.choice([0.05, 0.3, 1.0]) for _ in range(num_ranks)] for _ in range(num_ranks)]
    rings = Rings(rng, num_ranks, 160, ring, density)
    assert rings.run(rng.choice([1, 2, 5]), rng.choice([1, 2, 5]))


def test_holding_finished_batches_back_would_stop() -> None:
    full = [[1.0, 1.0], [1.0, 1.0]]
    assert not Rings(random.Random(0), 2, 160, 2 * PASS_TOKENS, full).run(4, 1, publishes_first=False)
    assert Rings(random.Random(0), 2, 160, 2 * PASS_TOKENS, full).run(4, 1)
