// Low-latency combine: the owner of a token's experts weighs and sums their rows, rounds once and pushes one row to the
// token's home (or, per copy, pushes every row as it is); the home adds up what arrives in the contract's order. Weights
// came with dispatch or, if not, are pushed to the owners first.
#include <deepep/ll_common.cuh>
#include <deepep/quant.cuh>

namespace deepep {
namespace {

constexpr uint32_t kTermsAtOnce = 4;  // rows of which a thread holds a vector at the same time

// The rows that add up to one row, by top-k position, and which positions there are.
struct Terms {
    uint32_t valid[2];
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

// Sum vector `vec` of all terms in ascending position, in fp32. Row r starts at base + r * row_vecs.
template <bool kWeighted>
__device__ __forceinline__ Vec16 sum_terms(const Terms& terms, const Vec16* base, uint32_t row_vecs, uint32_t vec) {
    float sum[8] = {};
    for (uint64_t left = terms.bits(); left != 0;) {
        Vec16 held[kTermsAtOnce];
        float weight[kTermsAtOnce];
        uint32_t count = 0;
#pragma unroll
        for (uint32_t i = 0; i < kTermsAtOnce; ++i) {
            if (left == 0) break;
            const uint32_t k = pop_position(left);
            held[i] = load_stream(base + static_cast<uint64_t>(terms.row[k]) * row_vecs + vec);
            if constexpr (kWeighted) weight[i] = terms.weight[k];
            count = i + 1;
        }
#pragma unroll
        for (uint32_t i = 0; i < kTermsAtOnce; ++i) {
            if (i >= count) break;
            float values[8];
            Bf16::unpack(held[i], values);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                if constexpr (kWeighted) values[c] = weight[i] * values[c];
                sum[c] = sum[c] + values[c];
            }
        }
    }
    return Bf16::pack(sum);
}

// Tell the owners of this rank's choices their weights, where dispatch did not.
__device__ void send_weights(const LlCombineArgs& args, const LlCall& call) {
    const LlShape& shape = args.common.shape;
    const uint32_t num_choices = args.common.num_tokens * shape.num_topk;
    for (uint32_t i = blockIdx.x * kLlThreads + threadIdx.x; i < num_choices; i += gridDim.x * kLlThreads) {
        const int32_t expert = pointer<const int32_t>(args.common.home_topk)[i];
        if (expert < 0) continue;
        const uint32_t owner = expert / shape.num_local_experts;
        const bool is_left_out = pointer<const int64_t>(args.topk_idx)[i] < 0;
        const uint32_t weight = is_left_out ? kSkippedWeight : pointer<const uint32_t>(args.topk_weights)[i];
        const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens * shape.num_topk + i;
        if (!call.is_masked(owner)) call.signal(owner, args.common.window.weights, index, weight);
    }
}

// By the first threads of a team: find the rows here of one token of `source`, and their weights.
__device__ void list_terms(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t source,
                           uint64_t index, bool has_weights, Terms& terms) {
    const uint32_t num_topk = args.common.shape.num_topk, k = team.thread;
    if (k >= kLlMaxTopk) return;
    const uint64_t choice = index * num_topk + k;
    int32_t row = k < num_topk ? pointer<const int32_t>(args.common.routes)[choice] : -1;
    uint32_t weight = 0;
    if (row >= 0 && !args.is_per_copy) {
        if (has_weights) {
            weight = pointer<const uint32_t>(args.common.route_weights)[choice];
        } else if (!call.wait(source, call.own_word(args.common.window.weights, choice), weight)) {
            weight = kSkippedWeight;
        }
    }
    terms.row[k] = row;
    terms.weight[k] = __uint_as_float(weight);
    set_valid(team, row >= 0 && weight != kSkippedWeight, terms);
}

// Whether this rank owes the home a row: its choices live here, even if all of them are left out now.
__device__ bool has_rows(const LlCombineArgs& args, uint64_t index, uint32_t k) {
    const uint32_t num_topk = args.common.shape.num_topk;
    return k < num_topk && pointer<const int32_t>(args.common.routes)[index * num_topk + k] >= 0;
}

__device__ __forceinline__ uint32_t group_lanes() { return 0xffffu << (lane_index() & 16); }

__device__ void push_sum(const LlCombineArgs& args, const Team& team, const Terms& terms, Vec16* out) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    for (uint32_t vec = team.thread; vec < row_vecs; vec += team.threads) {
        Vec16 sum = sum_terms<true>(terms, pointer<const Vec16>(args.x), row_vecs, vec);
        if (args.use_logfmt) sum = logfmt::roundtrip(sum, group_lanes());
        out[vec] = sum;
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
            if (args.use_logfmt) value = logfmt::roundtrip(value, group_lanes());
            out[static_cast<uint64_t>(k) * row_vecs + vec] = value;
        }
    }
}

