"""Models of low latency's lines, 16 bytes with the epoch inside: their packing, and ranks that run ahead of each other.

The protocol's model has stores that land in any order, ranks that poll when a random scheduler lets them, two banks and
credits. It shows that no line of an earlier call is taken for a new one and that nobody waits for ever. With one bank
and no credits it goes red.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from deepep import env
from deepep.cuda import ll_structs
from deepep.cuda.ll_structs import Shape
from deepep.errors import InvalidArgument

OCTET, OCTET_LINES = 8, 11


def rest_line(num_vecs: int, vec: int) -> int:
    return -(-num_vecs // OCTET) * OCTET + vec // OCTET * (OCTET_LINES - OCTET) + vec % OCTET


def shuffled(words: list[int], lane: int) -> int:
    return words[lane % OCTET]


@pytest.mark.parametrize("num_vecs", [1, 7, 8, 45, 896])
def test_vectors_and_extra_words_come_back_from_lines(num_vecs: int) -> None:
    rng, memory = random.Random(num_vecs), {}
    vecs = [[rng.getrandbits(32) for _ in range(4)] for _ in range(-(-num_vecs // OCTET) * OCTET)]
    extras = [rng.getrandbits(32) for _ in range(len(vecs) // OCTET)]
    for vec in range(len(vecs)):
        octet, lane = vec // OCTET * OCTET, vec % OCTET
        last = [v[3] for v in vecs[octet : octet + OCTET]]
        if vec < num_vecs:
            memory[vec] = vecs[vec][:3]
        if lane < OCTET_LINES - OCTET:
            at = rest_line(num_vecs, vec)
            assert at not in memory
            memory[at] = [
                extras[vec // OCTET] if 3 * lane + i == OCTET else shuffled(last, 3 * lane + i) for i in range(3)
            ]
    assert 16 * (max(memory) + 1) <= Shape(2, 8, 1, 1, 8 * num_vecs).combine_line_bytes
    for vec in range(num_vecs):
        octet = vec // OCTET * OCTET
        rest = [memory[rest_line(num_vecs, octet + lane)] for lane in range(3)]
        assert [*memory[vec], rest[vec % OCTET // 3][vec % OCTET % 3]] == vecs[vec]
        assert rest[2][2] == extras[vec // OCTET]


class World:
    """Windows of all ranks, and stores on their way to them."""

    def __init__(self, rng: random.Random, num_ranks: int, num_banks: int, lag: int) -> None:
        self.rng, self.num_ranks, self.num_banks, self.lag = rng, num_ranks, num_banks, lag
        self.windows: list[dict[object, tuple[int, object]]] = [{} for _ in range(num_ranks)]
        self.flying: list[tuple[int, object, tuple[int, object]]] = []

    def store(self, rank: int, where: object, epoch: int, value: object) -> None:
        self.flying.append((rank, where, (epoch, value)))

    def land(self) -> None:
        rank, where, line = self.flying.pop(self.rng.randrange(len(self.flying)))
        self.windows[rank][where] = line

    def run(self, rank: int, num_calls: int) -> Iterator[None]:
        """Calls of one rank: credits, then what it sends, then what it waits for."""
        window, read = self.windows[rank], [0] * self.num_banks
        for epoch in range(1, num_calls + 1):
            bank = epoch % self.num_banks
            for peer in range(self.num_ranks):
                for b, last in enumerate(read):
                    self.store(peer, ("credit", b, rank), last, None)
            for peer in range(self.num_ranks):
                while window.get(("credit", bank, peer), (0, None))[0] < epoch - self.lag:
                    yield
            yield from self.send(rank, epoch, bank)
            yield from self.receive(rank, epoch, bank)
            read[bank] = epoch

    def send(self, rank: int, epoch: int, bank: int) -> Iterator[None]:
        num_tokens = self.rng.randrange(4)
        for peer in range(self.num_ranks):
            self.store(peer, ("header", bank, rank), epoch, num_tokens)
            for token in range(num_tokens):
                for part in range(2):
                    self.store(peer, (bank, rank, token, part), epoch, (rank, epoch, token, part))
                yield

    def receive(self, rank: int, epoch: int, bank: int) -> Iterator[None]:
        window = self.windows[rank]

        def look(where: object) -> Callable[[], bool]:
            return lambda: window.get(where, (0, None))[0] == epoch

        for source in range(self.num_ranks):
            while not look(("header", bank, source))():
                yield
            num_tokens = window["header", bank, source][1]
            assert isinstance(num_tokens, int)
            for token in range(num_tokens):
                for part in range(2):
                    where = (bank, source, token, part)
                    while not look(where)():
                        yield
                    assert window[where][1] == (source, epoch, token, part), "a stale line"


def play(seed: int, num_banks: int, lag: int, num_calls: int = 12) -> None:
    """Run three ranks to their end; `AssertionError` if a line is stale or all wait for ever."""
    rng = random.Random(seed)
    world = World(rng, 3, num_banks, lag)
    ranks = [world.run(rank, num_calls) for rank in range(world.num_ranks)]
    for _ in range(200_000):
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
def test_ranks_that_run_ahead_never_meet_stale_lines(seed: int) -> None:
    play(seed, ll_structs.NUM_BANKS, lag=ll_structs.NUM_BANKS)


def test_the_model_would_notice_lines_written_too_early() -> None:
    def fails(seed: int) -> bool:
        try:
            play(seed, num_banks=1, lag=1000)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(10))


def test_how_many_tokens_are_lines_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPEP_LL_LINE_TOKENS", raising=False)
    assert env.ll_line_tokens(7) == 7
    monkeypatch.setenv("DEEPEP_LL_LINE_TOKENS", "0")
    assert env.ll_line_tokens(7) == 0
    for nonsense in ("-1", "many", "1.5"):
        monkeypatch.setenv("DEEPEP_LL_LINE_TOKENS", nonsense)
        with pytest.raises(InvalidArgument, match="DEEPEP_LL_LINE_TOKENS"):
            env.ll_line_tokens(7)


def test_lines_are_cleaned_like_words() -> None:
    division = ll_structs.divide(Shape(2, 8, 2, 16, 512))
    end = division.words_offset + 8 * division.num_words
    assert division.window.combine_lines < end == division.window.dispatch_slots
    assert division.num_words % 2 == 0
