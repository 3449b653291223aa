// Ordered fp32 sums of rows by one warp, straight from where the rows lie into registers. Loads of several vectors are on
// their way at once; the order of additions is the order of the slots, whatever arrives first.
#pragma once

#include <deepep/operation.cuh>
#include <deepep/vec.cuh>

namespace deepep {

constexpr uint32_t kLaneVecs = 4;  // of a row, loaded together

// One sum. Lane l holds what slots l and l + 32 add.
struct Job {
    uint32_t number;             // token, or compact row
    const uint8_t* row[2];       // null: the slot adds nothing
    const uint64_t* flag[2];     // that says the row is there; null if it is anyway
    uint32_t lap_and_peer[2];    // of that flag; fewer registers than two members
    uint32_t used[2];            // slots that add something, a bit each

    __device__ void clear() {
        row[0] = row[1] = nullptr;
        flag[0] = flag[1] = nullptr;
        lap_and_peer[0] = lap_and_peer[1] = 0;
    }

    // After the lanes have filled in their slots.
    __device__ void settle() {
        used[0] = __ballot_sync(kFullMask, row[0] != nullptr);
        used[1] = __ballot_sync(kFullMask, row[1] != nullptr);
    }

    // Wait until all rows are there.
    __device__ void await(const Operation& op) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (flag[half] == nullptr) continue;
            op.wait(flag[half], op.epoch, lap_and_peer[half] / kMaxRanks, lap_and_peer[half] % kMaxRanks);
        }
        __syncwarp();
    }

    // Address of the lowest slot's row that `left` still names, which it names no more. All lanes call it together.
    __device__ const Vec16* take(uint32_t (&left)[2]) const {
        const int half = left[0] == 0;
        const int slot = __ffs(left[half]) - 1;
        left[half] &= left[half] - 1;
        const uint64_t own = reinterpret_cast<uint64_t>(half == 0 ? row[0] : row[1]);
        return pointer<const Vec16>(__shfl_sync(kFullMask, own, slot));
    }
};

// Provider: bool load(Job&); void start(const Job&), when all rows are there; void begin(const Job&, uint32_t vec,
//           float (&)[n]); void write(const Job&, uint32_t vec, const Vec16&); void finish(const Job&). vec: 16-byte vector
//           of the row.
// kTerms: rows that are loaded from at the same time.
template <typename Type, uint32_t kTerms, typename Provider>
struct Reducer {
    const Operation& op;
    uint32_t row_vecs;
    Provider& provider;

    using Held = Vec16[kLaneVecs];

    // kFull: every lane has all of its vectors.
    template <bool kFull>
    __device__ __forceinline__ void load(Held& held, const Vec16* row, uint32_t vec) const {
#pragma unroll
        for (uint32_t i = 0; i < kLaneVecs; ++i) {
            if (kFull || vec + i * kWarpSize < row_vecs) held[i] = load_stream(row + vec + i * kWarpSize);
        }
    }

    __device__ __forceinline__ void add(float (&total)[kLaneVecs][Type::kPerVec], const Held& held) const {
#pragma unroll
        for (uint32_t i = 0; i < kLaneVecs; ++i) {
            float term[Type::kPerVec];
            Type::unpack(held[i], term);
#pragma unroll
            for (int j = 0; j < Type::kPerVec; ++j) total[i][j] = __fadd_rn(total[i][j], term[j]);
        }
    }

    template <bool kFull>
    __device__ __forceinline__ void sum(const Job& job, uint32_t vec) const {
        float total[kLaneVecs][Type::kPerVec];
#pragma unroll
        for (uint32_t i = 0; i < kLaneVecs; ++i) {
            if (kFull || vec + i * kWarpSize < row_vecs) provider.begin(job, vec + i * kWarpSize, total[i]);
        }
        uint32_t left[2] = {job.used[0], job.used[1]};
        while ((left[0] | left[1]) != 0) {
            Held held[kTerms];
            bool is_held[kTerms];
#pragma unroll
            for (uint32_t t = 0; t < kTerms; ++t) {
                is_held[t] = (left[0] | left[1]) != 0;
                if (is_held[t]) load<kFull>(held[t], job.take(left), vec);
            }
#pragma unroll
            for (uint32_t t = 0; t < kTerms; ++t) {
                if (is_held[t]) add(total, held[t]);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kLaneVecs; ++i) {
            if (kFull || vec + i * kWarpSize < row_vecs) provider.write(job, vec + i * kWarpSize, Type::pack(total[i]));
        }
    }

    __device__ void run() {
        for (Job job; provider.load(job);) {
            job.await(op);
            provider.start(job);
            for (uint32_t first = 0; first < row_vecs; first += kLaneVecs * kWarpSize) {
                if (first + kLaneVecs * kWarpSize <= row_vecs) {
                    sum<true>(job, first + lane_index());
                } else {
                    sum<false>(job, first + lane_index());
                }
            }
            provider.finish(job);
        }
    }
};

}  // namespace deepep
