// What a rank owes the homes of the tokens that its experts worked on, in low-latency combine.
#pragma once

#include <deepep/ll_choices.cuh>

namespace deepep {

// What the kernel knows of the ranks whose tokens came here.
struct Headers {
    uint32_t of[kMostChoices];
    uint32_t most_tokens[kWords];

    // Nothing is owed to a rank that is left out from the start; one that is lost later gets what it is owed, so that
    // all threads of a team agree.
    __device__ void keep(const LlCombineArgs& args, const LlCall& call, uint32_t header) {
        const uint32_t rank = call.looks_at();
        if (rank >= kMostChoices) return;
        if (rank >= args.common.shape.num_ranks || call.is_masked(rank)) header = 0;
        of[rank] = header;
        most_tokens[rank / kWarpSize] = __reduce_max_sync(kFullMask, tokens_of(header));
    }
    __device__ bool is_due(const Item& debt) const { return debt.token < tokens_of(of[debt.source]); }
    __device__ Weights weights(const LlCombineArgs& args, uint32_t source) const {
        return weights_of(args, source, of[source]);
    }
};

// What a team pushes: a row for every one of its numbers that is a token. This rank's own tokens may be left out.
struct Debts {
    const LlCombineArgs& args;
    const Sources sources;
    uint32_t count, step;
    __device__ Debts(const LlCombineArgs& arguments, const Team& team, const Headers& known)
        : args(arguments), sources(args.common.shape, args.keeps_own), step(team.global_count()) {
        uint32_t most_tokens = known.most_tokens[0];
        if constexpr (kWords > 1) most_tokens = max_of(most_tokens, known.most_tokens[kWords - 1]);
        count = most_tokens * sources.count;
    }
    __device__ Item operator[](uint32_t number) const { return Item(args.common.shape, sources, number); }
};

// The choice of the team's first debt, whose source may turn out not to have that many tokens.
__device__ __forceinline__ ChoiceAt find_first(const LlCombineArgs& args, const Team& team, Item& debt) {
    const Sources sources(args.common.shape, args.keeps_own);
    debt.token = args.common.shape.num_max_tokens;
    if (sources.count == 0) return {};
    debt = Item(args.common.shape, sources, divide(team.global_index(), args.debt_parts_magic));
    if (debt.token >= args.common.shape.num_max_tokens) return {};
    const bool is_own = debt.source == args.common.shape.rank;
    if (is_own && debt.token >= args.common.num_tokens) return {};
    return find_choice(args, debt, team.thread);
}

// Where slot `term` of a token is, in the first bank of its home's window.
__device__ __forceinline__ uint64_t slot_offset(const LlCombineArgs& args, uint32_t token, uint32_t term) {
    const LlShape& shape = args.common.shape;
    const uint64_t row_bytes = shape.hidden / Bf16::kPerVec * sizeof(Vec16);
    return args.common.window.combine_slots + (static_cast<uint64_t>(token) * shape.num_slots + term) * row_bytes;
}
__device__ __forceinline__ Vec16* home_slot(const LlCall& call, uint32_t home, uint64_t offset) {
    return reinterpret_cast<Vec16*>(call.transport.peer_ptr(home, offset + call.bank()));
}
// The slots of a token of this rank's own.
__device__ __forceinline__ Vec16* own_slots(const LlCombineArgs& args, const LlCall& call, uint32_t token) {
    return reinterpret_cast<Vec16*>(call.own_bytes(slot_offset(args, token, 0)));
}

// A token whose home is owed a sum, and where that goes.
struct Debt : Item {
    uint64_t offset = 0;
    Debt() = default;
    __device__ Debt(const LlCombineArgs& args, const Item& item)
        : Item(item), offset(slot_offset(args, token, args.common.shape.rank)) {}
};

}  // namespace deepep
