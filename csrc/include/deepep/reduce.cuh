// Ordered fp32 sums of rows by one warp. Loads run ahead, into the next job too; the order of additions is the order of
// the slots, whatever arrives first.
#pragma once

#include <deepep/operation.cuh>
#include <deepep/pipe.cuh>

namespace deepep {

constexpr uint32_t kMaxPieceVecs = 8;  // per lane: 4 KB pieces

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

    // Address of a slot's row, once it is there; null if it is not and `may_block` is false. All lanes call it together.
    __device__ const uint8_t* await(const Operation& op, uint32_t slot, bool may_block) {
        const int holder = static_cast<int>(slot % kWarpSize);
        const bool is_upper = slot >= kWarpSize;
        if (!(ready >> slot & 1)) {
            bool is_here = false;
            if (lane_index() == holder) {
                const uint64_t* word = is_upper ? flag[1] : flag[0];
                const uint32_t wanted = is_upper ? lap[1] : lap[0];
                is_here = may_block ? op.wait(word, op.epoch, wanted, is_upper ? peer[1] : peer[0])
                                    : load_acquire_sys(word) == make_word(op.epoch, wanted);
            }
            is_here = __shfl_sync(kFullMask, is_here, holder);
            if (!is_here && !may_block) return nullptr;
            fence_bulk();
            ready |= uint64_t{1} << slot;
        }
        const uint64_t address = reinterpret_cast<uint64_t>(is_upper ? row[1] : row[0]);
        return pointer<const uint8_t>(__shfl_sync(kFullMask, address, holder));
    }
};

// Where the loads have got to: the piece and the slots still to come, of the current job or the next.
struct LoadCursor {
    bool is_in_next = false;
    uint32_t piece = 0;
    uint64_t left = 0;
};

// Provider: bool load(Job&); void start(Job&); void begin(const Job&, uint32_t vec, float (&)[n]);
//           void write(const Job&, uint32_t vec, const Vec16&); void finish(const Job&). vec: 16-byte vector of the row.
template <typename Type, typename Provider>
struct Reducer {
    const Operation& op;
    const Cut& cut;
    WarpPipe& pipe;
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
        const uint32_t slot = __ffsll(static_cast<long long>(cursor.left)) - 1;
        // Never wait for the next job: what it needs may be published only after the current one is done.
        const uint8_t* row = cursor.is_in_next ? next.await(op, slot, false) : current.await(op, slot, true);
        if (row == nullptr) return false;
        pipe.issue(row + cursor.piece * cut.piece_bytes, piece_length(cut, cursor.piece));
        cursor.left &= cursor.left - 1;
        return true;
    }

    __device__ void fill(Job& current, Job& next) {
        while (pipe.issued - pipe.used < pipe.num_slots && try_issue(current, next)) {
        }
    }

    __device__ void sum_piece(Job& current, Job& next, uint32_t piece) {
        const uint32_t num_vecs = piece_length(cut, piece) / sizeof(Vec16), lane = lane_index();
        const uint32_t first_vec = piece * cut.piece_bytes / sizeof(Vec16);
        float total[kMaxPieceVecs][Type::kPerVec];
#pragma unroll
        for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
            if (lane + i * kWarpSize < num_vecs) provider.begin(current, first_vec + lane + i * kWarpSize, total[i]);
        }
        for (uint64_t left = current.mask; left != 0; left &= left - 1) {
            const uint8_t* data;
            if constexpr (kHasBulkCopies) {
                data = pipe.front();
            } else {
                data = current.await(op, __ffsll(static_cast<long long>(left)) - 1, true) + piece * cut.piece_bytes;
            }
#pragma unroll
            for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
                if (lane + i * kWarpSize >= num_vecs) continue;
                float term[Type::kPerVec];
                Type::unpack(reinterpret_cast<const Vec16*>(data)[lane + i * kWarpSize], term);
#pragma unroll
                for (int j = 0; j < Type::kPerVec; ++j) total[i][j] = __fadd_rn(total[i][j], term[j]);
            }
            if constexpr (kHasBulkCopies) {
                __syncwarp();  // everyone has read the slot
                ++pipe.used;
                try_issue(current, next);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kMaxPieceVecs; ++i) {
            if (lane + i * kWarpSize < num_vecs) {
                provider.write(current, first_vec + lane + i * kWarpSize, Type::pack(total[i]));
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
            if (!provider.load(next)) next.clear();
            if constexpr (kHasBulkCopies) fill(current, next);
            provider.start(current);
            for (uint32_t piece = 0; piece < cut.num_pieces; ++piece) sum_piece(current, next, piece);
            provider.finish(current);
            if (!next.is_valid) return;
            current = next;
            if (cursor.is_in_next) {
                cursor.is_in_next = false;
            } else {
                cursor = {false, 0, current.mask};
            }
        }
    }
};

}  // namespace deepep
