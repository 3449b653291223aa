// FP8, UE8M0 and LogFMT-10 casts, bit for bit those of deepep/quant.py, which explains them. Files are compiled without
// fused multiply-add; divisions name their rounding.
#pragma once

#include <deepep/vec.cuh>

namespace deepep {

constexpr int kGroupSize = 128;  // channels that share a scale factor or a LogFMT range
constexpr float kFp8Max = 448.0f;
constexpr float kFp8AmaxMin = 1e-4f;

enum SfFormat : uint32_t { kSfNone = 0, kSfFloat32 = 1, kSfPow2 = 2, kSfUe8m0 = 3 };

// The largest (or, complemented, smallest) value among a power of two of neighbouring lanes. The whole warp calls it:
// which lanes a shuffle is for costs dearly to find out, unless it is all of them.
template <int kLanes>
__device__ __forceinline__ uint32_t lanes_max(uint32_t value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        value = max_of(value, __shfl_xor_sync(kFullMask, value, step));
    }
    return value;
}

struct Fp8Scale {
    float factor;       // payload = x * factor
    uint32_t sf;        // bits of the float32 scale
    uint32_t exponent;  // biased, of a power-of-two scale
};

__device__ __forceinline__ uint32_t bits_of_power(uint32_t exponent) {
    return exponent == 0 ? 0x00400000u : exponent == 255 ? 0x7fc00000u : exponent << 23;
}

__device__ __forceinline__ Fp8Scale fp8_scale(float amax, uint32_t format) {
    amax = fmaxf(amax, kFp8AmaxMin);
    const float scale = __fdiv_rn(amax, kFp8Max);
    if (format == kSfFloat32) return {__fdiv_rn(kFp8Max, amax), __float_as_uint(scale), 0};
    const uint32_t bits = __float_as_uint(scale);
    const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
    return {__uint_as_float(bits_of_power(254 - exponent)), bits_of_power(exponent), exponent};
}

// Two finite floats to two e4m3 bytes, the first in the low byte; to nearest even, saturating.
__device__ __forceinline__ uint32_t fp8_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    uint32_t pair = 0;
    const float values[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t sign = __float_as_uint(values[i]) >> 31;
        const float magnitude = fminf(fabsf(values[i]), kFp8Max);
        uint32_t code;
        if (magnitude < 0.015625f) {  // below the smallest normal: whole steps of 2^-9
            code = static_cast<uint32_t>(__float2int_rn(magnitude * 512.0f));
        } else {
            const uint32_t bits = __float_as_uint(magnitude);
            code = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120u << 3);
        }
        pair |= (sign << 7 | code) << (8 * i);
    }
    return pair;
#endif
}

