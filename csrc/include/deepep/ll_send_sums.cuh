// The sending half of low-latency combine: what this rank owes the homes of the tokens that its experts worked on.
#pragma once

#include <deepep/ll_sums.cuh>

namespace deepep {

// What the kernel knows of the ranks whose tokens came here.
struct Headers {
    uint32_t of[kMostChoices];
    uint32_t most_tokens[kWords];

    // Nothing is owed to a rank that is left out from the start; one that is lost later gets what it is owed, so that
    // all threads of a team agree.
    __device__ void keep(const LlCombineArgs& args, const LlCall& call, uint32_t header) {
        if (threadIdx.x >= kMostChoices) return;
        if (threadIdx.x >= args.common.shape.num_ranks || call.is_masked(threadIdx.x)) header = 0;
        of[threadIdx.x] = header;
        most_tokens[warp_index()] = __reduce_max_sync(kFullMask, tokens_of(header));
    }
};

// What a team pushes: a row for every one of its numbers that is a token. This rank's own tokens may be left out.
struct Debts {
    const LlCombineArgs& args;
    const uint32_t* headers;
    const Sources sources;
    uint32_t count, step;
    __device__ Debts(const LlCombineArgs& arguments, const Team& team, const Headers& known)
        : args(arguments), headers(known.of), sources(args.common.shape, args.keeps_own), step(team.global_count()) {
        uint32_t most_tokens = known.most_tokens[0];
        if constexpr (kWords > 1) most_tokens = max_of(most_tokens, known.most_tokens[kWords - 1]);
        count = most_tokens * sources.count;
    }
    __device__ Item operator[](uint32_t number) const { return Item(args.common.shape, sources, number); }
    __device__ bool is_due(const Item& debt) const { return debt.token < tokens_of(headers[debt.source]); }
    // The first one from `number` on; at least `count` if there is none.
    __device__ uint32_t next(uint32_t number) const {
        while (number < count && !is_due((*this)[number])) number += step;
        return number;
    }
    __device__ Weights weights(uint32_t source) const { return weights_of(args, source, headers[source]); }
};

// The choice of the team's first debt, whose source may turn out not to have that many tokens.
__device__ Choice load_first(const LlCombineArgs& args, const Team& team) {
    const Sources sources(args.common.shape, args.keeps_own);
    if (sources.count == 0) return {};
    const Item debt(args.common.shape, sources, divide(team.global_index(), args.debt_parts_magic));
    if (debt.token >= args.common.shape.num_max_tokens) return {};
    const bool is_own = debt.source == args.common.shape.rank;
    if (is_own && debt.token >= args.common.num_tokens) return {};
    return load_choice(args, debt, team.thread);
}

// Slot `term` of a token at its home.
__device__ __forceinline__ Vec16* home_slot(const LlCombineArgs& args, const LlCall& call, const Item& debt,
                                            uint32_t term) {
    const LlShape& shape = args.common.shape;
    Vec16* slots =
        reinterpret_cast<Vec16*>(call.transport.peer_ptr(debt.source, args.common.window.combine_slots + call.bank()));
    return slots + (static_cast<uint64_t>(debt.token) * shape.num_slots + term) * (shape.hidden / Bf16::kPerVec);
}

// By a team: push a token's rows as they are, one per term.
__device__ void push_copies(const LlCombineArgs& args, const LlCall& call, const Team& team, const Item& debt,
                            const Terms& terms) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    for (Bits left = terms.bits(); left != 0;) {
        const uint32_t k = pop_bit(left);
        const Vec16* in = pointer<const Vec16>(args.x) + static_cast<uint64_t>(terms.row[k]) * row_vecs;
        Vec16* out = home_slot(args, call, debt, k);
        for (uint32_t vec = team.thread; warp_begins_before(vec, row_vecs); vec += team.threads) {
            Vec16 value = load_stream(in + min_of(vec, row_vecs - 1));
            if (args.use_logfmt) value = cast_logfmt(value);
            if (vec < row_vecs) store_b128(out + vec, to_wire(value));
        }
    }
}

// By a team: push the `part`th of `parts` of a token's weighted sum. Where the weights are yet to come, rows are loaded
// before they are waited for.
__device__ void push_part(const LlCombineArgs& args, const LlCall& call, const Team& team, const Item& debt,
                          bool awaits_weights, uint32_t part, uint32_t parts, Terms& terms) {
    Vec16* out = home_slot(args, call, debt, args.common.shape.rank);
    put_part<1, true>(args, terms, team.thread, team.threads, part, parts, out, [&] {
        if (!awaits_weights) return;
        await_weights(args, call, team, debt, terms);
        team.sync();
        awaits_weights = false;
    });
}

// Push all rows in parts, or, per copy, as they are. `choice` is of the team's first debt.
__device__ void send_parts(const LlCombineArgs& args, const LlCall& call, const Team& team, const Debts& debts,
                           Choice choice, Terms (&listed)[2]) {
    const uint32_t parts = args.debt_parts;
    uint32_t turn = 0;
    bool is_first = true;
    for (uint32_t number = team.global_index(); number < debts.count * parts; number += debts.step, is_first = false) {
        const uint32_t row = divide(number, args.debt_parts_magic);
        const Item debt = debts[row];
        if (!debts.is_due(debt)) continue;
        if (!is_first) choice = load_choice(args, debt, team.thread);
        Terms& terms = listed[turn];
        turn ^= 1;
        const Weights from = debts.weights(debt.source);
        list_terms(team, from, choice, terms);
        team.sync();
        if (terms.owed() == 0) continue;
        if (args.is_per_copy) {
            push_copies(args, call, team, debt, terms);
        } else {
            push_part(args, call, team, debt, from == Weights::kSentNow, number - row * parts, parts, terms);
        }
    }
}

// Push all sums. `choice` is of the team's first debt. A team's first warps, which have no rows to add, list what comes
// next and wait for weights; they call meanwhile() once, and all threads see what it did. The others, its workers, add
// up.
template <typename Meanwhile>
__device__ void send_sums(const LlCombineArgs& args, const LlCall& call, const Team& team, const Debts& debts,
                          Choice choice, Terms (&listed)[2], Meanwhile meanwhile) {
    const bool is_worker = team.thread >= kMostChoices;
    const auto list = [&](const Item& debt, const Choice& known, Terms& terms) {
        list_terms(team, debts.weights(debt.source), known, terms);
    };
    uint32_t number = debts.next(team.global_index()), turn = 0;
    Item debt = debts[number];
    if (number < debts.count) {
        if (number != team.global_index()) choice = load_choice(args, debt, team.thread);
        list(debt, choice, listed[0]);
        team.sync();
    }
    meanwhile();
    if (number >= debts.count) return team.sync();
    while (true) {
        const uint32_t next_number = debts.next(number + debts.step);
        const Item next = debts[next_number];
        Terms& terms = listed[turn];
        turn ^= 1;
        const bool is_owed = terms.owed() != 0;
        bool awaits_weights = is_owed && debts.weights(debt.source) == Weights::kSentNow;
        if (is_worker && is_owed) {
            put_sum<true>(args, team, terms, home_slot(args, call, debt, args.common.shape.rank), [&] {
                if (awaits_weights) team.sync();
                awaits_weights = false;
            });
        } else if (!is_worker) {
            if (awaits_weights) {
                await_weights(args, call, team, debt, terms);
                team.sync();
            }
            if (next_number < debts.count) list(next, load_choice(args, next, team.thread), listed[turn]);
        }
        team.sync();
        if (next_number >= debts.count) return;
        debt = next;
        number = next_number;
    }
}

}  // namespace deepep
