// One warp's shared-memory slots: bulk loads run ahead of whoever uses them.
#pragma once

#include <deepep/layout.cuh>
#include <deepep/vec.cuh>

namespace deepep {

constexpr uint32_t kMaxWarps = 16;
constexpr uint32_t kMaxSlots = 8;

struct PipeBarriers {
    uint64_t full[kMaxWarps][kMaxSlots];
};

struct WarpPipe {
    uint8_t* slots;
    uint64_t* full;
    uint32_t slot_bytes, num_slots;
    uint32_t issued = 0, used = 0;

    __device__ WarpPipe(uint8_t* shared, PipeBarriers& barriers, const Cut& cut)
        : slots(shared + warp_index() * cut.slots_per_warp * cut.slot_bytes),
          full(barriers.full[warp_index()]),
          slot_bytes(cut.slot_bytes),
          num_slots(cut.slots_per_warp) {}

    // Every thread of the CTA, before the first use; a __syncthreads must follow.
    __device__ static void init(PipeBarriers& barriers) {
        if constexpr (kHasBulkCopies) {
            for (uint32_t i = threadIdx.x; i < kMaxWarps * kMaxSlots; i += blockDim.x) {
                barrier_init(&barriers.full[0][0] + i, 1);
            }
            barrier_init_fence();
            fence_bulk();
        }
    }

    __device__ uint8_t* slot(uint32_t n) const { return slots + (n % num_slots) * slot_bytes; }
    __device__ uint64_t* barrier(uint32_t n) const { return full + n % num_slots; }

    // Lane 0 loads up to two pieces into the next slot; every lane counts. The slot must be free.
    __device__ void issue(const void* from, uint32_t num_bytes, const void* extra = nullptr, uint32_t extra_at = 0,
                          uint32_t extra_bytes = 0) {
        if (lane_index() == 0) {
            barrier_expect(barrier(issued), num_bytes + extra_bytes);
            if (num_bytes != 0) bulk_load(slot(issued), from, num_bytes, barrier(issued));
            if (extra_bytes != 0) bulk_load(slot(issued) + extra_at, extra, extra_bytes, barrier(issued));
        }
        ++issued;
    }

    // Wait for the oldest load; the slot stays the caller's until it counts it as used.
    __device__ const uint8_t* front() const {
        barrier_wait(barrier(used), used / num_slots % 2);
        return slot(used);
    }
};

__device__ __forceinline__ uint32_t piece_length(const Cut& cut, uint32_t piece) {
    return min_of(cut.piece_bytes, cut.row_bytes - piece * cut.piece_bytes);
}

// One warp copies rows; from(i) and to(i) give their addresses. Afterwards lane 0's writes are complete.
template <typename From, typename To>
__device__ __forceinline__ void warp_copy_rows(WarpPipe& pipe, const Cut& cut, uint32_t num_rows, From from, To to) {
    if constexpr (kHasBulkCopies) {
        const uint32_t total = num_rows * cut.num_pieces;
        uint32_t next = 0;
        auto issue = [&] {
            const uint32_t row = next / cut.num_pieces, piece = next % cut.num_pieces;
            pipe.issue(from(row) + piece * cut.piece_bytes, piece_length(cut, piece));
            ++next;
        };
        while (next < total && next + 1 < pipe.num_slots) issue();
        for (uint32_t item = 0; item < total; ++item) {
            const uint8_t* held = pipe.front();
            if (next < total) {
                if (lane_index() == 0) bulk_wait_read();  // the slot's last store began one load ago
                issue();
            }
            if (lane_index() == 0) {
                const uint32_t row = item / cut.num_pieces, piece = item % cut.num_pieces;
                bulk_store(to(row) + piece * cut.piece_bytes, held, piece_length(cut, piece));
                bulk_commit();
            }
            ++pipe.used;
        }
        if (lane_index() == 0) {
            bulk_wait_done();
            fence_bulk();
        }
    } else {
        for (uint32_t row = 0; row < num_rows; ++row) warp_copy(to(row), from(row), cut.row_bytes);
    }
}

}  // namespace deepep
