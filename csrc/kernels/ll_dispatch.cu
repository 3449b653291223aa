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

__device__ void store_unit_fp8(const LlDispatchArgs& args, const Held& held, uint32_t unit, const Destinations& to) {
    constexpr uint32_t kLanes = kGroupSize / 16;
    const uint32_t lane = lane_index(), active = 0xffu << (lane & ~(kLanes - 1));
    float values[2][8];
    Bf16::unpack(held.v[0], values[0]);
    Bf16::unpack(held.v[1], values[1]);
    float amax = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) amax = fmaxf(amax, fabsf(values[i / 8][i % 8]));
    amax = __uint_as_float(lanes_max<kLanes>(__float_as_uint(amax), active));
    const Fp8Scale scale = fp8_scale(amax, args.sf_format);
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

// Count how often each expert is chosen by tokens [0, end) of this rank.
__device__ void count_experts(const LlDispatchArgs& args, uint32_t end, uint32_t* table) {
    const LlShape& shape = args.common.shape;
    const int64_t* topk_idx = pointer<const int64_t>(args.topk_idx);
    for (uint32_t i = threadIdx.x; i < shape.num_experts; i += kLlThreads) table[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < end * shape.num_topk; i += kLlThreads) {
        const int64_t expert = topk_idx[i];
        if (expert >= 0) atomicAdd(&table[expert], 1);
    }
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

// By one warp: find the ranks of a token, and write each of them the token's choices. `table` counts on.
__device__ void address_token(const LlDispatchArgs& args, const LlCall& call, uint32_t token, uint32_t* table,
                              Destinations& to) {
    const LlShape& shape = args.common.shape;
    const uint32_t lane = lane_index();
    const uint64_t first = static_cast<uint64_t>(token) * shape.num_topk;
    int32_t owner[2], local[2];
    uint32_t position[2], low = 0, high = 0;
    float weight[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t k = lane + i * kWarpSize;
        const bool is_inside = k < shape.num_topk;
        int32_t expert = is_inside ? static_cast<int32_t>(pointer<const int64_t>(args.topk_idx)[first + k]) : -1;
        weight[i] = is_inside && args.topk_weights != 0 ? pointer<const float>(args.topk_weights)[first + k] : 0;
        owner[i] = expert >= 0 ? expert / static_cast<int32_t>(shape.num_local_experts) : -1;
        local[i] = expert - owner[i] * static_cast<int32_t>(shape.num_local_experts);
        if (expert >= 0) position[i] = table[expert]++;
        if (owner[i] >= 0 && call.is_masked(owner[i])) expert = owner[i] = -1;
        if (is_inside) pointer<int32_t>(args.common.home_topk)[first + k] = expert;
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
        LlChoice* choices = reinterpret_cast<LlChoice*>(slot + shape.choice_offset);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t k = lane + i * kWarpSize;
            if (k < shape.num_topk) choices[k] = {owner[i] == rank ? local[i] : -1, position[i], weight[i], 0};
        }
    }
    if (lane == 0) to.ranks = ranks, to.count = count;
}

