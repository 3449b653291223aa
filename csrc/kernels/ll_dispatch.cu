// Low-latency dispatch: push each token once to every rank of its experts, into the slot [source][token] of the receiver,
// and lay rows out per local expert there. A block first sends its tokens, then its teams receive rows; the two phases may
// also be two launches. No block waits for another one of its own grid.
#include <deepep/ll_common.cuh>
#include <deepep/quant.cuh>

namespace deepep {
namespace {

constexpr uint32_t kTokensPerFence = 4;  // tokens a block sends before it says that they are there

// Where a token goes.
struct Destinations {
    uint64_t ranks;  // bit per rank
    uint32_t count;
    uint8_t* slot[kLlMaxRanks];
};

// The part of a row that a thread holds at once: 16 channels.
struct Held {
    Vec16 v[2];
};

// FP8: 16 neighbouring channels, so that 8 lanes share a scale factor. Bf16: two vectors a block apart.
template <bool kFp8>
__device__ uint32_t held_index(uint32_t unit, uint32_t i) {
    return kFp8 ? 2 * unit + i : unit + i * kLlThreads;
}

template <bool kFp8>
__device__ Held load_unit(const LlDispatchArgs& args, uint32_t token, uint32_t unit) {
    const uint32_t num_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const Vec16* row = pointer<const Vec16>(args.x) + static_cast<uint64_t>(token) * num_vecs;
    Held held;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t index = held_index<kFp8>(unit, i);
        if (index < num_vecs) held.v[i] = load_stream(row + index);
    }
    return held;
}

__device__ void store_unit_bf16(const LlDispatchArgs& args, const Held& held, uint32_t unit, const Destinations& to) {
    const uint32_t num_vecs = args.common.shape.hidden / Bf16::kPerVec;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t index = held_index<false>(unit, i);
        if (index >= num_vecs) break;
        for (uint32_t d = 0; d < to.count; ++d) reinterpret_cast<Vec16*>(to.slot[d])[index] = held.v[i];
    }
}

// The largest magnitude of 16 finite channels, two at a time.
__device__ __forceinline__ float largest_bf16(const Vec16 (&v)[2]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t pair = v[i / 4].word[i % 4] & 0x7fff7fffu;
        asm("max.bf16x2 %0, %0, %1;" : "+r"(largest) : "r"(pair));
    }
    return fmaxf(__uint_as_float(largest << 16), __uint_as_float(largest & 0xffff0000u));
}

__device__ void store_unit_fp8(const LlDispatchArgs& args, const Held& held, uint32_t unit, const Destinations& to) {
    constexpr uint32_t kLanes = kGroupSize / 16;
    const uint32_t lane = lane_index(), active = 0xffu << (lane & ~(kLanes - 1));
    const float amax = __uint_as_float(lanes_max<kLanes>(__float_as_uint(largest_bf16(held.v)), active));
    const Fp8Scale scale = fp8_scale(amax, args.sf_format);
    float values[2][8];
    Bf16::unpack(held.v[0], values[0]);
    Bf16::unpack(held.v[1], values[1]);
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* four = &values[i / 2][4 * (i % 2)];
        const uint32_t low = fp8_pair(four[0] * scale.factor, four[1] * scale.factor);
        out.word[i] = low | fp8_pair(four[2] * scale.factor, four[3] * scale.factor) << 16;
    }
    const uint32_t group = unit / kLanes;
    for (uint32_t d = 0; d < to.count; ++d) {
        reinterpret_cast<Vec16*>(to.slot[d])[unit] = out;
        if (lane % kLanes != 0) continue;
        uint8_t* sf = to.slot[d] + args.common.shape.hidden;
        if (args.sf_format == kSfUe8m0) {
            sf[group] = static_cast<uint8_t>(scale.exponent);
        } else {
            reinterpret_cast<uint32_t*>(sf)[group] = scale.sf;
        }
    }
}

template <bool kFp8>
__device__ void store_row(const LlDispatchArgs& args, uint32_t token, Held held, const Destinations& to) {
    const uint32_t units = args.common.shape.hidden / (kFp8 ? 16 : 8), stride = kFp8 ? kLlThreads : 2 * kLlThreads;
    for (uint32_t unit = threadIdx.x; unit < units; unit += stride) {
        if (unit != threadIdx.x) held = load_unit<kFp8>(args, token, unit);
        if constexpr (kFp8) {
            store_unit_fp8(args, held, unit, to);
        } else {
            store_unit_bf16(args, held, unit, to);
        }
    }
}

