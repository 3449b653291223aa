// Low-latency dispatch takes in tokens of other ranks. A thread waits for its part of a row where it will be stored
// from, beside the counts that say where to.
#pragma once

#include <deepep/ll_lay_out.cuh>

namespace deepep {

constexpr uint32_t kPartsAtOnce = 2;  // vectors of a row per thread, as far apart as there are threads

// A team's place among those that share a row: where there are few rows, each of them is stored by several blocks.
struct Share {
    uint32_t part, threads, thread;
    Share() = default;
    __device__ Share(const LlDispatchArgs& args, const Team& team, uint32_t number)
        : part(number & (args.recv_parts - 1)),
          threads(team.threads * args.recv_parts),
          thread(team.threads * part + team.thread) {}
    __device__ static uint32_t row_of(const LlDispatchArgs& args, uint32_t number) {
        return number >> Team::log2_of(args.recv_parts);
    }
};

// A thread's part of a token on its way here: vectors and their scale factors; choice `team.thread` comes with the
// first part.
template <bool kFp8>
struct Arrival {
    static constexpr uint32_t kChoiceBit = 2 * kPartsAtOnce;
    Vec16 part[kPartsAtOnce];
    Vec16 choice;
    uint32_t sf[kPartsAtOnce];
    uint32_t missing;  // bit per vector, then per scale factor, then for the choice
    uint32_t first;    // vector of the row
    Vec16* part_at[kPartsAtOnce];
    uint32_t* sf_at[kPartsAtOnce];
    const Vec16* choice_at;

    Arrival() = default;
    // The part from vector `base` of all teams on.
    __device__ Arrival(const LlDispatchArgs& args, const LlCall& call, const Team& team, const Share& share,
                       const Item& item, uint32_t base)
        : first(base + share.thread) {
        const LlShape& shape = args.common.shape;
        uint8_t* slot =
            pointer<uint8_t>(args.common.own_base + slot_of(shape, args.common.window, item.slot) + call.bank());
        choice_at = reinterpret_cast<const Vec16*>(slot + shape.choice_offset) + team.thread;
        settle(choice_at);
        missing = base == 0 && team.thread < shape.num_topk ? 1u << kChoiceBit : 0;
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            const uint32_t vec = first + i * share.threads;
            part_at[i] = reinterpret_cast<Vec16*>(slot) + vec;
            settle(part_at[i]);
            if (kFp8) {
                sf_at[i] = reinterpret_cast<uint32_t*>(slot + shape.hidden) + vec / kLanesPerGroup;
                settle(sf_at[i]);
            }
            if (vec >= vecs_of<kFp8>(shape)) continue;
            missing |= 1u << i;
            if (kFp8) missing |= 1u << (kPartsAtOnce + i);
        }
    }

    __device__ __forceinline__ bool misses(uint32_t bit) const { return (missing >> bit & 1) != 0; }

    // Load what is missing, all of it in one trip.
    __device__ __forceinline__ void load() {
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            if (misses(i)) part[i] = load_b128(part_at[i]);
        }
#pragma unroll
        for (uint32_t i = 0; kFp8 && i < kPartsAtOnce; ++i) {
            if (misses(kPartsAtOnce + i)) sf[i] = load_relaxed_sys(sf_at[i]);
        }
        if (misses(kChoiceBit)) {
            choice = load_b128(choice_at);
        }
    }

    // Of what was loaded, see what is there.
    __device__ __forceinline__ void look(uint32_t epoch) {
        uint32_t left = 0;
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            if (misses(i) && !is_there(part[i])) left |= 1u << i;
            if (kFp8 && misses(kPartsAtOnce + i) && !is_there(sf[i])) left |= 1u << (kPartsAtOnce + i);
        }
        if (misses(kChoiceBit) && choice.word[3] != epoch) left |= 1u << kChoiceBit;
        missing = left;
    }

    // All being there: leave zeros where the thread's part came from.
    __device__ __forceinline__ void leave_zeros(const LlDispatchArgs& args, const Share& share) const {
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            if (first + i * share.threads >= vecs_of<kFp8>(args.common.shape)) continue;
            *global(part_at[i]) = {};
            if (has_sf<kFp8>()) *global(sf_at[i]) = 0;
        }
    }

    // And store it.
    __device__ __forceinline__ void store(const LlDispatchArgs& args, const Share& share, const Rows& rows) const {
        const LlShape& shape = args.common.shape;
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            const uint32_t vec = first + i * share.threads;
            if (vec >= vecs_of<kFp8>(shape)) continue;
            store_vec<kFp8>(args, rows, vec, from_wire(part[i]), from_wire(sf[i]));
        }
    }
};

