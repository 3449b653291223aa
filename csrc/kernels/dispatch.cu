// Dispatch, second half: every rank fetches the rows that are its own, from where their sources have published them.
#include <deepep/pull.cuh>

namespace deepep {

// Make shared descriptions of the sources. False if the operation has failed.
__device__ bool find_sources(const Operation& op, const DispatchArgs& args, Source* sources, uint32_t* header,
                             uint32_t* num_passes) {
    const uint32_t num_ranks = op.window.num_ranks;
    if (args.is_cached && blockIdx.x == 0) {
        op.send_headers(args.header, args.num_tokens, static_cast<uint32_t>(args.rows_offset / 16),
                        static_cast<uint32_t>(args.sf_offset / 16), args.ring_rows, args.room, 0, 0, nullptr);
    }
    const uint64_t start = global_timer_ns();
    op.wait_headers(header);
    if (args.is_cached && args.wait_stats != 0 && blockIdx.x == 0 && threadIdx.x < num_ranks) {
        pointer<int64_t>(args.wait_stats)[threadIdx.x] += static_cast<int64_t>((global_timer_ns() - start) / 1000);
    }
    if (args.is_cached) {
        op.compare_headers(header);
    } else if (threadIdx.x < num_ranks) {
        op.wait(reinterpret_cast<uint64_t*>(op.transport.local(op.ready_at(threadIdx.x))), op.epoch, 0, threadIdx.x);
    }
    if (threadIdx.x == 0) *num_passes = 1;
    __syncthreads();
    for (uint32_t rank = threadIdx.x; rank < num_ranks; rank += blockDim.x) {
        const uint32_t* theirs = header + rank * kHeaderWords;
        const int32_t* psum = pointer<const int32_t>(args.psum_ranks);
        const bool is_self = rank == op.window.rank, is_cast = args.sf_format != kSfNone;
        const bool is_staged = theirs[kHeaderRing] != kNoEntry || args.num_sf != 0;
        Source& source = sources[rank];
        source.ring = theirs[kHeaderRing];
        source.rows = op.transport.peer_ptr(rank, uint64_t{theirs[kHeaderRows]} * 16);
        source.sf = op.transport.peer_ptr(rank, uint64_t{theirs[kHeaderSf]} * 16);
        source.flags = is_staged ? op.flag_of(rank, 0) : nullptr;
        source.is_direct_sf = 0;
        if (is_self && !is_cast) {
            source.ring = kNoEntry;
            source.rows = pointer<const uint8_t>(args.x);
            source.flags = nullptr;
            source.is_direct_sf = 1;
        }
        source.first_row = rank == 0 ? 0 : psum[rank - 1];
        source.num_rows = psum[rank] - source.first_row;
        const uint8_t* metadata = op.transport.local(op.metadata_at(rank));
        source.tokens = reinterpret_cast<const uint32_t*>(metadata);
        source.entries = source.tokens + args.metadata_rows;
        source.weights = reinterpret_cast<const float*>(source.entries + uint64_t{args.metadata_rows} * args.num_topk);
        atomicMax(num_passes, ceil_div(max_of(theirs[kHeaderTokens], 1u), source.ring));
    }
    __syncthreads();
    return !op.failed();
}

// Rows at their destination were counted from this source's first; now its first row there is known.
__device__ void finish_dst_rows(const Operation& op, const DispatchArgs& args, uint32_t* first_row) {
    const uint32_t num_ranks = op.window.num_ranks;
    for (uint32_t receiver = threadIdx.x; receiver < num_ranks; receiver += blockDim.x) {
        uint32_t base = 0;
        for (uint32_t source = 0; source < op.window.rank; ++source) {
            const uint64_t at = op.matrix_at(source) + receiver * 8;
            base += word_value(load_acquire_sys(reinterpret_cast<uint64_t*>(op.transport.local(at))));
        }
        first_row[receiver] = base;
    }
    __syncthreads();
    const uint64_t total = uint64_t{args.num_tokens} * args.num_slots;
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < total; i += gridDim.x * blockDim.x) {
        const int32_t rank = pointer<const int32_t>(args.dst_rank)[i];
        if (rank >= 0) pointer<int32_t>(args.dst_row)[i] += static_cast<int32_t>(first_row[rank]);
    }
}

