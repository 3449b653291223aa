// Some of a token's choices, or some ranks, as bits. Kernels are compiled twice: for up to 32 of each, which is usual
// and takes one word, and for more (DEEPEP_LL_WIDE).
#pragma once

#include <deepep/ll_layout.cuh>

namespace deepep {

constexpr uint32_t kWords = DEEPEP_LL_WIDE ? 2 : 1;
constexpr uint32_t kMostChoices = kWords * kWarpSize;  // of a token, or ranks
static_assert(!DEEPEP_LL_WIDE || (kMostChoices == kLlMaxRanks && kMostChoices == kLlMaxTopk), "there are no more");

template <uint32_t kNumWords>
struct BitsOf {
    using Type = uint64_t;
};
template <>
struct BitsOf<1> {
    using Type = uint32_t;
};
using Bits = BitsOf<kWords>::Type;

// From words whose bit i of word w stands for 32 w + i, shared memory included.
__device__ __forceinline__ Bits bits_of(const uint32_t (&words)[kWords]) {
    Bits bits = words[0];
    if constexpr (kWords > 1) bits |= static_cast<Bits>(static_cast<uint64_t>(words[kWords - 1]) << 32);
    return bits;
}

__device__ __forceinline__ bool has_bit(Bits bits, uint32_t index) { return (bits >> index & 1) != 0; }

// Take out the first one.
__device__ __forceinline__ uint32_t pop_bit(Bits& bits) {
    const uint32_t index = (kWords > 1 ? __ffsll(static_cast<long long>(bits)) : __ffs(static_cast<int>(bits))) - 1;
    bits &= bits - 1;
    return index;
}

// By a whole warp: all bits that any lane has.
__device__ __forceinline__ Bits any_bits(Bits bits) {
    uint64_t all = __reduce_or_sync(kFullMask, static_cast<uint32_t>(bits));
    if constexpr (kWords > 1) {
        const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(bits) >> 32);
        all |= static_cast<uint64_t>(__reduce_or_sync(kFullMask, high)) << 32;
    }
    return static_cast<Bits>(all);
}

}  // namespace deepep
