"""`EPHandle`: fields that programs save, clear, cut, replace and put back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from elastic_scenes import NUM_EXPERTS, batch, build, same_bits

import deepep
from deepep.testing.checks_elastic import SAVED_FIELDS
from deepep.testing.launch import Workers
from deepep.topology import Topology


def recompute(group: Any, do_expand: bool, do_cpu_sync: bool, num_hosts: int) -> None:
    """A later dispatch's handle gets the fields of an earlier one, as programs that recompute activations do."""
    buffer = build(group, topology=Topology.split(group.size(), num_hosts))
    other = build(group, topology=Topology.split(group.size(), num_hosts))
    x, topk_idx, _ = batch(group)
    options: dict[str, Any] = {"num_experts": NUM_EXPERTS, "do_expand": do_expand, "do_cpu_sync": do_cpu_sync}
    options |= {"expert_alignment": 4, "do_zero_padding": True}
    recv, _, _, handle, _ = buffer.dispatch(x, topk_idx, **options)
    num_real = handle.num_recv_tokens if do_cpu_sync else int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    rows = torch.ones(len(recv), dtype=torch.bool) if do_expand else torch.arange(len(recv)) < num_real
    y = buffer.combine(recv, handle)[0]
    saved = {name: getattr(handle, name) for name in SAVED_FIELDS}
    shadow = copy.copy(handle)
    for name in SAVED_FIELDS:
        setattr(handle, name, None)
    with pytest.raises(deepep.InvalidArgument, match="topk_idx"):
        buffer.combine(recv, handle)
    again = buffer.dispatch(x, topk_idx, **options)[3]
    for name, value in saved.items():
        setattr(again, name, value.clone() if isinstance(value, torch.Tensor) else value)
    for user in (buffer, other):
        repeated = user.dispatch(x, handle=again, do_zero_padding=True)[0]
        assert same_bits(repeated[rows], recv[rows])
        assert same_bits(user.combine(recv, again)[0], y)
    assert same_bits(other.combine(recv, shadow)[0], y)


@pytest.mark.parametrize("do_expand", [False, True])
@pytest.mark.parametrize("do_cpu_sync", [False, True])
def test_fields_saved_cleared_and_put_back_give_the_same_bits(
    pair: Workers, do_expand: bool, do_cpu_sync: bool
) -> None:
    pair.run(recompute, do_expand, do_cpu_sync, 1)


@pytest.mark.parametrize("do_expand", [False, True])
def test_fields_put_back_across_hosts(four: Workers, do_expand: bool) -> None:
    four.run(recompute, do_expand, False, 2)


def foreign_fields(group: Any) -> None:
    """Fields of another routing are followed, not what was remembered; metadata is still that of its own dispatch."""
    buffer = build(group)
    x, idx, weights = batch(group)
    _, other_idx, other_weights = batch(group, seed=1)
    recv, _, _, handle, _ = buffer.dispatch(x, idx, weights, num_experts=NUM_EXPERTS)
    wanted, _, _, replaced, _ = buffer.dispatch(x, other_idx, other_weights, num_experts=NUM_EXPERTS)
    before = buffer.combine(recv, handle)[0]
    for name in SAVED_FIELDS:
        setattr(handle, name, getattr(replaced, name))
    assert same_bits(buffer.dispatch(x, handle=handle)[0], wanted)
    handle = buffer.dispatch(x, idx, weights, num_experts=NUM_EXPERTS)[3]
    handle.psum_num_recv_tokens_per_scaleup_rank = handle.psum_num_recv_tokens_per_scaleup_rank.clone()
    assert same_bits(buffer.combine(recv, handle)[0], before)


def test_replaced_fields_are_followed(pair: Workers) -> None:
    pair.run(foreign_fields)


def shortened(group: Any) -> None:
    """A client may cut the unused tail off the metadata, and off its rows."""
    buffer = build(group)
    x, idx, weights = batch(group)
    recv, _, _, handle, _ = buffer.dispatch(x, idx, weights, num_experts=NUM_EXPERTS, do_cpu_sync=False)
    num_real = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    y = buffer.combine(recv, handle)[0]
    handle.recv_src_metadata = handle.recv_src_metadata[:num_real]
    assert same_bits(buffer.combine(recv[:num_real], handle)[0], y)
    assert same_bits(buffer.dispatch(x, handle=handle)[0], recv[:num_real])


def test_metadata_may_be_cut(pair: Workers) -> None:
    pair.run(shortened)