// By each thread: wait for its part of a token, which may have been loaded once already, and, with `table`, for the
// thread's first word among the counts, side by side. It stays missing if the source has fewer tokens, the token does
// not come here, or the rank is lost.
template <bool kFp8>
__device__ void await_token(const LlDispatchArgs& args, const LlCall& call, const Item& item, Arrival<kFp8>& arrival,
                            uint32_t* table, Arrivals* from, bool is_loaded = false) {
    constexpr uint32_t kSpinsPerCheck = 64;
    const LlCommon& common = args.common;
    const uint64_t* header = call.own_word(common.window.headers, item.source);
    const uint64_t* absent = call.own_word(common.window.absent, item.slot);
    settle(header);
    settle(absent);
    const uint64_t start = common.wait_stats != 0 ? global_timer_ns() : 0;
    const uint32_t index = threadIdx.x;
    if (is_loaded) arrival.look(call.epoch);
    const bool has_word = table != nullptr && index < Announced::count(common.shape);
    Announced announced(args, call, has_word ? index : 0);
    settle(announced.word);
    bool waits_for_word = has_word, waits_for_token = arrival.missing != 0 && !call.is_masked(item.source);
    uint32_t value = 0;
    if (has_word && call.is_masked(announced.rank)) waits_for_word = false;
    for (uint32_t spin = 1; waits_for_word || waits_for_token; ++spin) {
        uint64_t seen = 0, seen_header = 0, seen_absent = 0;
        if (waits_for_word) seen = load_relaxed_sys(announced.word);
        if (waits_for_token) {
            seen_header = load_relaxed_sys(header);
            seen_absent = load_relaxed_sys(absent);
            arrival.load();
            arrival.look(call.epoch);
            waits_for_token = arrival.missing != 0;
            if (waits_for_token) {
                const bool is_beyond = item.token >= tokens_of(static_cast<uint32_t>(seen_header));
                waits_for_token = !call.is_current(seen_absent) && !(call.is_current(seen_header) && is_beyond);
            }
        }
        if (waits_for_word && call.is_current(seen)) {
            waits_for_word = false;
            value = static_cast<uint32_t>(seen);
            if (common.wait_stats != 0) call.note_wait(announced.rank, start);
        }
        if (spin % kSpinsPerCheck != 0) continue;
        if (waits_for_word && call.has_given_up(announced.rank)) waits_for_word = false;
        if (waits_for_token && call.has_given_up(item.source)) waits_for_token = false;
    }
    if (has_word) announced.keep(index, value, table, *from);
}

// By a team that has all it takes in, and left zeros. Its last warp counts it, which has the least of a row to store.
__device__ __forceinline__ void end_taking(const LlCall& call, const Team& team, Arrivals& from) {
    if (team.thread < team.threads - kWarpSize) return arrive_threads(kEndBarriers + team.index, team.threads);
    sync_threads(kEndBarriers + team.index, team.threads);
    if (lane_index() != 0) return;
    // Of the block nothing waits for another rank, once all teams are here.
    if (atomicAdd(&from.num_done, 1) == team.per_block() - 1) let_next_kernel_start();
    call.count_reader();
}

// By a team: lay out its share of a token whose first part was waited for; it counts only if all of it came. Gives
// whether the team has ended, as it does with its last one; if that did not come, it is left to the caller.
template <bool kFp8>
__device__ bool store_token(const LlDispatchArgs& args, const LlCall& call, const Team& team, const Share& share,
                            const Item& item, const uint32_t* table, Arrival<kFp8>& arrival, Rows& rows, Arrivals& from,
                            bool is_last) {
    const uint32_t step = kPartsAtOnce * share.threads, num_vecs = vecs_of<kFp8>(args.common.shape);
    if (arrival.misses(Arrival<kFp8>::kChoiceBit)) arrival.choice.word[0] = 0xffffffffu;
    list_rows<kFp8>(args, item, arrival.choice, table, team.thread, rows, share.part == 0);
    for (uint32_t base = 0;;) {
        if (team.any(arrival.missing != 0)) {
            forget_token(args, item, team.thread);
            return false;
        }
        arrival.leave_zeros(args, share);
        base += step;
        const bool has_all = base >= num_vecs;
        if (has_all && is_last) end_taking(call, team, from);
        arrival.store(args, share, rows);
        if (has_all) return is_last;
        arrival = Arrival<kFp8>(args, call, team, share, item, base);
        await_token(args, call, item, arrival, nullptr, nullptr);
    }
}

}  // namespace deepep