constexpr uint32_t kScansAtOnce = 2;  // choices a thread holds before it counts them

struct Scan {
    int32_t expert[kScansAtOnce];
};

// Choices [first, ..) of this rank's tokens, of which there are `end` to look at.
__device__ __forceinline__ Scan load_scan(const LlDispatchArgs& args, uint32_t first, uint32_t end) {
    Scan scan;
#pragma unroll
    for (uint32_t i = 0; i < kScansAtOnce; ++i) {
        const uint32_t at = first + i * kLlThreads + threadIdx.x;
        scan.expert[i] = at < end ? static_cast<int32_t>(pointer<const int64_t>(args.topk_idx)[at]) : -1;
    }
    return scan;
}

// Add how often each expert is chosen by the first `end` choices to `table`; `scan` holds the very first ones.
__device__ void count_experts(const LlDispatchArgs& args, Scan scan, uint32_t end, uint32_t* table) {
    for (uint32_t first = 0; first < end; first += kScansAtOnce * kLlThreads) {
        if (first != 0) scan = load_scan(args, first, end);
#pragma unroll
        for (uint32_t i = 0; i < kScansAtOnce; ++i) {
            if (scan.expert[i] >= 0) atomicAdd(&table[scan.expert[i]], 1);
        }
    }
}

__device__ void clear(const LlDispatchArgs& args, uint32_t* table) {
    for (uint32_t i = threadIdx.x; i < args.common.shape.num_experts; i += kLlThreads) table[i] = 0;
    __syncthreads();
}

// Tell every rank how many tokens there are here, and how many rows each of its experts gets.
__device__ void publish_counts(const LlDispatchArgs& args, const LlCall& call, const uint32_t* table) {
    const LlShape& shape = args.common.shape;
    for (uint32_t i = threadIdx.x; i < shape.num_experts; i += kLlThreads) {
        const uint32_t owner = i / shape.num_local_experts;
        const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_local_experts + i % shape.num_local_experts;
        if (!call.is_masked(owner)) call.signal(owner, args.common.window.counts, index, table[i]);
    }
    for (uint32_t rank = threadIdx.x; rank < shape.num_ranks; rank += kLlThreads) {
        const uint32_t header = args.common.num_tokens | (args.topk_weights != 0 ? kHasWeights : 0);
        if (!call.is_masked(rank)) call.signal(rank, args.common.window.headers, shape.rank, header);
    }
}

// A token's choices, two per lane of the first warp.
struct Choices {
    int32_t expert[2];
    float weight[2];
};

__device__ __forceinline__ Choices load_choices(const LlDispatchArgs& args, uint32_t token) {
    const uint32_t num_topk = args.common.shape.num_topk;
    const uint64_t first = static_cast<uint64_t>(token) * num_topk;
    Choices choices;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t k = lane_index() + i * kWarpSize;
        choices.expert[i] = -1;
        choices.weight[i] = 0;
        if (warp_index() != 0 || k >= num_topk) continue;
        choices.expert[i] = static_cast<int32_t>(pointer<const int64_t>(args.topk_idx)[first + k]);
        if (args.topk_weights != 0) choices.weight[i] = pointer<const float>(args.topk_weights)[first + k];
    }
    return choices;
}

