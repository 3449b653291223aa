// Low-latency dispatch lays out rows per expert: counts, places, stores.
#pragma once

#include <deepep/ll_items.cuh>
#include <deepep/ll_rows.cuh>

namespace deepep {

// What a block knows about the sources, and its teams.
struct Arrivals {
    uint32_t header[kMostChoices];
    uint32_t most_tokens;  // of any source
    uint32_t num_done;     // teams that have all they take

    // By the whole block, before a barrier that comes before the first header.
    __device__ void init() {
        if (threadIdx.x == 0) most_tokens = num_done = 0;
    }
};

// A count or, after all counts, a header: who sends it, and where it comes in.
struct Announced {
    bool is_header;
    uint32_t rank;
    const uint64_t* word;
    __device__ Announced(const LlDispatchArgs& args, const LlCall& call, uint32_t i) {
        const LlShape& shape = args.common.shape;
        is_header = i >= shape.num_experts;
        rank = is_header ? i - shape.num_experts : owner_of(shape, i);
        const LlWindow& window = args.common.window;
        word = call.own_word(is_header ? window.headers : window.counts, is_header ? rank : i);
    }
    __device__ static uint32_t count(const LlShape& shape) { return shape.num_experts + shape.num_ranks; }
    __device__ void keep(uint32_t i, uint32_t value, uint32_t* table, Arrivals& from) const {
        (is_header ? from.header[rank] : table[i]) = value;
        if (is_header) atomicMax(&from.most_tokens, tokens_of(value));
    }
};

// Wait for the headers and counts of all sources from the thread's `first` on; `table` [R, L] gets the counts.
__device__ void await_counts(const LlDispatchArgs& args, const LlCall& call, uint32_t first, uint32_t* table,
                             Arrivals& from, bool is_early = false) {
#pragma unroll 1
    for (uint32_t i = first; i < Announced::count(args.common.shape); i += kLlThreads) {
        const Announced announced(args, call, i);
        uint32_t value = 0;
        if (call.is_masked(announced.rank) || !call.wait(announced.rank, announced.word, value, is_early)) value = 0;
        announced.keep(i, value, table, from);
    }
}

// The first row of a source inside a local expert: after the rows of all sources before it. Few enough sums to make
// each one where it is needed, rather than all of them before anybody goes on.
__device__ __forceinline__ uint32_t first_row(const LlShape& shape, const uint32_t* table, uint32_t source,
                                              uint32_t expert) {
    uint32_t first = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < source; ++rank) first += table[rank * shape.num_local_experts + expert];
    return first;
}

// By one block: tell the caller what came.
__device__ void report(const LlDispatchArgs& args, const uint32_t* table, const Arrivals& from) {
    const LlShape& shape = args.common.shape;
#pragma unroll 1
    for (uint32_t expert = threadIdx.x; expert < shape.num_local_experts; expert += kLlThreads) {
        uint32_t begin = 0;
#pragma unroll 1
        for (uint32_t rank = 0; rank < shape.num_ranks; ++rank) {
            const uint32_t count = table[rank * shape.num_local_experts + expert];
            pointer<uint64_t>(args.layout_range)[expert * shape.num_ranks + rank] = ll_word(begin, count);
            begin += count;
        }
        pointer<uint32_t>(args.recv_count)[expert] = begin;
        if (args.recv_stats != 0) pointer<uint32_t>(args.recv_stats)[expert] += begin;
    }
    if (threadIdx.x < shape.num_ranks) {
        pointer<uint32_t>(args.common.sources)[threadIdx.x] = from.header[threadIdx.x];
    }
}

// The rows that one token gets here, and their scale factors: side by side, for each word of top-k positions.
struct Rows {
    uint32_t count[kWords];
    uint8_t* row[kMostChoices];
    uint8_t* sf[kMostChoices];

    // Every `step`th one from `first` on.
    template <typename Visit>
    __device__ __forceinline__ void for_each(uint32_t first, uint32_t step, Visit visit) const {
#pragma unroll
        for (uint32_t w = 0; w < kWords; ++w) {
            const uint32_t end = w * kWarpSize + count[w];
#pragma unroll 1
            for (uint32_t i = w * kWarpSize + first; i < end; i += step) visit(i);
        }
    }
};

