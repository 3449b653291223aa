// Low-latency combine: the owner of a token's experts weighs and sums their rows, rounds once and pushes one row to the
// token's home (or, per copy, pushes every row as it is); the home adds up what arrives in the contract's order, its own
// rows straight from where they lie. Weights came with dispatch or, if not, are pushed to the owners first.
#include <deepep/ll_common.cuh>
#include <deepep/quant.cuh>

namespace deepep {
namespace {

constexpr uint32_t kTermsAtOnce = 2;  // rows of which a thread holds vectors at the same time
constexpr uint32_t kVecsAtOnce = 2;   // vectors of each of them, a team apart

// The rows that add up to one row, by top-k position, which positions count, and which there are at all: a rank whose
// positions are all left out owes the home a row of zeros nevertheless.
struct Terms {
    uint32_t valid[2];
    uint32_t owes[2];
    int32_t row[kLlMaxTopk];
    float weight[kLlMaxTopk];
    __device__ uint64_t bits() const { return static_cast<uint64_t>(valid[1]) << 32 | valid[0]; }
};

// All threads of the team's first two warps call it: keep whether position k counts.
__device__ __forceinline__ void set_valid(const Team& team, bool is_valid, Terms& terms) {
    if (team.thread >= kLlMaxTopk) return;
    const uint32_t bits = __ballot_sync(kFullMask, is_valid);
    if (lane_index() == 0) terms.valid[team.thread / kWarpSize] = bits;
}

__device__ __forceinline__ uint32_t pop_position(uint64_t& bits) {
    const uint32_t k = __ffsll(static_cast<long long>(bits)) - 1;
    bits &= bits - 1;
    return k;
}

// Two vectors of a row.
struct Pair {
    Vec16 v[kVecsAtOnce];
};

// Sum a pair of vectors of all terms in ascending position, in fp32. load(k, i) gives vector i of term k.
template <bool kWeighted, typename Load>
__device__ __forceinline__ Pair sum_terms(const Terms& terms, Load load) {
    float sum[kVecsAtOnce][8] = {};
    for (uint64_t left = terms.bits(); left != 0;) {
        Pair held[kTermsAtOnce];
        float weight[kTermsAtOnce];
        uint32_t count = 0;
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if (left == 0) break;
            const uint32_t k = pop_position(left);
#pragma unroll
            for (uint32_t i = 0; i < kVecsAtOnce; ++i) held[t].v[i] = load(k, i);
            if constexpr (kWeighted) weight[t] = terms.weight[k];
            count = t + 1;
        }
#pragma unroll
        for (uint32_t t = 0; t < kTermsAtOnce; ++t) {
            if (t >= count) break;
#pragma unroll
            for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
                float values[8];
                Bf16::unpack(held[t].v[i], values);
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    if constexpr (kWeighted) values[c] = weight[t] * values[c];
                    sum[i][c] = sum[i][c] + values[c];
                }
            }
        }
    }
    Pair out;
#pragma unroll
    for (uint32_t i = 0; i < kVecsAtOnce; ++i) out.v[i] = Bf16::pack(sum[i]);
    return out;
}

// Where a thread's pairs of a row are; the last one may reach beyond the end, then it is the last vector again.
struct Place {
    uint32_t vec[kVecsAtOnce];
    bool is_inside[kVecsAtOnce];
    __device__ __forceinline__ Place(const Team& team, uint32_t base, uint32_t row_vecs) {
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            const uint32_t at = base + i * team.threads + team.thread;
            is_inside[i] = at < row_vecs;
            vec[i] = min_of(at, row_vecs - 1);
        }
    }
};

// The sum of a token's rows here, weighted; every row of `terms` is one of x.
__device__ __forceinline__ Pair sum_rows(const LlCombineArgs& args, const Terms& terms, const Place& place) {
    const Vec16* x = pointer<const Vec16>(args.x);
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    return sum_terms<true>(terms, [&](uint32_t k, uint32_t i) {
        return load_stream(x + (terms.row[k] * row_vecs + place.vec[i]));
    });
}

