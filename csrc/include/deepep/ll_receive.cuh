// The receiving half of low-latency dispatch: each token by the team whose turn it is.
#pragma once

#include <deepep/ll_arrive.cuh>

namespace deepep {

// What a team takes in, one token or a share of one after the other.
template <bool kFp8>
struct Taker {
    const Team team;
    const Sources sources;
    uint32_t number;
    Share share;
    Item item;
    Arrival<kFp8> arrival;

    // Neighbouring numbers go to different blocks: a multiprocessor stores only so fast.
    __device__ explicit Taker(const LlDispatchArgs& args)
        : team(args.common.team_threads),
          sources(args.common.shape, args.keeps_own),
          number(team.index * gridDim.x + blockIdx.x) {}
    __device__ void start(const LlDispatchArgs& args, const LlCall& call) {
        share = Share(args, team, number);
        item = Item(args.common.shape, sources, Share::row_of(args, number));
        arrival = Arrival<kFp8>(args, call, team, share, item, 0);
    }
    // The very first one, of which nobody knows yet whether there is room for such a token.
    __device__ void start_first(const LlDispatchArgs& args, const LlCall& call) {
        start(args, call);
        if (Share::row_of(args, number) >= args.common.shape.num_max_tokens * sources.count) arrival.missing = 0;
    }
    __device__ void load() { arrival.load(); }
};

// Each team's first token is waited for beside the counts or, where these are known, was started and loaded before.
template <bool kFp8>
__device__ void receive(const LlDispatchArgs& args, const LlCall& call, Taker<kFp8>& taker, uint32_t* counts,
                        Arrivals& from, bool knows_counts) {
    __shared__ Rows listed[kLlMaxTeams][2];
    const Team& team = taker.team;
    bool is_waited_for = !knows_counts, is_loaded = knows_counts;
    if (!knows_counts) {
        taker.start_first(args, call);
        await_token(args, call, taker.item, taker.arrival, counts, &from);
        await_counts(args, call, threadIdx.x + kLlThreads, counts, from);
        __syncthreads();
    }
    const uint32_t end = from.most_tokens * taker.sources.count * args.recv_parts;
    uint32_t turn = 0;
    bool has_ended = false;
#pragma unroll 1
    while (taker.number < end) {
        if (taker.item.token < tokens_of(from.header[taker.item.source])) {
            if (!is_waited_for) {
                await_token(args, call, taker.item, taker.arrival, nullptr, nullptr, is_loaded);
            }
            has_ended = store_token<kFp8>(args, call, team, taker.share, taker.item, counts, taker.arrival,
                                          listed[team.index][turn], from, taker.number + team.global_count() >= end);
            turn ^= 1;
        }
        taker.number += team.global_count();
        if (taker.number >= end) break;
        taker.start(args, call);
        is_waited_for = is_loaded = false;
    }
    if (!has_ended) end_taking(call, team, from);
    if (call.is_last_block()) report(args, counts, from);
}

}  // namespace deepep
