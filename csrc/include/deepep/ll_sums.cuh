// Sums of low-latency combine: a thread's vectors of a row, in fp32 until they are rounded once.
#pragma once

#include <deepep/ll_wire.cuh>
#include <deepep/quant.cuh>

namespace deepep {

// Where a thread's vectors of a row are; the last ones may reach beyond the end, then they are the last vector again.
template <uint32_t kVecs>
struct Place {
    uint32_t vec[kVecs];
    bool is_inside[kVecs];
    __device__ __forceinline__ Place(uint32_t thread, uint32_t num_threads, uint32_t base, uint32_t row_vecs) {
#pragma unroll
        for (uint32_t i = 0; i < kVecs; ++i) {
            const uint32_t at = base + i * num_threads + thread;
            is_inside[i] = at < row_vecs;
            vec[i] = min_of(at, row_vecs - 1);
        }
    }
};

__device__ __forceinline__ void add(const Vec16& v, float (&sum)[8]) {
    float values[8];
    Bf16::unpack(v, values);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] = sum[c] + values[c];
}

__device__ __forceinline__ void add_weighted(const Vec16& v, float weight, float (&sum)[8]) {
    float values[8];
    Bf16::unpack(v, values);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] = sum[c] + weight * values[c];
}

// By a whole warp.
__device__ __noinline__ Vec16 cast_logfmt(const Vec16 value) { return logfmt::roundtrip(value); }

// A sum as it travels to the token's home. By a whole warp.
__device__ __forceinline__ Vec16 round_sum(const float (&sum)[8], bool use_logfmt) {
    const Vec16 out = Bf16::pack(sum);
    return use_logfmt ? cast_logfmt(out) : out;
}

// By one thread, where statistics are asked for: wait for a vector of a rank's sum, and note how long. Nothing is
// taken.
__device__ __forceinline__ void note_wait(const LlCall& call, int32_t rank, const Vec16* slot, uint64_t start) {
    if (rank == static_cast<int32_t>(call.args.shape.rank)) return;
    while (!is_there(load_b128(slot)) && !call.has_given_up(rank)) continue;
    call.note_wait(rank, start);
}

}  // namespace deepep