template <bool kFp8>
__device__ void send(const LlDispatchArgs& args, const LlCall& call, uint32_t* table) {
    __shared__ Destinations to[2];
    __shared__ uint64_t sent_to[kTokensPerFence];
    const LlCommon& common = args.common;
    const uint32_t publisher = gridDim.x - 1, num_senders = max_of(publisher, 1u);
    const uint32_t per_block = ceil_div(common.num_tokens, num_senders);
    const uint32_t begin = min_of(blockIdx.x * per_block, common.num_tokens);
    const uint32_t end = blockIdx.x < num_senders ? min_of(begin + per_block, common.num_tokens) : begin;
    Held held;
    if (begin < end) held = load_unit<kFp8>(args, begin, threadIdx.x);
    if (threadIdx.x < common.shape.num_ranks && !call.is_masked(threadIdx.x)) {
        call.wait_credit(threadIdx.x, call.own_word(common.window.dispatch_credits, threadIdx.x));
    }
    if (blockIdx.x == publisher) {
        count_experts(args, common.num_tokens, table);
        publish_counts(args, call, table);
        __syncthreads();
    }
    if (begin >= end) return;
    count_experts(args, begin, table);
    for (uint32_t token = begin; token < end; ++token) {
        const uint32_t place = token - begin, in_batch = place % kTokensPerFence;
        Destinations& now = to[place % 2];
        if (warp_index() == 0) address_token(args, call, token, table, now);
        __syncthreads();
        if (threadIdx.x == 0) sent_to[in_batch] = now.ranks;
        store_row<kFp8>(args, token, held, now);
        if (token + 1 < end) held = load_unit<kFp8>(args, token + 1, threadIdx.x);
        if (in_batch + 1 < kTokensPerFence && token + 1 < end) continue;
        __syncthreads();
        if (warp_index() != 0) continue;
        fence_sys();
        for (uint32_t i = lane_index(); i < (in_batch + 1) * common.shape.num_ranks; i += kWarpSize) {
            const uint32_t rank = i % common.shape.num_ranks, batch = i / common.shape.num_ranks;
            const uint64_t index = static_cast<uint64_t>(common.shape.rank) * common.shape.num_max_tokens + token -
                                   in_batch + batch;
            if (!call.is_masked(rank)) call.signal(rank, common.window.present, index, sent_to[batch] >> rank & 1);
        }
        __syncwarp();
    }
}

// What a block knows about the sources: their tokens, and where the rows of each begin inside each expert.
struct Arrivals {
    uint32_t tokens_before[kLlMaxRanks + 1];
    uint32_t header[kLlMaxRanks];
};

// Wait for the counts of all sources and turn `table` [R, L] from counts into first rows.
__device__ void place_sources(const LlDispatchArgs& args, const LlCall& call, uint32_t* table, Arrivals& from) {
    const LlShape& shape = args.common.shape;
    const uint32_t num_local = shape.num_local_experts;
    for (uint32_t i = threadIdx.x; i < shape.num_experts + shape.num_ranks; i += kLlThreads) {
        const bool is_header = i >= shape.num_experts;
        const uint32_t rank = is_header ? i - shape.num_experts : i / num_local;
        const uint64_t offset = is_header ? args.common.window.headers : args.common.window.counts;
        uint32_t value = 0;
        if (call.is_masked(rank) || !call.wait(rank, call.own_word(offset, is_header ? rank : i), value)) value = 0;
        (is_header ? from.header[rank] : table[i]) = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t sum = 0;
        for (uint32_t rank = 0; rank < shape.num_ranks; ++rank) {
            from.tokens_before[rank] = sum;
            sum += from.header[rank] & ~kHasWeights;
        }
        from.tokens_before[shape.num_ranks] = sum;
    }
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
    __syncthreads();
}

// The rows that one token gets here.
struct Rows {
    uint32_t is_present, count;
    uint32_t row[kLlMaxTopk];
};

// By the first K threads of a team: read the choices of a slot, list their rows and keep them for combine.
__device__ void list_rows(const LlDispatchArgs& args, const uint8_t* slot, uint32_t source, uint32_t token,
                          const uint32_t* table, uint32_t k, Rows& rows) {
    const LlShape& shape = args.common.shape;
    const Vec16 raw = load_stream(reinterpret_cast<const Vec16*>(slot + shape.choice_offset) + k);
    const int32_t expert = static_cast<int32_t>(raw.word[0]);
    const uint64_t route = (static_cast<uint64_t>(source) * shape.num_max_tokens + token) * shape.num_topk + k;
    int32_t row = -1;
    if (expert >= 0) {
        const uint32_t place = table[source * shape.num_local_experts + expert] + raw.word[1];
        row = static_cast<int32_t>(expert * shape.num_ranks * shape.num_max_tokens + place);
        rows.row[atomicAdd(&rows.count, 1)] = row;
        pointer<uint32_t>(args.src_info)[row] = token;
    }
    pointer<int32_t>(args.common.routes)[route] = row;
    pointer<uint32_t>(args.common.route_weights)[route] = raw.word[2];
}

