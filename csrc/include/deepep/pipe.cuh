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

    // shared: of this warp; number: which of the barriers it takes.
    __device__ WarpPipe(uint8_t* shared, PipeBarriers& barriers, uint32_t number, const Cut& cut)
        : slots(shared), full(barriers.full[number]), slot_bytes(cut.slot_bytes), num_slots(cut.slots_per_warp) {}

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

// A few rows that lie side by side, to consecutive slots of a ring.
struct CopyJob {
    bool is_valid;
    uint32_t number, group;  // what the provider calls it
    uint32_t num_rows;
    const uint8_t* from;
    uint8_t* ring;
    uint32_t first_slot, num_slots;
    // Scale factors that travel by bulk copies too, or null.
    const uint8_t* sf_from;
    uint8_t* sf_ring;
    uint64_t sf_from_pitch;
    uint32_t sf_pitch;

    __device__ uint8_t* to(uint32_t row, uint32_t row_bytes) const {
        return ring + uint64_t{(first_slot + row) % num_slots} * row_bytes;
    }
    __device__ uint8_t* sf_to(uint32_t row) const { return sf_ring + uint64_t{(first_slot + row) % num_slots} * sf_pitch; }
};

// One warp copies jobs until there are none. Loads run ahead into the next job, and a job is published when the stores
// of the next one are on their way: nothing ever drains.
// Provider: bool load(CopyJob&); bool waits(const CopyJob&): whether begin may have to wait for other ranks;
//           void begin(const CopyJob&), before the first store; void publish(const CopyJob&), after the last one is done.
template <typename Provider>
struct Copier {
    WarpPipe& pipe;
    const Cut& cut;
    Provider& provider;

    __device__ void issue(const CopyJob& job, uint32_t item) {
        const uint32_t row = item / cut.num_pieces, piece = item % cut.num_pieces;
        const bool with_sf = piece == 0 && job.sf_from != nullptr;
        if (lane_index() == 0) bulk_wait_read();  // the slot's last store began one load ago
        pipe.issue(job.from + uint64_t{row} * cut.row_bytes + piece * cut.piece_bytes, piece_length(cut, piece),
                   job.sf_from + row * job.sf_from_pitch, cut.piece_bytes, with_sf ? job.sf_pitch : 0);
    }

    __device__ void store(const CopyJob& job, uint32_t item, const uint8_t* held) const {
        if (lane_index() == 0) {
            const uint32_t row = item / cut.num_pieces, piece = item % cut.num_pieces;
            bulk_store(job.to(row, cut.row_bytes) + piece * cut.piece_bytes, held, piece_length(cut, piece));
            if (piece == 0 && job.sf_from != nullptr) bulk_store(job.sf_to(row), held + cut.piece_bytes, job.sf_pitch);
            bulk_commit();
        }
    }

    __device__ void publish(const CopyJob& job) {
        if (lane_index() == 0) fence_bulk();
        __syncwarp();
        provider.publish(job);
    }

    __device__ void finish(CopyJob& job) {
        if (lane_index() == 0) bulk_wait_done();
        publish(job);
        job.is_valid = false;
    }

    __device__ void run() {
        CopyJob current, next, finished;
        finished.is_valid = false;
        current.is_valid = provider.load(current);
        uint32_t ahead = 0;  // items issued, counted from the current job's first
        while (current.is_valid) {
            next.is_valid = provider.load(next);
            const uint32_t total = current.num_rows * cut.num_pieces;
            const uint32_t most = total + (next.is_valid ? next.num_rows * cut.num_pieces : 0);
            auto fill = [&] {
                while (ahead < most && pipe.issued - pipe.used + 1 < pipe.num_slots) {
                    if (ahead < total) {
                        issue(current, ahead);
                    } else {
                        issue(next, ahead - total);
                    }
                    ++ahead;
                }
            };
            if constexpr (kHasBulkCopies) {
                fill();
                // Others may need the last job before they give this one its space.
                if (finished.is_valid && provider.waits(current)) {
                    finish(finished);
                }
                provider.begin(current);
                for (uint32_t item = 0; item < total; ++item) {
                    const uint8_t* held = pipe.front();
                    if (ahead < most) {
                        // One slot more than `fill` takes: the oldest one, whose store has been read by now.
                        if (ahead < total) {
                            issue(current, ahead);
                        } else {
                            issue(next, ahead - total);
                        }
                        ++ahead;
                    }
                    store(current, item, held);
                    ++pipe.used;
                    if (finished.is_valid && item == 3) {
                        if (lane_index() == 0) bulk_wait_done_but_4();
                        publish(finished);
                        finished.is_valid = false;
                    }
                }
                if (finished.is_valid) finish(finished);
                finished = current;
                ahead -= total;
            } else {
                provider.begin(current);
                for (uint32_t row = 0; row < current.num_rows; ++row) {
                    warp_copy(current.to(row, cut.row_bytes), current.from + uint64_t{row} * cut.row_bytes, cut.row_bytes);
                    if (current.sf_from == nullptr) continue;
                    warp_copy(current.sf_to(row), current.sf_from + row * current.sf_from_pitch, current.sf_pitch);
                }
                publish(current);
            }
            current = next;
        }
        if (finished.is_valid) finish(finished);
    }
};

// The next number of a counter, the same for all lanes of a warp.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
    uint32_t ticket = 0;
    if (lane_index() == 0) ticket = atomicAdd(counter, 1);
    return __shfl_sync(kFullMask, ticket, 0);
}

}  // namespace deepep