// Rows nothing arrives in: mark the compact tail (CONTRACT, 'Tails').
__device__ void mark_tail(const Operation& op, const DispatchArgs& args, bool is_expanded) {
    const uint64_t begin = pointer<const int32_t>(args.psum_ranks)[op.window.num_ranks - 1];
    const uint64_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (uint64_t row = begin + first; row < args.num_compact_rows; row += step) {
        pointer<int32_t>(args.recv_src_token)[row] = -1;
    }
    const uint64_t end = uint64_t{args.num_compact_rows} * args.num_topk;
    for (uint64_t i = begin * args.num_topk + first; i < end; i += step) {
        if (is_expanded) {
            pointer<int32_t>(args.expanded_row)[i] = -1;
        } else {
            pointer<int64_t>(args.recv_topk_idx)[i] = -1;
            if (args.recv_topk_weights) pointer<float>(args.recv_topk_weights)[i] = 0.0f;
        }
    }
}

// Rows between experts and after the last one: weight 0; the former all zero if asked for. One CTA per expert at a time.
__device__ void clear_padding(const Operation& op, const DispatchArgs& args, uint32_t num_local) {
    const uint32_t* start = pointer<const uint32_t>(op.window.scratch);
    float* weights = pointer<float>(args.recv_topk_weights);
    for (uint32_t expert = blockIdx.x; expert < num_local; expert += gridDim.x) {
        const uint32_t count = pointer<const uint32_t>(args.counts_out)[expert];
        const uint64_t begin = start[expert] + count, end = start[expert] + align_up(count, args.alignment);
        const uint64_t tail_end = expert + 1 == num_local ? args.num_rows : end;
        if (weights != nullptr) {
            for (uint64_t row = begin + threadIdx.x; row < tail_end; row += blockDim.x) weights[row] = 0.0f;
        }
        if (!args.do_zero_padding) continue;
        const Vec16 zero = {{0, 0, 0, 0}};
        const uint64_t vecs_per_row = args.cut.row_bytes / sizeof(Vec16);
        for (uint64_t i = begin * vecs_per_row + threadIdx.x; i < end * vecs_per_row; i += blockDim.x) {
            pointer<Vec16>(args.recv_x)[i] = zero;
        }
        for (uint64_t i = begin * args.num_sf + threadIdx.x; i < end * args.num_sf; i += blockDim.x) {
            pointer<uint32_t>(args.recv_sf)[i] = 0;
        }
    }
}

template <bool kExpanded>
__device__ void dispatch(const DispatchArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ PipeBarriers barriers;
    __shared__ Source sources[kMaxRanks];
    __shared__ uint32_t header[kMaxRanks * kHeaderWords];
    __shared__ uint32_t first_row[kMaxRanks], num_passes;
    const Operation op(args.window);
    const uint32_t num_local = args.num_topk ? args.num_experts / op.window.num_ranks : 0;
    const uint32_t warp = warp_index(), num_stagers = args.cut.num_stage_warps;
    WarpPipe::init(barriers);
    // Everyone must have decided alike before anyone leaves: only CTA 0 of notify sets the error, and it is done.
    if (!op.failed() && find_sources(op, args, sources, header, &num_passes)) {
        if (!args.is_cached) {
            finish_dst_rows(op, args, first_row);
            mark_tail(op, args, kExpanded);
            if constexpr (kExpanded) clear_padding(op, args, num_local);
        }
        WarpPipe pipe(shared, barriers, args.cut);
        if (num_stagers != 0) op.wait_readers();
        if (warp < num_stagers) {
            const uint32_t num_chunks = ceil_div(args.num_tokens, kFlagRows);
            stage_chunks(op, args, pipe, &op.control->next_stage, args.num_early_chunks, num_chunks);
        } else if (warp < args.cut.num_warps) {
            const uint32_t worker = (warp - num_stagers) * gridDim.x + blockIdx.x;
            Puller<kExpanded> puller{op, args, sources, pipe, worker, (args.cut.num_warps - num_stagers) * gridDim.x};
            puller.run(num_passes, pointer<const uint32_t>(op.window.scratch), num_local);
        }
    }
    op.leave(true, args.is_in_window != 0);
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