// Tell the owners of this rank's choices their weights, where dispatch did not.
__device__ void send_weights(const LlCombineArgs& args, const LlCall& call) {
    const LlShape& shape = args.common.shape;
    const uint32_t num_choices = args.common.num_tokens * shape.num_topk;
    for (uint32_t i = blockIdx.x * kLlThreads + threadIdx.x; i < num_choices; i += gridDim.x * kLlThreads) {
        const int32_t expert = pointer<const int32_t>(args.common.home_topk)[i];
        const uint32_t owner = expert / shape.num_local_experts;
        if (expert < 0 || owner == shape.rank) continue;
        const bool is_left_out = pointer<const int64_t>(args.topk_idx)[i] < 0;
        const uint32_t weight = is_left_out ? kSkippedWeight : pointer<const uint32_t>(args.topk_weights)[i];
        const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens * shape.num_topk + i;
        if (!call.is_masked(owner)) call.signal(owner, args.common.window.weights, index, weight);
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
    uint32_t weight = 0;     // as sent ahead, or of this rank's own token
    int64_t left_out = 0;    // of this rank's own token: negative if it is
};

// Choice k of the token in slot `index` of all sources.
__device__ __forceinline__ Choice load_choice(const LlCombineArgs& args, uint64_t index, uint32_t k, bool is_own) {
    const LlShape& shape = args.common.shape;
    Choice choice;
    if (k >= shape.num_topk) return choice;
    const uint64_t at = index * shape.num_topk + k;
    choice.row = pointer<const int32_t>(args.common.routes)[at];
    if (is_own) {
        const uint64_t own = at - static_cast<uint64_t>(shape.rank) * shape.num_max_tokens * shape.num_topk;
        choice.weight = pointer<const uint32_t>(args.topk_weights)[own];
        choice.left_out = pointer<const int64_t>(args.topk_idx)[own];
    } else {
        choice.weight = pointer<const uint32_t>(args.common.route_weights)[at];
    }
    return choice;
}

// By the first threads of a team: list the rows here of one token of `source`, and their weights.
__device__ void list_terms(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t source,
                           uint64_t index, Weights from, Choice choice, Terms& terms) {
    const uint32_t k = team.thread;
    if (k >= kLlMaxTopk) return;
    if (from == Weights::kNone) choice.weight = 0;
    if (from == Weights::kOwn && choice.left_out < 0) choice.weight = kSkippedWeight;
    if (from == Weights::kSentNow && choice.row >= 0) {
        const uint64_t* word = call.own_word(args.common.window.weights, index * args.common.shape.num_topk + k);
        if (!call.wait<false>(source, word, choice.weight, true)) choice.weight = kSkippedWeight;
    }
    terms.row[k] = choice.row;
    terms.weight[k] = __uint_as_float(choice.weight);
    const uint32_t owes = __ballot_sync(kFullMask, choice.row >= 0);
    if (lane_index() == 0) terms.owes[k / kWarpSize] = owes;
    set_valid(team, choice.row >= 0 && choice.weight != kSkippedWeight, terms);
}

// By the 16 lanes of a group.
__device__ __noinline__ Vec16 cast_logfmt(const Vec16 value) {
    return logfmt::roundtrip(value, 0xffffu << (lane_index() & 16));
}

// Write a token's weighted sum to `out`: a slot of its home, or shared memory.
__device__ void put_sum(const LlCombineArgs& args, const Team& team, const Terms& terms, Vec16* out) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    for (uint32_t base = 0; base < row_vecs; base += kVecsAtOnce * team.threads) {
        const Place place(team, base, row_vecs);
        const Pair sum = sum_rows(args, terms, place);
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            if (place.is_inside[i]) out[place.vec[i]] = args.use_logfmt ? cast_logfmt(sum.v[i]) : sum.v[i];
        }
    }
}

// `out` is the slot of position 0.
__device__ void push_copies(const LlCombineArgs& args, const Team& team, const Terms& terms, Vec16* out) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    for (uint64_t left = terms.bits(); left != 0;) {
        const uint32_t k = pop_position(left);
        const Vec16* in = pointer<const Vec16>(args.x) + static_cast<uint64_t>(terms.row[k]) * row_vecs;
        for (uint32_t vec = team.thread; vec < row_vecs; vec += team.threads) {
            Vec16 value = load_stream(in + vec);
            if (args.use_logfmt) value = cast_logfmt(value);
            out[static_cast<uint64_t>(k) * row_vecs + vec] = value;
        }
    }
}