__device__ void store_scales(const LlDispatchArgs& args, const uint8_t* slot, const Team& team, const Rows& rows) {
    const LlShape& shape = args.common.shape;
    const uint32_t room = shape.num_ranks * shape.num_max_tokens;
    const uint32_t num_sf = shape.hidden / kGroupSize / (args.sf_format == kSfUe8m0 ? 4 : 1);
    for (uint32_t i = team.thread; i < num_sf * rows.count; i += team.threads) {
        const uint32_t sf = i % num_sf, row = rows.row[i / num_sf];
        const uint32_t value = reinterpret_cast<const volatile uint32_t*>(slot + shape.hidden)[sf];
        const uint64_t column = static_cast<uint64_t>(row / room) * num_sf + sf;
        pointer<uint32_t>(args.recv_sf)[column * room + row % room] = value;
    }
}

template <bool kFp8>
__device__ void receive(const LlDispatchArgs& args, const LlCall& call, uint32_t* table) {
    constexpr uint32_t kUnroll = 4;
    __shared__ Arrivals from;
    __shared__ Rows listed[kLlMaxTeams][2];
    const LlCommon& common = args.common;
    const LlShape& shape = common.shape;
    place_sources(args, call, table, from);
    const Team team(common.team_threads);
    const uint32_t num_vecs = shape.hidden / (kFp8 ? 16 : 8);
    uint32_t source = 0, turn = 0;
    for (uint32_t item = team.global_index(); item < from.tokens_before[shape.num_ranks];
         item += team.global_count(), turn ^= 1) {
        while (item >= from.tokens_before[source + 1]) ++source;
        const uint32_t token = item - from.tokens_before[source];
        const uint64_t index = static_cast<uint64_t>(source) * shape.num_max_tokens + token;
        Rows& rows = listed[team.index][turn];
        if (team.thread == 0) {
            uint32_t value = 0;
            rows.is_present = call.wait(source, call.own_word(common.window.present, index), value) && value != 0;
            rows.count = 0;
        }
        team.sync();
        if (!rows.is_present) {
            if (team.thread < shape.num_topk) {
                pointer<int32_t>(common.routes)[index * shape.num_topk + team.thread] = -1;
            }
            continue;
        }
        const uint8_t* slot = call.transport.local(common.window.dispatch_slots + call.bank) + index * shape.slot_bytes;
        const Vec16* in = reinterpret_cast<const Vec16*>(slot);
        for (uint32_t base = 0; base < num_vecs; base += kUnroll * team.threads) {
            Vec16 held[kUnroll];
#pragma unroll
            for (uint32_t i = 0; i < kUnroll; ++i) {
                const uint32_t vec = base + i * team.threads + team.thread;
                if (vec < num_vecs) held[i] = load_stream(in + vec);
            }
            if (base == 0) {
                if (team.thread < shape.num_topk) list_rows(args, slot, source, token, table, team.thread, rows);
                team.sync();
            }
            for (uint32_t r = 0; r < rows.count; ++r) {
                Vec16* out = pointer<Vec16>(args.recv_x) + static_cast<uint64_t>(rows.row[r]) * num_vecs;
#pragma unroll
                for (uint32_t i = 0; i < kUnroll; ++i) {
                    const uint32_t vec = base + i * team.threads + team.thread;
                    if (vec < num_vecs) out[vec] = held[i];
                }
            }
        }
        if constexpr (kFp8) store_scales(args, slot, team, rows);
    }
}

template <bool kFp8>
__device__ void run(const LlDispatchArgs& args, uint32_t* table) {
    const LlCommon& common = args.common;
    LlCall call = LlCall::begin(common, kLlDispatch, common.call_epoch);
    if (common.phases & kLlSend) {
        send<kFp8>(args, call, table);
        __syncthreads();
    }
    if (common.phases & kLlRecv) receive<kFp8>(args, call, table);
    call.end(common.window.dispatch_credits);
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_dispatch_kernel(const __grid_constant__ deepep::LlDispatchArgs args) {
    extern __shared__ uint32_t table[];
    if (args.sf_format == deepep::kSfNone) {
        deepep::run<false>(args, table);
    } else {
        deepep::run<true>(args, table);
    }
}
