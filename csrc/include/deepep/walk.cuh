// A warp walks over tokens in order and numbers their rows: per expert and per destination rank. No atomics, no order
// but that of the tokens.
#pragma once

#include <deepep/layout.cuh>

namespace deepep {

struct Choices {
    const int64_t* topk_idx;           // [T, K], or null
    const uint8_t* is_token_in_rank;   // [T, R], where there is no top-k
    uint32_t num_slots, num_experts, num_ranks;

    // Expert and rank of a slot; -1 where it chooses none.
    __device__ void read(uint32_t token, uint32_t slot, int& expert, int& rank) const {
        expert = rank = -1;
        const uint64_t at = uint64_t{token} * num_slots + slot;
        if (topk_idx == nullptr) {
            if (is_token_in_rank[at]) rank = static_cast<int>(slot);
            return;
        }
        const int64_t chosen = topk_idx[at];
        if (chosen >= 0 && chosen < num_experts) {
            expert = static_cast<int>(chosen);
            rank = expert / static_cast<int>(num_experts / num_ranks);
        }
    }
};

// What a lane knows about one slot of one token.
struct SlotPlace {
    int expert, rank;      // chosen, or -1
    uint32_t in_expert;    // rows of that expert before this one
    bool records;          // the highest slot of the token that chose the rank
    uint32_t in_rank;      // where it records: rows for that rank before this one
};

// Slots of several tokens at a time (K <= 32), or of one token in two halves: lane l holds slots l and l + 32.
struct Group {
    uint32_t num_slots, num_halves, tokens_per_group;
    SlotPlace place[2];
    uint32_t token, slot;  // of this lane; the second half's slot is 32 more
    int next_expert[2], next_rank[2];  // read ahead

    __device__ explicit Group(uint32_t slots)
        : num_slots(slots),
          num_halves(slots > kWarpSize ? 2 : 1),
          tokens_per_group(num_halves == 2 ? 1 : kWarpSize / slots) {}

    __device__ bool has_slot(uint32_t half) const {
        return slot + half * kWarpSize < num_slots && (num_halves == 2 || lane_index() < tokens_per_group * num_slots);
    }

    // Read the choices of tokens [first, first + tokens_per_group) below `end`, for the call of `number` that follows.
    __device__ void read(const Choices& choices, uint32_t first, uint32_t end) {
        const uint32_t lane = lane_index(), from = num_halves == 2 ? first : first + lane / num_slots;
        slot = num_halves == 2 ? lane : lane % num_slots;
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            next_expert[half] = next_rank[half] = -1;
            if (from < end && has_slot(half)) {
                choices.read(from, slot + half * kWarpSize, next_expert[half], next_rank[half]);
            }
        }
    }

    // Number the slots of tokens [first, first + tokens_per_group) below `end`; counters move on, and the next tokens'
    // choices are read meanwhile.
    __device__ void number(const Choices& choices, uint32_t first, uint32_t end, uint32_t* expert_count,
                           uint32_t* rank_count) {
        const uint32_t lane = lane_index();
        token = num_halves == 2 ? first : first + lane / num_slots;
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            place[half].expert = next_expert[half];
            place[half].rank = next_rank[half];
        }
        read(choices, first + tokens_per_group, end);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            if (half >= num_halves) break;
            place[half].in_expert = take_numbers(place[half].expert, expert_count);
        }
        // The upper half first: its slots win over the lower half's.
        uint64_t in_upper = 0;
#pragma unroll
        for (int half = 1; half >= 0; --half) {
            if (half >= static_cast<int>(num_halves)) continue;
            SlotPlace& here = place[half];
            const uint32_t same_token = num_halves == 2 ? 0 : lane / num_slots;
            const int key = here.rank >= 0 ? static_cast<int>(same_token * kMaxRanks) + here.rank : -1 - static_cast<int>(lane);
            const uint32_t same = __match_any_sync(kFullMask, key);
            here.records = here.rank >= 0 && (same >> lane) == 1;
            if (half == 0 && num_halves == 2) here.records = here.records && !(in_upper >> here.rank & 1);
            here.in_rank = take_numbers(here.records ? here.rank : -1, rank_count);
            if (half == 1) {
                const uint64_t bit = here.rank >= 0 ? uint64_t{1} << here.rank : 0;
                in_upper = uint64_t{__reduce_or_sync(kFullMask, static_cast<uint32_t>(bit >> 32))} << 32 |
                           __reduce_or_sync(kFullMask, static_cast<uint32_t>(bit));
            }
        }
    }

    // Row of this lane's token among those for `rank`, or kNoEntry. All lanes call it together.
    __device__ uint32_t row_for(int rank) const {
        uint32_t row = kNoEntry;
        const uint32_t lane = lane_index();
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            if (half >= num_halves) break;
            uint32_t holders = __ballot_sync(kFullMask, place[half].records && place[half].rank == rank);
            if (tokens_per_group > 1) holders = holders >> (lane / num_slots * num_slots) & ((1u << num_slots) - 1);
            const uint32_t first = tokens_per_group > 1 ? lane / num_slots * num_slots : 0;
            const int holder = holders ? static_cast<int>(first) + __ffs(holders) - 1 : 0;
            const uint32_t from = __shfl_sync(kFullMask, place[half].in_rank, holder);
            if (holders) row = from;
        }
        return row;
    }

private:
    // Lanes with the same key >= 0 get consecutive numbers from its counter, in lane order.
    __device__ static uint32_t take_numbers(int key, uint32_t* counter) {
        const int lane = lane_index();
        const uint32_t same = __match_any_sync(kFullMask, key >= 0 ? key : -1 - lane);
        const uint32_t before = key >= 0 ? counter[key] : 0;
        __syncwarp();
        if (key >= 0 && (same >> lane) == 1) counter[key] = before + __popc(same);
        __syncwarp();
        return before + __popc(same & ((1u << lane) - 1));
    }
};

}  // namespace deepep
