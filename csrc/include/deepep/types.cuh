// Fixed-width types and the few constants that everything here shares.
#pragma once

#include <stdint.h>

#ifndef DEEPEP_CHECK_INDICES
#define DEEPEP_CHECK_INDICES 0
#endif

namespace deepep {

// The debug switch: look at every index before it is used.
constexpr bool kChecksIndices = DEEPEP_CHECK_INDICES != 0;

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasBulkCopies = true;
#else
constexpr bool kHasBulkCopies = false;
#endif

// 16 bytes, the unit of every payload.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

template <typename T>
__device__ __forceinline__ constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

template <typename T>
__device__ __forceinline__ constexpr T align_up(T a, T b) {
    return ceil_div(a, b) * b;
}

template <typename T>
__device__ __forceinline__ T min_of(T a, T b) {
    return a < b ? a : b;
}

template <typename T>
__device__ __forceinline__ T max_of(T a, T b) {
    return a > b ? a : b;
}

template <typename T>
__device__ __forceinline__ T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
// For loops that a warp leaves as a whole: whether any lane's index, in steps of one, is less than `end`.
__device__ __forceinline__ bool warp_begins_before(uint32_t index, uint32_t end) {
    return index - static_cast<uint32_t>(lane_index()) < end;
}
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

}  // namespace deepep
