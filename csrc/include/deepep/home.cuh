// Combine at the home of the tokens: fetch what the owners have published and add it up.
#pragma once

#include <deepep/reduce.cuh>
#include <deepep/stage.cuh>

namespace deepep {

// What one owner has published for this home.
struct Owner {
    const uint8_t* rows;     // of its compact row 0, or of slot 0 of this home's ring
    const float* weights;    // likewise
    const uint64_t* flags;   // null if nothing is staged
    uint32_t ring, first_row;
    uint32_t is_in_place;    // rows are indexed by compact row; else by slot of the ring
    uint32_t is_self_direct; // own rank, nothing staged: rows and weights are the user's tensors
};

// Sums over owners, in ascending slot; a Provider for Reducer.
template <typename Type>
struct HomeSums {
    const Operation& op;
    const CombineArgs& args;
    const Owner* owners;
    bool gives_credit;
    uint32_t ahead = 0;  // lane 0: the ticket after the one in use, asked for early

    __device__ void ask() {
        if (lane_index() == 0) ahead = atomicAdd(&op.control->next_job, 1);
    }

    __device__ uint32_t slot_of(const Owner& owner, uint32_t row) const { return (row - owner.first_row) % owner.ring; }

    __device__ bool load(Job& job) {
        const uint32_t token = __shfl_sync(kFullMask, ahead, 0);
        if (token >= args.num_tokens) return false;
        ask();
        job.clear();
        job.number = token;
        const uint64_t first = uint64_t{token} * args.num_slots;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t slot = lane_index() + half * kWarpSize;
            int rank = -1, row = -1;
            if (slot < args.num_slots) {
                rank = pointer<const int32_t>(args.dst_rank)[first + slot];
                row = pointer<const int32_t>(args.dst_row)[first + slot];
                if (args.is_per_copy) find_copy(first, slot, rank, row);
            }
            if (rank >= 0) locate(job, half, slot, static_cast<uint32_t>(rank), static_cast<uint32_t>(row));
        }
        job.settle();
        return true;
    }

    // Every copy travels: the row is recorded at another slot, if that one chose the same rank and is higher.
    __device__ void find_copy(uint64_t first, uint32_t slot, int& rank, int& row) const {
        const int64_t expert = pointer<const int64_t>(args.topk_idx)[first + slot];
        rank = expert < 0 ? -1 : static_cast<int>(expert / args.num_local_experts);
        for (uint32_t other = slot; rank >= 0 && other < args.num_slots; ++other) {
            if (pointer<const int32_t>(args.dst_rank)[first + other] == rank) {
                row = pointer<const int32_t>(args.dst_row)[first + other];
            }
        }
    }

    __device__ void locate(Job& job, int half, uint32_t slot, uint32_t rank, uint32_t row) const {
        const Owner& owner = owners[rank];
        const uint64_t row_bytes = args.cut.row_bytes;
        if (owner.flags != nullptr) {
            job.flag[half] = owner.flags + slot_of(owner, row);
            job.lap_and_peer[half] = (row - owner.first_row) / owner.ring * kMaxRanks + rank;
        }
        if (args.is_per_copy) {
            if (owner.is_self_direct) {
                const uint64_t at = uint64_t{row} * args.num_topk + slot;
                job.row[half] = owner.rows + pointer<const uint32_t>(args.expanded_row)[at] * row_bytes;
            } else {
                job.row[half] = owner.rows + (uint64_t{slot_of(owner, row)} * args.num_topk + slot) * row_bytes;
            }
        } else {
            job.row[half] = owner.rows + (owner.is_in_place ? row : slot_of(owner, row)) * row_bytes;
        }
    }

    __device__ void start(const Job& job) {
        if (args.out_weights == 0) return;
        const uint64_t first = uint64_t{job.number} * args.num_slots;
        for (uint32_t k = lane_index(); k < args.num_topk; k += kWarpSize) {
            int home_rank = -1;
            if (args.is_owner_only) {
                const int64_t expert = pointer<const int64_t>(args.topk_idx)[first + k];
                if (expert >= 0) home_rank = static_cast<int>(expert / args.num_local_experts);
            }
            float total = 0.0f;
            for (uint32_t slot = 0; slot < args.num_slots; ++slot) {
                const int rank = pointer<const int32_t>(args.dst_rank)[first + slot];
                if (rank < 0 || (args.is_owner_only && rank != home_rank)) continue;
                const uint32_t row = pointer<const uint32_t>(args.dst_row)[first + slot];
                total = __fadd_rn(total, weight_of(owners[rank], row, k));
            }
            pointer<float>(args.out_weights)[first + k] = total;
        }
        __syncwarp();
    }

    __device__ float weight_of(const Owner& owner, uint32_t row, uint32_t k) const {
        if (!owner.is_self_direct) {
            const uint64_t pitch = args.weights_pitch / sizeof(float);
            return *reinterpret_cast<const volatile float*>(owner.weights + slot_of(owner, row) * pitch + k);
        }
        const float* weights = pointer<const float>(args.topk_weights);
        const uint64_t at = uint64_t{row} * args.num_topk + k;
        if (args.expanded_row == 0) return weights[at];
        const int from = pointer<const int32_t>(args.expanded_row)[at];
        return from < 0 ? 0.0f : weights[from];
    }

    __device__ void begin(const Job& job, uint32_t vec, float (&total)[Type::kPerVec]) const {
        const uint64_t at = uint64_t{job.number} * (args.cut.row_bytes / sizeof(Vec16)) + vec;
#pragma unroll
        for (int j = 0; j < Type::kPerVec; ++j) total[j] = 0.0f;
        if (args.bias0 != 0) Type::unpack(pointer<const Vec16>(args.bias0)[at], total);
        if (args.bias1 != 0) {
            float more[Type::kPerVec];
            Type::unpack(pointer<const Vec16>(args.bias1)[at], more);
#pragma unroll
            for (int j = 0; j < Type::kPerVec; ++j) total[j] = __fadd_rn(total[j], more[j]);
        }
    }
    __device__ void write(const Job& job, uint32_t vec, const Vec16& value) const {
        pointer<Vec16>(args.out)[uint64_t{job.number} * (args.cut.row_bytes / sizeof(Vec16)) + vec] = value;
    }
    __device__ void finish(const Job& job) const {
        if (!gives_credit) return;
        const uint32_t pass = job.number / kPassTokens;
        __syncwarp();
        if (lane_index() == 0) op.finish_part(pass, min_of(kPassTokens, args.num_tokens - pass * kPassTokens));
    }
};

}  // namespace deepep
