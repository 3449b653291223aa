// The sending half of low-latency combine where there are few tokens, or every row is sent by itself: all threads of a
// team add up, and teams may share a row.
#pragma once

#include <deepep/ll_debts.cuh>
#include <deepep/ll_sums.cuh>

namespace deepep {

constexpr uint32_t kRowsAtOnce = 8;  // vectors of expert outputs that a thread loads before it adds the first one

// The rows that add up to one row, by top-k position, which positions count, and which there are at all: a rank whose
// positions are all left out owes the home a row of zeros nevertheless.
struct Terms {
    uint32_t valid[kWords];
    int32_t row[kMostChoices];
    float weight[kMostChoices];
    uint32_t owes[kWords];  // not beside `valid`: one load of both would read that while it is written
    __device__ Bits bits() const { return bits_of(valid); }
    __device__ Bits owed() const { return bits_of(owes); }
};

// By the team's threads that may have a position: keep for which ones it is so.
__device__ __forceinline__ void set_bits(const Team& team, bool is_so, uint32_t (&words)[kWords]) {
    const uint32_t bits = __ballot_sync(kFullMask, is_so);
    if (lane_index() == 0) words[team.thread / kWarpSize] = bits;
}

// By the first threads of a team: list the rows here of one token, and the weights that are known.
__device__ void list_terms(const Team& team, Weights from, Choice choice, Terms& terms) {
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
    if (from == Weights::kNone) choice.weight = 0;
    if (from == Weights::kOwn && choice.left_out < 0) choice.weight = kSkippedWeight;
    terms.row[k] = choice.target;
    terms.weight[k] = __uint_as_float(choice.weight);
    set_bits(team, choice.target >= 0, terms.owes);
    set_bits(team, choice.target >= 0 && choice.weight != kSkippedWeight, terms.valid);
}

// By the first threads of a team: wait for a token's weights, which its home sends only now.
__device__ void await_weights(const LlCombineArgs& args, const LlCall& call, const Team& team, const Item& item,
                              Terms& terms) {
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
    uint32_t weight = kSkippedWeight;
    if (terms.owes[k / kWarpSize] >> (k % kWarpSize) & 1) weight = await_weight(args, call, item, k);
    terms.weight[k] = __uint_as_float(weight);
    set_bits(team, weight != kSkippedWeight, terms.valid);
}

// Sum a thread's vector of a token's rows here, weighted. The first rows are loaded before ready() is called, once or
// more, which tells when weights are known; `owes` are all rows.
template <typename Ready>
__device__ __forceinline__ Vec16 sum_rows(const LlCombineArgs& args, const Terms& terms, Bits owes, uint32_t vec,
                                          Ready ready) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const Vec16* x = pointer<const Vec16>(args.x);
    float sum[8] = {};
    for (Bits left = owes; left != 0;) {
        Vec16 held[kRowsAtOnce];
        Bits ahead = left;
#pragma unroll
        for (uint32_t t = 0; t < kRowsAtOnce; ++t) {
            if (ahead == 0) break;
            held[t] = load_stream(x + (terms.row[pop_bit(ahead)] * row_vecs + vec));
        }
        ready();
        const Bits valid = terms.bits();
#pragma unroll
        for (uint32_t t = 0; t < kRowsAtOnce; ++t) {
            if (left == 0) break;
            const uint32_t k = pop_bit(left);
            if (has_bit(valid, k)) add_weighted(held[t], terms.weight[k], sum);
        }
    }
    return round_sum(sum, args.use_logfmt != 0);
}

// By a team: push a token's rows as they are, one per term.
__device__ void push_copies(const LlCombineArgs& args, const LlCall& call, const Team& team, const Item& debt,
                            const Terms& terms) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    for (Bits left = terms.bits(); left != 0;) {
        const uint32_t k = pop_bit(left);
        const Vec16* in = pointer<const Vec16>(args.x) + static_cast<uint64_t>(terms.row[k]) * row_vecs;
        Vec16* out = home_slot(call, debt.source, slot_offset(args, debt.token, k));
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
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const Bits owes = terms.owed();
    Vec16* out = home_slot(call, debt.source, slot_offset(args, debt.token, args.common.shape.rank));
    for (uint32_t base = part * team.threads; base < row_vecs; base += parts * team.threads) {
        const Place<1> place(team.thread, team.threads, base, row_vecs);
        const Vec16 sum = sum_rows(args, terms, owes, place.vec[0], [&] {
            if (!awaits_weights) return;
            await_weights(args, call, team, debt, terms);
            team.sync();
            awaits_weights = false;
        });
        if (place.is_inside[0]) store_b128(out + place.vec[0], to_wire(sum));
    }
}

// Push all rows in parts, or, per copy, as they are. `choice` is of the team's first debt.
__device__ void send_parts(const LlCombineArgs& args, const LlCall& call, const Team& team, const Headers& headers,
                           Choice choice, Terms (&listed)[2]) {
    const Debts debts(args, team, headers);
    const uint32_t parts = args.debt_parts;
    uint32_t turn = 0;
    bool is_first = true;
    for (uint32_t number = team.global_index(); number < debts.count * parts; number += debts.step, is_first = false) {
        const uint32_t row = divide(number, args.debt_parts_magic);
        const Item debt = debts[row];
        if (!headers.is_due(debt)) continue;
        if (!is_first) choice = load_choice(args, debt, team.thread);
        Terms& terms = listed[turn];
        turn ^= 1;
        const Weights from = headers.weights(args, debt.source);
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

}  // namespace deepep
