// The sending half of low-latency dispatch: counts to every rank, each token once to every rank of its experts. Every
// warp finds the ranks of a token by itself, so that warps need not meet. Rows that stay on their rank may skip the
// window: they are laid out from the registers they were cast in, while others are on their way.
#pragma once

#include <deepep/ll_lay_out.cuh>

namespace deepep {

constexpr uint32_t kScansAtOnce = 2;  // choices a thread holds before it counts them

// A choice of this rank's tokens; -1 is none.
__device__ __forceinline__ int32_t load_expert(const LlDispatchArgs& args, const int64_t* at) {
    const int64_t expert = load_if(at, int64_t{-1});
    if constexpr (kChecksIndices) {
        if (expert < -1 || expert >= args.common.shape.num_experts) {
            tell_host(args.common, kLlBadIndex, args.common.shape.num_ranks, static_cast<uint32_t>(expert));
            return -1;
        }
    }
    return static_cast<int32_t>(expert);
}

struct Scan {
    int32_t expert[kScansAtOnce];
};

// Where it is; null if there is none.
struct ScanAt {
    const int64_t* expert[kScansAtOnce];
    __device__ __forceinline__ void settle() {
#pragma unroll
        for (uint32_t i = 0; i < kScansAtOnce; ++i) deepep::settle(expert[i]);
    }
    __device__ __forceinline__ Scan load(const LlDispatchArgs& args) const {
        Scan scan;
#pragma unroll
        for (uint32_t i = 0; i < kScansAtOnce; ++i) scan.expert[i] = load_expert(args, expert[i]);
        return scan;
    }
};

// Choices [first, ..) of this rank's tokens, of which there are `end` to look at.
__device__ __forceinline__ ScanAt find_scan(const LlDispatchArgs& args, uint32_t first, uint32_t end) {
    ScanAt scan;
#pragma unroll
    for (uint32_t i = 0; i < kScansAtOnce; ++i) {
        const uint32_t at = first + i * kLlThreads + threadIdx.x;
        scan.expert[i] = at < end ? pointer<const int64_t>(args.topk_idx) + at : nullptr;
    }
    return scan;
}

// Add how often each expert is chosen by the first `end` choices to `table`; `scan` holds the very first ones.
__device__ void count_experts(const LlDispatchArgs& args, Scan scan, uint32_t end, uint32_t* table) {
#pragma unroll 1
    for (uint32_t first = 0; first < end; first += kScansAtOnce * kLlThreads) {
        if (first != 0) scan = find_scan(args, first, end).load(args);
#pragma unroll
        for (uint32_t i = 0; i < kScansAtOnce; ++i) {
            if (scan.expert[i] >= 0) atomicAdd(&table[scan.expert[i]], 1);
        }
    }
}

__device__ void clear(const LlDispatchArgs& args, uint32_t* table) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < args.common.shape.num_experts; i += kLlThreads) table[i] = 0;
    __syncthreads();
}

// Tell every rank how many tokens there are here, and how many rows each of its experts gets.
__device__ void publish_counts(const LlDispatchArgs& args, const LlCall& call, const uint32_t* table) {
    const LlShape& shape = args.common.shape;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < shape.num_experts; i += kLlThreads) {
        const uint32_t owner = owner_of(shape, i);
        const uint64_t index =
            static_cast<uint64_t>(shape.rank) * shape.num_local_experts + i - owner * shape.num_local_experts;
        if (!call.is_masked(owner)) call.signal(owner, args.common.window.counts, index, table[i]);
    }
    if (threadIdx.x < shape.num_ranks) {
        const uint32_t rank = threadIdx.x;
        const uint32_t header = args.common.num_tokens | (args.topk_weights != 0 ? kHasWeights : 0);
        if (!call.is_masked(rank)) call.signal(rank, args.common.window.headers, shape.rank, header);
    }
}

// A token's choices, one or two per lane of every warp.
struct Choices {
    int32_t expert[kWords], owner[kWords];
    float weight[kWords];
    __device__ Choices() {
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) expert[i] = owner[i] = -1, weight[i] = 0;
    }
};

// Where they are; null if there are none.
struct ChoicesAt {
    const int64_t* expert[kWords];
    const float* weight[kWords];
    __device__ __forceinline__ void settle() {
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) deepep::settle(expert[i]), deepep::settle(weight[i]);
    }
    __device__ __forceinline__ Choices load(const LlDispatchArgs& args) const {
        Choices choices;
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) {
            choices.expert[i] = load_expert(args, expert[i]);
            choices.weight[i] = load_if(weight[i], 0.0f);
        }
        return choices;
    }
};

