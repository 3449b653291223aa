"""Sizes that `ElasticBuffer` suggests: bytes, multiprocessors, queue pairs."""

from __future__ import annotations

import pytest

import deepep
from deepep.elastic_sizes import SIZE_ALIGNMENT, theoretical_num_qps, theoretical_num_sms


def test_larger_shapes_need_larger_buffers() -> None:
    sizes = [
        deepep.ElasticBuffer.get_buffer_size_hint(FakeGroup(), 4096, 7168, num_topk=8, **options)
        for options in ({"use_fp8_dispatch": True}, {}, {"allow_multiple_reduction": False})
    ]
    assert sizes[0] <= sizes[1] <= sizes[2]
    assert all(size % SIZE_ALIGNMENT == 0 for size in sizes)
    tokens, unknown = (deepep.ElasticBuffer.get_buffer_size_hint(FakeGroup(), 4096, 7168, k) for k in (8, 0))
    assert tokens <= unknown


class FakeGroup:
    def size(self) -> int:
        return 8


@pytest.mark.parametrize("domain", [(1, 1), (1, 2), (1, 8), (2, 1), (4, 8)])
def test_multiprocessors_follow_the_links(domain: tuple[int, int]) -> None:
    for num_topk in (1, 8, 300):
        few = theoretical_num_sms(domain, 256, num_topk, nvlink_gbs=10, rdma_gbs=1)
        usual = theoretical_num_sms(domain, 256, num_topk)
        assert 4 <= few <= usual < 100
        assert few % 2 == usual % 2 == 0
    with pytest.raises(deepep.InvalidArgument, match="num_experts=3"):
        theoretical_num_sms((1, 2), 3, 1)


def test_queue_pairs() -> None:
    assert theoretical_num_qps(24, is_hybrid=False, num_allocated_qps=17) == 9
    assert theoretical_num_qps(2, is_hybrid=True, num_allocated_qps=65) == 33
    assert theoretical_num_qps(24, is_hybrid=True, num_allocated_qps=65) == 65