__device__ void send(const LlCombineArgs& args, const LlCall& call) {
    __shared__ uint32_t tokens_before[kLlMaxRanks + 1];
    __shared__ Terms listed[kLlMaxTeams][2];
    __shared__ uint32_t owes[kLlMaxTeams][2];
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    const uint32_t* sources = pointer<const uint32_t>(common.sources);
    if (threadIdx.x < shape.num_ranks && !call.is_masked(threadIdx.x)) {
        call.wait_credit(threadIdx.x, call.own_word(common.window.combine_credits, threadIdx.x));
    }
    if (threadIdx.x == 0) {
        uint32_t sum = 0;
        for (uint32_t rank = 0; rank <= shape.num_ranks; ++rank) {
            tokens_before[rank] = sum;
            if (rank < shape.num_ranks) sum += sources[rank] & ~kHasWeights;
        }
    }
    __syncthreads();
    if (!args.has_sent_weights && !args.is_per_copy) send_weights(args, call);
    const Team team(common.team_threads);
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    uint32_t source = 0, turn = 0;
    for (uint32_t item = team.global_index(); item < tokens_before[shape.num_ranks];
         item += team.global_count(), turn ^= 1) {
        while (item >= tokens_before[source + 1]) ++source;
        if (call.is_masked(source)) continue;
        const uint32_t token = item - tokens_before[source];
        const uint64_t index = static_cast<uint64_t>(source) * shape.num_max_tokens + token;
        Terms& terms = listed[team.index][turn];
        if (team.thread < kWarpSize) {
            const bool is_owing = __any_sync(kFullMask, has_rows(args, index, team.thread) ||
                                                            has_rows(args, index, team.thread + kWarpSize));
            if (team.thread == 0) owes[team.index][turn] = is_owing;
        }
        list_terms(args, call, team, source, index, (sources[source] & kHasWeights) != 0, terms);
        team.sync();
        if (!owes[team.index][turn]) continue;
        const uint64_t first = static_cast<uint64_t>(token) * shape.num_slots;
        Vec16* slots = reinterpret_cast<Vec16*>(
            call.transport.peer_ptr(source, common.window.combine_slots + call.bank)) + first * row_vecs;
        if (args.is_per_copy) {
            push_copies(args, team, terms, slots);
        } else {
            push_sum(args, team, terms, slots + static_cast<uint64_t>(shape.rank) * row_vecs);
        }
        team.sync();
        if (team.thread >= kLlMaxTopk) continue;
        const bool is_mine = args.is_per_copy ? (terms.bits() >> team.thread & 1) != 0 : team.thread == 0;
        fence_sys();
        if (is_mine) {
            const uint32_t slot = args.is_per_copy ? team.thread : shape.rank;
            call.signal(source, common.window.arrived, first + slot, 1);
        }
    }
}

// By the first threads of a team: wait for the rows of one token, and list where they are among its slots.
__device__ void await_terms(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                            int32_t* owners, Terms& terms) {
    const LlShape& shape = args.common.shape;
    const uint32_t k = team.thread;
    const uint64_t choice = static_cast<uint64_t>(token) * shape.num_topk + k;
    int32_t owner = -1;
    if (k < shape.num_topk) {
        const int32_t expert = pointer<const int32_t>(args.common.home_topk)[choice];
        owner = expert < 0 ? -1 : expert / static_cast<int32_t>(shape.num_local_experts);
        owners[k] = owner;
    }
    team.sync();
    if (k >= kLlMaxTopk) return;
    bool is_valid = owner >= 0;
    if (args.is_per_copy) {
        is_valid = is_valid && pointer<const int64_t>(args.topk_idx)[choice] >= 0;
        terms.row[k] = k;
        if (is_valid) terms.weight[k] = pointer<const float>(args.topk_weights)[choice];
    } else {
        for (uint32_t later = k + 1; is_valid && later < shape.num_topk; ++later) is_valid = owners[later] != owner;
        terms.row[k] = owner;
    }
    if (is_valid) {
        const uint64_t slot = static_cast<uint64_t>(token) * shape.num_slots + terms.row[k];
        uint32_t value;
        is_valid = !call.is_masked(owner) && call.wait(owner, call.own_word(args.common.window.arrived, slot), value);
    }
    set_valid(team, is_valid, terms);
}

__device__ void receive(const LlCombineArgs& args, const LlCall& call) {
    __shared__ Terms listed[kLlMaxTeams][2];
    __shared__ int32_t owners[kLlMaxTeams][kLlMaxTopk];
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    const Team team(common.team_threads);
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    const Vec16* slots = reinterpret_cast<const Vec16*>(call.transport.local(common.window.combine_slots + call.bank));
    uint32_t turn = 0;
    for (uint32_t token = team.global_index(); token < common.num_tokens; token += team.global_count(), turn ^= 1) {
        Terms& terms = listed[team.index][turn];
        await_terms(args, call, team, token, owners[team.index], terms);
        team.sync();
        const Vec16* first = slots + static_cast<uint64_t>(token) * shape.num_slots * row_vecs;
        Vec16* out = pointer<Vec16>(args.out) + static_cast<uint64_t>(token) * row_vecs;
        for (uint32_t vec = team.thread; vec < row_vecs; vec += team.threads) {
            out[vec] = args.is_per_copy ? sum_terms<true>(terms, first, row_vecs, vec)
                                        : sum_terms<false>(terms, first, row_vecs, vec);
        }
    }
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_combine_kernel(const __grid_constant__ deepep::LlCombineArgs args) {
    using namespace deepep;
    LlCall call = LlCall::begin(args.common, kLlCombine, args.combine_epoch);
    if (args.common.phases & kLlSend) send(args, call);
    if (args.common.phases & kLlRecv) receive(args, call);
    call.end(args.common.window.combine_credits);
}