// By one warp: find the ranks of a token, and write each of them the token's choices. `table` counts on.
__device__ void address_token(const LlDispatchArgs& args, const LlCall& call, uint32_t token, const Choices& choices,
                              uint32_t* table, Destinations& to) {
    const LlShape& shape = args.common.shape;
    const uint32_t lane = lane_index();
    const uint64_t first = static_cast<uint64_t>(token) * shape.num_topk;
    int32_t owner[2], local[2];
    uint32_t position[2], low = 0, high = 0;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t k = lane + i * kWarpSize;
        int32_t expert = choices.expert[i];
        owner[i] = expert >= 0 ? expert / static_cast<int32_t>(shape.num_local_experts) : -1;
        local[i] = expert - owner[i] * static_cast<int32_t>(shape.num_local_experts);
        position[i] = expert >= 0 ? table[expert]++ : 0;
        if (owner[i] >= 0 && call.is_masked(owner[i])) expert = owner[i] = -1;
        if (k < shape.num_topk) pointer<int32_t>(args.common.home_topk)[first + k] = expert;
        if (owner[i] >= 32) high |= 1u << (owner[i] - 32);
        if (owner[i] >= 0 && owner[i] < 32) low |= 1u << owner[i];
    }
    const uint64_t ranks =
        static_cast<uint64_t>(__reduce_or_sync(kFullMask, high)) << 32 | __reduce_or_sync(kFullMask, low);
    const uint64_t offset = args.common.window.dispatch_slots + call.bank +
                            (static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + token) * shape.slot_bytes;
    uint32_t count = 0;
    for (uint64_t left = ranks; left != 0; left &= left - 1) {
        const int32_t rank = __ffsll(static_cast<long long>(left)) - 1;
        uint8_t* slot = call.transport.peer_ptr(rank, offset);
        if (lane == 0) to.slot[count] = slot;
        ++count;
        LlChoice* out = reinterpret_cast<LlChoice*>(slot + shape.choice_offset);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t k = lane + i * kWarpSize;
            if (k < shape.num_topk) out[k] = {owner[i] == rank ? local[i] : -1, position[i], choices.weight[i], 0};
        }
    }
    if (lane == 0) to.ranks = ranks, to.count = count;
}

// Tokens [begin, end) that a block sends. The last block publishes counts instead, where there are several.
struct Range {
    uint32_t begin, end;
    bool is_publisher;
    __device__ explicit Range(uint32_t num_tokens) : is_publisher(blockIdx.x == gridDim.x - 1) {
        const uint32_t num_senders = max_of(gridDim.x - 1, 1u), per_block = ceil_div(num_tokens, num_senders);
        begin = min_of(blockIdx.x * per_block, num_tokens);
        end = blockIdx.x < num_senders ? min_of(begin + per_block, num_tokens) : begin;
    }
};

// By one warp: say which of the last tokens went to which rank, all that was pushed to them being there.
__device__ void signal_tokens(const LlDispatchArgs& args, const LlCall& call, uint32_t first, uint32_t count,
                              const uint64_t* sent_to) {
    const LlShape& shape = args.common.shape;
    fence_sys();
    for (uint32_t i = lane_index(); i < count * shape.num_ranks; i += kWarpSize) {
        const uint32_t rank = i % shape.num_ranks, place = i / shape.num_ranks;
        const uint64_t index = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + first + place;
        if (!call.is_masked(rank)) call.signal(rank, args.common.window.present, index, sent_to[place] >> rank & 1);
    }
    __syncwarp();
}

// `table` holds how often the tokens before the range choose each expert; `held` and `choices` are of the first token.
template <bool kFp8>
__device__ void send(const LlDispatchArgs& args, const LlCall& call, const Range& range, Held held, Choices choices,
                     uint32_t* table) {
    __shared__ Destinations to[2];
    __shared__ uint64_t sent_to[kTokensPerFence];
    for (uint32_t token = range.begin; token < range.end; ++token) {
        const uint32_t place = token - range.begin, in_batch = place % kTokensPerFence;
        Destinations& now = to[place % 2];
        if (warp_index() == 0) address_token(args, call, token, choices, table, now);
        __syncthreads();
        if (threadIdx.x == 0) sent_to[in_batch] = now.ranks;
        store_row<kFp8>(args, token, held, now);
        const bool is_last = token + 1 == range.end;
        if (!is_last) {
            choices = load_choices(args, token + 1);
            held = load_unit<kFp8>(args, token + 1, threadIdx.x);
        }
        if (in_batch + 1 < kTokensPerFence && !is_last) continue;
        __syncthreads();
        if (warp_index() == 0) signal_tokens(args, call, token - in_batch, in_batch + 1, sent_to);
    }
}

// What a block knows about the sources.
struct Arrivals {
    uint32_t header[kLlMaxRanks];
    uint32_t is_first_present[kLlMaxTeams];
};

