// Dispatch, second half: every rank fetches the rows that are its own, from where their sources have published them.
#include <deepep/pull.cuh>

namespace deepep {

// Notify has told about this rank's rows, but those copied into the window beside it are there only now: say so, and wait
// for the others to say it. Their first flag is free for this, since nothing of theirs is staged.
__device__ void exchange_copied(const Operation& op, const DispatchArgs& args, const uint32_t* header) {
    const uint32_t num_ranks = op.window.num_ranks, peer = threadIdx.x;
    if (args.is_in_place && blockIdx.x == 0 && peer < num_ranks) {
        op.transport.release_signal(peer, op.window.flags + uint64_t{op.window.rank} * op.window.num_flags * 8,
                                    make_word(op.epoch, 0));
    }
    if (peer < num_ranks && header[peer * kHeaderWords + kHeaderInPlace]) {
        op.wait(op.flag_of(peer, 0), op.epoch, 0, peer);
    }
}

// Make shared descriptions of the sources. False if the operation has failed.
__device__ bool find_sources(const Operation& op, const DispatchArgs& args, Source* sources, uint32_t* header,
                             uint32_t* first_row, uint32_t* num_passes) {
    const uint32_t num_ranks = op.window.num_ranks;
    if (args.is_cached && blockIdx.x == 0) {
        op.send_headers(args.header, args.num_tokens, static_cast<uint32_t>(args.rows_offset / 16),
                        static_cast<uint32_t>(args.sf_offset / 16), args.ring_rows, args.room, args.is_in_place, 0, nullptr);
    }
    const uint64_t start = global_timer_ns();
    // Threads that have no word of a header to look at wait for the metadata meanwhile.
    const uint32_t from_end = blockDim.x - 1 - threadIdx.x;
    if (!args.is_cached && from_end < num_ranks) {
        op.wait(reinterpret_cast<uint64_t*>(op.transport.local(op.ready_at(from_end))), op.epoch, 0, from_end);
    }
    op.wait_headers(header);
    if (!args.is_cached) exchange_copied(op, args, header);
    if (args.is_cached && args.wait_stats != 0 && blockIdx.x == 0 && threadIdx.x < num_ranks) {
        pointer<int64_t>(args.wait_stats)[threadIdx.x] += static_cast<int64_t>((global_timer_ns() - start) / 1000);
    }
    if (args.is_cached) op.compare_headers(header);
    if (threadIdx.x == 0) *num_passes = 1;
    // Where this source's rows begin at each receiver.
    for (uint32_t receiver = threadIdx.x; !args.is_cached && receiver < num_ranks; receiver += blockDim.x) {
        uint32_t base = 0;
        for (uint32_t source = 0; source < op.window.rank; ++source) {
            const uint64_t at = op.matrix_at(source) + receiver * 8;
            base += word_value(load_acquire_sys(reinterpret_cast<uint64_t*>(op.transport.local(at))));
        }
        first_row[receiver] = base;
    }
    __syncthreads();
    for (uint32_t rank = threadIdx.x; rank < num_ranks; rank += blockDim.x) {
        const uint32_t* theirs = header + rank * kHeaderWords;
        const int32_t* psum = pointer<const int32_t>(args.psum_ranks);
        const bool is_self = rank == op.window.rank, is_cast = args.sf_format != kSfNone;
        Source& source = sources[rank];
        source.ring = theirs[kHeaderRing];
        source.rows = op.transport.peer_ptr(rank, uint64_t{theirs[kHeaderRows]} * 16);
        source.sf = op.transport.peer_ptr(rank, uint64_t{theirs[kHeaderSf]} * 16);
        source.flags = theirs[kHeaderInPlace] ? nullptr : op.flag_of(rank, 0);
        source.is_direct_sf = 0;
        source.sf_pitch = args.sf_pitch;
        if (is_self && !is_cast) {
            source.ring = kNoEntry;
            source.rows = pointer<const uint8_t>(args.x);
            source.flags = nullptr;
            source.is_direct_sf = !args.sf_is_bulk;
            if (args.sf_is_bulk) {
                source.sf = pointer<const uint8_t>(args.sf);
                source.sf_pitch = static_cast<uint32_t>(args.sf_stride_token) * 4;
            }
        }
        source.first_row = rank == 0 ? 0 : psum[rank - 1];
        source.num_rows = psum[rank] - source.first_row;
        const uint8_t* metadata = op.transport.local(op.metadata_at(rank));
        source.tokens = reinterpret_cast<const uint32_t*>(metadata);
        source.entries = source.tokens + args.metadata_rows;
        source.weights = reinterpret_cast<const float*>(source.entries + uint64_t{args.metadata_rows} * args.num_topk);
        // Laps of its own, too: this rank waits for its own credit like for any other.
        atomicMax(num_passes, ceil_div(max_of(theirs[kHeaderTokens], 1u), theirs[kHeaderRing]));
    }
    __syncthreads();
    return !op.failed();
}

// The warps that keep the books while others move rows: threads of the whole grid, numbered.
struct Clerk {
    const Operation& op;
    const DispatchArgs& args;
    uint32_t thread, num_threads;

    // Rows at their destination were counted from this source's first; now its first row there is known.
    __device__ void finish_dst_rows(const uint32_t* first_row) const {
        const uint32_t total = args.num_tokens * args.num_slots;
#pragma unroll 4
        for (uint32_t i = thread; i < total; i += num_threads) {
            const int32_t rank = pointer<const int32_t>(args.dst_rank)[i];
            if (rank >= 0) pointer<int32_t>(args.dst_row)[i] += static_cast<int32_t>(first_row[rank]);
        }
    }

