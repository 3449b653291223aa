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
    uint32_t lap_and_peer[2];    // of that flag; fewer registers than two members
    uint32_t order[2];           // which term of the sum this is
    uint32_t num_terms;
    bool is_ready;

    __device__ void clear() {
        is_valid = is_ready = false;
        row[0] = row[1] = nullptr;
        flag[0] = flag[1] = nullptr;
        lap_and_peer[0] = lap_and_peer[1] = 0;
        order[0] = order[1] = kNoEntry;
        num_terms = 0;
    }

    // After the lanes have filled in their slots.
    __device__ void settle(const Operation& op) {
        is_valid = true;
        const uint32_t below = (1u << lane_index()) - 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t used = __ballot_sync(kFullMask, row[half] != nullptr);
            order[half] = row[half] != nullptr ? num_terms + __popc(used & below) : kNoEntry;
            num_terms += __popc(used);
        }
        await(op, false);
    }

    // See that all rows are there; false if one is not and `may_block` is false.
    __device__ bool await(const Operation& op, bool may_block) {
        if (is_ready) return true;
        bool is_here = true;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (flag[half] == nullptr) continue;
            const uint32_t lap = lap_and_peer[half] / kMaxRanks, peer = lap_and_peer[half] % kMaxRanks;
            is_here &= may_block ? op.wait(flag[half], op.epoch, lap, peer)
                                 : load_acquire_sys(flag[half]) == make_word(op.epoch, lap);
        }
        is_ready = __all_sync(kFullMask, is_here) || may_block;
        fence_bulk();
        return is_ready;
    }

    // Address of a term's row. All lanes call it together.
    __device__ const uint8_t* address(uint32_t term) const {
        const uint32_t lower = __ballot_sync(kFullMask, order[0] == term), upper = __ballot_sync(kFullMask, order[1] == term);
        const uint64_t own = reinterpret_cast<uint64_t>(lower != 0 ? row[0] : row[1]);
        return pointer<const uint8_t>(__shfl_sync(kFullMask, own, __ffs(lower | upper) - 1));
    }
};

// Where the loads have got to: the piece and the term, of the current job or the next.
struct LoadCursor {
    bool is_in_next;
    uint32_t piece, term;
};

// Shared-memory slots of one warp, filled several at a time: a batch of terms has one barrier.
struct TermPipe {
    uint32_t slots;  // shared address
    uint64_t* full;
    uint32_t slot_bytes, num_slots, most_terms;
    uint32_t head = 0, tail = 0, num_free;
    uint32_t issued = 0, used = 0;  // batches

    __device__ TermPipe(const uint8_t* shared, PipeBarriers& barriers, uint32_t number, const Cut& cut)
        : slots(shared_address(shared)),
          full(barriers.full[number]),
          slot_bytes(cut.slot_bytes),
          num_slots(cut.slots_per_warp),
          most_terms(max_of(1u, min_of(kMaxBatch, cut.slots_per_warp / 2))),
          num_free(cut.slots_per_warp) {}

    __device__ uint32_t wrap(uint32_t n) const { return n >= num_slots ? n - num_slots : n; }

    // Each lane loads the terms it holds, of [first, first + num_terms).
    __device__ void issue(const Job& job, uint32_t first, uint32_t num_terms, uint32_t offset, uint32_t num_bytes) {
        uint64_t* barrier = full + issued % kMaxSlots;
        if (lane_index() == 0) barrier_expect(barrier, num_terms * num_bytes);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t place = job.order[half] - first;  // wraps to something large below `first`
            if (place >= num_terms) continue;
            bulk_load_at(slots + wrap(head + place) * slot_bytes, job.row[half] + offset, num_bytes, barrier);
        }
        head = wrap(head + num_terms);
        num_free -= num_terms;
        ++issued;
    }
    __device__ void wait() const { barrier_wait(full + used % kMaxSlots, used / kMaxSlots % 2); }
    __device__ uint32_t term(uint32_t i) const { return slots + wrap(tail + i) * slot_bytes; }
    __device__ void release(uint32_t num_terms) {
        __syncwarp();  // everyone has read them
        tail = wrap(tail + num_terms);
        num_free += num_terms;
        ++used;
    }
};

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
        if (!cursor.is_in_next && cursor.piece == cut.num_pieces) {
            if (!next.is_valid) return false;
            cursor = {true, 0, 0};
        }
        const uint32_t job_terms = cursor.is_in_next ? next.num_terms : current.num_terms;
        if (cursor.piece == cut.num_pieces || job_terms == 0) return false;
        const uint32_t num_terms = min_of(pipe.most_terms, job_terms - cursor.term);
        if (num_terms > pipe.num_free) return false;
        // Never wait for the next job: what it needs may be published only after the current one is done.
        const uint32_t offset = cursor.piece * cut.piece_bytes, num_bytes = piece_length(cut, cursor.piece);
        if (cursor.is_in_next) {
            if (!next.await(op, false)) return false;
            pipe.issue(next, cursor.term, num_terms, offset, num_bytes);
        } else {
            current.await(op, true);
            pipe.issue(current, cursor.term, num_terms, offset, num_bytes);
        }
        cursor.term += num_terms;
        if (cursor.term == job_terms) {
            cursor.term = 0;
            ++cursor.piece;
        }
        return true;
    }

    // load(i): the lane's i-th vector of a term.
    template <bool kFull, typename Load>
    __device__ void add(float (&total)[kMaxPieceVecs][Type::kPerVec], uint32_t num_vecs, Load load) const {
#pragma unroll
        for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
            if (!kFull && lane_index() + i * kWarpSize >= num_vecs) continue;
            float term[Type::kPerVec];
            Type::unpack(load(i), term);
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
        for (uint32_t first = 0; first < current.num_terms;) {
            if constexpr (kHasBulkCopies) {
                const uint32_t num_terms = min_of(pipe.most_terms, current.num_terms - first);
                while (pipe.issued == pipe.used) try_issue(current, next);
                pipe.wait();
                for (uint32_t i = 0; i < num_terms; ++i) {
                    const uint32_t data = pipe.term(i) + lane * sizeof(Vec16);
                    add<kFull>(total, num_vecs, [&](uint32_t n) { return load_shared(data + n * kWarpSize * sizeof(Vec16)); });
                }
                pipe.release(num_terms);
                try_issue(current, next);
                first += num_terms;
            } else {
                current.await(op, true);
                const Vec16* data =
                    reinterpret_cast<const Vec16*>(current.address(first) + piece * cut.piece_bytes) + lane;
                add<kFull>(total, num_vecs, [&](uint32_t n) { return load_stream(data + n * kWarpSize); });
                ++first;
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
        cursor = {false, 0, 0};
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
                cursor = {false, 0, 0};
            }
            next.clear();
        }
    }
};

}  // namespace deepep