// One token of one source, as a number: sources take turns, so that teams start on what comes first.
struct Item {
    uint32_t source, token;
    uint64_t slot;  // number
    __device__ Item(const LlShape& shape, uint32_t number)
        : source(number % shape.num_ranks),
          token(number / shape.num_ranks),
          slot(static_cast<uint64_t>(source) * shape.num_max_tokens + token) {}
};

// By one thread of each team, while others wait for counts: learn whether the team's first token is there. Its source may
// have fewer tokens, which only the header tells.
__device__ bool await_first(const LlDispatchArgs& args, const LlCall& call, const Item& item) {
    constexpr uint32_t kSpinsPerCheck = 64;
    if (item.token >= args.common.shape.num_max_tokens || call.is_masked(item.source)) return false;
    const uint64_t* present = call.own_word(args.common.window.present, item.slot);
    const uint64_t* header = call.own_word(args.common.window.headers, item.source);
    for (uint32_t spin = 1;; ++spin) {
        uint32_t is_here, num_tokens;
        const bool has_header = call.peek<false>(header, num_tokens), has_flag = call.peek<true>(present, is_here);
        if (has_header && item.token >= (num_tokens & ~kHasWeights)) return false;
        if (has_flag) return is_here != 0;
        if (spin % kSpinsPerCheck == 0 && call.has_given_up(item.source)) return false;
    }
}

// Wait for the headers and counts of all sources; `table` [R, L] gets the counts.
__device__ void await_counts(const LlDispatchArgs& args, const LlCall& call, uint32_t* table, Arrivals& from) {
    const LlShape& shape = args.common.shape;
    for (uint32_t i = threadIdx.x; i < shape.num_experts + shape.num_ranks; i += kLlThreads) {
        const bool is_header = i >= shape.num_experts;
        const uint32_t rank = is_header ? i - shape.num_experts : i / shape.num_local_experts;
        const uint64_t offset = is_header ? args.common.window.headers : args.common.window.counts;
        uint32_t value = 0;
        if (call.is_masked(rank) || !call.wait<false>(rank, call.own_word(offset, is_header ? rank : i), value)) value = 0;
        (is_header ? from.header[rank] : table[i]) = value;
    }
}

// Turn `table` from counts into the first row of each source inside each expert. Block 0 tells the caller about them.
__device__ void place_sources(const LlDispatchArgs& args, uint32_t* table, const Arrivals& from) {
    const LlShape& shape = args.common.shape;
    const uint32_t num_local = shape.num_local_experts;
    for (uint32_t expert = threadIdx.x; expert < num_local; expert += kLlThreads) {
        uint32_t begin = 0;
        for (uint32_t rank = 0; rank < shape.num_ranks; ++rank) {
            const uint32_t count = table[rank * num_local + expert];
            table[rank * num_local + expert] = begin;
            if (blockIdx.x == 0) {
                pointer<uint64_t>(args.layout_range)[expert * shape.num_ranks + rank] = ll_word(begin, count);
            }
            begin += count;
        }
        if (blockIdx.x != 0) continue;
        pointer<uint32_t>(args.recv_count)[expert] = begin;
        if (args.recv_stats != 0) pointer<uint32_t>(args.recv_stats)[expert] += begin;
    }
    if (blockIdx.x == 0 && threadIdx.x < shape.num_ranks) {
        pointer<uint32_t>(args.common.sources)[threadIdx.x] = from.header[threadIdx.x];
    }
}

// The rows that one token gets here.
struct Rows {
    uint32_t is_present, count;
    uint32_t row[kLlMaxTopk];
};

constexpr uint32_t kVecsAtOnce = 4;  // of a row, per thread

// A team's part of a row under way, and one of its choices.
struct Arrived {
    Vec16 part[kVecsAtOnce];
    Vec16 choice;
    uint32_t scale;
};

__device__ __forceinline__ uint32_t num_scales(const LlDispatchArgs& args) {
    return args.common.shape.hidden / kGroupSize / (args.sf_format == kSfUe8m0 ? 4 : 1);
}

__device__ __forceinline__ uint32_t load_scale(const LlShape& shape, const uint8_t* slot, uint32_t index) {
    return reinterpret_cast<const volatile uint32_t*>(slot + shape.hidden)[index];
}

