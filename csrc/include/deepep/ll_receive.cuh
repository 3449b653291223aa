// The receiving half of low-latency dispatch: each token by the team whose turn it is.
#pragma once

#include <deepep/ll_arrive.cuh>

namespace deepep {

// Each team's first token is waited for beside the counts. With `stays` this rank's own rows are laid out first
// instead, as soon as counts are there.
template <bool kFp8>
__device__ void receive(const LlDispatchArgs& args, const LlCall& call, const Range& range, const Outgoing<kFp8>& last,
                        uint32_t* table, const Stay (*stays)[kMostChoices], Arrivals& from) {
    __shared__ Rows listed[kLlMaxTeams][2];
    __shared__ Rows kept[kKeptTokens];
    const LlShape& shape = args.common.shape;
    const Sources sources(shape, stays != nullptr);
    const Team team(args.common.team_threads);
    // Neighbouring numbers go to different blocks: a multiprocessor stores only so fast.
    uint32_t number = team.index * gridDim.x + blockIdx.x, turn = 0;
    Share share(args, team, number);
    Item item(shape, sources, Share::row_of(args, number));
    Arrival<kFp8> arrival(args, call, team, share, item, 0);
    bool is_waited_for = stays == nullptr;
    if (is_waited_for) {
        if (item.token >= shape.num_max_tokens) arrival.missing = 0;
        await_token(args, call, team, share, item, arrival, table, &from);
        await_counts(args, call, threadIdx.x + kLlThreads, table, from);
        __syncthreads();
    } else {
        await_counts(args, call, threadIdx.x, table, from);
        __syncthreads();
        keep_tokens<kFp8>(args, range, last, table, stays, kept);
    }
    const uint32_t end = from.most_tokens * sources.count * args.recv_parts;
#pragma unroll 1
    while (number < end) {
        if (item.token < tokens_of(from.header[item.source])) {
            if (!is_waited_for) await_token(args, call, team, share, item, arrival, nullptr, nullptr);
            store_token<kFp8>(args, call, team, share, item, table, arrival, listed[team.index][turn]);
            turn ^= 1;
        }
        number += team.global_count();
        if (number >= end) break;
        share = Share(args, team, number);
        item = Item(shape, sources, Share::row_of(args, number));
        arrival = Arrival<kFp8>(args, call, team, share, item, 0);
        is_waited_for = false;
    }
    if (call.is_last_block()) report(args, table, from);
}

}  // namespace deepep
