// What rows are on the wire: vectors and scale factors that say themselves whether they are there. No barrier, fence or
// flag stands between a row and the link, and nothing is added to its bytes. The last word of a vector is sent
// inverted, so that zero is no data: a receiver looks at a vector until that word is not zero, takes it, and leaves
// zeros behind.
//
// What this rests on:
// - A vector is stored and loaded by one b128 access, which PTX promises to be single-copy atomic (a vector of four
// words
//   would be four accesses): whoever sees its last word sees all of it. Vectors promise nothing about each other.
// - The word that cannot be sent, all ones, is none that a cast to FP8 or a sum in bf16 makes: a pair of NaN whose
// every
//   bit is set. Of raw bf16 such a pair loses a bit, and stays two NaN.
// - Memory has two banks, and credits keep a sender from writing to a bank before its zeros are back. A receiver that
//   gives up on a rank takes nothing more of it until the window is cleaned (LlState::is_stale).
#pragma once

#include <deepep/ll_common.cuh>

namespace deepep {

__device__ __forceinline__ void store_b128(Vec16* address, const Vec16& v) {
    const uint64_t low = static_cast<uint64_t>(v.word[1]) << 32 | v.word[0];
    const uint64_t high = static_cast<uint64_t>(v.word[3]) << 32 | v.word[2];
    asm volatile("{\n .reg .b128 v;\n mov.b128 v, {%1, %2};\n st.relaxed.sys.global.b128 [%0], v;\n}" ::"l"(address),
                 "l"(low), "l"(high)
                 : "memory");
}

__device__ __forceinline__ Vec16 load_b128(const Vec16* address) {
    uint64_t low, high;
    asm volatile("{\n .reg .b128 v;\n ld.relaxed.sys.global.b128 v, [%2];\n mov.b128 {%0, %1}, v;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(address)
                 : "memory");
    return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
             static_cast<uint32_t>(high >> 32)}};
}

__device__ __forceinline__ uint32_t to_wire(uint32_t word) { return max_of(~word, 1u); }
__device__ __forceinline__ Vec16 to_wire(Vec16 v) {
    v.word[3] = to_wire(v.word[3]);
    return v;
}

// Of what was looked at: whether it is there, and what it is then.
__device__ __forceinline__ bool is_there(uint32_t seen) { return seen != 0; }
__device__ __forceinline__ bool is_there(const Vec16& seen) { return is_there(seen.word[3]); }
__device__ __forceinline__ uint32_t from_wire(uint32_t seen) { return ~seen; }
__device__ __forceinline__ Vec16 from_wire(Vec16 seen) {
    seen.word[3] = from_wire(seen.word[3]);
    return seen;
}

}  // namespace deepep