// A token that a team pushes a row for, as a number: sources take turns. This rank's own may be left out.
struct Debt {
    uint32_t source, token;
    uint64_t index;  // slot among those of all sources
    __device__ Debt(const LlCombineArgs& args, uint32_t number) {
        const LlShape& shape = args.common.shape;
        const uint32_t num_sources = count(args);
        source = number % num_sources;
        token = number / num_sources;
        if (args.keeps_own && source >= shape.rank) ++source;
        index = static_cast<uint64_t>(source) * shape.num_max_tokens + token;
    }
    __device__ static uint32_t count(const LlCombineArgs& args) { return args.common.shape.num_ranks - args.keeps_own; }
};

// The choice of the team's first debt, whose source may turn out not to have that many tokens.
__device__ Choice load_first(const LlCombineArgs& args, const Team& team) {
    if (Debt::count(args) == 0) return {};
    const Debt debt(args, team.global_index());
    if (debt.token >= args.common.shape.num_max_tokens) return {};
    const bool is_own = debt.source == args.common.shape.rank;
    if (is_own && debt.token >= args.common.num_tokens) return {};
    return load_choice(args, debt.index, team.thread, is_own);
}

// Push what this rank owes, to itself only where it does not keep it.
__device__ void send(const LlCombineArgs& args, const LlCall& call, const Team& team, const uint32_t* headers,
                     Choice choice) {
    __shared__ Terms listed[kLlMaxTeams][2];
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    if (!args.has_sent_weights && !args.is_per_copy) send_weights(args, call);
    uint32_t max_tokens = 0;
    for (uint32_t rank = 0; rank < shape.num_ranks; ++rank) {
        max_tokens = max_of(max_tokens, headers[rank] & ~kHasWeights);
    }
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    bool is_first = true;
    uint32_t turn = 0;
    for (uint32_t number = team.global_index(); number < max_tokens * Debt::count(args);
         number += team.global_count(), is_first = false) {
        const Debt debt(args, number);
        const uint32_t source = debt.source, header = headers[source];
        if (debt.token >= (header & ~kHasWeights) || call.is_masked(source)) continue;
        if (!is_first) choice = load_choice(args, debt.index, team.thread, source == shape.rank);
        Terms& terms = listed[team.index][turn];
        turn ^= 1;
        list_terms(args, call, team, source, debt.index, weights_of(args, source, header), choice, terms);
        team.sync();
        if ((terms.owes[0] | terms.owes[1]) == 0) continue;
        const uint64_t first = static_cast<uint64_t>(debt.token) * shape.num_slots;
        Vec16* slots = reinterpret_cast<Vec16*>(
            call.transport.peer_ptr(source, common.window.combine_slots + call.bank)) + first * row_vecs;
        if (args.is_per_copy) {
            push_copies(args, team, terms, slots);
        } else {
            put_sum(args, team, terms, slots + static_cast<uint64_t>(shape.rank) * row_vecs);
        }
        team.sync();
        if (team.thread >= kLlMaxTopk) continue;
        fence_sys();
        const bool is_mine = args.is_per_copy ? (terms.bits() >> team.thread & 1) != 0 : team.thread == 0;
        if (is_mine) {
            call.signal(source, common.window.arrived, first + (args.is_per_copy ? team.thread : shape.rank), 1);
        }
    }
}

// By the first threads of a team: wait for the rows of one token, and list where they are among its slots. `owners` are
// the ranks of its choices.
__device__ void await_terms(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                            const int32_t* owners, Terms& terms) {
    const LlShape& shape = args.common.shape;
    const uint32_t k = team.thread;
    if (k >= kLlMaxTopk) return;
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
    if (is_valid && !(args.keeps_own && owner == static_cast<int32_t>(shape.rank))) {
        const uint64_t slot = static_cast<uint64_t>(token) * shape.num_slots + terms.row[k];
        uint32_t value;
        is_valid = !call.is_masked(owner) && call.wait<true>(owner, call.own_word(args.common.window.arrived, slot), value);
    }
    set_valid(team, is_valid, terms);
}

