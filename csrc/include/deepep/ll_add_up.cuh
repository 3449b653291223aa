// The receiving half of low-latency combine: a home adds up what arrives for each of its tokens, in the contract's
// order.
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
        for (uint32_t later = k + 1; is_owed && later < shape.num_topk; ++later) is_owed = owners[later] != owner;
        counts = is_owed;
        terms.row[k] = owner;
    }
    set_bits(team, is_owed, terms.owes);
    set_bits(team, counts, terms.valid);
}

// A thread's vectors of some terms of a token: which ones they are, and where among the token's slots.
template <uint32_t kVecs>
struct Awaited {
    static constexpr uint32_t kTermsAtOnce = 2 / kVecs;
    Vec16 v[kTermsAtOnce][kVecs];
    uint32_t k[kTermsAtOnce], first[kTermsAtOnce];
    uint32_t expected = 0;  // bit per vector that comes through the window

    static __device__ constexpr uint32_t bit(uint32_t t, uint32_t i) { return 1u << (t * kVecs + i); }
    static __device__ constexpr uint32_t bits(uint32_t t) { return ((1u << kVecs) - 1) << (t * kVecs); }

    // Look at all of them, all loads in one trip. Gives those that are not there.
    __device__ __forceinline__ uint32_t look(const Vec16* slots, const Place<kVecs>& place) {
        uint32_t missing = 0;
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
#pragma unroll
            for (uint32_t i = 0; i < kVecs; ++i) {
                if (expected & bit(t, i)) v[t][i] = load_b128(slots + (first[t] + place.vec[i]));
            }
        }
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
#pragma unroll
            for (uint32_t i = 0; i < kVecs; ++i) {
                if ((expected & bit(t, i)) && !is_there(v[t][i])) missing |= bit(t, i);
            }
        }
        return missing;
    }

    // Expect a rank that is lost no more: what it did not send is zeros, which add nothing.
    __device__ __forceinline__ void forget_lost(const LlCall& call, const int32_t* owners, uint32_t missing) {
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if ((missing & bits(t)) == 0 || !call.has_given_up(owners[k[t]])) continue;
#pragma unroll
            for (uint32_t i = 0; i < kVecs; ++i) {
                if (missing & bit(t, i)) v[t][i] = {};
            }
            expected &= ~(missing & bits(t));
        }
    }

    // Wait for all of them, and leave zeros where they came from. (A rank that dies while it sends may so leave a row
    // of which parts count and others do not; the mask, or the error, says that it was lost.)
    __device__ __forceinline__ void take(const LlCall& call, const int32_t* owners, Vec16* slots,
                                         const Place<kVecs>& place) {
        constexpr uint32_t kSpinsPerCheck = 64;
        uint32_t missing = look(slots, place);
        for (uint32_t spin = 1; missing != 0; ++spin, missing = look(slots, place)) {
            if (spin % kSpinsPerCheck == 0) forget_lost(call, owners, missing);
        }
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
#pragma unroll
            for (uint32_t i = 0; i < kVecs; ++i) {
                if ((expected & bit(t, i)) == 0) continue;
                v[t][i] = from_wire(v[t][i]);
                slots[first[t] + place.vec[i]] = {};
            }
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
        const int32_t rank = home.owners[k];
        if (rank == static_cast<int32_t>(call.args.shape.rank)) continue;
        while (!is_there(load_b128(slots + home.all.row[k] * row_vecs)) && !call.has_given_up(rank)) continue;
        call.note_wait(rank, start);
    }
}

