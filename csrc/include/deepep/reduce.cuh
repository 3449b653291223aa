// Ordered fp32 sums of rows by one warp. Loads run ahead, into the next job too; the order of additions is the order of
// the slots, whatever arrives first.
#pragma once

#include <deepep/operation.cuh>
#include <deepep/pipe.cuh>

namespace deepep {

constexpr uint32_t kMaxPieceVecs = 4;  // per lane: 2 KB pieces
constexpr uint32_t kMaxBatch = 4;      // terms that are waited for together

// One sum. Lane l holds what slots l and l + 32 add.
struct Job {
    bool is_valid;
    uint32_t number;             // token, or compact row
    const uint8_t* row[2];       // null: the slot adds nothing
    const uint64_t* flag[2];     // that says the row is there; null if it is anyway
    uint32_t lap[2], peer[2];
    uint64_t mask, ready;        // by slot, the same in all lanes

    __device__ void clear() {
        is_valid = false;
        row[0] = row[1] = nullptr;
        flag[0] = flag[1] = nullptr;
        lap[0] = lap[1] = peer[0] = peer[1] = 0;
        mask = ready = 0;
    }

    // After the lanes have filled in their slots.
    __device__ void settle(const Operation& op) {
        is_valid = true;
        mask = ready = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool is_ready =
                flag[half] == nullptr || load_acquire_sys(flag[half]) == make_word(op.epoch, lap[half]);
            mask |= uint64_t{__ballot_sync(kFullMask, row[half] != nullptr)} << (half * kWarpSize);
            ready |= uint64_t{__ballot_sync(kFullMask, is_ready)} << (half * kWarpSize);
        }
        fence_bulk();
    }

    // See that the rows of these slots are there; false if one is not and `may_block` is false.
    __device__ bool await(const Operation& op, uint64_t slots, bool may_block) {
        const uint64_t unseen = slots & ~ready;
        if (unseen == 0) return true;
        bool is_here = true;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!(unseen >> (half * kWarpSize + lane_index()) & 1)) continue;
            is_here &= may_block ? op.wait(flag[half], op.epoch, lap[half], peer[half])
                                 : load_acquire_sys(flag[half]) == make_word(op.epoch, lap[half]);
        }
        is_here = __all_sync(kFullMask, is_here);
        if (!is_here && !may_block) return false;
        fence_bulk();
        ready |= slots;
        return true;
    }

    // Address of a slot's row. All lanes call it together.
    __device__ const uint8_t* address(uint32_t slot) const {
        const uint64_t own = reinterpret_cast<uint64_t>(slot >= kWarpSize ? row[1] : row[0]);
        return pointer<const uint8_t>(__shfl_sync(kFullMask, own, static_cast<int>(slot % kWarpSize)));
    }
};

// Where the loads have got to: the piece and the slots still to come, of the current job or the next.
struct LoadCursor {
    bool is_in_next = false;
    uint32_t piece = 0;
    uint64_t left = 0;
};

// Shared-memory slots of one warp, filled several at a time: a batch of terms has one barrier.
struct TermPipe {
    uint8_t* slots;
    uint64_t* full;
    uint32_t slot_bytes, num_slots;
    uint32_t head = 0, tail = 0, num_free;
    uint32_t issued = 0, used = 0;  // batches

    __device__ TermPipe(uint8_t* shared, PipeBarriers& barriers, uint32_t number, const Cut& cut)
        : slots(shared),
          full(barriers.full[number]),
          slot_bytes(cut.slot_bytes),
          num_slots(cut.slots_per_warp),
          num_free(cut.slots_per_warp) {}

    __device__ uint32_t wrap(uint32_t n) const { return n >= num_slots ? n - num_slots : n; }
    __device__ uint32_t most_terms() const { return max_of(1u, min_of(kMaxBatch, num_slots / 2)); }

    // Each lane loads the terms it holds.
    __device__ void issue(const Job& job, uint64_t chosen, uint32_t num_terms, uint32_t offset, uint32_t num_bytes) {
        uint64_t* barrier = full + issued % kMaxSlots;
        if (lane_index() == 0) barrier_expect(barrier, num_terms * num_bytes);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t slot = lane_index() + half * kWarpSize;
            if (!(chosen >> slot & 1)) continue;
            const uint32_t before = __popcll(chosen & ((uint64_t{1} << slot) - 1));
            bulk_load(slots + wrap(head + before) * slot_bytes, job.row[half] + offset, num_bytes, barrier);
        }
        head = wrap(head + num_terms);
        num_free -= num_terms;
        ++issued;
    }
    __device__ void wait() const { barrier_wait(full + used % kMaxSlots, used / kMaxSlots % 2); }
    __device__ const uint8_t* term(uint32_t i) const { return slots + wrap(tail + i) * slot_bytes; }
    __device__ void release(uint32_t num_terms) {
        __syncwarp();  // everyone has read them
        tail = wrap(tail + num_terms);
        num_free += num_terms;
        ++used;
    }
};

