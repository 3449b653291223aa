// The receiving half of low-latency combine where there are few tokens, or every row comes by itself: a home adds up
// what arrives for each of its tokens, in the contract's order.
#pragma once

#include <deepep/ll_send_parts.cuh>

namespace deepep {

// What a team knows of the token it adds up.
struct Home {
    int32_t owners[kMostChoices];
    Terms all;
};

// By the first threads of a team: the ranks of a token's choices.
__device__ __forceinline__ void list_home(const LlCombineArgs& args, const Team& team, const HomeChoice& choice,
                                          Home& home) {
    if (team.thread < args.common.shape.num_topk) home.owners[team.thread] = rank_of(args.common.shape, choice.expert);
}

// By the first threads of a team: list which of a token's slots are filled, and by what. `owners` are the ranks of its
// choices, all of them known.
__device__ void list_slots(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                           const int32_t* owners, Terms& terms) {
    const LlShape& shape = args.common.shape;
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
    const int32_t owner = k < shape.num_topk ? owners[k] : -1;
    bool is_owed = owner >= 0 && !call.is_masked(owner), counts = is_owed;
    if (args.is_per_copy) {
        // Its owner sends a row that is left out here, too.
        const uint64_t choice = static_cast<uint64_t>(token) * shape.num_topk + k;
        counts = is_owed && pointer<const int64_t>(args.topk_idx)[choice] >= 0;
        terms.row[k] = k;
        if (counts) terms.weight[k] = pointer<const float>(args.topk_weights)[choice];
    } else {
        counts = is_owed = is_owed && is_last_of(owners, k, shape.num_topk);
        terms.row[k] = owner;
    }
    set_bits(team, is_owed, terms.owes);
    set_bits(team, counts, terms.valid);
}

// A thread's vector of some terms of a token: which ones they are, and where among the token's slots.
struct Awaited {
    static constexpr uint32_t kTermsAtOnce = 2;
    Vec16 v[kTermsAtOnce];
    uint32_t k[kTermsAtOnce], at[kTermsAtOnce];
    uint32_t expected = 0;  // bit per term

    // Look at all of them, all loads in one trip. Gives those that are not there.
    __device__ __forceinline__ uint32_t look(const Vec16* slots) {
        uint32_t missing = 0;
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if (expected >> t & 1) v[t] = load_b128(slots + at[t]);
        }
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if ((expected >> t & 1) && !is_there(v[t])) missing |= 1u << t;
        }
        return missing;
    }

    // Expect a rank that is lost no more: what it did not send is zeros, which add nothing.
    __device__ __forceinline__ void forget_lost(const LlCall& call, const int32_t* owners, uint32_t missing) {
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if ((missing >> t & 1) == 0 || !call.has_given_up(owners[k[t]])) continue;
            v[t] = {};
            expected &= ~(1u << t);
        }
    }

    // Wait for all of them, and leave zeros where they came from. (A rank that dies while it sends may so leave a row
    // of which parts count and others do not; the mask, or the error, says that it was lost.)
    __device__ __forceinline__ void take(const LlCall& call, const int32_t* owners, Vec16* slots) {
        constexpr uint32_t kSpinsPerCheck = 64;
        uint32_t missing = look(slots);
        for (uint32_t spin = 1; missing != 0; ++spin, missing = look(slots)) {
            if (spin % kSpinsPerCheck == 0) forget_lost(call, owners, missing);
        }
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if ((expected >> t & 1) == 0) continue;
            v[t] = from_wire(v[t]);
            slots[at[t]] = {};
        }
    }
};

// By one thread, where statistics are asked for: wait for a vector of each term, and note how long. Nothing is taken.
__device__ __forceinline__ void note_waits(const LlCall& call, const Home& home, const Vec16* slots,
                                           uint32_t row_vecs) {
    const uint64_t start = global_timer_ns();
#pragma unroll 1
    for (Bits left = home.all.owed(); left != 0;) {
        const uint32_t k = pop_bit(left);
        note_wait(call, home.owners[k], slots + home.all.row[k] * row_vecs, start);
    }
}

// By a team: add up the `part`th of `parts` of a token from its slots, in the order of its terms.
__device__ void add_up(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token, uint32_t part,
                       uint32_t parts, const Home& home) {
    constexpr uint32_t kTermsAtOnce = Awaited::kTermsAtOnce;
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    Vec16* slots = own_slots(args, call, token);
    Vec16* out = pointer<Vec16>(args.out) + static_cast<uint64_t>(token) * row_vecs;
    if (args.common.wait_stats != 0 && team.thread == 0 && part == 0) note_waits(call, home, slots, row_vecs);
#pragma unroll 1
    for (uint32_t base = part * team.threads; base < row_vecs; base += parts * team.threads) {
        const Place<1> place(team.thread, team.threads, base, row_vecs);
        float sum[8] = {};
#pragma unroll 1
        for (Bits left = home.all.owed(); left != 0;) {
            Awaited terms;
            uint32_t count = 0;
#pragma unroll
            for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
                if (left == 0) break;
                const uint32_t k = terms.k[t] = pop_bit(left);
                count = t + 1;
                terms.at[t] = home.all.row[k] * row_vecs + place.vec[0];
                terms.expected |= place.is_inside[0] ? 1u << t : 0;
            }
            terms.take(call, home.owners, slots);
#pragma unroll
            for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
                if (t >= count) break;
                if (!args.is_per_copy) {
                    add(terms.v[t], sum);
                } else if (has_bit(home.all.bits(), terms.k[t])) {
                    add_weighted(terms.v[t], home.all.weight[terms.k[t]], sum);
                }
            }
        }
        if (place.is_inside[0]) out[place.vec[0]] = Bf16::pack(sum);
    }
}

// `homes[0]` lists the first token.
__device__ void receive(const LlCombineArgs& args, const LlCall& call, const Team& team, Home (&homes)[2]) {
    const uint32_t parts = args.home_parts, end = args.common.num_tokens * parts;
    uint32_t turn = 0;
#pragma unroll 1
    for (uint32_t number = first_at_home(team); number < end; turn ^= 1) {
        const uint32_t token = divide(number, args.home_parts_magic), part = number - token * parts;
        Home& home = homes[turn];
        number += team.global_count();
        list_slots(args, call, team, token, home.owners, home.all);
        if (number < end) {
            const uint32_t next = divide(number, args.home_parts_magic);
            list_home(args, team, find_home(args, team, next).load(), homes[turn ^ 1]);
        }
        team.sync();
        add_up(args, call, team, token, part, parts, home);
        if (number < end) team.sync();
    }
}

}  // namespace deepep