__device__ __forceinline__ uint32_t num_scales(const LlDispatchArgs& args) {
    return args.common.shape.hidden / kGroupSize / (args.sf_format == kSfUe8m0 ? 4 : 1);
}

template <bool kFp8>
__device__ __forceinline__ uint8_t* row_of(const LlDispatchArgs& args, uint32_t row) {
    return pointer<uint8_t>(args.recv_x) + uint64_t{row} * vecs_of<kFp8>(args.common.shape) * sizeof(Vec16);
}

// Note where one choice of a token ended up: `expert` -1 if elsewhere.
__device__ __forceinline__ void keep_route(const LlDispatchArgs& args, uint64_t slot, uint32_t token, uint32_t k,
                                           int32_t expert, uint32_t row, uint32_t weight) {
    const uint64_t route = slot * args.common.shape.num_topk + k;
    pointer<int32_t>(args.common.routes)[route] = expert < 0 ? -1 : static_cast<int32_t>(row);
    pointer<uint32_t>(args.common.route_weights)[route] = weight;
    if (expert >= 0) pointer<uint32_t>(args.src_info)[row] = token;
}

// By a team's first threads, those of whole warps: list the token's rows and, if `keeps`, keep them for combine. `raw`
// is choice k.
template <bool kFp8>
__device__ void list_rows(const LlDispatchArgs& args, const Item& item, const Vec16& raw, const uint32_t* table,
                          uint32_t k, Rows& rows, bool keeps = true) {
    const LlShape& shape = args.common.shape;
    if (k >= kMostChoices) return;
    const bool is_choice = k < shape.num_topk;
    const int32_t expert = is_choice ? static_cast<int32_t>(raw.word[0]) : -1;
    const uint32_t here = __ballot_sync(kFullMask, expert >= 0), lane = lane_index();
    if (lane == 0) rows.count[k / kWarpSize] = __popc(here);
    if (!is_choice) return;
    const uint32_t room = shape.num_ranks * shape.num_max_tokens;
    const uint32_t at = (expert < 0 ? 0 : first_row(shape, table, item.source, expert)) + raw.word[1];
    const uint32_t row = expert * room + at;
    if (keeps) keep_route(args, item.slot, item.token, k, expert, row, raw.word[2]);
    if (expert < 0) return;
    const uint32_t place = k - lane + __popc(here & ((1u << lane) - 1));
    rows.row[place] = row_of<kFp8>(args, row);
    rows.sf[place] = pointer<uint8_t>(args.recv_sf) + uint64_t{expert * num_scales(args) * room + at} * 4;
}

// By a thread: its vector of a row, to all of the token's rows. The lanes of a group share its scale factor, and the
// rows that it goes to: each of these words is in a sector of its own.
template <bool kFp8>
__device__ __forceinline__ void store_vec(const LlDispatchArgs& args, const Rows& rows, uint32_t vec,
                                          const Vec16& value, uint32_t sf) {
    const uint32_t stride = 4 * args.common.shape.num_ranks * args.common.shape.num_max_tokens;
    const uint32_t group = vec / kLanesPerGroup;
    const bool is_ue8m0 = args.sf_format == kSfUe8m0;
    const uint32_t sf_at = is_ue8m0 ? group / 4 * stride + group % 4 : group * stride;
    rows.for_each(0, 1, [&](uint32_t i) { store_stream(reinterpret_cast<Vec16*>(rows.row[i]) + vec, value); });
    if (!kFp8) return;
    rows.for_each(lane_index() % kLanesPerGroup, kLanesPerGroup, [&](uint32_t i) {
        if (is_ue8m0) {
            global(rows.sf[i])[sf_at] = static_cast<uint8_t>(sf);
        } else {
            *reinterpret_cast<uint32_t*>(global(rows.sf[i]) + sf_at) = sf;
        }
    });
}

__device__ void forget_token(const LlDispatchArgs& args, const Item& item, uint32_t k) {
    const uint32_t num_topk = args.common.shape.num_topk;
    if (k < num_topk) pointer<int32_t>(args.common.routes)[item.slot * num_topk + k] = -1;
}

}  // namespace deepep
