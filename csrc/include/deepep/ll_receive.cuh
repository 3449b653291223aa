// The receiving half of low-latency dispatch: each token by the team whose turn it is, in the way its source sends it.
#pragma once

#include <deepep/ll_lay_out_lines.cuh>

namespace deepep {

// By a team: wait for a token's slot to be filled, and lay it out.
template <bool kFp8>
__device__ void receive_slot(const LlDispatchArgs& args, const LlCall& call, const Team& team, const Item& item,
                             const uint8_t* slots, const uint32_t* table, Rows& rows) {
    if (team.thread == 0) {
        const uint64_t* word = call.own_word(args.common.window.present, item.slot);
        uint32_t value = 0;
        rows.is_present = call.wait<true>(item.source, word, value) && value != 0;
    }
    team.sync();
    if (!rows.is_present) return forget_token(args, item, team.thread);
    const uint8_t* slot = slots + item.slot * args.common.shape.slot_bytes;
    Arrived arrived;
    load_slot<kFp8>(args, slot, team, arrived);
    store_token<kFp8>(args, item, slot, team, table, arrived, rows);
}

// The teams' first tokens, found in their slots while others waited for counts: load them, lay out what stays here, and
// then them. True where the team is through with its first one.
template <bool kFp8>
__device__ bool receive_first_slots(const LlDispatchArgs& args, const Range& range, const Outgoing<kFp8>& last,
                                    const Team& team, const Item& item, Presence presence, const uint8_t* slots,
                                    const uint32_t* table, const Stay (*stays)[kMostChoices], Targets* kept,
                                    Rows& rows) {
    const uint8_t* slot = slots + item.slot * args.common.shape.slot_bytes;
    Arrived arrived;
    if (presence == Presence::kPresent) load_slot<kFp8>(args, slot, team, arrived);
    if (stays != nullptr) keep_tokens<kFp8>(args, range, last, table, stays, kept);
    if (presence == Presence::kPresent) store_token<kFp8>(args, item, slot, team, table, arrived, rows);
    return presence == Presence::kPresent;
}

// `expects_lines`: look for each team's first token as lines while counts are waited for, else in its slot. Headers
// tell in the end how it comes. With `stays` this rank's own rows are laid out first, as soon as counts are there.
template <bool kFp8>
__device__ void receive(const LlDispatchArgs& args, const LlCall& call, const Range& range, const Outgoing<kFp8>& last,
                        uint32_t* table, const Stay (*stays)[kMostChoices], bool expects_lines, Arrivals& from) {
    __shared__ Rows listed[kLlMaxTeams][2];
    __shared__ Targets kept[kKeptTokens];
    const LlShape& shape = args.common.shape;
    const Sources sources(shape, stays != nullptr);
    const Team team(args.common.team_threads);
    const uint8_t* slots = call.own_bytes(args.common.window.dispatch_slots);
    uint32_t number = team.global_index(), turn = 0;
    const Item first(shape, sources, number);
    TokenLines lines(args, call, team, first, 0, vecs_of<kFp8>(shape));
    bool is_waited_for = expects_lines && stays == nullptr;
    if (is_waited_for) {
        if (first.token >= shape.dispatch_line_tokens) lines.missing = 0;
        await_lines(args, call, team, first, lines, table, &from);
        await_counts(args, call, threadIdx.x + kLlThreads, table, from);
        __syncthreads();
    } else {
        if (team.thread == team.threads - 1) {
            const bool looks = sources.count != 0 && !expects_lines;
            from.first[team.index] =
                looks ? look_for_first(args, call, first, stays != nullptr) : Presence::kUnknown;
        }
        if (threadIdx.x < kKeptTokens) kept[threadIdx.x].count = 0;
        await_counts(args, call, threadIdx.x, table, from);
        __syncthreads();
        const bool is_done = receive_first_slots<kFp8>(args, range, last, team, first, from.first[team.index], slots,
                                                       table, stays, kept, listed[team.index][1]);
        if (is_done) number += team.global_count();
    }
    const uint32_t end = from.most_lined * sources.count, step = team.global_count();
    if (team.global_index() < end) {
        Item item = first;
#pragma unroll 1
        for (uint32_t lined = team.global_index();;) {
            const uint32_t num_tokens = tokens_of(from.header[item.source]);
            if (item.token < num_tokens && is_lined(shape, num_tokens)) {
                if (!is_waited_for) {
                    lines = TokenLines(args, call, team, item, 0, vecs_of<kFp8>(shape));
                    await_lines(args, call, team, item, lines, nullptr, nullptr);
                }
                store_lines<kFp8>(args, call, team, item, table, lines, listed[team.index][turn]);
                turn ^= 1;
            }
            if ((lined += step) >= end) break;
            item = Item(shape, sources, lined);
            is_waited_for = false;
        }
    }
#pragma unroll 1
    for (; number < from.most_slotted * sources.count; number += step) {
        const Item item(shape, sources, number);
        const uint32_t num_tokens = tokens_of(from.header[item.source]);
        if (item.token >= num_tokens || is_lined(shape, num_tokens)) continue;
        receive_slot<kFp8>(args, call, team, item, slots, table, listed[team.index][turn]);
        turn ^= 1;
    }
    if (call.is_last_block()) report(args, table, from);
}

}  // namespace deepep