// The lowest `most` bits of a mask.
__device__ __forceinline__ uint64_t lowest_bits(uint64_t mask, uint32_t most) {
    uint64_t rest = mask;
    for (uint32_t i = 0; i < most && rest != 0; ++i) rest &= rest - 1;
    return mask ^ rest;
}

// Provider: bool load(Job&); void start(Job&); void begin(const Job&, uint32_t vec, float (&)[n]);
//           void write(const Job&, uint32_t vec, const Vec16&); void finish(const Job&). vec: 16-byte vector of the row.
template <typename Type, typename Provider>
struct Reducer {
    const Operation& op;
    const Cut& cut;
    TermPipe& pipe;
    Provider& provider;
    LoadCursor cursor;

    __device__ bool try_issue(Job& current, Job& next) {
        if (cursor.left == 0) {
            if (cursor.piece + 1 < cut.num_pieces && (cursor.is_in_next ? next.mask : current.mask) != 0) {
                ++cursor.piece;
            } else if (!cursor.is_in_next && next.is_valid && next.mask != 0) {
                cursor.is_in_next = true;
                cursor.piece = 0;
            } else {
                return false;
            }
            cursor.left = cursor.is_in_next ? next.mask : current.mask;
        }
        const uint64_t chosen = lowest_bits(cursor.left, pipe.most_terms());
        const uint32_t num_terms = __popcll(chosen);
        if (num_terms > pipe.num_free) return false;
        // Never wait for the next job: what it needs may be published only after the current one is done.
        const uint32_t offset = cursor.piece * cut.piece_bytes, num_bytes = piece_length(cut, cursor.piece);
        if (cursor.is_in_next) {
            if (!next.await(op, chosen, false)) return false;
            pipe.issue(next, chosen, num_terms, offset, num_bytes);
        } else {
            current.await(op, chosen, true);
            pipe.issue(current, chosen, num_terms, offset, num_bytes);
        }
        cursor.left ^= chosen;
        return true;
    }

    template <bool kFull>
    __device__ void add(float (&total)[kMaxPieceVecs][Type::kPerVec], const uint8_t* data, uint32_t num_vecs) const {
        const Vec16* vecs = reinterpret_cast<const Vec16*>(data) + lane_index();
#pragma unroll
        for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
            if (!kFull && lane_index() + i * kWarpSize >= num_vecs) continue;
            float term[Type::kPerVec];
            Type::unpack(vecs[i * kWarpSize], term);
#pragma unroll
            for (int j = 0; j < Type::kPerVec; ++j) total[i][j] = __fadd_rn(total[i][j], term[j]);
        }
    }

    template <bool kFull>
    __device__ void sum_piece(Job& current, Job& next, uint32_t piece) {
        const uint32_t num_vecs = piece_length(cut, piece) / sizeof(Vec16), lane = lane_index();
        const uint32_t first_vec = piece * cut.piece_bytes / sizeof(Vec16) + lane;
        float total[kMaxPieceVecs][Type::kPerVec];
#pragma unroll
        for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
            if (kFull || lane + i * kWarpSize < num_vecs) provider.begin(current, first_vec + i * kWarpSize, total[i]);
        }
        for (uint64_t left = current.mask; left != 0;) {
            if constexpr (kHasBulkCopies) {
                const uint64_t chosen = lowest_bits(left, pipe.most_terms());
                const uint32_t num_terms = __popcll(chosen);
                while (pipe.issued == pipe.used) try_issue(current, next);
                pipe.wait();
                for (uint32_t i = 0; i < num_terms; ++i) add<kFull>(total, pipe.term(i), num_vecs);
                pipe.release(num_terms);
                try_issue(current, next);
                left ^= chosen;
            } else {
                current.await(op, left & (~left + 1), true);
                const uint32_t slot = __ffsll(static_cast<long long>(left)) - 1;
                add<kFull>(total, current.address(slot) + piece * cut.piece_bytes, num_vecs);
                left &= left - 1;
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
            if (kFull || lane + i * kWarpSize < num_vecs) {
                provider.write(current, first_vec + i * kWarpSize, Type::pack(total[i]));
            }
        }
    }

    __device__ void run() {
        Job current, next;
        current.clear();
        next.clear();
        if (!provider.load(current)) return;
        cursor = {false, 0, current.mask};
        for (;;) {
            if constexpr (kHasBulkCopies) {
                // Before anything else of this job is waited for.
                while (try_issue(current, next)) {
                }
            }
            if (!provider.load(next)) next.clear();
            provider.start(current);
            for (uint32_t piece = 0; piece < cut.num_pieces; ++piece) {
                if (piece_length(cut, piece) == kMaxPieceVecs * kWarpSize * sizeof(Vec16)) {
                    sum_piece<true>(current, next, piece);
                } else {
                    sum_piece<false>(current, next, piece);
                }
            }
            provider.finish(current);
            if (!next.is_valid) return;
            current = next;
            if (cursor.is_in_next) {
                cursor.is_in_next = false;
            } else {
                cursor = {false, 0, current.mask};
            }
            next.clear();
        }
    }
};

}  // namespace deepep
