// Tokens that ranks send each other, as numbers that teams share out among themselves.
#pragma once

#include <deepep/ll_common.cuh>

namespace deepep {

// The ranks whose tokens are numbered: all of them, or all others.
struct Sources {
    uint32_t count, magic, rank;  // rank: own number if it is left out, else more than any
    __device__ Sources(const LlShape& shape, bool without_own)
        : count(shape.num_ranks - without_own),
          magic(without_own ? shape.others_magic : shape.ranks_magic),
          rank(without_own ? shape.rank : shape.num_ranks) {}
};

// One token of one source: sources take turns, so that teams start on what comes first.
struct Item {
    uint32_t source = 0, token = 0;
    uint64_t slot = 0;  // number
    __device__ Item() {}
    __device__ Item(const LlShape& shape, uint32_t from, uint32_t index)
        : source(from), token(index), slot(static_cast<uint64_t>(from) * shape.num_max_tokens + index) {}
    __device__ Item(const LlShape& shape, const Sources& sources, uint32_t number) {
        const uint32_t index = divide(number, sources.magic), from = number - index * sources.count;
        *this = Item(shape, from >= sources.rank ? from + 1 : from, index);
    }
};

// Where an item comes in, inside a window.
__device__ __forceinline__ uint64_t slot_of(const LlShape& shape, const LlWindow& window, uint64_t number) {
    return window.dispatch_slots + number * shape.slot_bytes;
}

}  // namespace deepep
