// Combine: owners publish their rows, homes fetch and add them. Some warps of every CTA begin as owners and become homes
// when nothing is left to publish; the others are homes from the start, so nobody waits for a role that no warp has.
#include <deepep/home.cuh>
#include <deepep/owner.cuh>

namespace deepep {

// As many as have registers for what they load at once.
constexpr int combine_threads(bool sums) { return sums ? 512 : 640; }

// kSums: owners add up the expanded rows of a token before they publish.
template <bool kSums>
__device__ void find_owners(const Operation& op, const CombineArgs& args, const uint32_t* header, Owner* owners,
                            uint32_t* least_ring) {
    if (threadIdx.x == 0) *least_ring = kNoEntry;
    __syncthreads();
    for (uint32_t rank = threadIdx.x; rank < op.window.num_ranks; rank += blockDim.x) {
        const uint32_t* theirs = header + rank * kHeaderWords;
        Owner& owner = owners[rank];
        const uint64_t copies = args.is_per_copy ? args.num_topk : 1, ring = theirs[kHeaderRing];
        owner.ring = theirs[kHeaderRing];
        owner.first_row = theirs[kHeaderFirstRow];
        owner.is_in_place = theirs[kHeaderInPlace];
        owner.is_self_direct = 0;
        const uint64_t skipped = owner.is_in_place ? 0 : op.window.rank * ring * copies * args.cut.row_bytes;
        owner.rows = op.transport.peer_ptr(rank, uint64_t{theirs[kHeaderRows]} * 16 + skipped);
        owner.weights = reinterpret_cast<const float*>(op.transport.peer_ptr(
            rank, uint64_t{theirs[kHeaderSf]} * 16 + op.window.rank * ring * args.weights_pitch));
        owner.flags = owner.is_in_place && args.out_weights == 0 ? nullptr : op.flag_of(rank, 0);
        if (rank == op.window.rank && !kSums) {
            owner.rows = pointer<const uint8_t>(args.x);
            owner.is_in_place = owner.is_self_direct = 1;
            owner.flags = nullptr;
        }
        if (owner.flags != nullptr) atomicMin(least_ring, owner.ring);
    }
    __syncthreads();
}

template <typename Type, bool kSums>
__device__ void combine(const CombineArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ PipeBarriers barriers;
    __shared__ Owner owners[kMaxRanks];
    __shared__ uint32_t header[kMaxRanks * kHeaderWords];
    __shared__ uint32_t least_ring;
    const Operation op(args.window, whole_cta());
    const uint32_t warp = warp_index();
    WarpPipe::init(barriers);
    if (blockIdx.x == 0) {
        op.send_headers(args.header, args.num_tokens, static_cast<uint32_t>(args.rows_offset / 16),
                        static_cast<uint32_t>(args.weights_offset / 16), args.ring_rows, kNoEntry, args.is_in_window, 0,
                        pointer<const int32_t>(args.psum_ranks));
    }
    const uint64_t start = global_timer_ns();
    op.wait_headers(header);
    if (args.wait_stats != 0 && blockIdx.x == 0 && threadIdx.x < op.window.num_ranks) {
        pointer<int64_t>(args.wait_stats)[threadIdx.x] += static_cast<int64_t>((global_timer_ns() - start) / 1000);
    }
    op.compare_headers(header);
    if (!op.has_failed()) {
        find_owners<kSums>(op, args, header, owners, &least_ring);
        const uint32_t row_vecs = args.cut.row_bytes / sizeof(Vec16);
        if (warp < args.cut.num_stage_warps) {
            if constexpr (kSums) {
                OwnerSums<Type> sums(op, args, header);
                Reducer<Type, 4, OwnerSums<Type>>{op, row_vecs, sums}.run();
            } else {
                WarpPipe pipe(shared + warp * args.cut.slots_per_warp * args.cut.slot_bytes, barriers, warp, args.cut);
                stage_batches(op, args, pipe, header);
            }
        }
        HomeSums<Type> sums{op, args, owners, args.num_tokens > least_ring};
        sums.ask();
        Reducer<Type, 2, HomeSums<Type>>{op, row_vecs, sums}.run();
    }
    op.leave(true, true);
}

}  // namespace deepep

#define DEEPEP_COMBINE(name, type, sums)                                                                           \
    extern "C" __global__ void __launch_bounds__(deepep::combine_threads(sums), 1)                                 \
        name(const __grid_constant__ deepep::CombineArgs args) {                                                  \
        deepep::combine<deepep::type, sums>(args);                                                                 \
    }

DEEPEP_COMBINE(deepep_combine_bf16, Bf16, false)
DEEPEP_COMBINE(deepep_combine_fp16, Fp16, false)
DEEPEP_COMBINE(deepep_combine_fp32, Fp32, false)
DEEPEP_COMBINE(deepep_combine_sums_bf16, Bf16, true)
DEEPEP_COMBINE(deepep_combine_sums_fp16, Fp16, true)
DEEPEP_COMBINE(deepep_combine_sums_fp32, Fp32, true)
