// The receiving half of low-latency combine: a home adds up what arrives for each of its tokens, in the contract's order.
#pragma once

#include <deepep/ll_send_sums.cuh>

namespace deepep {

// What a team knows of the token it adds up.
struct Home {
    int32_t owners[kMostChoices];
    Terms own, all;
};

// What one of a team's first threads knows of a choice of a token at home.
struct HomeChoice {
    int32_t expert = -1;
    Choice own;
};

__device__ HomeChoice load_home(const LlCombineArgs& args, const Team& team, uint32_t token) {
    const LlShape& shape = args.common.shape;
    HomeChoice choice;
    if (token >= args.common.num_tokens || team.thread >= shape.num_topk) return choice;
    const uint64_t at = static_cast<uint64_t>(token) * shape.num_topk + team.thread;
    choice.expert = pointer<const int32_t>(args.common.home_topk)[at];
    if (args.keeps_own) choice.own = load_choice(args, Item(shape, shape.rank, token), team.thread);
    return choice;
}

// By the first threads of a team: the ranks of a token's choices and, if they are kept, its rows here.
__device__ __forceinline__ void list_home(const LlCombineArgs& args, const Team& team, const HomeChoice& choice,
                                          Home& home) {
    if (team.thread < args.common.shape.num_topk) {
        home.owners[team.thread] =
            choice.expert < 0 ? -1 : static_cast<int32_t>(owner_of(args.common.shape, choice.expert));
    }
    if (args.keeps_own) list_terms(team, Weights::kOwn, choice.own, home.own);
}

// By the first threads of a team: list where the rows of one token are among its slots, and, unless they come as lines,
// wait for them. `owners` are the ranks of its choices.
__device__ void await_terms(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                            const int32_t* owners, Terms& terms, bool as_lines) {
    const LlShape& shape = args.common.shape;
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
    const uint64_t choice = static_cast<uint64_t>(token) * shape.num_topk + k;
    const int32_t owner = k < shape.num_topk ? owners[k] : -1;
    bool is_valid = owner >= 0;
    if (args.is_per_copy) {
        is_valid = is_valid && pointer<const int64_t>(args.topk_idx)[choice] >= 0;
        terms.row[k] = k;
        if (is_valid) terms.weight[k] = pointer<const float>(args.topk_weights)[choice];
    } else {
        for (uint32_t later = k + 1; is_valid && later < shape.num_topk; ++later) is_valid = owners[later] != owner;
        terms.row[k] = owner;
    }
    if (is_valid && as_lines) {
        is_valid = !call.is_masked(owner);
    } else if (is_valid && !(args.keeps_own && owner == static_cast<int32_t>(shape.rank))) {
        const uint64_t slot = static_cast<uint64_t>(token) * shape.num_slots + terms.row[k];
        uint32_t value;
        is_valid =
            !call.is_masked(owner) && call.wait<true>(owner, call.own_word(args.common.window.arrived, slot), value);
    }
    set_valid(team, is_valid, terms);
}

// Add up what came home: rows of `all` are numbers of slots, of which `own_slot` (-1: none) is in `own` instead.
template <bool kWeighted>
__device__ void add_slots(const Team& team, const Terms& all, const Vec16* slots, const Vec16* own, int32_t own_slot,
                          uint32_t row_vecs, Vec16* out) {
    for (uint32_t base = 0; base < row_vecs; base += kVecsAtOnce * team.threads) {
        const Place place(team.thread, team.threads, base, row_vecs);
        const Pair sum = sum_terms<kWeighted>(all, [&](uint32_t k, uint32_t i) {
            const int32_t slot = all.row[k];
            if (slot == own_slot) return own[place.vec[i]];
            return load_stream(slots + (slot * row_vecs + place.vec[i]));
        });
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            if (place.is_inside[i]) out[place.vec[i]] = sum.v[i];
        }
    }
}

// A team's first token or part of one: from the last team on, since the first ones have rows to send.
__device__ __forceinline__ uint32_t first_at_home(const Team& team) {
    return team.global_count() - 1 - team.global_index();
}

// `homes[0]` lists the first token. While a team's first warps wait for what others send, its workers make this rank's
// own sum, for which `own` has room.
__device__ void receive_slots(const LlCombineArgs& args, const LlCall& call, const Team& team, Home (&homes)[2],
                              Vec16* own) {
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec, step = team.global_count();
    const int32_t own_slot = args.keeps_own ? static_cast<int32_t>(shape.rank) : -1;
    const Vec16* slots = reinterpret_cast<const Vec16*>(call.own_bytes(args.common.window.combine_slots));
    uint32_t turn = 0;
    for (uint32_t token = first_at_home(team); token < args.common.num_tokens; turn ^= 1) {
        Home& home = homes[turn];
        const bool has_next = token + step < args.common.num_tokens;
        if (team.thread >= kMostChoices) {
            if (args.keeps_own) put_sum(args, team, home.own, own, [] {});
        } else {
            if (has_next) list_home(args, team, load_home(args, team, token + step), homes[turn ^ 1]);
            await_terms(args, call, team, token, home.owners, home.all, false);
        }
        team.sync();
        const Vec16* first = slots + static_cast<uint64_t>(token) * shape.num_slots * row_vecs;
        Vec16* out = pointer<Vec16>(args.out) + static_cast<uint64_t>(token) * row_vecs;
        if (args.is_per_copy) {
            add_slots<true>(team, home.all, first, own, own_slot, row_vecs, out);
        } else {
            add_slots<false>(team, home.all, first, own, own_slot, row_vecs, out);
        }
        if (!has_next) return;
        team.sync();
        token += step;
    }
}

// `homes[0]` lists the first token.
__device__ void receive_lines(const LlCombineArgs& args, const LlCall& call, const Team& team, Home (&homes)[2]) {
    const uint32_t parts = args.home_parts;
    uint32_t turn = 0;
    for (uint32_t number = first_at_home(team); number < args.common.num_tokens * parts; turn ^= 1) {
        const uint32_t token = divide(number, args.home_parts_magic);
        Home& home = homes[turn];
        await_terms(args, call, team, token, home.owners, home.all, true);
        team.sync();
        add_lines(args, call, team, token, number - token * parts, parts, home.all);
        number += team.global_count();
        if (number >= args.common.num_tokens * parts) return;
        list_home(args, team, load_home(args, team, divide(number, args.home_parts_magic)), homes[turn ^ 1]);
        team.sync();
    }
}

}  // namespace deepep
