// Sums of low-latency combine: which rows of a token count, with which weights, added up in the contract's order.
#pragma once

#include <deepep/ll_items.cuh>
#include <deepep/ll_wire.cuh>
#include <deepep/quant.cuh>

namespace deepep {

constexpr uint32_t kVecsAtOnce = 2;  // vectors of a row, as far apart as there are threads, where workers add up
constexpr uint32_t kRowsAtOnce = 8;  // vectors of expert outputs a thread loads before it adds the first one

// The rows that add up to one row, by top-k position, which positions count, and which there are at all: a rank whose
// positions are all left out owes the home a row of zeros nevertheless.
struct Terms {
    uint32_t valid[kWords];
    uint32_t owes[kWords];
    int32_t row[kMostChoices];
    float weight[kMostChoices];
    __device__ Bits bits() const { return bits_of(valid); }
    __device__ Bits owed() const { return bits_of(owes); }
};

// By the team's threads that may have a position: keep for which ones it is so.
__device__ __forceinline__ void set_bits(const Team& team, bool is_so, uint32_t (&words)[kWords]) {
    const uint32_t bits = __ballot_sync(kFullMask, is_so);
    if (lane_index() == 0) words[team.thread / kWarpSize] = bits;
}

// Where a thread's vectors of a row are; the last ones may reach beyond the end, then they are the last vector again.
template <uint32_t kVecs>
struct Place {
    uint32_t vec[kVecs];
    bool is_inside[kVecs];
    __device__ __forceinline__ Place(uint32_t thread, uint32_t num_threads, uint32_t base, uint32_t row_vecs) {
#pragma unroll
        for (uint32_t i = 0; i < kVecs; ++i) {
            const uint32_t at = base + i * num_threads + thread;
            is_inside[i] = at < row_vecs;
            vec[i] = min_of(at, row_vecs - 1);
        }
    }
};

// A choice of this rank's own, and its weight.
struct OwnWeight {
    int32_t expert = -1;
    uint32_t weight = 0;
    int64_t left_out = 0;  // negative if it is
};

__device__ __forceinline__ uint32_t global_thread() { return blockIdx.x * kLlThreads + threadIdx.x; }

// Choice i of all tokens, where its owner is yet to be told the weight.
__device__ __forceinline__ OwnWeight load_weight(const LlCombineArgs& args, uint32_t i) {
    const uint32_t num_choices = args.common.num_tokens * args.common.shape.num_topk;
    if (args.has_sent_weights || args.is_per_copy || i >= num_choices) return {};
    return {pointer<const int32_t>(args.common.home_topk)[i], pointer<const uint32_t>(args.topk_weights)[i],
            pointer<const int64_t>(args.topk_idx)[i]};
}

// Tell the owners of this rank's choices their weights, where dispatch did not. `own` is the thread's first choice.
__device__ void send_weights(const LlCombineArgs& args, const LlCall& call, OwnWeight own) {
    const LlShape& shape = args.common.shape;
    const uint32_t num_choices = args.common.num_tokens * shape.num_topk;
#pragma unroll 1
    for (uint32_t i = global_thread(); i < num_choices; own = load_weight(args, i)) {
        const uint32_t owner = owner_of(shape, own.expert);
        if (own.expert >= 0 && owner != shape.rank && !call.is_masked(owner)) {
            const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens * shape.num_topk + i;
            call.signal(owner, args.common.window.weights, index, own.left_out < 0 ? kSkippedWeight : own.weight);
        }
        i += gridDim.x * kLlThreads;
    }
}

// Where the weights of one token come from.
enum class Weights : uint32_t { kNone, kSentAhead, kSentNow, kOwn };

__device__ __forceinline__ Weights weights_of(const LlCombineArgs& args, uint32_t source, uint32_t header) {
    if (args.is_per_copy) return Weights::kNone;
    if (source == args.common.shape.rank) return Weights::kOwn;
    return header & kHasWeights ? Weights::kSentAhead : Weights::kSentNow;
}

// What one of a team's first threads knows of a choice; loaded without waiting for anything.
struct Choice {
    int32_t row = -1;
    uint32_t weight = 0;   // as sent ahead, or of this rank's own token
    int64_t left_out = 0;  // of this rank's own token: negative if it is
};

// Choice k of a token.
__device__ __forceinline__ Choice load_choice(const LlCombineArgs& args, const Item& item, uint32_t k) {
    const LlShape& shape = args.common.shape;
    Choice choice;
    if (k >= shape.num_topk) return choice;
    const uint64_t at = item.slot * shape.num_topk + k;
    choice.row = pointer<const int32_t>(args.common.routes)[at];
    if (item.source == shape.rank) {
        const uint64_t own = static_cast<uint64_t>(item.token) * shape.num_topk + k;
        choice.weight = pointer<const uint32_t>(args.topk_weights)[own];
        choice.left_out = pointer<const int64_t>(args.topk_idx)[own];
    } else {
        choice.weight = pointer<const uint32_t>(args.common.route_weights)[at];
    }
    return choice;
}

// Bring a row of expert outputs close; -1 is none.
__device__ __forceinline__ void prefetch_row(const LlCombineArgs& args, int32_t row) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    if (row < 0) return;
    bulk_prefetch(pointer<const Vec16>(args.x) + static_cast<uint64_t>(row) * row_vecs, row_vecs * sizeof(Vec16));
}

