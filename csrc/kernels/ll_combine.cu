// Low-latency combine: the owner of a token's experts weighs and sums their rows, rounds once and pushes one row to the
// token's home (or, per copy, pushes every row as it is); the home adds up what arrives in the contract's order, its
// own rows straight from where they lie. Weights came with dispatch or, if not, are pushed to the owners first. Sums of
// few tokens travel as lines, each token's as many as its home has.
#include <deepep/ll_sum_lines.cuh>

namespace deepep {
namespace {

// A token that a team pushes a row for, as a number: sources take turns. This rank's own may be left out.
struct Debt {
    uint32_t source, token;
    uint64_t index;  // slot among those of all sources
    __device__ Debt(const LlCombineArgs& args, uint32_t number) {
        const LlShape& shape = args.common.shape;
        token = divide(number, args.keeps_own ? shape.others_magic : shape.ranks_magic);
        source = number - token * count(args);
        if (args.keeps_own && source >= shape.rank) ++source;
        index = static_cast<uint64_t>(source) * shape.num_max_tokens + token;
    }
    __device__ static uint32_t count(const LlCombineArgs& args) { return args.common.shape.num_ranks - args.keeps_own; }
};

__device__ __forceinline__ bool is_lined(const LlCombineArgs& args, uint32_t num_tokens) {
    return !args.is_per_copy && num_tokens <= args.common.shape.combine_line_tokens;
}

// The choice of the team's first debt, whose source may turn out not to have that many tokens.
__device__ Choice load_first(const LlCombineArgs& args, const Team& team) {
    if (Debt::count(args) == 0) return {};
    const Debt debt(args, divide(team.global_index(), args.debt_parts_magic));
    if (debt.token >= args.common.shape.num_max_tokens) return {};
    const bool is_own = debt.source == args.common.shape.rank;
    if (is_own && debt.token >= args.common.num_tokens) return {};
    return load_choice(args, debt.index, team.thread, is_own);
}

// Push the rows that travel behind flags. `choice` is of the team's first debt.
__device__ void send_slots(const LlCombineArgs& args, const LlCall& call, const Team& team, const uint32_t* headers,
                           uint32_t num_debts, Choice choice, bool has_choice, Terms (&listed)[2], uint32_t turn) {
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    for (uint32_t number = team.global_index(); number < num_debts;
         number += team.global_count(), has_choice = false) {
        const Debt debt(args, number);
        const uint32_t source = debt.source, header = headers[source];
        if (debt.token >= tokens_of(header) || is_lined(args, tokens_of(header))) continue;
        if (!has_choice) choice = load_choice(args, debt.index, team.thread, source == shape.rank);
        Terms& terms = listed[turn];
        turn ^= 1;
        list_terms(args, call, team, source, debt.index, weights_of(args, source, header), choice, terms, true);
        team.sync();
        if (bits_of(terms.owes) == 0) continue;
        const uint64_t first = static_cast<uint64_t>(debt.token) * shape.num_slots;
        Vec16* slots =
            reinterpret_cast<Vec16*>(call.transport.peer_ptr(source, common.window.combine_slots + call.bank)) +
            first * row_vecs;
        if (args.is_per_copy) {
            push_copies(args, team, terms, slots);
        } else {
            put_sum(args, team, terms, slots + static_cast<uint64_t>(shape.rank) * row_vecs);
        }
        team.sync();
        if (team.thread >= kMostChoices) continue;
        fence_sys();
        const bool is_mine = args.is_per_copy ? has_bit(terms.bits(), team.thread) : team.thread == 0;
        if (is_mine) {
            call.signal(source, common.window.arrived, first + (args.is_per_copy ? team.thread : shape.rank), 1);
        }
    }
}

// Push the rows that travel as lines, each in as many parts as there are teams for. Gives the next of the two `listed`.
__device__ uint32_t send_lines(const LlCombineArgs& args, const LlCall& call, const Team& team,
                               const uint32_t* headers, uint32_t num_debts, Choice choice, Terms (&listed)[2]) {
    const uint32_t rank = args.common.shape.rank, parts = args.debt_parts;
    uint32_t turn = 0;
    bool is_first = true;
    for (uint32_t number = team.global_index(); number < num_debts * parts;
         number += team.global_count(), is_first = false) {
        const uint32_t row = divide(number, args.debt_parts_magic);
        const Debt debt(args, row);
        const uint32_t source = debt.source, header = headers[source];
        if (debt.token >= tokens_of(header) || !is_lined(args, tokens_of(header))) continue;
        if (!is_first) choice = load_choice(args, debt.index, team.thread, source == rank);
        Terms& terms = listed[turn];
        turn ^= 1;
        const Weights from = weights_of(args, source, header);
        list_terms(args, call, team, source, debt.index, from, choice, terms, false);
        team.sync();
        if (bits_of(terms.owes) == 0) continue;
        push_lines(args, call, team, source, debt.token, debt.index, from == Weights::kSentNow,
                   number - row * parts, parts, terms);
    }
    return turn;
}

// Push what this rank owes, to itself only where it does not keep it. `choice` is of the team's first debt.
__device__ void send(const LlCombineArgs& args, const LlCall& call, const Team& team, const uint32_t* headers,
                     const Choice& choice, const OwnWeight& weight) {
    __shared__ Terms listed[kLlMaxTeams][2];
    send_weights(args, call, weight);
    uint32_t max_tokens = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < args.common.shape.num_ranks; ++rank) {
        max_tokens = max_of(max_tokens, tokens_of(headers[rank]));
    }
    const uint32_t num_debts = max_tokens * Debt::count(args);
    const uint32_t turn = send_lines(args, call, team, headers, num_debts, choice, listed[team.index]);
    send_slots(args, call, team, headers, num_debts, choice, args.debt_parts == 1, listed[team.index], turn);
}

// By the first threads of a team: list where the rows of one token are among its slots, and, unless they come as lines,
// wait for them. `owners` are the ranks of its choices.
__device__ void await_terms(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                            const int32_t* owners, Terms& terms, bool as_lines) {
    const LlShape& shape = args.common.shape;
    const uint32_t k = team.thread;
    if (k >= kMostChoices) return;
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
    if (is_valid && as_lines) {
        is_valid = !call.is_masked(owner);
    } else if (is_valid && !(args.keeps_own && owner == static_cast<int32_t>(shape.rank))) {
        const uint64_t slot = static_cast<uint64_t>(token) * shape.num_slots + terms.row[k];
        uint32_t value;
        is_valid =
            !call.is_masked(owner) && call.wait<true>(owner, call.own_word(args.common.window.arrived, slot), value);
    }
    set_valid(team, is_valid, terms);
}

// What a team knows of the token it adds up.
struct Home {
    int32_t owners[kMostChoices];
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

__device__ __forceinline__ void list_owners(const LlShape& shape, const Team& team, const HomeChoice& choice,
                                            Home& home) {
    if (team.thread >= shape.num_topk) return;
    home.owners[team.thread] = choice.expert < 0 ? -1 : static_cast<int32_t>(owner_of(shape, choice.expert));
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
    list_owners(shape, team, choice, home);
    if (args.keeps_own) list_terms(args, call, team, shape.rank, index, Weights::kOwn, choice.own, home.own, true);
    team.sync();
    if (args.keeps_own) put_sum(args, team, home.own, own);
    await_terms(args, call, team, token, home.owners, home.all, false);
    team.sync();
    const int32_t own_slot = args.keeps_own ? static_cast<int32_t>(shape.rank) : -1;
    if (args.is_per_copy) {
        add_slots<true>(team, home.all, slots, own, own_slot, row_vecs, out);
    } else {
        add_slots<false>(team, home.all, slots, own, own_slot, row_vecs, out);
    }
}

// A team's first token or part of one: from the last team on, since the first ones have rows to send.
__device__ __forceinline__ uint32_t first_at_home(const Team& team) {
    return team.global_count() - 1 - team.global_index();
}

__device__ void receive_slots(const LlCombineArgs& args, const LlCall& call, const Team& team, HomeChoice choice,
                              Home (&homes)[2], Vec16* own_sums) {
    Vec16* own = own_sums + team.index * (args.common.shape.hidden / Bf16::kPerVec);
    uint32_t turn = 0;
    for (uint32_t token = first_at_home(team); token < args.common.num_tokens; turn ^= 1) {
        add_up(args, call, team, token, choice, own, homes[turn]);
        token += team.global_count();
        choice = load_home(args, team, token);
    }
}

__device__ void receive_lines(const LlCombineArgs& args, const LlCall& call, const Team& team, HomeChoice choice,
                              Home (&homes)[2]) {
    const uint32_t parts = args.home_parts;
    uint32_t turn = 0;
    for (uint32_t number = first_at_home(team); number < args.common.num_tokens * parts; turn ^= 1) {
        const uint32_t token = divide(number, args.home_parts_magic);
        Home& home = homes[turn];
        list_owners(args.common.shape, team, choice, home);
        team.sync();
        await_terms(args, call, team, token, home.owners, home.all, true);
        team.sync();
        add_lines(args, call, team, token, number - token * parts, parts, home.all);
        number += team.global_count();
        choice = load_home(args, team, divide(number, args.home_parts_magic));
    }
}

__device__ void receive(const LlCombineArgs& args, const LlCall& call, const Team& team, const HomeChoice& choice,
                        Vec16* own_sums) {
    __shared__ Home homes[kLlMaxTeams][2];
    if (is_lined(args, args.common.num_tokens)) {
        receive_lines(args, call, team, choice, homes[team.index]);
    } else {
        receive_slots(args, call, team, choice, homes[team.index], own_sums);
    }
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_combine_kernel(const __grid_constant__ deepep::LlCombineArgs args) {
    using namespace deepep;
    extern __shared__ Vec16 own_sums[];
    __shared__ LlShared shared;
    __shared__ uint32_t headers[kMostChoices];
    const LlCommon& common = args.common;
    const uint64_t credits = common.window.combine_credits;
    const Team team(common.team_threads);
    LlCall call(common, kLlCombine, shared);
    const Choice debt = common.phases & kLlSend ? load_first(args, team) : Choice{};
    const uint32_t first = divide(first_at_home(team), args.home_parts_magic);
    const HomeChoice home = common.phases & kLlRecv ? load_home(args, team, first) : HomeChoice{};
    const OwnWeight weight = common.phases & kLlSend ? load_weight(args, global_thread()) : OwnWeight{};
    uint32_t header = 0;
    if (threadIdx.x < common.shape.num_ranks) header = pointer<const uint32_t>(common.sources)[threadIdx.x];
    call.prepare(credits, args.combine_epoch);
    // Nothing is owed to a rank that is left out from the start; one that is lost later gets what it is owed, so that
    // all threads of a team agree.
    if (threadIdx.x < common.shape.num_ranks) headers[threadIdx.x] = call.is_masked(threadIdx.x) ? 0 : header;
    call.begin(args.combine_epoch);
    if (common.phases & kLlSend) send(args, call, team, headers, debt, weight);
    if (common.phases & kLlRecv) receive(args, call, team, home, own_sums);
    call.end();
}
