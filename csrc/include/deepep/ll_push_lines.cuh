// Low-latency dispatch sends few tokens: as lines, so that no barrier, fence or flag stands between a token and the
// link. Every warp finds the ranks of a token by itself.
#pragma once

#include <deepep/ll_lines.cuh>
#include <deepep/ll_push.cuh>

namespace deepep {

__device__ __forceinline__ uint64_t token_lines(const LlShape& shape, const LlWindow& window, uint32_t source,
                                                uint32_t token) {
    const uint64_t index = static_cast<uint64_t>(source) * shape.dispatch_line_tokens + token;
    return window.dispatch_lines + index * shape.dispatch_line_bytes;
}

// By the address warp: the token's choices, to its ranks; the others learn that it does not come.
__device__ void address_lines(const LlDispatchArgs& args, const LlCall& call, uint32_t token, const Choices& choices,
                              Bits ranks, uint32_t* table, Stay* stays) {
    const LlShape& shape = args.common.shape;
    const LlWindow& window = args.common.window;
    const uint32_t lane = lane_index();
    const Positions positions = number_choices(choices, table);
    const uint64_t offset = token_lines(shape, window, shape.rank, token) + call.bank;
#pragma unroll 1
    for (Bits left = ranks; left != 0;) {
        const int32_t rank = static_cast<int32_t>(pop_bit(left));
        Vec16* out = reinterpret_cast<Vec16*>(call.transport.peer_ptr(rank, offset));
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) {
            const uint32_t k = lane + i * kWarpSize;
            if (k >= shape.num_topk) continue;
            const LlChoice choice = choice_for(shape, rank, choices, i, positions, call.epoch);
            store_line(out + k, {{static_cast<uint32_t>(choice.expert), choice.position,
                                  __float_as_uint(choice.weight), choice.epoch}});
        }
    }
#pragma unroll 1
    for (uint32_t rank = lane; rank < shape.num_ranks; rank += kWarpSize) {
        const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + token;
        if (!has_bit(ranks, rank) && !call.is_masked(rank)) call.signal(rank, window.present, index, 0);
    }
    keep_choices(args, token, choices, positions, stays);
}

// By the whole block: a row and its scale factors, `out` being a thread's first part of it.
template <bool kFp8>
__device__ __forceinline__ void store_row_lines(const LlDispatchArgs& args, const LlCall& call, uint32_t token,
                                                Outgoing<kFp8> out, Bits ranks) {
    constexpr uint32_t kParts = kFp8 ? 1 : 2;
    const LlShape& shape = args.common.shape;
    const uint32_t num_vecs = shape.hidden / (kFp8 ? 16 : 8), end = octets_end(num_vecs);
    const uint64_t row = token_lines(shape, args.common.window, shape.rank, token) + call.bank + shape.line_row_offset;
#pragma unroll 1
    for (uint32_t unit = threadIdx.x; warp_begins_before(unit, end); unit += kParts * kLlThreads) {
        if (unit != threadIdx.x) cast_unit(args, load_unit<kFp8>(args, token, unit), out);
#pragma unroll
        for (uint32_t part = 0; part < kParts; ++part) {
            const uint32_t vec = unit + part * kLlThreads;
            if (!warp_begins_before(vec, end)) continue;
            const LinePair lines = fold(out.v[part], kFp8 ? out.sf : 0, call.epoch);
#pragma unroll 1
            for (Bits left = ranks; left != 0;) {
                const int32_t rank = static_cast<int32_t>(pop_bit(left));
                Vec16* to = reinterpret_cast<Vec16*>(call.transport.peer_ptr(rank, row));
                if (vec < num_vecs) store_line(to + vec, lines.own);
                if (vec < end && has_rest()) store_line(to + rest_line(num_vecs, vec), lines.rest);
            }
        }
    }
}

// As send(), `choices` being every warp's.
template <bool kFp8>
__device__ Outgoing<kFp8> send_lines(const LlDispatchArgs& args, const LlCall& call, const Range& range, Held held,
                           Choices choices, uint32_t* table, Stay (*stays)[kMostChoices]) {
    const Bits kept = stays != nullptr ? Bits{1} << args.common.shape.rank : 0;
    Outgoing<kFp8> out;
#pragma unroll 1
    for (uint32_t token = range.begin; token < range.end; ++token) {
        const Bits ranks = ranks_of(call, choices) & ~kept;
        if (warp_index() == kAddressWarp) {
            address_lines(args, call, token, choices, ranks, table,
                          stays != nullptr ? stays[token - range.begin] : nullptr);
        }
        cast_unit(args, held, out);
        if (token + 1 < range.end) {
            choices = load_choices(args, token + 1, true);
            held = load_unit<kFp8>(args, token + 1, threadIdx.x);
            find_owners(args.common.shape, choices);
        }
        store_row_lines<kFp8>(args, call, token, out, ranks);
    }
    return out;
}

}  // namespace deepep