// What a team knows of the token it adds up.
struct Home {
    int32_t owners[kLlMaxTopk];
    Terms own, all;
};

// Add up what came home: rows of `all` are numbers of slots, of which `own_slot` (-1: none) is in `own` instead.
template <bool kWeighted>
__device__ void add_slots(const Team& team, const Terms& all, const Vec16* slots, const Vec16* own, int32_t own_slot,
                          uint32_t row_vecs, Vec16* out) {
    for (uint32_t base = 0; base < row_vecs; base += kVecsAtOnce * team.threads) {
        const Place place(team, base, row_vecs);
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
    const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + token;
    if (args.keeps_own) choice.own = load_choice(args, index, team.thread, true);
    return choice;
}

// This rank's own sum is made before the team waits for the others.
__device__ void add_up(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                       const HomeChoice& choice, Vec16* own, Home& home) {
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + token;
    const Vec16* slots = reinterpret_cast<const Vec16*>(call.own_bytes(args.common.window.combine_slots)) +
                         static_cast<uint64_t>(token) * shape.num_slots * row_vecs;
    Vec16* out = pointer<Vec16>(args.out) + static_cast<uint64_t>(token) * row_vecs;
    if (team.thread < shape.num_topk) {
        home.owners[team.thread] =
            choice.expert < 0 ? -1 : choice.expert / static_cast<int32_t>(shape.num_local_experts);
    }
    if (args.keeps_own) list_terms(args, call, team, shape.rank, index, Weights::kOwn, choice.own, home.own);
    team.sync();
    if (args.keeps_own) put_sum(args, team, home.own, own);
    await_terms(args, call, team, token, home.owners, home.all);
    team.sync();
    const int32_t own_slot = args.keeps_own ? static_cast<int32_t>(shape.rank) : -1;
    if (args.is_per_copy) {
        add_slots<true>(team, home.all, slots, own, own_slot, row_vecs, out);
    } else {
        add_slots<false>(team, home.all, slots, own, own_slot, row_vecs, out);
    }
}

// A team's first token: from the last team on, since the first ones have rows to send.
__device__ __forceinline__ uint32_t first_token(const Team& team) {
    return team.global_count() - 1 - team.global_index();
}

__device__ void receive(const LlCombineArgs& args, const LlCall& call, const Team& team, HomeChoice choice,
                        Vec16* own_sums) {
    __shared__ Home homes[kLlMaxTeams][2];
    Vec16* own = own_sums + team.index * (args.common.shape.hidden / Bf16::kPerVec);
    uint32_t turn = 0;
    for (uint32_t token = first_token(team); token < args.common.num_tokens; turn ^= 1) {
        add_up(args, call, team, token, choice, own, homes[team.index][turn]);
        token += team.global_count();
        choice = load_home(args, team, token);
    }
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_combine_kernel(const __grid_constant__ deepep::LlCombineArgs args) {
    using namespace deepep;
    extern __shared__ Vec16 own_sums[];
    __shared__ LlShared shared;
    __shared__ uint32_t headers[kLlMaxRanks];
    const LlCommon& common = args.common;
    const uint64_t credits = common.window.combine_credits;
    const Team team(common.team_threads);
    LlCall call(common, kLlCombine, shared);
    const Choice debt = common.phases & kLlSend ? load_first(args, team) : Choice{};
    const HomeChoice home = common.phases & kLlRecv ? load_home(args, team, first_token(team)) : HomeChoice{};
    uint32_t header = 0;
    if (threadIdx.x < common.shape.num_ranks) header = pointer<const uint32_t>(common.sources)[threadIdx.x];
    call.prepare(credits, args.combine_epoch);
    if (threadIdx.x < common.shape.num_ranks) headers[threadIdx.x] = header;
    call.begin(args.combine_epoch);
    if (common.phases & kLlSend) {
        if (blockIdx.x == gridDim.x - 1) call.publish_credits(credits);
        call.await_credit(threadIdx.x, credits);
        __syncthreads();
        send(args, call, team, headers, debt);
    }
    if (common.phases & kLlRecv) receive(args, call, team, home, own_sums);
    call.end();
}
