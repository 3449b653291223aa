// Lines: 16 bytes of which the last four are the epoch, so that data say themselves whether they are there. Few tokens
// travel like this: one trip over the link, where a flag costs two more, the fence before it having to wait for every
// store to come back. The price is a third more bytes, which counts where there are many tokens.
//
// What this rests on: a line is stored and loaded by one b128 access, which PTX promises to be single-copy atomic (a
// vector of four words would be four accesses). So whoever sees the epoch of its call in a line sees the 12 bytes that
// were written with it; lines promise nothing about each other, and each is looked at on its own. Memory of lines holds
// lines only, of epochs before or zeros, never other bytes that may look like an epoch. It has two banks like all else,
// and credits keep a sender from writing to a bank that the receiver still reads.
#pragma once

#include <deepep/ll_common.cuh>

namespace deepep {

constexpr uint32_t kOctet = 8;        // neighbouring vectors of a row, and the lanes that hold them
constexpr uint32_t kOctetLines = 11;  // that hold them and one extra word, 33 words in all

__device__ __forceinline__ void store_line(Vec16* address, const Vec16& line) {
    const uint64_t low = static_cast<uint64_t>(line.word[1]) << 32 | line.word[0];
    const uint64_t high = static_cast<uint64_t>(line.word[3]) << 32 | line.word[2];
    asm volatile("{\n .reg .b128 line;\n mov.b128 line, {%1, %2};\n st.relaxed.sys.global.b128 [%0], line;\n}" ::"l"(
                     address),
                 "l"(low), "l"(high)
                 : "memory");
}

__device__ __forceinline__ Vec16 load_line(const Vec16* address) {
    uint64_t low, high;
    asm volatile("{\n .reg .b128 line;\n ld.relaxed.sys.global.b128 line, [%2];\n mov.b128 {%0, %1}, line;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(address)
                 : "memory");
    return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
             static_cast<uint32_t>(high >> 32)}};
}

// Of a row: first a line per vector, with the first three words of it; then three lines per octet, with the eight
// fourth words and the extra one.
__device__ __forceinline__ uint32_t octets_end(uint32_t num_vecs) { return align_up(num_vecs, kOctet); }
__device__ __forceinline__ uint32_t rest_line(uint32_t num_vecs, uint32_t vec) {
    return octets_end(num_vecs) + vec / kOctet * (kOctetLines - kOctet) + vec % kOctet;
}

__device__ __forceinline__ uint32_t octet_lane() { return threadIdx.x % kOctet; }
__device__ __forceinline__ bool has_rest() { return octet_lane() < kOctetLines - kOctet; }
__device__ __forceinline__ uint32_t octet_mask() { return 0xffu << (lane_index() & ~(kOctet - 1)); }

// What a lane stores of an octet: a line of its own vector and, the first three, one of the rest.
struct LinePair {
    Vec16 own, rest;
};

// By a whole warp; `extra` is the same for all lanes of an octet.
__device__ __forceinline__ LinePair fold(const Vec16& v, uint32_t extra, uint32_t epoch) {
    const uint32_t first = 3 * octet_lane();
    LinePair lines = {{{v.word[0], v.word[1], v.word[2], epoch}}, {{0, 0, 0, epoch}}};
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i) {
        const uint32_t word = __shfl_sync(kFullMask, v.word[3], (first + i) % kOctet, kOctet);
        lines.rest.word[i] = first + i == kOctet ? extra : word;
    }
    return lines;
}

// The way back, by a whole warp; what octets come to that have not got all of their lines is of no use.
__device__ __forceinline__ Vec16 unfold(const Vec16& own, const Vec16& rest, uint32_t& extra) {
    const uint32_t place = octet_lane() % 3;
    Vec16 v = own;
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i) {
        const uint32_t word = __shfl_sync(kFullMask, rest.word[i], octet_lane() / 3, kOctet);
        if (i == place) v.word[3] = word;
    }
    extra = __shfl_sync(kFullMask, rest.word[2], 2, kOctet);
    return v;
}

// Lines that one thread waits for.
template <uint32_t kCount>
struct Lines {
    Vec16 line[kCount];
    uint32_t missing;  // bit per line

    // Look once at those that are missing, all loads in one trip.
    template <typename Address>
    __device__ __forceinline__ void look(uint32_t epoch, Address address) {
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            if (missing >> i & 1) line[i] = load_line(address(i));
        }
        uint32_t left = 0;
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            if ((missing >> i & 1) && line[i].word[3] != epoch) left |= 1u << i;
        }
        missing = left;
    }
};

__device__ __forceinline__ uint32_t tokens_of(uint32_t header) { return header & ~kHasWeights; }

// Whether a rank with so many tokens sends them as lines. All ranks know this of each other without asking: a header
// tells the tokens, and the limit is the same everywhere.
__device__ __forceinline__ bool is_lined(const LlShape& shape, uint32_t num_tokens) {
    return num_tokens <= shape.dispatch_line_tokens;
}

}  // namespace deepep