// By the first threads of a team: list the rows here of one token, and the weights that are known.
__device__ void list_terms(const Team& team, Weights from, Choice choice, Terms& terms) {
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
    if (from == Weights::kNone) choice.weight = 0;
    if (from == Weights::kOwn && choice.left_out < 0) choice.weight = kSkippedWeight;
    terms.row[k] = choice.row;
    terms.weight[k] = __uint_as_float(choice.weight);
    set_bits(team, choice.row >= 0, terms.owes);
    set_bits(team, choice.row >= 0 && choice.weight != kSkippedWeight, terms.valid);
}

// By the first threads of a team: wait for a token's weights, which its home sends only now.
__device__ void await_weights(const LlCombineArgs& args, const LlCall& call, const Team& team, const Item& item,
                              Terms& terms) {
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
    uint32_t weight = kSkippedWeight;
    if (terms.owes[k / kWarpSize] >> (k % kWarpSize) & 1) {
        const uint64_t* word = call.own_word(args.common.window.weights, item.slot * args.common.shape.num_topk + k);
        if (!call.wait(item.source, word, weight, true)) weight = kSkippedWeight;
    }
    terms.weight[k] = __uint_as_float(weight);
    set_bits(team, weight != kSkippedWeight, terms.valid);
}

// By a whole warp.
__device__ __noinline__ Vec16 cast_logfmt(const Vec16 value) { return logfmt::roundtrip(value); }

// Sum a thread's kVecs vectors of a token's rows here, weighted. The first rows are loaded before ready() is called,
// once or more, which tells when weights are known; `owes` are all rows.
template <uint32_t kVecs, typename Ready>
__device__ __forceinline__ void sum_rows(const LlCombineArgs& args, const Terms& terms, Bits owes,
                                         const uint32_t (&vec)[kVecs], Vec16 (&out)[kVecs], Ready ready) {
    constexpr uint32_t kRows = kRowsAtOnce / kVecs;
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const Vec16* x = pointer<const Vec16>(args.x);
    float sum[kVecs][8] = {};
    for (Bits left = owes; left != 0;) {
        Vec16 held[kRows][kVecs];
        Bits ahead = left;
#pragma unroll
        for (uint32_t t = 0; t < kRows; ++t) {
            if (ahead == 0) break;
            const uint32_t row = terms.row[pop_bit(ahead)] * row_vecs;
#pragma unroll
            for (uint32_t i = 0; i < kVecs; ++i) held[t][i] = load_stream(x + (row + vec[i]));
        }
        ready();
        const Bits valid = terms.bits();
#pragma unroll
        for (uint32_t t = 0; t < kRows; ++t) {
            if (left == 0) break;
            const uint32_t k = pop_bit(left);
            if (!has_bit(valid, k)) continue;
            const float weight = terms.weight[k];
#pragma unroll
            for (uint32_t i = 0; i < kVecs; ++i) {
                float values[8];
                Bf16::unpack(held[t][i], values);
#pragma unroll
                for (int c = 0; c < 8; ++c) sum[i][c] = sum[i][c] + weight * values[c];
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < kVecs; ++i) {
        out[i] = Bf16::pack(sum[i]);
        if (args.use_logfmt) out[i] = cast_logfmt(out[i]);
    }
}

// Write the `part`th of `parts` of a token's weighted sum to `out`, a slot of its home (kIsSent) or shared memory.
template <uint32_t kVecs, bool kIsSent, typename Ready>
__device__ void put_part(const LlCombineArgs& args, const Terms& terms, uint32_t thread, uint32_t num_threads,
                         uint32_t part, uint32_t parts, Vec16* out, Ready ready) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec, step = kVecs * num_threads;
    const Bits owes = terms.owed();
    for (uint32_t base = part * step; base < row_vecs; base += parts * step) {
        const Place<kVecs> place(thread, num_threads, base, row_vecs);
        Vec16 sum[kVecs];
        sum_rows(args, terms, owes, place.vec, sum, ready);
#pragma unroll
        for (uint32_t i = 0; i < kVecs; ++i) {
            if (!place.is_inside[i]) continue;
            if constexpr (kIsSent) {
                store_b128(out + place.vec[i], to_wire(sum[i]));
            } else {
                out[place.vec[i]] = sum[i];
            }
        }
    }
}

// The same of all of it, by a team's workers.
template <bool kIsSent, typename Ready>
__device__ void put_sum(const LlCombineArgs& args, const Team& team, const Terms& terms, Vec16* out, Ready ready) {
    const uint32_t thread = team.thread - kMostChoices, num_threads = team.threads - kMostChoices;
    put_part<kVecsAtOnce, kIsSent>(args, terms, thread, num_threads, 0, 1, out, ready);
}

}  // namespace deepep
