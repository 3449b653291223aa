// Who gets which token: counts per expert, rank and host, and the table of tokens and ranks, in one launch. Sums of whole
// numbers, so the order in which CTAs add theirs does not show.
#include <deepep/ptx.cuh>
#include <deepep/types.cuh>

namespace deepep {

constexpr uint32_t kTileTokens = 128;  // whole warps, and a tile of the table begins at a whole word
constexpr uint32_t kTileWarps = kTileTokens / kWarpSize;

// Twin: deepep/cuda/layout.py.
struct LayoutArgs {
    uint64_t topk_idx;                                      // [T, K] i64
    uint64_t per_expert, per_rank, per_host, is_token_in_rank;  // [E], [R], [R / ranks_per_host] i32 or 0, [T, R] bool
    uint64_t sums;  // [1 + E + R + hosts] u32: CTAs that are through, then columns; zero before and after a launch
    uint32_t num_tokens, num_topk, num_experts, num_ranks, ranks_per_host, num_hosts;
};

// The ranks of each token of a tile, a bit each.
struct Masks {
    uint32_t half[2][kTileTokens];

    __device__ uint64_t of(uint32_t token) const { return uint64_t{half[1][token]} << 32 | half[0][token]; }
};

// What is out of range counts nowhere: naming it would cost a wait, so the host looks under the debug switch only.
__device__ void count_experts(const LayoutArgs& args, uint64_t first, uint32_t num_tokens, uint32_t* counts,
                              Masks& masks) {
    const int64_t* chosen = pointer<const int64_t>(args.topk_idx) + first * args.num_topk;
    const uint32_t num_local = args.num_experts / args.num_ranks;
    for (uint32_t i = threadIdx.x; i < num_tokens * args.num_topk; i += blockDim.x) {
        const int64_t expert = chosen[i];
        if (expert < 0 || expert >= args.num_experts) continue;
        const uint32_t rank = static_cast<uint32_t>(expert) / num_local;
        atomicAdd(&counts[expert], 1);
        atomicOr(&masks.half[rank / 32][i / args.num_topk], 1u << rank % 32);
    }
}

// counts: of ranks, then of hosts. One warp looks at one of them for 32 tokens.
__device__ void count_ranks(const LayoutArgs& args, uint32_t* counts, const Masks& masks) {
    const uint32_t num_columns = args.num_ranks + args.num_hosts;
    for (uint32_t job = warp_index(); job < num_columns * kTileWarps; job += blockDim.x / kWarpSize) {
        const uint32_t column = job / kTileWarps, token = job % kTileWarps * kWarpSize + lane_index();
        const bool is_host = column >= args.num_ranks;
        const uint32_t begin = is_host ? (column - args.num_ranks) * args.ranks_per_host : column;
        const uint32_t width = is_host ? args.ranks_per_host : 1;
        const bool is_hit = (masks.of(token) >> begin & ((uint64_t{1} << width) - 1)) != 0;
        const uint32_t hits = __popc(__ballot_sync(kFullMask, is_hit));
        if (lane_index() == 0 && hits != 0) atomicAdd(&counts[column], hits);
    }
}

__device__ void write_table(const LayoutArgs& args, uint64_t first, uint32_t num_tokens, const Masks& masks) {
    uint8_t* table = pointer<uint8_t>(args.is_token_in_rank) + first * args.num_ranks;
    const uint32_t num_bytes = num_tokens * args.num_ranks;
    const auto byte_at = [&](uint32_t i) {
        return static_cast<uint32_t>(masks.of(i / args.num_ranks) >> i % args.num_ranks & 1);
    };
    for (uint32_t i = 4 * threadIdx.x; i < num_bytes; i += 4 * blockDim.x) {
        if (i + 4 <= num_bytes) {
            *reinterpret_cast<uint32_t*>(table + i) =
                byte_at(i) | byte_at(i + 1) << 8 | byte_at(i + 2) << 16 | byte_at(i + 3) << 24;
        } else {
            for (uint32_t j = i; j < num_bytes; ++j) table[j] = static_cast<uint8_t>(byte_at(j));
        }
    }
}

// The last CTA to come takes the sums out and leaves zeros for the next launch.
__device__ void add_up(const LayoutArgs& args, const uint32_t* counts, uint32_t num_columns) {
    __shared__ uint32_t is_last;
    uint32_t* arrivals = pointer<uint32_t>(args.sums);
    uint32_t* sums = arrivals + 1;
    for (uint32_t i = threadIdx.x; i < num_columns; i += blockDim.x) {
        if (counts[i] != 0) atomicAdd(&sums[i], counts[i]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = add_acq_rel_gpu(arrivals, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (uint32_t i = threadIdx.x; i < num_columns; i += blockDim.x) {
        const uint32_t sum = atomicExch(&sums[i], 0);
        const uint32_t column = i - args.num_experts;
        uint32_t* out = i < args.num_experts      ? pointer<uint32_t>(args.per_expert) + i
                        : column < args.num_ranks ? pointer<uint32_t>(args.per_rank) + column
                                                  : pointer<uint32_t>(args.per_host) + (column - args.num_ranks);
        *out = sum;
    }
    if (threadIdx.x == 0) *arrivals = 0;
}

}  // namespace deepep

extern "C" __global__ void __launch_bounds__(256) deepep_layout(const __grid_constant__ deepep::LayoutArgs args) {
    using namespace deepep;
    extern __shared__ uint32_t counts[];  // experts, ranks, hosts
    __shared__ Masks masks;
    const uint32_t num_columns = args.num_experts + args.num_ranks + args.num_hosts;
    for (uint32_t i = threadIdx.x; i < num_columns; i += blockDim.x) counts[i] = 0;
    for (uint64_t first = uint64_t{blockIdx.x} * kTileTokens; first < args.num_tokens;
         first += uint64_t{gridDim.x} * kTileTokens) {
        const uint32_t num_tokens = static_cast<uint32_t>(min_of<uint64_t>(kTileTokens, args.num_tokens - first));
        for (uint32_t i = threadIdx.x; i < 2 * kTileTokens; i += blockDim.x) masks.half[i / kTileTokens][i % kTileTokens] = 0;
        __syncthreads();
        count_experts(args, first, num_tokens, counts, masks);
        __syncthreads();
        count_ranks(args, counts + args.num_experts, masks);
        write_table(args, first, num_tokens, masks);
        __syncthreads();
    }
    __syncthreads();
    add_up(args, counts, num_columns);
}
