// 16-byte vectors as fp32 numbers and back, rounding to nearest even; plain copies by one warp.
#pragma once

#include <deepep/ptx.cuh>

namespace deepep {

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

struct Bf16 {
    static constexpr int kPerVec = 8;
    __device__ static void unpack(const Vec16& v, float (&out)[kPerVec]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = bits_to_float(v.word[i] << 16);
            out[2 * i + 1] = bits_to_float(v.word[i] & 0xffff0000u);
        }
    }
    __device__ static Vec16 pack(const float (&in)[kPerVec]) {
        Vec16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v.word[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
        }
        return v;
    }
};

struct Fp16 {
    static constexpr int kPerVec = 8;
    __device__ static void unpack(const Vec16& v, float (&out)[kPerVec]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm("{\n .reg .b16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;\n}"
                : "=f"(out[2 * i]), "=f"(out[2 * i + 1])
                : "r"(v.word[i]));
        }
    }
    __device__ static Vec16 pack(const float (&in)[kPerVec]) {
        Vec16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v.word[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
        }
        return v;
    }
};

struct Fp32 {
    static constexpr int kPerVec = 4;
    __device__ static void unpack(const Vec16& v, float (&out)[kPerVec]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = bits_to_float(v.word[i]);
    }
    __device__ static Vec16 pack(const float (&in)[kPerVec]) {
        Vec16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.word[i] = __float_as_uint(in[i]);
        return v;
    }
};

// One warp copies num_bytes (a multiple of 16), several loads in flight.
__device__ __forceinline__ void warp_copy(void* to, const void* from, uint32_t num_bytes) {
    constexpr uint32_t kUnroll = 4;
    Vec16* out = static_cast<Vec16*>(to);
    const Vec16* in = static_cast<const Vec16*>(from);
    const uint32_t num_vecs = num_bytes / sizeof(Vec16);
    for (uint32_t base = lane_index(); base < num_vecs; base += kWarpSize * kUnroll) {
        Vec16 held[kUnroll];
#pragma unroll
        for (uint32_t i = 0; i < kUnroll; ++i) {
            if (base + i * kWarpSize < num_vecs) held[i] = load_stream(in + base + i * kWarpSize);
        }
#pragma unroll
        for (uint32_t i = 0; i < kUnroll; ++i) {
            if (base + i * kWarpSize < num_vecs) out[base + i * kWarpSize] = held[i];
        }
    }
}

}  // namespace deepep