__device__ __forceinline__ ChoicesAt find_choices(const LlDispatchArgs& args, uint32_t token, uint32_t end) {
    const LlShape& shape = args.common.shape;
    const uint64_t first = static_cast<uint64_t>(token) * shape.num_topk;
    ChoicesAt at;
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        const uint32_t k = lane_index() + i * kWarpSize;
        const bool is_choice = token < end && k < shape.num_topk;
        at.expert[i] = is_choice ? pointer<const int64_t>(args.topk_idx) + first + k : nullptr;
        at.weight[i] =
            is_choice && args.topk_weights != 0 ? pointer<const float>(args.topk_weights) + first + k : nullptr;
    }
    return at;
}

// Apart from the loads, which others follow.
__device__ __forceinline__ void find_owners(const LlShape& shape, Choices& choices) {
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        choices.owner[i] = rank_of(shape, choices.expert[i]);
    }
}

// By a warp: the ranks that a token goes to. Choices of masked ranks are struck out.
__device__ __forceinline__ Bits ranks_of(const LlCall& call, Choices& choices) {
    Bits mine = 0;
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        const int32_t owner = choices.owner[i];
        if (owner < 0) continue;
        if (call.is_masked(owner)) {
            choices.owner[i] = -1;
        } else {
            mine |= Bits{1} << owner;
        }
    }
    return any_bits(mine);
}

// Places of a lane's choices among this rank's rows for their experts.
struct Positions {
    uint32_t of[kWords];
};

// By the address warp: number a token's choices, for which `table` counts on.
__device__ __forceinline__ Positions number_choices(const Choices& choices, uint32_t* table) {
    Positions positions;
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        positions.of[i] = choices.expert[i] >= 0 ? table[choices.expert[i]]++ : 0;
    }
    __syncwarp();  // other lanes may count the same experts for the next token
    return positions;
}

// By the address warp, once others were told: keep a token's choices for combine.
__device__ __forceinline__ void keep_choices(const LlDispatchArgs& args, uint32_t token, const Choices& choices) {
    const uint32_t num_topk = args.common.shape.num_topk;
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        const uint32_t k = lane_index() + i * kWarpSize;
        const int32_t expert = choices.owner[i] < 0 ? -1 : choices.expert[i];
        if (k < num_topk) pointer<int32_t>(args.common.home_topk)[token * num_topk + k] = expert;
    }
}

// Choice i of a lane, as rank `rank` is told of it.
__device__ __forceinline__ LlChoice choice_for(const LlShape& shape, int32_t rank, const Choices& choices, uint32_t i,
                                               const Positions& positions, uint32_t epoch) {
    const int32_t local = choices.expert[i] - rank * static_cast<int32_t>(shape.num_local_experts);
    return {choices.owner[i] == rank ? local : -1, positions.of[i], choices.weight[i], epoch};
}

// Tokens [begin, end) that a block sends, and a thread's first part of a row: where there are few tokens, several
// blocks share a row. The first block publishes counts instead, where there are several: none starts sooner.
struct Range {
    static constexpr uint32_t kNone = 1u << 24;  // more than any row has
    uint32_t begin, end, part, first_unit;
    bool is_publisher;
    __device__ explicit Range(const LlDispatchArgs& args) : is_publisher(LlCall::is_first_block()) {
        const uint32_t num_tokens = args.common.num_tokens, num_senders = max_of(gridDim.x - 1, 1u);
        const uint32_t sender = gridDim.x == 1 ? 0 : blockIdx.x - 1;
        const uint32_t log2_parts = Team::log2_of(args.send_parts), index = sender >> log2_parts;
        const uint32_t num_threads = kLlThreads >> log2_parts;
        part = sender & (args.send_parts - 1);
        first_unit = threadIdx.x < num_threads ? part * num_threads + threadIdx.x : kNone;
        begin = min_of(index * args.tokens_per_block, num_tokens);
        end = sender < num_senders ? min_of(begin + args.tokens_per_block, num_tokens) : begin;
    }
};

// By the address warp, once `counts` are there: list the rows that a token gets on this rank.
template <bool kFp8>
__device__ void list_own(const LlDispatchArgs& args, const Item& item, const Choices& choices,
                         const Positions& positions, const uint32_t* counts, Rows& rows) {
    const int32_t rank = static_cast<int32_t>(args.common.shape.rank);
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        const LlChoice own = choice_for(args.common.shape, rank, choices, i, positions, 0);
        const Vec16 choice = {{static_cast<uint32_t>(own.expert), own.position, 0, 0}};
        list_rows<kFp8>(args, item, choice, counts, lane_index() + i * kWarpSize, rows);
    }
}

