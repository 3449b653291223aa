"""Groups over gloo and over collectives only: all-to-all, gather, barrier, tags, sub-groups."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep.errors import BufferDestroyed, CommTimeout, InvalidArgument
from deepep.group import make_group
from deepep.group_collective import CollectiveGroup
from deepep.testing.launch import Workers

TIMEOUT = 30.0


@pytest.fixture(scope="module")
def four() -> Iterator[Workers]:
    with Workers(4) as started:
        yield started


def first(group: Any, num_ranks: int) -> Any:
    """A process group of the first ranks of `group`; None on the others."""
    members = dist.new_group(list(range(num_ranks)))
    return members if group.rank() < num_ranks else None


def make(group: Any, kind: str) -> Any:
    return CollectiveGroup(group, "cpu") if kind == "collective" else make_group(group)


def exchange(group: Any, num_ranks: int, kind: str, rows: int, dtype: torch.dtype) -> bool:
    """Rank r sends `rows * (r + p) % 5` rows to rank p (some are none), all of the value 10 r + p."""
    members = first(group, num_ranks)
    if members is None:
        return True
    ours = make(members, kind)
    rank, ranks = ours.rank, range(ours.num_ranks)
    send = [torch.full((rows * ((rank + peer) % 5), 2), 10 * rank + peer).to(dtype) for peer in ranks]
    recv = [torch.zeros(rows * ((rank + peer) % 5), 2, dtype=dtype) for peer in ranks]
    ours.exchange(send, recv, op="test", timeout=TIMEOUT)
    return all(torch.equal(recv[peer], torch.full_like(recv[peer], 10 * peer + rank)) for peer in ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["gloo", "collective"])
@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.bfloat16), (1, torch.uint8), (1 << 18, torch.float32)])
def test_exchange_of_unequal_and_empty_tensors(
    four: Workers, num_ranks: int, kind: str, rows: int, dtype: torch.dtype
) -> None:
    assert all(four.run(exchange, num_ranks, kind, rows, dtype))


def exchange_one(group: Any) -> bool:
    """One element of stride 0 is contiguous."""
    ours = make_group(group)
    one = torch.tensor(7 + ours.rank).expand(1, 1)
    recv = [torch.zeros(1, 1, dtype=torch.int64) for _ in range(ours.num_ranks)]
    ours.exchange([one] * ours.num_ranks, recv, op="test", timeout=TIMEOUT)
    return torch.cat(recv).flatten().tolist() == [7 + peer for peer in range(ours.num_ranks)]


def test_exchange_of_a_single_element_of_any_stride(four: Workers) -> None:
    assert all(four.run(exchange_one))


def gather(group: Any, kind: str) -> list[Any]:
    ours = make(group, kind)
    ours.barrier(op="test", timeout=TIMEOUT)
    return ours.all_gather_object({"rank": ours.rank, "text": "x" * 1000 * ours.rank}, op="test", timeout=TIMEOUT)


@pytest.mark.parametrize("kind", ["gloo", "collective"])
def test_gather_of_objects_of_different_sizes(four: Workers, kind: str) -> None:
    expected = [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(4)]
    assert four.run(gather, kind) == [expected] * 4


def gather_without_last(group: Any) -> list[Any]:
    ours, last = make_group(group), group.size() - 1
    if ours.rank == last:
        return []
    return ours.all_gather_object(ours.rank, op="test", timeout=TIMEOUT, skip=[last])


def test_skipped_ranks_are_neither_sent_to_nor_waited_for(four: Workers) -> None:
    assert four.run(gather_without_last)[:3] == [[0, 1, 2, None]] * 3


def use_two_groups(group: Any) -> list[int]:
    """Half of the ranks use the older group first, so that messages of both are under way at once."""
    groups = [make_group(group), make_group(group)]
    results: list[list[int]] = [[], []]

    def gather_in(index: int) -> None:
        results[index] = groups[index].all_gather_object(100 * index + group.rank(), op="test", timeout=TIMEOUT)

    order = (0, 1) if group.rank() % 2 else (1, 0)
    threads = [threading.Thread(target=gather_in, args=(index,)) for index in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0] + results[1]


def test_groups_on_one_process_group_do_not_mix(four: Workers) -> None:
    assert four.run(use_two_groups) == [[0, 1, 2, 3, 100, 101, 102, 103]] * 4


def use_sub_group(group: Any) -> list[Any]:
    members = dist.new_group([1, 3])
    if group.rank() not in (1, 3):
        with pytest.raises(InvalidArgument):
            make_group(members)
        return []
    ours = make_group(members)
    assert make_group(ours) is ours
    return [ours.rank, ours.num_ranks, ours.raw is members, *gather(members, "gloo")]


def test_sub_group_counts_its_own_ranks(four: Workers) -> None:
    objects = [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 1000}]
    assert four.run(use_sub_group) == [[], [0, 2, True, *objects], [], [1, 2, True, *objects]]


def use_from_two_threads(group: Any) -> list[Any]:
    ours, results = make_group(group), []
    for value in range(2):
        call = threading.Thread(
            target=lambda: results.append(ours.all_gather_object(value, op="test", timeout=TIMEOUT))  # noqa: B023
        )
        call.start()
        call.join()
    return results


def test_threads_may_use_a_group_one_after_the_other(four: Workers) -> None:
    assert four.run(use_from_two_threads) == [[[0] * 4, [1] * 4]] * 4


def pass_bad_arguments(group: Any) -> None:
    ours = make_group(group)
    good = [torch.zeros(4, 4) for _ in range(ours.num_ranks)]
    bad_calls: list[tuple[Any, Any, float]] = [
        (good[1:], good, 1.0),
        ([part.t() for part in good], good, 1.0),
        (good, [part[1:] for part in good], 1.0),
        (good, good, -1.0),
        (good, good, float("inf")),
    ]
    for send, recv, timeout in bad_calls:
        with pytest.raises(InvalidArgument):
            ours.exchange(send, recv, op="test", timeout=timeout)
    ours.barrier(op="test", timeout=TIMEOUT)


def test_bad_arguments_send_nothing(four: Workers) -> None:
    four.run(pass_bad_arguments)


def test_a_group_needs_exactly_one_source() -> None:
    for arguments in ({}, {"group": object(), "comm": object()}, {"group": object()}, {"comm": object()}):
        with pytest.raises(InvalidArgument):
            make_group(**arguments)


def miss_one(_: Any, kind: str, absent: int) -> Any:
    """What a rank that comes 2 s late does to a gather with a limit of 0.7 s."""
    ours = make(dist.new_group(), kind)
    ours.barrier(op="warm-up", timeout=TIMEOUT)
    dist.barrier()
    if ours.rank == absent:
        threading.Event().wait(2.0)
    with pytest.raises(CommTimeout) as caught:
        ours.all_gather_object(0, op="test", timeout=0.7)
    missing = caught.value.missing_ranks
    with pytest.raises(BufferDestroyed, match=", ".join(map(str, missing))):
        ours.barrier(op="after", timeout=1.0)
    dist.barrier()
    if kind == "gloo":
        make_group(ours.raw).barrier(op="again", timeout=TIMEOUT)
    return caught.value.op, missing


def test_a_late_rank_is_named_and_the_process_group_stays_usable(four: Workers) -> None:
    others, late = ("test", (2,)), ("test", (0, 1, 3))
    assert four.run(miss_one, "gloo", 2) == [others, others, late, others]


def test_a_late_rank_is_named_by_collectives_too(four: Workers) -> None:
    results = four.run(miss_one, "collective", 2)
    assert [results[rank] for rank in (0, 1, 3)] == [("test", (2,))] * 3


def miss_first_call(_: Any) -> Any:
    ours = CollectiveGroup(dist.new_group(), "cpu")
    if ours.rank == 0:
        return ()
    # What an earlier process group of the same name left in the store is nobody's presence.
    store = dist.distributed_c10d._get_default_store()
    for call in ("first", "late/1"):
        for key in ("0", f"0/{ours.rank}"):
            store.set(f"{ours._prefix}/{call}/{key}", "of an earlier life")
    with pytest.raises(CommTimeout) as caught:
        ours.barrier(op="test", timeout=0.5)
    return caught.value.missing_ranks


def test_collectives_know_who_never_came(four: Workers) -> None:
    assert four.run(miss_first_call) == [(), (0,), (0,), (0,)]