template <bool kFp8>
__device__ uint32_t vecs_of(const LlShape& shape) {
    return shape.hidden / (kFp8 ? 16 : 8);
}

__device__ __forceinline__ void load_part(const Vec16* in, uint32_t base, uint32_t num_vecs, const Team& team,
                                          Arrived& arrived) {
#pragma unroll
    for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
        const uint32_t vec = base + i * team.threads + team.thread;
        if (vec < num_vecs) arrived.part[i] = load_stream(in + vec);
    }
}

__device__ __forceinline__ void store_part(const LlDispatchArgs& args, uint32_t base, uint32_t num_vecs,
                                           const Team& team, const Rows& rows, const Arrived& arrived) {
    for (uint32_t r = 0; r < rows.count; ++r) {
        Vec16* out = pointer<Vec16>(args.recv_x) + static_cast<uint64_t>(rows.row[r]) * num_vecs;
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            const uint32_t vec = base + i * team.threads + team.thread;
            if (vec < num_vecs) out[vec] = arrived.part[i];
        }
    }
}

template <bool kFp8>
__device__ void load_slot(const LlDispatchArgs& args, const uint8_t* slot, const Team& team, Arrived& arrived) {
    const LlShape& shape = args.common.shape;
    load_part(reinterpret_cast<const Vec16*>(slot), 0, vecs_of<kFp8>(shape), team, arrived);
    const Vec16* choices = reinterpret_cast<const Vec16*>(slot + shape.choice_offset);
    if (team.thread < shape.num_topk) arrived.choice = load_stream(choices + team.thread);
    if (kFp8 && team.thread < num_scales(args)) arrived.scale = load_scale(shape, slot, team.thread);
}

// By the first K threads of a team: list the token's rows, and keep them for combine.
__device__ void list_rows(const LlDispatchArgs& args, const Item& item, const Vec16& raw, const uint32_t* table,
                          uint32_t k, Rows& rows) {
    const LlShape& shape = args.common.shape;
    if (k >= shape.num_topk) return;
    const int32_t expert = static_cast<int32_t>(raw.word[0]);
    const uint64_t route = item.slot * shape.num_topk + k;
    int32_t row = -1;
    if (expert >= 0) {
        const uint32_t place = table[item.source * shape.num_local_experts + expert] + raw.word[1];
        row = static_cast<int32_t>(expert * shape.num_ranks * shape.num_max_tokens + place);
        rows.row[atomicAdd(&rows.count, 1)] = row;
        pointer<uint32_t>(args.src_info)[row] = item.token;
    }
    pointer<int32_t>(args.common.routes)[route] = row;
    pointer<uint32_t>(args.common.route_weights)[route] = raw.word[2];
}

__device__ void store_scales(const LlDispatchArgs& args, const uint8_t* slot, const Team& team, const Rows& rows,
                             uint32_t scale) {
    const LlShape& shape = args.common.shape;
    const uint32_t room = shape.num_ranks * shape.num_max_tokens, count = num_scales(args);
    for (uint32_t sf = team.thread; sf < count; sf += team.threads) {
        if (sf != team.thread) scale = load_scale(shape, slot, sf);
        for (uint32_t r = 0; r < rows.count; ++r) {
            const uint64_t column = static_cast<uint64_t>(rows.row[r] / room) * count + sf;
            pointer<uint32_t>(args.recv_sf)[column * room + rows.row[r] % room] = scale;
        }
    }
}

template <bool kFp8>
__device__ void store_token(const LlDispatchArgs& args, const Item& item, const uint8_t* slot, const Team& team,
                            const uint32_t* table, Arrived& arrived, Rows& rows) {
    const uint32_t num_vecs = vecs_of<kFp8>(args.common.shape), step = kVecsAtOnce * team.threads;
    list_rows(args, item, arrived.choice, table, team.thread, rows);
    team.sync();
    store_part(args, 0, num_vecs, team, rows, arrived);
    if constexpr (kFp8) store_scales(args, slot, team, rows, arrived.scale);
    for (uint32_t base = step; base < num_vecs; base += step) {
        load_part(reinterpret_cast<const Vec16*>(slot), base, num_vecs, team, arrived);
        store_part(args, base, num_vecs, team, rows, arrived);
    }
}