// By the address warp: the token's choices, to its ranks; the others learn that it does not come.
__device__ Positions push_choices(const LlDispatchArgs& args, const LlCall& call, const Item& item,
                                  const Choices& choices, Bits ranks, uint32_t* table) {
    const LlShape& shape = args.common.shape;
    const LlWindow& window = args.common.window;
    const uint32_t lane = lane_index();
    const Positions positions = number_choices(choices, table);
    const uint64_t offset = slot_of(shape, window, item.slot) + shape.choice_offset + call.bank();
#pragma unroll 1
    for (Bits left = ranks; left != 0;) {
        const int32_t rank = static_cast<int32_t>(pop_bit(left));
        Vec16* out = reinterpret_cast<Vec16*>(call.transport.peer_ptr(rank, offset));
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) {
            const uint32_t k = lane + i * kWarpSize;
            if (k >= shape.num_topk) continue;
            const LlChoice choice = choice_for(shape, rank, choices, i, positions, call.epoch);
            store_b128(out + k, {{static_cast<uint32_t>(choice.expert), choice.position, __float_as_uint(choice.weight),
                                  choice.epoch}});
        }
    }
#pragma unroll 1
    for (uint32_t rank = lane; rank < shape.num_ranks; rank += kWarpSize) {
        if (!has_bit(ranks, rank) && !call.is_masked(rank)) call.signal(rank, window.absent, item.slot, 0);
    }
    keep_choices(args, item.token, choices);
    return positions;
}

// By the whole block: a row and its scale factors, `out` being a thread's first part of it.
template <bool kFp8>
__device__ __forceinline__ void push_row(const LlDispatchArgs& args, const LlCall& call, const Item& item,
                                         uint32_t first_unit, Outgoing<kFp8> out, Bits ranks) {
    const LlShape& shape = args.common.shape;
    const uint64_t slot = slot_of(shape, args.common.window, item.slot) + call.bank();
    for_each_vec<kFp8>(args, item.token, first_unit, out, [&](uint32_t vec, const Vec16& value, uint32_t value_sf) {
        const Vec16 sent = to_wire(value);
#pragma unroll 1
        for (Bits left = ranks; left != 0;) {
            uint8_t* to = call.transport.peer_ptr(static_cast<int32_t>(pop_bit(left)), slot);
            store_b128(reinterpret_cast<Vec16*>(to) + vec, sent);
            if (!has_sf<kFp8>()) continue;
            store_relaxed_sys(reinterpret_cast<uint32_t*>(to + shape.hidden) + vec / kLanesPerGroup, to_wire(value_sf));
        }
    });
}

// `table` holds how often the tokens before the range choose each expert; `held` and `choices` are of the first token.
// Where rows of this rank's own skip the window, each is laid out once the token is sent, the first one when `counts`
// are there; meanwhile() is called before the last one is stored.
template <bool kFp8, typename Meanwhile>
__device__ void send(const LlDispatchArgs& args, const LlCall& call, const Range& range, Held held, Choices choices,
                     uint32_t* table, uint32_t* counts, Arrivals& from, Meanwhile meanwhile) {
    __shared__ Rows listed[2];
    const LlShape& shape = args.common.shape;
    const Bits kept = args.keeps_own ? Bits{1} << shape.rank : 0;
    const bool is_addressing = warp_index() == kAddressWarp && range.part == 0;
    Outgoing<kFp8> out;
#pragma unroll 1
    for (uint32_t token = range.begin; token < range.end; ++token) {
        const Item item(shape, shape.rank, token);
        const bool is_first = token == range.begin;
        if (!is_first) find_owners(shape, choices);  // no sooner: it would wait for their loads
        const Bits ranks = ranks_of(call, choices) & ~kept;
        const Choices mine = choices;
        Positions positions{};
        if (is_addressing) positions = push_choices(args, call, item, mine, ranks, table);
        cast_unit(args, held, out);
        if (token + 1 < range.end) {
            choices = find_choices(args, token + 1, range.end).load(args);
            held = find_unit<kFp8>(args, token + 1, range.first_unit).load();
        }
        push_row<kFp8>(args, call, item, range.first_unit, out, ranks);
        if (!args.keeps_own) continue;
        Rows& rows = listed[token % 2];
        if (is_first) {
            await_counts(args, call, threadIdx.x, counts, from, true);
            __syncthreads();
        }
        if (is_addressing) list_own<kFp8>(args, item, mine, positions, counts, rows);
        if (token + 1 == range.end) meanwhile();
        __syncthreads();
        for_each_vec<kFp8>(args, token, range.first_unit, out, [&](uint32_t vec, const Vec16& value, uint32_t sf) {
            store_vec<kFp8>(args, rows, vec, value, sf);
        });
    }
}

}  // namespace deepep