    // Rows nothing arrives in: mark the compact tail (CONTRACT, 'Tails').
    __device__ void mark_tail(uint32_t begin, bool is_expanded) const {
        for (uint32_t row = begin + thread; row < args.num_compact_rows; row += num_threads) {
            pointer<int32_t>(args.recv_src_token)[row] = -1;
        }
        const uint64_t end = uint64_t{args.num_compact_rows} * args.num_topk;
        for (uint64_t i = uint64_t{begin} * args.num_topk + thread; i < end; i += num_threads) {
            if (is_expanded) {
                pointer<int32_t>(args.expanded_row)[i] = -1;
            } else {
                pointer<int64_t>(args.recv_topk_idx)[i] = -1;
                if (args.recv_topk_weights) pointer<float>(args.recv_topk_weights)[i] = 0.0f;
            }
        }
    }

    // Rows between experts and after the last one: weight 0; the former all zero if asked for. A warp per expert.
    __device__ void clear_padding(uint32_t num_local) const {
        const uint32_t* start = pointer<const uint32_t>(op.window.scratch);
        float* weights = pointer<float>(args.recv_topk_weights);
        const uint32_t lane = lane_index();
        const uint64_t vecs_per_row = args.cut.row_bytes / sizeof(Vec16);
        for (uint32_t expert = thread / kWarpSize; expert < num_local; expert += num_threads / kWarpSize) {
            const uint32_t count = pointer<const uint32_t>(args.counts_out)[expert];
            const uint64_t begin = start[expert] + count, end = start[expert] + align_up(count, args.alignment);
            if (weights != nullptr) {
                for (uint64_t row = begin + lane; row < end; row += kWarpSize) weights[row] = 0.0f;
            }
            if (!args.do_zero_padding) continue;
            const Vec16 zero = {{0, 0, 0, 0}};
            for (uint64_t i = begin * vecs_per_row + lane; i < end * vecs_per_row; i += kWarpSize) {
                pointer<Vec16>(args.recv_x)[i] = zero;
            }
            for (uint64_t i = begin * args.num_sf + lane; i < end * args.num_sf; i += kWarpSize) {
                pointer<uint32_t>(args.recv_sf)[i] = 0;
            }
        }
        if (weights == nullptr || num_local == 0) return;
        const uint32_t count = pointer<const uint32_t>(args.counts_out)[num_local - 1];
        const uint64_t end = start[num_local - 1] + align_up(count, args.alignment);
        for (uint64_t row = end + thread; row < args.num_rows; row += num_threads) weights[row] = 0.0f;
    }
};

template <bool kExpanded>
__device__ void dispatch(const DispatchArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ PipeBarriers barriers;
    __shared__ Source sources[kMaxRanks];
    __shared__ uint32_t header[kMaxRanks * kHeaderWords];
    __shared__ uint32_t first_row[kMaxRanks], num_passes;
    const Operation op(args.window, whole_cta());
    const uint32_t num_ranks = op.window.num_ranks, num_local = args.num_topk ? args.num_experts / num_ranks : 0;
    const uint32_t warp = warp_index(), num_stagers = args.cut.num_stage_warps, num_warps = args.cut.num_warps;
    const uint32_t* expert_base = pointer<const uint32_t>(op.window.scratch);
    WarpPipe::init(barriers);
    if (!op.has_failed() && find_sources(op, args, sources, header, first_row, &num_passes)) {
        WarpPipe pipe(shared + warp * args.cut.slots_per_warp * args.cut.slot_bytes, barriers, warp % kMaxWarps, args.cut);
        if (warp >= num_warps) {
            if (!args.is_cached) {
                const uint32_t own = threadIdx.x - num_warps * kWarpSize, per_cta = blockDim.x - num_warps * kWarpSize;
                const Clerk clerk{op, args, blockIdx.x * per_cta + own, gridDim.x * per_cta};
                unpack_metadata<kExpanded>(op, args, sources, expert_base, num_local, clerk.thread, clerk.num_threads);
                clerk.finish_dst_rows(first_row);
                clerk.mark_tail(sources[num_ranks - 1].first_row + sources[num_ranks - 1].num_rows, kExpanded);
                if constexpr (kExpanded) clerk.clear_padding(num_local);
            }
        } else if (warp < num_stagers) {
            const uint32_t num_chunks = ceil_div(args.num_tokens, kFlagRows);
            // Go on where notify stopped, or behind what it was to stage.
            const bool is_shared = args.is_staging_shared != 0;
            stage_chunks(op, args, pipe, is_shared ? &op.control->next_early : &op.control->next_stage,
                         is_shared ? 0 : args.num_early_chunks, num_chunks, nullptr);
        } else {
            const uint32_t worker = (warp - num_stagers) * gridDim.x + blockIdx.x;
            const uint32_t num_workers = (num_warps - num_stagers) * gridDim.x;
            Puller<kExpanded>{op, args, sources, pipe, worker, num_workers, expert_base, num_local}.run(num_passes);
        }
    }
    op.leave(true, true);
}

}  // namespace deepep

extern "C" __global__ void __launch_bounds__(512, 1)
    deepep_dispatch_compact(const __grid_constant__ deepep::DispatchArgs args) {
    deepep::dispatch<false>(args);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    deepep_dispatch_expanded(const __grid_constant__ deepep::DispatchArgs args) {
    deepep::dispatch<true>(args);
}
