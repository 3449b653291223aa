// Low-latency dispatch: push each token once to every rank of its experts, into the slot [source][token] of the receiver,
// and lay rows out per local expert there. A block first sends its tokens, then its teams receive rows; the two phases may
// also be two launches. No block waits for another one of its own grid.
#include <deepep/ll_common.cuh>
#include <deepep/quant.cuh>

namespace deepep {
namespace {

constexpr uint32_t kTokensPerFence = 4;  // tokens a block sends before it says that they are there
constexpr int kAddressWarp = kLlThreads / kWarpSize - 1;  // the one with the least of a row to cast
constexpr uint32_t kDirectTokens = 4;    // tokens a block has at most, where rows that stay here skip the window

// Where a row goes: slots of several ranks, or rows of several local experts.
struct Targets {
    uint64_t ranks;  // bit per rank, for slots
    uint32_t count;
    uint32_t sf_stride;  // bytes from one word of scale factors to the next
    uint8_t* row[kLlMaxTopk];
    uint8_t* sf[kLlMaxTopk];
};
static_assert(kLlMaxRanks <= kLlMaxTopk, "a token has as many slots at most");

// The part of a row that a thread holds at once: 16 channels.
struct Held {
    Vec16 v[2];
};

// The same on its way out: 16 bytes of FP8 and the scale factor, or two vectors of bf16.
template <bool kFp8>
struct Outgoing {
    Vec16 v[kFp8 ? 1 : 2];
    uint32_t sf;
};

// FP8: 16 neighbouring channels, so that 8 lanes share a scale factor. Bf16: two vectors a block apart.
template <bool kFp8>
__device__ uint32_t held_index(uint32_t unit, uint32_t i) {
    return kFp8 ? 2 * unit + i : unit + i * kLlThreads;
}

template <bool kFp8>
__device__ __forceinline__ Held load_unit(const LlDispatchArgs& args, uint32_t token, uint32_t unit) {
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

constexpr uint32_t kLanesPerGroup = kGroupSize / 16;

// By all lanes of a warp, some of which may hold nothing of the row.
__device__ __forceinline__ void cast_unit(const LlDispatchArgs& args, const Held& held, Outgoing<true>& out) {
    const uint32_t active = 0xffu << (lane_index() & ~(kLanesPerGroup - 1));
    const float amax = __uint_as_float(lanes_max<kLanesPerGroup>(__float_as_uint(largest_bf16(held.v)), active));
    const Fp8Scale scale = fp8_scale(amax, args.sf_format);
    out.sf = args.sf_format == kSfUe8m0 ? scale.exponent : scale.sf;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x[8];
        Bf16::unpack(held.v[i], x);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t low = fp8_pair(x[4 * j] * scale.factor, x[4 * j + 1] * scale.factor);
            out.v[0].word[2 * i + j] =
                low | fp8_pair(x[4 * j + 2] * scale.factor, x[4 * j + 3] * scale.factor) << 16;
        }
    }
}

__device__ __forceinline__ void cast_unit(const LlDispatchArgs&, const Held& held, Outgoing<false>& out) {
    out.v[0] = held.v[0];
    out.v[1] = held.v[1];
}

__device__ __forceinline__ void store_unit(const LlDispatchArgs& args, const Outgoing<true>& out, uint32_t unit,
                                           const Targets& to) {
    const uint32_t group = unit / kLanesPerGroup;
    const bool has_sf = lane_index() % kLanesPerGroup == 0, is_ue8m0 = args.sf_format == kSfUe8m0;
    const uint32_t sf_at = is_ue8m0 ? group / 4 * to.sf_stride + group % 4 : group * to.sf_stride;
    for (uint32_t d = 0; d < to.count; ++d) {
        reinterpret_cast<Vec16*>(to.row[d])[unit] = out.v[0];
        if (has_sf && is_ue8m0) to.sf[d][sf_at] = static_cast<uint8_t>(out.sf);
        if (has_sf && !is_ue8m0) *reinterpret_cast<uint32_t*>(to.sf[d] + sf_at) = out.sf;
    }
}

__device__ __forceinline__ void store_unit(const LlDispatchArgs& args, const Outgoing<false>& out, uint32_t unit,
                                           const Targets& to) {
    const uint32_t num_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const bool has_second = held_index<false>(unit, 1) < num_vecs;
    for (uint32_t d = 0; d < to.count; ++d) {
        Vec16* row = reinterpret_cast<Vec16*>(to.row[d]);
        row[unit] = out.v[0];
        if (has_second) row[held_index<false>(unit, 1)] = out.v[1];
    }
}

// By the whole block: the rest of a row, `out` being a thread's first part of it.
template <bool kFp8>
__device__ __forceinline__ void store_row(const LlDispatchArgs& args, uint32_t token, Outgoing<kFp8> out,
                                          const Targets& to) {
    const uint32_t units = args.common.shape.hidden / (kFp8 ? 16 : 8), stride = kFp8 ? kLlThreads : 2 * kLlThreads;
    for (uint32_t unit = threadIdx.x; unit < units; unit += stride) {
        if (unit != threadIdx.x) cast_unit(args, load_unit<kFp8>(args, token, unit), out);
        store_unit(args, out, unit, to);
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

// A token's choices, two per lane of the address warp.
struct Choices {
    int32_t expert[2], owner[2];
    float weight[2];
};

__device__ __forceinline__ Choices load_choices(const LlDispatchArgs& args, uint32_t token) {
    const LlShape& shape = args.common.shape;
    const uint64_t first = static_cast<uint64_t>(token) * shape.num_topk;
    Choices choices;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t k = lane_index() + i * kWarpSize;
        choices.expert[i] = -1;
        choices.weight[i] = 0;
        if (warp_index() != kAddressWarp || k >= shape.num_topk) continue;
        choices.expert[i] = static_cast<int32_t>(pointer<const int64_t>(args.topk_idx)[first + k]);
        if (args.topk_weights != 0) choices.weight[i] = pointer<const float>(args.topk_weights)[first + k];
    }
    return choices;
}

// Apart from the loads, which others follow.
__device__ __forceinline__ void find_owners(const LlShape& shape, Choices& choices) {
    if (warp_index() != kAddressWarp) return;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        choices.owner[i] =
            choices.expert[i] < 0 ? -1 : choices.expert[i] / static_cast<int32_t>(shape.num_local_experts);
    }
}

// A choice that stays on this rank.
struct Stay {
    int32_t expert;  // local number, -1 if it does not
    uint32_t position;
};

// By one warp: find the ranks of a token, and write each of them the token's choices. `table` counts on. With `stays`,
// this rank's own choices are noted there instead.
__device__ void address_token(const LlDispatchArgs& args, const LlCall& call, uint32_t token, const Choices& choices,
                              uint32_t* table, Stay* stays, Targets& to) {
    const LlShape& shape = args.common.shape;
    const uint32_t lane = lane_index();
    const uint64_t first = static_cast<uint64_t>(token) * shape.num_topk;
    int32_t owner[2], local[2];
    uint32_t position[2], low = 0, high = 0;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t k = lane + i * kWarpSize;
        int32_t expert = choices.expert[i];
        owner[i] = choices.owner[i];
        local[i] = expert - owner[i] * static_cast<int32_t>(shape.num_local_experts);
        position[i] = expert >= 0 ? table[expert]++ : 0;
        if (owner[i] >= 0 && call.is_masked(owner[i])) expert = owner[i] = -1;
        if (k < shape.num_topk) pointer<int32_t>(args.common.home_topk)[first + k] = expert;
        if (stays != nullptr) {
            const bool is_here = owner[i] == static_cast<int32_t>(shape.rank);
            if (k < shape.num_topk) stays[k] = {is_here ? local[i] : -1, position[i]};
            if (is_here) owner[i] = -1;
        }
        if (owner[i] >= 32) high |= 1u << (owner[i] - 32);
        if (owner[i] >= 0 && owner[i] < 32) low |= 1u << owner[i];
    }
    low = __reduce_or_sync(kFullMask, low);
    high = shape.num_ranks > 32 ? __reduce_or_sync(kFullMask, high) : 0;
    const uint64_t ranks = static_cast<uint64_t>(high) << 32 | low;
    const uint64_t offset = args.common.window.dispatch_slots + call.bank +
                            (static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + token) * shape.slot_bytes;
    uint32_t count = 0;
    for (uint64_t left = ranks; left != 0; left &= left - 1) {
        const int32_t rank = __ffsll(static_cast<long long>(left)) - 1;
        uint8_t* slot = call.transport.peer_ptr(rank, offset);
        if (lane == 0) {
            to.row[count] = slot;
            to.sf[count] = slot + shape.hidden;
        }
        ++count;
        LlChoice* out = reinterpret_cast<LlChoice*>(slot + shape.choice_offset);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t k = lane + i * kWarpSize;
            if (k < shape.num_topk) out[k] = {owner[i] == rank ? local[i] : -1, position[i], choices.weight[i], 0};
        }
    }
    if (lane == 0) to.ranks = ranks, to.count = count, to.sf_stride = 4;
}