namespace logfmt {

constexpr int32_t kMaxOctaves = 32;
constexpr int32_t kOctave = 1 << 16;
constexpr float kNumSteps = 510.0f;
constexpr uint32_t kBf16One = 0x3f80, kBf16MinNormal = 0x0080;

// round(2^16 * log2(1 + m / 128)), and the same at m + 1/2.
__constant__ int32_t kLogs[128] = {
    0,     736,   1466,  2190,  2909,  3623,  4331,  5034,  5732,  6425,  7112,  7795,  8473,  9146,  9814,  10477,
    11136, 11791, 12440, 13086, 13727, 14363, 14996, 15624, 16248, 16868, 17484, 18096, 18704, 19308, 19909, 20505,
    21098, 21687, 22272, 22854, 23433, 24007, 24579, 25146, 25711, 26272, 26830, 27384, 27936, 28484, 29029, 29571,
    30109, 30645, 31178, 31707, 32234, 32758, 33279, 33797, 34312, 34825, 35334, 35841, 36346, 36847, 37346, 37842,
    38336, 38827, 39316, 39802, 40286, 40767, 41246, 41722, 42196, 42667, 43137, 43603, 44068, 44530, 44990, 45448,
    45904, 46357, 46809, 47258, 47705, 48150, 48593, 49034, 49472, 49909, 50344, 50776, 51207, 51636, 52063, 52488,
    52911, 53332, 53751, 54169, 54584, 54998, 55410, 55820, 56229, 56635, 57040, 57443, 57845, 58245, 58643, 59039,
    59434, 59827, 60219, 60609, 60997, 61384, 61769, 62152, 62534, 62915, 63294, 63671, 64047, 64421, 64794, 65166,
};
__constant__ int32_t kMidpoints[128] = {
    369,   1102,  1829,  2551,  3267,  3978,  4683,  5384,  6079,  6769,  7454,  8134,  8810,  9480,  10146, 10807,
    11464, 12116, 12764, 13407, 14046, 14680, 15310, 15937, 16559, 17177, 17791, 18401, 19007, 19609, 20207, 20802,
    21393, 21980, 22564, 23144, 23720, 24293, 24863, 25429, 25992, 26551, 27108, 27660, 28210, 28757, 29300, 29840,
    30378, 30912, 31443, 31971, 32496, 33019, 33538, 34055, 34569, 35080, 35588, 36094, 36597, 37097, 37595, 38090,
    38582, 39072, 39559, 40044, 40527, 41006, 41484, 41959, 42432, 42902, 43370, 43836, 44300, 44761, 45220, 45676,
    46131, 46583, 47034, 47482, 47928, 48372, 48813, 49253, 49691, 50127, 50560, 50992, 51422, 51850, 52276, 52700,
    53122, 53542, 53960, 54377, 54791, 55204, 55615, 56025, 56432, 56838, 57242, 57644, 58045, 58444, 58841, 59237,
    59631, 60023, 60414, 60803, 61190, 61576, 61961, 62343, 62725, 63104, 63483, 63859, 64234, 64608, 64980, 65351,
};

__device__ __forceinline__ int32_t log_of(uint32_t magnitude) {
    return static_cast<int32_t>((magnitude >> 7) << 16) + kLogs[magnitude & 0x7f];
}

// How many midpoints are at most this fraction of an octave.
__device__ __forceinline__ uint32_t mantissa_of(int32_t fraction) {
    uint32_t first = 0;
#pragma unroll
    for (uint32_t step = 64; step > 0; step /= 2) {
        if (kMidpoints[first + step - 1] <= fraction) first += step;
    }
    return first + (kMidpoints[first] <= fraction);
}

// Largest and smallest magnitude of a group (as bf16 bits, zeros left out) among the 8 values of a lane.
__device__ __forceinline__ void lane_range(const Vec16& v, uint32_t& amin, uint32_t& amax) {
    amin = 0x7fff, amax = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t magnitude = (v.word[i / 2] >> (16 * (i % 2))) & 0x7fff;
        if (magnitude < kBf16MinNormal) continue;
        amin = min_of(amin, magnitude);
        amax = max_of(amax, magnitude);
    }
}

__device__ __forceinline__ uint32_t roundtrip_one(uint32_t bits, int32_t lo, float width) {
    const uint32_t magnitude = bits & 0x7fff, sign = bits & 0x8000;
    if (magnitude < kBf16MinNormal) return sign;
    const int32_t offset = log_of(magnitude) - lo;
    if (offset < -kOctave) return sign;
    const int32_t steps = max_of(__float2int_rn(static_cast<float>(offset) * __fdiv_rn(kNumSteps, width)), 0);
    const int32_t log = lo + __float2int_rn(static_cast<float>(steps) * __fdiv_rn(width, kNumSteps));
    return sign | ((static_cast<uint32_t>(log >> 16) << 7) + mantissa_of(log & (kOctave - 1)));
}

// What a receiver sees of 8 values sent as LogFMT-10; 16 lanes are a group. The whole warp calls it.
__device__ __forceinline__ Vec16 roundtrip(const Vec16& v) {
    uint32_t amin, amax;
    lane_range(v, amin, amax);
    amax = lanes_max<16>(amax);
    amin = min_of(0x7fff - lanes_max<16>(0x7fff - amin), amax);
    if (amax >= kBf16One) return v;
    const int32_t hi = log_of(amax), lo = max_of(log_of(amin), hi - kMaxOctaves * kOctave);
    const float width = static_cast<float>(max_of(hi - lo, 1));
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = roundtrip_one(v.word[i] & 0xffff, lo, width);
        out.word[i] = low | roundtrip_one(v.word[i] >> 16, lo, width) << 16;
    }
    return out;
}

}  // namespace logfmt
}  // namespace deepep
