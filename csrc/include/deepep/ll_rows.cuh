// Rows of low-latency dispatch on their way out of a block: loaded, and cast to FP8 where asked for.
#pragma once

#include <deepep/ll_wire.cuh>
#include <deepep/quant.cuh>

namespace deepep {

constexpr int kAddressWarp = kLlThreads / kWarpSize - 1;  // the one with the least of a row to cast

// Vectors of a row as it is dispatched.
template <bool kFp8>
__device__ __forceinline__ uint32_t vecs_of(const LlShape& shape) {
    return shape.hidden / (kFp8 ? 16 : 8);
}

// The part of a row that a thread holds at once: 16 channels.
struct Held {
    Vec16 v[2];
};

// The same on its way out: 16 bytes of FP8 and the scale factor, or two vectors of bf16.
template <bool kFp8>
struct Outgoing {
    Vec16 v[kFp8 ? 1 : 2];
    uint32_t sf;
};

// FP8: 16 neighbouring channels, so that 8 lanes share a scale factor. Bf16: two vectors a block apart.
template <bool kFp8>
__device__ uint32_t held_index(uint32_t unit, uint32_t i) {
    return kFp8 ? 2 * unit + i : unit + i * kLlThreads;
}

// Where it is; null if there is none.
struct HeldAt {
    const Vec16* v[2];
    __device__ __forceinline__ void settle() { deepep::settle(v[0]), deepep::settle(v[1]); }
    __device__ __forceinline__ Held load() const {
        return {{v[0] != nullptr ? load_stream(v[0]) : Vec16{}, v[1] != nullptr ? load_stream(v[1]) : Vec16{}}};
    }
};

template <bool kFp8>
__device__ __forceinline__ HeldAt find_unit(const LlDispatchArgs& args, uint32_t token, uint32_t unit) {
    const uint32_t num_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const Vec16* row = pointer<const Vec16>(args.x) + static_cast<uint64_t>(token) * num_vecs;
    HeldAt at;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t index = held_index<kFp8>(unit, i);
        at.v[i] = index < num_vecs ? row + index : nullptr;
    }
    return at;
}

// The largest magnitude of 16 finite channels, two at a time.
__device__ __forceinline__ float largest_bf16(const Vec16 (&v)[2]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t pair = v[i / 4].word[i % 4] & 0x7fff7fffu;
        asm("max.bf16x2 %0, %0, %1;" : "+r"(largest) : "r"(pair));
    }
    return fmaxf(__uint_as_float(largest << 16), __uint_as_float(largest & 0xffff0000u));
}

constexpr uint32_t kLanesPerGroup = kGroupSize / 16;

// Whether the lane sends the scale factor of its group of channels, and clears the one that came.
template <bool kFp8>
__device__ __forceinline__ bool has_sf() {
    return kFp8 && lane_index() % kLanesPerGroup == 0;
}

// By all lanes of a warp, some of which may hold nothing of the row.
__device__ __forceinline__ void cast_unit(const LlDispatchArgs& args, const Held& held, Outgoing<true>& out) {
    const float amax = __uint_as_float(lanes_max<kLanesPerGroup>(__float_as_uint(largest_bf16(held.v))));
    const Fp8Scale scale = fp8_scale(amax, args.sf_format);
    out.sf = args.sf_format == kSfUe8m0 ? scale.exponent : scale.sf;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x[8];
        Bf16::unpack(held.v[i], x);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t low = fp8_pair(x[4 * j] * scale.factor, x[4 * j + 1] * scale.factor);
            out.v[0].word[2 * i + j] = low | fp8_pair(x[4 * j + 2] * scale.factor, x[4 * j + 3] * scale.factor) << 16;
        }
    }
}

// What the wire cannot carry is the same in rows that stay here.
__device__ __forceinline__ void cast_unit(const LlDispatchArgs&, const Held& held, Outgoing<false>& out) {
    out.v[0] = from_wire(to_wire(held.v[0]));
    out.v[1] = from_wire(to_wire(held.v[1]));
}

// By the whole block: visit every vector of a row that a thread holds, with its scale factor, `out` being its first
// part.
template <bool kFp8, typename Visit>
__device__ __forceinline__ void for_each_vec(const LlDispatchArgs& args, uint32_t token, uint32_t first_unit,
                                             Outgoing<kFp8> out, Visit visit) {
    constexpr uint32_t kParts = kFp8 ? 1 : 2;
    const uint32_t num_vecs = vecs_of<kFp8>(args.common.shape);
#pragma unroll 1
    for (uint32_t unit = first_unit; warp_begins_before(unit, num_vecs); unit += kParts * kLlThreads) {
        if (unit != first_unit) cast_unit(args, find_unit<kFp8>(args, token, unit).load(), out);
#pragma unroll
        for (uint32_t part = 0; part < kParts; ++part) {
            const uint32_t vec = unit + part * kLlThreads;
            if (vec < num_vecs) visit(vec, out.v[part], out.sf);
        }
    }
}

}  // namespace deepep