// Tokens [begin, end) that a block sends. The last block publishes counts instead, where there are several.
struct Range {
    uint32_t begin, end, per_block;
    bool is_publisher;
    __device__ explicit Range(uint32_t num_tokens) : is_publisher(blockIdx.x == gridDim.x - 1) {
        const uint32_t num_senders = max_of(gridDim.x - 1, 1u);
        per_block = ceil_div(num_tokens, num_senders);
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
// With `stays` [.., K] the choices of this rank's own experts are left to receive(). Returns the last token's part.
template <bool kFp8>
__device__ Outgoing<kFp8> send(const LlDispatchArgs& args, const LlCall& call, const Range& range, Held held, Choices choices,
                     uint32_t* table, Stay (*stays)[kLlMaxTopk]) {
    __shared__ Targets to[2];
    __shared__ uint64_t sent_to[kTokensPerFence];
    Outgoing<kFp8> out;
    for (uint32_t token = range.begin; token < range.end; ++token) {
        const uint32_t place = token - range.begin, in_batch = place % kTokensPerFence;
        Targets& now = to[place % 2];
        if (warp_index() == kAddressWarp) {
            address_token(args, call, token, choices, table, stays != nullptr ? stays[place] : nullptr, now);
        }
        cast_unit(args, held, out);
        const bool is_last = token + 1 == range.end;
        if (!is_last) {
            choices = load_choices(args, token + 1);
            held = load_unit<kFp8>(args, token + 1, threadIdx.x);
            find_owners(args.common.shape, choices);
        }
        __syncthreads();
        if (threadIdx.x == 0) sent_to[in_batch] = now.ranks;
        store_row<kFp8>(args, token, out, now);
        if (in_batch + 1 < kTokensPerFence && !is_last) continue;
        __syncthreads();
        if (warp_index() == kAddressWarp) signal_tokens(args, call, token - in_batch, in_batch + 1, sent_to);
    }
    return out;
}

// What a block knows about the sources.
enum class Presence : uint32_t { kUnknown, kAbsent, kPresent };

struct Arrivals {
    uint32_t header[kLlMaxRanks];
    Presence first[kLlMaxTeams];  // of the first token of each team
};

// The sources whose tokens come through the window: all of them, or all others.
struct Sources {
    uint32_t count, rank;  // rank: own number if it is left out, else more than any
    __device__ Sources(const LlShape& shape, bool without_own)
        : count(shape.num_ranks - without_own), rank(without_own ? shape.rank : shape.num_ranks) {}
};

// One token of one source, as a number: sources take turns, so that teams start on what comes first.
struct Item {
    uint32_t source, token;
    uint64_t slot;  // number
    __device__ Item(const LlShape& shape, const Sources& sources, uint32_t number)
        : source(number % sources.count), token(number / sources.count) {
        if (source >= sources.rank) ++source;
        slot = static_cast<uint64_t>(source) * shape.num_max_tokens + token;
    }
};

// By one thread of each team, while others wait for counts: learn whether the team's first token is there. Its source may
// have fewer tokens, which only the header tells. Where there is other work (`may_leave`), look a few times only.
__device__ Presence look_for_first(const LlDispatchArgs& args, const LlCall& call, const Item& item, bool may_leave) {
    constexpr uint32_t kSpinsPerCheck = 64, kSpinsAtMost = 2;
    if (item.token >= args.common.shape.num_max_tokens || call.is_masked(item.source)) return Presence::kAbsent;
    const uint64_t* present = call.own_word(args.common.window.present, item.slot);
    const uint64_t* header = call.own_word(args.common.window.headers, item.source);
    for (uint32_t spin = 1;; ++spin) {
        uint32_t is_here, num_tokens;
        const bool has_header = call.peek<false>(header, num_tokens), has_flag = call.peek<true>(present, is_here);
        if (has_header && item.token >= (num_tokens & ~kHasWeights)) return Presence::kAbsent;
        if (has_flag) return is_here != 0 ? Presence::kPresent : Presence::kAbsent;
        if (may_leave && spin == kSpinsAtMost) return Presence::kUnknown;
        if (spin % kSpinsPerCheck == 0 && call.has_given_up(item.source)) return Presence::kAbsent;
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
    uint32_t sf_at[kLlMaxTopk];  // index of the row's first scale factor
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

// Note where one choice of a token ended up: `expert` -1 if elsewhere. Gives the row and the index of its first scale.
__device__ __forceinline__ uint2 keep_route(const LlDispatchArgs& args, uint64_t slot, uint32_t token, uint32_t k,
                                            int32_t expert, uint32_t place, uint32_t weight) {
    const LlShape& shape = args.common.shape;
    const uint64_t route = slot * shape.num_topk + k;
    const uint32_t room = shape.num_ranks * shape.num_max_tokens, row = expert * room + place;
    pointer<int32_t>(args.common.routes)[route] = expert < 0 ? -1 : static_cast<int32_t>(row);
    pointer<uint32_t>(args.common.route_weights)[route] = weight;
    if (expert >= 0) pointer<uint32_t>(args.src_info)[row] = token;
    return {row, expert * num_scales(args) * room + place};
}

// By the first K threads of a team: list the token's rows, and keep them for combine.
__device__ void list_rows(const LlDispatchArgs& args, const Item& item, const Vec16& raw, const uint32_t* table,
                          uint32_t k, Rows& rows) {
    const LlShape& shape = args.common.shape;
    if (k >= shape.num_topk) return;
    const int32_t expert = static_cast<int32_t>(raw.word[0]);
    const uint32_t first = expert < 0 ? 0 : table[item.source * shape.num_local_experts + expert];
    const uint2 at = keep_route(args, item.slot, item.token, k, expert, first + raw.word[1], raw.word[2]);
    if (expert < 0) return;
    const uint32_t index = atomicAdd(&rows.count, 1);
    rows.row[index] = at.x;
    rows.sf_at[index] = at.y;
}

__device__ void store_scales(const LlDispatchArgs& args, const uint8_t* slot, const Team& team, const Rows& rows,
                             uint32_t scale) {
    const LlShape& shape = args.common.shape;
    const uint32_t room = shape.num_ranks * shape.num_max_tokens, count = num_scales(args);
    for (uint32_t sf = team.thread; sf < count; sf += team.threads) {
        if (sf != team.thread) scale = load_scale(shape, slot, sf);
        for (uint32_t r = 0; r < rows.count; ++r) pointer<uint32_t>(args.recv_sf)[rows.sf_at[r] + sf * room] = scale;
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

// By the whole block: lay out the rows of its own tokens that stay here while others' are on their way. `out` is a
// thread's part of the last token; the others are cast once more.
template <bool kFp8>
__device__ void keep_tokens(const LlDispatchArgs& args, const Range& range, Outgoing<kFp8> out, const uint32_t* table,
                            const Stay (*stays)[kLlMaxTopk], Targets* to) {
    const LlShape& shape = args.common.shape;
    const uint32_t place = threadIdx.x / kLlMaxTopk, k = threadIdx.x % kLlMaxTopk, token = range.begin + place;
    if (token < range.end && k < shape.num_topk) {
        const Stay stay = stays[place][k];
        const uint64_t slot = static_cast<uint64_t>(shape.rank) * shape.num_max_tokens + token;
        const uint32_t first = stay.expert < 0 ? 0 : table[shape.rank * shape.num_local_experts + stay.expert];
        const uint2 at = keep_route(args, slot, token, k, stay.expert, first + stay.position, 0);
        if (stay.expert >= 0) {
            const uint32_t index = atomicAdd(&to[place].count, 1);
            to[place].row[index] = pointer<uint8_t>(args.recv_x) + uint64_t{at.x} * shape.hidden * (kFp8 ? 1 : 2);
            to[place].sf[index] = pointer<uint8_t>(args.recv_sf) + uint64_t{at.y} * 4;
            to[place].sf_stride = 4 * shape.num_ranks * shape.num_max_tokens;
        }
    }
    __syncthreads();
    for (uint32_t own = range.end; own-- > range.begin;) {
        if (own + 1 != range.end) cast_unit(args, load_unit<kFp8>(args, own, threadIdx.x), out);
        if (to[own - range.begin].count != 0) store_row<kFp8>(args, own, out, to[own - range.begin]);
    }
}

template <bool kFp8>
__device__ void receive(const LlDispatchArgs& args, const LlCall& call, const Range& range, const Outgoing<kFp8>& last,
                        uint32_t* table, const Stay (*stays)[kLlMaxTopk]) {
    __shared__ Arrivals from;
    __shared__ Rows listed[kLlMaxTeams][2];
    __shared__ Targets kept[kDirectTokens];
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    const Sources sources(shape, stays != nullptr);
    const Team team(common.team_threads);
    if (team.thread == team.threads - 1) {
        listed[team.index][0].count = 0;
        from.first[team.index] = sources.count == 0 ? Presence::kAbsent
                                                    : look_for_first(args, call, Item(shape, sources, team.global_index()),
                                                                     stays != nullptr);
    }
    if (threadIdx.x < kDirectTokens) kept[threadIdx.x].count = 0;
    await_counts(args, call, table, from);
    __syncthreads();
    place_sources(args, table, from);
    uint32_t max_tokens = 0;
    for (uint32_t rank = 0; rank < shape.num_ranks; ++rank) {
        max_tokens = max_of(max_tokens, from.header[rank] & ~kHasWeights);
    }
    __syncthreads();
    const uint8_t* slots = call.own_bytes(common.window.dispatch_slots);
    Presence presence = from.first[team.index];
    Arrived arrived;
    if (presence == Presence::kPresent) {
        const Item item(shape, sources, team.global_index());
        load_slot<kFp8>(args, slots + item.slot * shape.slot_bytes, team, arrived);
    }
    bool is_loaded = presence == Presence::kPresent;
    if (stays != nullptr) keep_tokens<kFp8>(args, range, last, table, stays, kept);
    uint32_t turn = 0;
    for (uint32_t number = team.global_index(); number < max_tokens * sources.count; number += team.global_count()) {
        const Item item(shape, sources, number);
        const Presence known = presence;
        presence = Presence::kUnknown;
        if (item.token >= (from.header[item.source] & ~kHasWeights)) continue;
        const uint8_t* slot = slots + item.slot * shape.slot_bytes;
        Rows& rows = listed[team.index][turn];
        turn ^= 1;
        if (known == Presence::kUnknown) {
            if (team.thread == 0) {
                uint32_t value = 0;
                rows.is_present = call.wait<true>(item.source, call.own_word(common.window.present, item.slot), value) &&
                                  value != 0;
                rows.count = 0;
            }
            team.sync();
        }
        if (known == Presence::kPresent || (known == Presence::kUnknown && rows.is_present)) {
            if (!is_loaded) load_slot<kFp8>(args, slot, team, arrived);
            is_loaded = false;
            store_token<kFp8>(args, item, slot, team, table, arrived, rows);
        } else {
            forget_token(args, item, team.thread);
        }
    }
}

template <bool kFp8>
__device__ void run(const LlDispatchArgs& args, LlCall& call, uint32_t* table) {
    __shared__ Stay stays[kDirectTokens][kLlMaxTopk];
    const LlCommon& common = args.common;
    const uint64_t credits = common.window.dispatch_credits;
    const Range range(common.num_tokens);
    const bool is_sending = (common.phases & kLlSend) != 0, is_receiving = (common.phases & kLlRecv) != 0;
    // Rows that stay skip the window where one launch does everything and blocks can remember their tokens.
    const bool is_direct = is_sending && is_receiving && range.per_block <= kDirectTokens;
    Outgoing<kFp8> last;
    if (is_sending) {
        const uint32_t num_scanned = (range.is_publisher ? common.num_tokens : range.begin) * common.shape.num_topk;
        const Scan scan = load_scan(args, 0, num_scanned);
        Held held;
        Choices choices = {{-1, -1}, {-1, -1}, {0, 0}};
        if (range.begin < range.end) {
            choices = load_choices(args, range.begin);
            held = load_unit<kFp8>(args, range.begin, threadIdx.x);
        }
        call.prepare(credits, common.call_epoch);
        clear(args, table);
        find_owners(common.shape, choices);
        count_experts(args, scan, num_scanned, table);
        call.begin(common.call_epoch);
        if (range.is_publisher) call.publish_credits(credits);
        call.await_credit(threadIdx.x, credits);
        __syncthreads();
        if (range.is_publisher) {
            publish_counts(args, call, table);
            __syncthreads();
            if (range.begin < range.end) clear(args, table);
        }
        last = send<kFp8>(args, call, range, held, choices, table, is_direct ? stays : nullptr);
        __syncthreads();
    } else {
        call.prepare(credits, common.call_epoch);
        call.begin(common.call_epoch);
    }
    if (is_receiving) receive<kFp8>(args, call, range, last, table, is_direct ? stays : nullptr);
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
