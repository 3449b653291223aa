// What low-latency combine knows of choices of experts: rows and weights, where they are and what they say. Places are
// apart from loads, since they are known before a kernel's turn.
#pragma once

#include <deepep/ll_items.cuh>

namespace deepep {

// What a thread knows of a choice; loaded without waiting for anything.
struct Choice {
    int32_t target = -1;   // its row here or, where its owner is yet to be told the weight, its expert; -1 is none
    uint32_t weight = 0;   // as sent ahead, or of this rank's own token
    int64_t left_out = 0;  // of this rank's own token: negative if it is
};

// Where it is; null if there is none.
struct ChoiceAt {
    const int32_t* target = nullptr;
    const uint32_t* weight = nullptr;
    const int64_t* left_out = nullptr;  // null also if it is of another rank's token
    __device__ __forceinline__ void settle() {
        deepep::settle(target);
        deepep::settle(weight);
        deepep::settle(left_out);
    }
    __device__ __forceinline__ Choice load() const {
        return {load_if(target, -1), load_if(weight, 0u), load_if(left_out, int64_t{0})};
    }
};

// By number among all threads: warps of all blocks that do not look at ranks first, and those that list rows last.
__device__ __forceinline__ uint32_t global_thread() {
    constexpr uint32_t kNumWarps = kLlThreads / kWarpSize;
    const uint32_t warp = (2 * kNumWarps - 1 - kWords - warp_index()) % kNumWarps;
    return (warp * gridDim.x + blockIdx.x) * kWarpSize + lane_index();
}

// Choice i of all tokens, where its owner is yet to be told the weight.
__device__ __forceinline__ ChoiceAt find_weight(const LlCombineArgs& args, uint32_t i) {
    const uint32_t num_choices = args.common.num_tokens * args.common.shape.num_topk;
    if (args.has_sent_weights || args.is_per_copy || i >= num_choices) return {};
    return {pointer<const int32_t>(args.common.home_topk) + i, pointer<const uint32_t>(args.topk_weights) + i,
            pointer<const int64_t>(args.topk_idx) + i};
}

// Tell the owners of this rank's choices their weights, where dispatch did not. `own` is the thread's first choice, if
// it `is_loaded`.
__device__ __forceinline__ void send_weights(const LlCombineArgs& args, const LlCall& call, Choice own,
                                             bool is_loaded) {
    const LlShape& shape = args.common.shape;
    const uint32_t num_choices = args.common.num_tokens * shape.num_topk;
#pragma unroll 1
    for (uint32_t i = global_thread(); i < num_choices; is_loaded = false) {
        if (!is_loaded) own = find_weight(args, i).load();
        const uint32_t owner = owner_of(shape, own.target);
        if (own.target >= 0 && owner != shape.rank && !call.is_masked(owner)) {
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

// Choice k of a token.
__device__ __forceinline__ ChoiceAt find_choice(const LlCombineArgs& args, const Item& item, uint32_t k) {
    const LlShape& shape = args.common.shape;
    if (k >= shape.num_topk) return {};
    const uint64_t at = item.slot * shape.num_topk + k;
    ChoiceAt choice;
    choice.target = pointer<const int32_t>(args.common.routes) + at;
    if (item.source == shape.rank) {
        const uint64_t own = static_cast<uint64_t>(item.token) * shape.num_topk + k;
        choice.weight = pointer<const uint32_t>(args.topk_weights) + own;
        choice.left_out = pointer<const int64_t>(args.topk_idx) + own;
    } else {
        choice.weight = pointer<const uint32_t>(args.common.route_weights) + at;
    }
    return choice;
}
__device__ __forceinline__ Choice load_choice(const LlCombineArgs& args, const Item& item, uint32_t k) {
    return find_choice(args, item, k).load();
}

// Bring a row of expert outputs close; -1 is none.
__device__ __forceinline__ void prefetch_row(const LlCombineArgs& args, int32_t row) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    if (row < 0) return;
    bulk_prefetch(pointer<const Vec16>(args.x) + static_cast<uint64_t>(row) * row_vecs, row_vecs * sizeof(Vec16));
}

// What one of a team's first threads knows of a choice of a token at home.
struct HomeChoice {
    int32_t expert = -1;
    Choice own;
};

// Where it is; null if there is none.
struct HomeChoiceAt {
    const int32_t* expert = nullptr;
    ChoiceAt own;
    __device__ __forceinline__ void settle() {
        deepep::settle(expert);
        own.settle();
    }
    __device__ __forceinline__ HomeChoice load() const { return {load_if(expert, -1), own.load()}; }
};

__device__ __forceinline__ HomeChoiceAt find_home(const LlCombineArgs& args, const Team& team, uint32_t token) {
    const LlShape& shape = args.common.shape;
    if (token >= args.common.num_tokens || team.thread >= shape.num_topk) return {};
    const uint64_t at = static_cast<uint64_t>(token) * shape.num_topk + team.thread;
    HomeChoiceAt choice;
    choice.expert = pointer<const int32_t>(args.common.home_topk) + at;
    if (args.keeps_own) choice.own = find_choice(args, Item(shape, shape.rank, token), team.thread);
    return choice;
}

// By one of a team's first threads: wait for the weight of choice k of a token, which its home sends only now.
__device__ __forceinline__ uint32_t await_weight(const LlCombineArgs& args, const LlCall& call, const Item& item,
                                                 uint32_t k) {
    uint32_t weight = kSkippedWeight;
    const uint64_t* word = call.own_word(args.common.window.weights, item.slot * args.common.shape.num_topk + k);
    return call.wait(item.source, word, weight, true) ? weight : kSkippedWeight;
}

// Whether choice k of a token at home is the last one that its owner has: that is where the owner's sum is added.
__device__ __forceinline__ bool is_last_of(const int32_t* owners, uint32_t k, uint32_t num_topk) {
    const int32_t owner = owners[k];
    bool is_last = owner >= 0;
    for (uint32_t later = k + 1; is_last && later < num_topk; ++later) is_last = owners[later] != owner;
    return is_last;
}

// A team's first token or part of one: from the last team on, since the first ones have rows to send.
__device__ __forceinline__ uint32_t first_at_home(const Team& team) {
    return team.global_count() - 1 - team.global_index();
}

}  // namespace deepep