__device__ void forget_token(const LlDispatchArgs& args, const Item& item, uint32_t k) {
    const uint32_t num_topk = args.common.shape.num_topk;
    if (k < num_topk) pointer<int32_t>(args.common.routes)[item.slot * num_topk + k] = -1;
}

template <bool kFp8>
__device__ void receive(const LlDispatchArgs& args, const LlCall& call, uint32_t* table) {
    __shared__ Arrivals from;
    __shared__ Rows listed[kLlMaxTeams][2];
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    const Team team(common.team_threads);
    const uint8_t* slots = call.own_bytes(common.window.dispatch_slots);
    Arrived arrived;
    uint32_t number = team.global_index();
    {
        const Item item(shape, number);
        if (team.thread == team.threads - 1) {
            from.is_first_present[team.index] = await_first(args, call, item);
            listed[team.index][0].count = 0;
        }
        await_counts(args, call, table, from);
        __syncthreads();
        if (from.is_first_present[team.index]) {
            load_slot<kFp8>(args, slots + item.slot * shape.slot_bytes, team, arrived);
        }
    }
    place_sources(args, table, from);
    uint32_t max_tokens = 0;
    for (uint32_t rank = 0; rank < shape.num_ranks; ++rank) {
        max_tokens = max_of(max_tokens, from.header[rank] & ~kHasWeights);
    }
    __syncthreads();
    bool is_first = true;
    for (uint32_t turn = 0; number < max_tokens * shape.num_ranks; number += team.global_count()) {
        const Item item(shape, number);
        if (item.token >= (from.header[item.source] & ~kHasWeights)) {
            is_first = false;
            continue;
        }
        const uint8_t* slot = slots + item.slot * shape.slot_bytes;
        Rows& rows = listed[team.index][turn];
        bool is_present = is_first && from.is_first_present[team.index];
        if (!is_first) {
            if (team.thread == 0) {
                uint32_t value = 0;
                rows.is_present = call.wait<true>(item.source, call.own_word(common.window.present, item.slot), value) &&
                                  value != 0;
                rows.count = 0;
            }
            team.sync();
            is_present = rows.is_present;
            if (is_present) load_slot<kFp8>(args, slot, team, arrived);
        }
        if (is_present) {
            store_token<kFp8>(args, item, slot, team, table, arrived, rows);
        } else {
            forget_token(args, item, team.thread);
        }
        is_first = false;
        turn ^= 1;
    }
}

template <bool kFp8>
__device__ void run(const LlDispatchArgs& args, LlCall& call, uint32_t* table) {
    const LlCommon& common = args.common;
    const uint64_t credits = common.window.dispatch_credits;
    const Range range(common.num_tokens);
    const bool is_sending = (common.phases & kLlSend) != 0;
    Held held;
    Choices choices;
    if (is_sending) {
        const uint32_t num_scanned = (range.is_publisher ? common.num_tokens : range.begin) * common.shape.num_topk;
        const Scan scan = load_scan(args, 0, num_scanned);
        if (range.begin < range.end) {
            choices = load_choices(args, range.begin);
            held = load_unit<kFp8>(args, range.begin, threadIdx.x);
        }
        call.prepare(credits, common.call_epoch);
        clear(args, table);
        count_experts(args, scan, num_scanned, table);
    } else {
        call.prepare(credits, common.call_epoch);
    }
    call.begin(common.call_epoch);
    if (is_sending) {
        if (range.is_publisher) call.publish_credits(credits);
        call.await_credit(threadIdx.x, credits);
        __syncthreads();
        if (range.is_publisher) {
            publish_counts(args, call, table);
            __syncthreads();
            if (range.begin < range.end) clear(args, table);
        }
        send<kFp8>(args, call, range, held, choices, table);
        __syncthreads();
    }
    if (common.phases & kLlRecv) receive<kFp8>(args, call, table);
    call.end();
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_dispatch_kernel(const __grid_constant__ deepep::LlDispatchArgs args) {
    using namespace deepep;
    extern __shared__ uint32_t table[];
    __shared__ LlShared shared;
    LlCall call(args.common, kLlDispatch, shared);
    if (args.sf_format == kSfNone) {
        run<false>(args, call, table);
    } else {
        run<true>(args, call, table);
    }
}
