// The FP8 cast of deepep/quant.py, bit for bit: same IEEE operations in the same order, nothing fused.
#pragma once

#include <deepep/vec.cuh>

namespace deepep {

constexpr float kFp8Max = 448.0f;
constexpr float kFp8AmaxMin = 1e-4f;
constexpr int kGroupSize = 128;
constexpr int kLanesPerGroup = 8;  // each casts 16 channels: 16 bytes of FP8

// How scale factors are kept; values as in deepep/cuda/arguments.py.
enum SfFormat : uint32_t { kSfNone = 0, kSfFloat32 = 1, kSfPow2 = 2, kSfUe8m0 = 3 };

// Two floats within +-448 to e4m3, low byte first, to nearest even.
__device__ __forceinline__ uint32_t pack_e4m3x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else
    uint32_t packed = 0;
    const float value[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t bits = __float_as_uint(value[i]), magnitude = bits & 0x7fffffffu;
        // Below 2^-6 the step is 2^-9; above, three mantissa bits stay and a carry runs into the exponent by itself.
        const uint32_t code = magnitude < 0x3c800000u
                                  ? static_cast<uint32_t>(rintf(__uint_as_float(magnitude) * 512.0f))
                                  : ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20) - (120u << 3);
        packed |= (code | (bits >> 31 << 7)) << (8 * i);
    }
    return packed;
#endif
}

struct GroupScale {
    float factor;       // what channels are multiplied by
    uint32_t sf;        // float32 bits (kSfFloat32, kSfPow2)
    uint32_t exponent;  // biased, for kSfUe8m0
};

// Scale of a group whose largest magnitude is amax (not yet raised to the minimum).
__device__ __forceinline__ GroupScale group_scale(float amax, uint32_t format) {
    amax = fmaxf(amax, kFp8AmaxMin);
    const float scale = __fdiv_rn(amax, kFp8Max);
    if (format == kSfFloat32) return {__fdiv_rn(kFp8Max, amax), __float_as_uint(scale), 0};
    const uint32_t bits = __float_as_uint(scale);
    const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
    const uint32_t inverse = 254 - exponent;
    return {__uint_as_float(inverse == 0 ? 0x00400000u : inverse << 23), exponent << 23, exponent};
}

// One lane's 16 bf16 channels, of eight lanes that share a group. All lanes of the warp call it together.
__device__ __forceinline__ Vec16 cast_16_channels(const Vec16& first, const Vec16& second, uint32_t format,
                                                  GroupScale& scale) {
    float x[16];
    Bf16::unpack(first, *reinterpret_cast<float(*)[8]>(x));
    Bf16::unpack(second, *reinterpret_cast<float(*)[8]>(x + 8));
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < kLanesPerGroup; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, step));
    scale = group_scale(amax, format);
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = fminf(fmaxf(__fmul_rn(x[4 * i + j], scale.factor), -kFp8Max), kFp8Max);
        out.word[i] = pack_e4m3x2(y[0], y[1]) | pack_e4m3x2(y[2], y[3]) << 16;
    }
    return out;
}

// One warp casts a row of `hidden` bf16 channels (a multiple of 128; 512 for UE8M0). sf has hidden/128 (or /512) words.
__device__ __forceinline__ void warp_cast_row(Vec16* out, uint32_t* sf, const Vec16* in, uint32_t hidden,
                                              uint32_t format) {
    const uint32_t num_vecs = hidden / 16, lane = lane_index();
    for (uint32_t base = 0; base < num_vecs; base += kWarpSize) {
        const uint32_t vec = base + lane;
        const bool is_inside = vec < num_vecs;
        const Vec16 zero = {{0, 0, 0, 0}};
        const Vec16 first = is_inside ? load_stream(in + 2 * vec) : zero;
        const Vec16 second = is_inside ? load_stream(in + 2 * vec + 1) : zero;
        GroupScale scale;
        const Vec16 packed = cast_16_channels(first, second, format, scale);
        if (is_inside) out[vec] = packed;
        if (format == kSfUe8m0) {
            // 32 lanes hold four groups: one packed word.
            uint32_t word = scale.exponent << (8 * (lane / kLanesPerGroup));
            word |= __shfl_xor_sync(kFullMask, word, kLanesPerGroup);
            word |= __shfl_xor_sync(kFullMask, word, 2 * kLanesPerGroup);
            if (lane == 0) sf[base / kWarpSize] = word;
        } else if (is_inside && lane % kLanesPerGroup == 0) {
            sf[vec / kLanesPerGroup] = scale.sf;
        }
    }
}

}  // namespace deepep
