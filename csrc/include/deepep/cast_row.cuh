// One warp casts a row of bf16 to FP8, as dispatch does on the way into the window.
#pragma once

#include <deepep/quant.cuh>

namespace deepep {

constexpr uint32_t kChannelsPerLane = 16;  // 16 bytes of FP8
constexpr uint32_t kLanesPerGroup = kGroupSize / kChannelsPerLane;

// One lane's 16 channels, of eight lanes that share a group. All lanes of the warp call it together.
__device__ inline Vec16 cast_16_channels(const Vec16& first, const Vec16& second, uint32_t format, Fp8Scale& scale) {
    float x[2][8];
    Bf16::unpack(first, x[0]);
    Bf16::unpack(second, x[1]);
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) amax = fmaxf(amax, fabsf(x[i / 8][i % 8]));
#pragma unroll
    for (uint32_t step = 1; step < kLanesPerGroup; step *= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, static_cast<int>(step)));
    }
    scale = fp8_scale(amax, format);
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* four = &x[i / 2][i % 2 * 4];
        out.word[i] = fp8_pair(__fmul_rn(four[0], scale.factor), __fmul_rn(four[1], scale.factor)) |
                      fp8_pair(__fmul_rn(four[2], scale.factor), __fmul_rn(four[3], scale.factor)) << 16;
    }
    return out;
}

// hidden is a multiple of 128 (512 for UE8M0); sf has hidden/128 (or /512) words.
__device__ inline void warp_cast_row(Vec16* out, uint32_t* sf, const Vec16* in, uint32_t hidden, uint32_t format) {
    const uint32_t num_vecs = hidden / kChannelsPerLane, lane = lane_index();
    for (uint32_t base = 0; base < num_vecs; base += kWarpSize) {
        const uint32_t vec = base + lane;
        const bool is_inside = vec < num_vecs;
        const Vec16 zero = {{0, 0, 0, 0}};
        const Vec16 first = is_inside ? load_stream(in + 2 * vec) : zero;
        const Vec16 second = is_inside ? load_stream(in + 2 * vec + 1) : zero;
        Fp8Scale scale;
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