// By a team: add up the `part`th of `parts` of a token from its slots, in the order of its terms. This rank's own sum
// is in `own`, if it is kept. (A team with workers never adds up copies.)
template <uint32_t kVecs>
__device__ void add_up(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token, uint32_t part,
                       uint32_t parts, const Home& home, const Vec16* own) {
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec, step = kVecs * team.threads;
    Vec16* slots = reinterpret_cast<Vec16*>(call.own_bytes(args.common.window.combine_slots)) +
                   static_cast<uint64_t>(token) * shape.num_slots * row_vecs;
    Vec16* out = pointer<Vec16>(args.out) + static_cast<uint64_t>(token) * row_vecs;
    const int32_t kept = args.keeps_own ? static_cast<int32_t>(shape.rank) : -1;
    if (args.common.wait_stats != 0 && team.thread == 0 && part == 0) note_waits(call, home, slots, row_vecs);
#pragma unroll 1
    for (uint32_t base = part * step; base < row_vecs; base += parts * step) {
        const Place<kVecs> place(team.thread, team.threads, base, row_vecs);
        float sum[kVecs][8] = {};
#pragma unroll 1
        for (Bits left = home.all.owed(); left != 0;) {
            Awaited<kVecs> terms;
            constexpr uint32_t kTermsAtOnce = Awaited<kVecs>::kTermsAtOnce;
            uint32_t count = 0;
#pragma unroll
            for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
                if (left == 0) break;
                const uint32_t k = terms.k[t] = pop_bit(left);
                count = t + 1;
                if (home.owners[k] == kept) {
#pragma unroll
                    for (uint32_t i = 0; i < kVecs; ++i) terms.v[t][i] = own[place.vec[i]];
                } else {
                    terms.first[t] = home.all.row[k] * row_vecs;
#pragma unroll
                    for (uint32_t i = 0; i < kVecs; ++i) terms.expected |= place.is_inside[i] ? terms.bit(t, i) : 0;
                }
            }
            terms.take(call, home.owners, slots, place);
#pragma unroll
            for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
                if (t >= count) break;
                const bool is_weighted = kVecs == 1 && args.is_per_copy;
                if (is_weighted && !has_bit(home.all.bits(), terms.k[t])) continue;
#pragma unroll
                for (uint32_t i = 0; i < kVecs; ++i) {
                    float values[8];
                    Bf16::unpack(terms.v[t][i], values);
                    if (is_weighted) {
#pragma unroll
                        for (int c = 0; c < 8; ++c) values[c] = home.all.weight[terms.k[t]] * values[c];
                    }
#pragma unroll
                    for (int c = 0; c < 8; ++c) sum[i][c] = sum[i][c] + values[c];
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kVecs; ++i) {
            if (place.is_inside[i]) out[place.vec[i]] = Bf16::pack(sum[i]);
        }
    }
}

// A team's first token or part of one: from the last team on, since the first ones have rows to send.
__device__ __forceinline__ uint32_t first_at_home(const Team& team) {
    return team.global_count() - 1 - team.global_index();
}

// `homes[0]` lists the first token. While a team's first warps list what comes, its workers, if it has any, make this
// rank's own sum, for which `own` has room.
__device__ void receive(const LlCombineArgs& args, const LlCall& call, const Team& team, Home (&homes)[2], Vec16* own) {
    const uint32_t parts = args.home_parts, end = args.common.num_tokens * parts;
    uint32_t turn = 0;
#pragma unroll 1
    for (uint32_t number = first_at_home(team); number < end; turn ^= 1) {
        const uint32_t token = divide(number, args.home_parts_magic), part = number - token * parts;
        Home& home = homes[turn];
        number += team.global_count();
        if (args.keeps_own && team.thread >= kMostChoices) {
            put_sum<false>(args, team, home.own, own, [] {});
        } else {
            list_slots(args, call, team, token, home.owners, home.all);
            if (number < end) {
                const uint32_t next = divide(number, args.home_parts_magic);
                list_home(args, team, load_home(args, team, next), homes[turn ^ 1]);
            }
        }
        team.sync();
        if (args.has_workers) {
            add_up<kVecsAtOnce>(args, call, team, token, part, parts, home, own);
        } else {
            add_up<1>(args, call, team, token, part, parts, home, own);
        }
        if (number < end) team.sync();
    }
}

}  // namespace deepep
