// The sending half of low-latency combine: what this rank owes the homes of the tokens that its experts worked on.
#pragma once

#include <deepep/ll_sum_lines.cuh>

namespace deepep {

__device__ __forceinline__ bool is_lined(const LlCombineArgs& args, uint32_t num_tokens) {
    return !args.is_per_copy && num_tokens <= args.common.shape.combine_line_tokens;
}

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

// What a team pushes: a row for every one of its numbers that is a token, and travels in the way asked for. This rank's
// own tokens may be left out.
struct Debts {
    const LlCombineArgs& args;
    const uint32_t* headers;
    const Sources sources;
    uint32_t count, step;
    __device__ Debts(const LlCombineArgs& arguments, const Team& team, const Headers& known)
        : args(arguments),
          headers(known.of),
          sources(args.common.shape, args.keeps_own),
          step(team.global_count()) {
        uint32_t most_tokens = known.most_tokens[0];
        if constexpr (kWords > 1) most_tokens = max_of(most_tokens, known.most_tokens[kWords - 1]);
        count = most_tokens * sources.count;
    }
    __device__ Item operator[](uint32_t number) const { return Item(args.common.shape, sources, number); }
    __device__ bool is_due(const Item& debt, bool as_lines) const {
        const uint32_t num_tokens = tokens_of(headers[debt.source]);
        return debt.token < num_tokens && is_lined(args, num_tokens) == as_lines;
    }
    // The first one behind a flag from `number` on; at least `count` if there is none.
    __device__ uint32_t next_slot(uint32_t number) const {
        while (number < count && !is_due((*this)[number], false)) number += step;
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

__device__ __forceinline__ uint64_t first_slot(const LlCombineArgs& args, const Item& debt) {
    return static_cast<uint64_t>(debt.token) * args.common.shape.num_slots;
}

__device__ __forceinline__ Vec16* home_slots(const LlCombineArgs& args, const LlCall& call, const Item& debt) {
    Vec16* slots =
        reinterpret_cast<Vec16*>(call.transport.peer_ptr(debt.source, args.common.window.combine_slots + call.bank));
    return slots + first_slot(args, debt) * (args.common.shape.hidden / Bf16::kPerVec);
}

// Push rows as they are, each behind a flag of its own. `choice` is of the team's first debt.
__device__ void send_copies(const LlCombineArgs& args, const LlCall& call, const Team& team, const Debts& debts,
                            Choice choice, Terms (&listed)[2]) {
    uint32_t turn = 0;
    for (uint32_t number = team.global_index(); number < debts.count; number += debts.step) {
        const Item debt = debts[number];
        if (!debts.is_due(debt, false)) continue;
        if (number != team.global_index()) choice = load_choice(args, debt, team.thread);
        Terms& terms = listed[turn];
        turn ^= 1;
        list_terms(team, Weights::kNone, choice, terms);
        team.sync();
        push_copies(args, team, terms, home_slots(args, call, debt));
        team.sync();
        if (team.thread >= kMostChoices || terms.owed() == 0) continue;
        fence_sys();
        if (!has_bit(terms.bits(), team.thread)) continue;
        call.signal(debt.source, args.common.window.arrived, first_slot(args, debt) + team.thread, 1);
    }
}

// Push the sums that travel behind flags. `choice` is of the team's first debt, unless teams share that one. A team's
// first warps, which have no rows to add, list what comes next, wait for weights and say what is there; they call
// meanwhile() once, and all threads see what it did. The others, its workers, add up.
template <typename Meanwhile>
__device__ void send_slots(const LlCombineArgs& args, const LlCall& call, const Team& team, const Debts& debts,
                           Choice choice, Terms (&listed)[2], uint32_t turn, Meanwhile meanwhile) {
    const LlShape& shape = args.common.shape;
    const bool is_worker = team.thread >= kMostChoices;
    const auto list = [&](const Item& debt, const Choice& known, Terms& terms) {
        list_terms(team, debts.weights(debt.source), known, terms);
    };
    uint32_t number = debts.next_slot(team.global_index());
    Item debt = debts[number], earlier;
    bool has_earlier = false;  // there, but nobody was told
    if (number < debts.count) {
        if (number != team.global_index() || args.debt_parts != 1) choice = load_choice(args, debt, team.thread);
        list(debt, choice, listed[turn]);
        team.sync();
    }
    meanwhile();
    if (number >= debts.count) return team.sync();
    while (true) {
        const uint32_t next_number = debts.next_slot(number + debts.step);
        const bool is_last = next_number >= debts.count;
        const Item next = debts[next_number];
        Terms& terms = listed[turn];
        turn ^= 1;
        const bool is_owed = terms.owed() != 0;
        bool awaits_weights = is_owed && debts.weights(debt.source) == Weights::kSentNow;
        if (is_worker) {
            Vec16* slots = home_slots(args, call, debt);
            put_sum(args, team, terms, slots + static_cast<uint64_t>(shape.rank) * (shape.hidden / Bf16::kPerVec), [&] {
                if (awaits_weights) team.sync();
                awaits_weights = false;
            });
        } else {
            if (awaits_weights) {
                await_weights(args, call, team, debt, terms);
                team.sync();
            }
            if (!is_last) list(next, load_choice(args, next, team.thread), listed[turn]);
        }
        team.sync();
        // One fence for two of them.
        const bool is_put_off = is_owed && !has_earlier && !is_last;
        if (team.thread == 0 && !is_put_off && (is_owed || has_earlier)) {
            const auto announce = [&](const Item& done) {
                call.signal(done.source, args.common.window.arrived, first_slot(args, done) + shape.rank, 1);
            };
            fence_sys();
            if (has_earlier) announce(earlier);
            if (is_owed) announce(debt);
        }
        if (is_last) return;
        has_earlier = is_put_off;
        earlier = debt;
        debt = next;
        number = next_number;
    }
}

// Push the rows that travel as lines, each in as many parts as there are teams for. Gives the next of the two `listed`.
__device__ uint32_t send_lines(const LlCombineArgs& args, const LlCall& call, const Team& team, const Debts& debts,
                               Choice choice, Terms (&listed)[2]) {
    const uint32_t parts = args.debt_parts;
    uint32_t turn = 0;
    bool is_first = true;
    for (uint32_t number = team.global_index(); number < debts.count * parts; number += debts.step, is_first = false) {
        const uint32_t row = divide(number, args.debt_parts_magic);
        const Item debt = debts[row];
        if (!debts.is_due(debt, true)) continue;
        if (!is_first) choice = load_choice(args, debt, team.thread);
        Terms& terms = listed[turn];
        turn ^= 1;
        const Weights from = debts.weights(debt.source);
        list_terms(team, from, choice, terms);
        team.sync();
        if (terms.owed() == 0) continue;
        push_lines(args, call, team, debt, from == Weights::kSentNow, number - row * parts, parts, terms);
    }
    return turn;
}

}  // namespace deepep
