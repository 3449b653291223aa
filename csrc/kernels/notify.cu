// Dispatch, first half: who gets how many rows, where each lies, and which token it is.
//
// Counts per expert and rank are prefix sums over CTAs and warps, so places need no atomics. Every rank sends its counts
// as words, and each row's metadata into the receiver's window. While the counts travel and the CPU allocates, the CTAs
// publish rows.
#include <deepep/stage.cuh>
#include <deepep/walk.cuh>

namespace deepep {

// Walk one warp's tokens and count; with kPlace, also write where everything goes.
template <bool kPlace>
__device__ void walk_tokens(const Operation& op, const DispatchArgs& args, uint32_t begin, uint32_t end,
                            uint32_t* counters, uint32_t capacity) {
    const uint32_t num_experts = args.num_topk ? args.num_experts : 0, num_local = args.num_experts / op.window.num_ranks;
    const Choices choices{pointer<const int64_t>(args.topk_idx), pointer<const uint8_t>(args.is_token_in_rank),
                          args.num_slots, args.num_experts, op.window.num_ranks};
    Group group(args.num_slots);
    for (uint32_t first = begin; first < end; first += group.tokens_per_group) {
        group.number(choices, first, end, counters, counters + num_experts);
        if constexpr (kPlace) {
            const bool is_used = group.token < end &&
                                 (group.num_halves == 2 || lane_index() < group.tokens_per_group * args.num_slots);
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                if (half >= group.num_halves) break;
                const uint32_t slot = group.slot + half * kWarpSize;
                const SlotPlace& here = group.place[half];
                if (is_used && slot < args.num_slots) {
                    const uint64_t at = uint64_t{group.token} * args.num_slots + slot;
                    pointer<int32_t>(args.dst_rank)[at] = here.records ? here.rank : -1;
                    pointer<int32_t>(args.dst_row)[at] = here.records ? static_cast<int>(here.in_rank) : -1;
                }
            }
            for (uint32_t rank = 0; rank < op.window.num_ranks; ++rank) {
                const uint32_t row = group.row_for(static_cast<int>(rank));
                if (!is_used || row >= capacity) continue;
                uint8_t* metadata = op.transport.peer_ptr(rank, op.metadata_at(op.window.rank));
                if (group.slot == 0) reinterpret_cast<uint32_t*>(metadata)[row] = group.token;
                uint32_t* entries = reinterpret_cast<uint32_t*>(metadata + uint64_t{capacity} * 4);
                float* weights = reinterpret_cast<float*>(entries + uint64_t{capacity} * args.num_topk);
    #pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                if (half >= group.num_halves) break;
                    const uint32_t slot = group.slot + half * kWarpSize;
                    if (slot >= args.num_topk) continue;
                    const SlotPlace& here = group.place[half];
                    const uint64_t at = uint64_t{row} * args.num_topk + slot;
                    const bool is_there = here.rank == static_cast<int>(rank);
                    entries[at] =
                        is_there ? (here.expert % num_local) << kPositionBits | here.in_expert : kNoEntry;
                    if (args.topk_weights) {
                        weights[at] =
                            is_there ? pointer<const float>(args.topk_weights)[uint64_t{group.token} * args.num_topk + slot]
                                     : 0.0f;
                    }
                }
            }
        }
    }
}

// CTA-wide: exclusive prefix over this CTA's warps, in place; totals go to scratch.
__device__ void scan_warps(uint32_t* counters, uint32_t num_warps, uint32_t num_columns, uint32_t* totals) {
    for (uint32_t column = threadIdx.x; column < num_columns; column += blockDim.x) {
        uint32_t running = 0;
        for (uint32_t warp = 0; warp < num_warps; ++warp) {
            const uint32_t count = counters[warp * num_columns + column];
            counters[warp * num_columns + column] = running;
            running += count;
        }
        totals[column] = running;
    }
}

// Add what earlier CTAs counted; CTA 0 sends the sums to whoever needs them.
__device__ void add_earlier(const Operation& op, const DispatchArgs& args, uint32_t* counters, uint32_t num_warps,
                            uint32_t num_columns, const uint32_t* partial) {
    const uint32_t num_ranks = op.window.num_ranks, num_experts = args.num_topk ? args.num_experts : 0;
    const uint32_t num_local = args.num_experts / num_ranks, rank = op.window.rank;
    for (uint32_t column = threadIdx.x; column < num_columns; column += blockDim.x) {
        uint32_t earlier = 0, total = 0;
        for (uint32_t cta = 0; cta < gridDim.x; ++cta) {
            const uint32_t count = partial[cta * num_columns + column];
            if (cta < blockIdx.x) earlier += count;
            total += count;
        }
        for (uint32_t warp = 0; warp < num_warps; ++warp) counters[warp * num_columns + column] += earlier;
        if (blockIdx.x != 0) continue;
        const uint64_t word = make_word(op.epoch, total);
        if (column < num_experts) {
            op.transport.signal(column / num_local, op.counts_at(rank) + column % num_local * 8, word);
        } else {
            for (uint32_t peer = 0; peer < num_ranks; ++peer) {
                op.transport.signal(peer, op.matrix_at(rank) + (column - num_experts) * 8, word);
            }
        }
    }
    if (blockIdx.x == 0 && num_experts == 0) {
        const int32_t* given = pointer<const int32_t>(args.tokens_per_expert);
        for (uint32_t expert = threadIdx.x; expert < args.num_experts; expert += blockDim.x) {
            op.transport.signal(expert / num_local, op.counts_at(rank) + expert % num_local * 8,
                                make_word(op.epoch, given == nullptr ? 0 : given[expert]));
        }
    }
}

// The last CTA to have sent its metadata says so to every peer.
__device__ void announce_metadata(const Operation& op) {
    __shared__ uint32_t is_last;
    fence_sys();
    __syncthreads();
    if (threadIdx.x == 0) is_last = add_acq_rel_gpu(&op.control->metadata, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (uint32_t peer = threadIdx.x; peer < op.window.num_ranks; peer += blockDim.x) {
        fence_sys();
        op.transport.release_signal(peer, op.window.ready + (op.bank * op.window.num_ranks + op.window.rank) * 8,
                                    make_word(op.epoch, 0));
    }
}

// CTA 0: everybody's headers and counts. Returns whether the operation can go on. shared: R*16 + R*R words.
__device__ bool receive_counts(const Operation& op, const DispatchArgs& args, uint32_t* shared) {
    const uint32_t num_ranks = op.window.num_ranks, num_local = args.num_experts / num_ranks, rank = op.window.rank;
    uint32_t* header = shared;
    uint32_t* matrix = shared + num_ranks * kHeaderWords;
    const uint64_t start = global_timer_ns();
    op.wait_headers(header);
    if (args.wait_stats != 0 && threadIdx.x < num_ranks) {
        pointer<int64_t>(args.wait_stats)[threadIdx.x] += static_cast<int64_t>((global_timer_ns() - start) / 1000);
    }
    if (op.failed()) return false;
    op.compare_headers(header);
    if (op.failed()) return false;
    for (uint32_t i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
        uint64_t word = 0;
        const uint64_t at = op.matrix_at(i / num_ranks) + i % num_ranks * 8;
        op.wait_counted(reinterpret_cast<uint64_t*>(op.transport.local(at)), op.epoch, 0, i / num_ranks, &word);
        matrix[i] = word_value(word);
    }
    for (uint32_t expert = threadIdx.x; expert < num_local; expert += blockDim.x) {
        for (uint32_t source = 0; source < num_ranks; ++source) {
            const uint64_t at = op.counts_at(source) + expert * 8;
            op.wait(reinterpret_cast<uint64_t*>(op.transport.local(at)), op.epoch, 0, source);
        }
    }
    __syncthreads();
    if (op.failed()) return false;
    // Every rank sees who has too little room, so all of them stop.
    if (threadIdx.x < num_ranks) {
        uint32_t arriving = 0;
        for (uint32_t source = 0; source < num_ranks; ++source) arriving += matrix[source * num_ranks + threadIdx.x];
        const uint32_t room = header[threadIdx.x * kHeaderWords + kHeaderRoom];
        if (arriving > room) op.fail(kOverflow, 0, threadIdx.x, arriving, room);
    }
    __syncthreads();
    if (op.failed()) return false;
    for (uint32_t receiver = threadIdx.x; receiver < num_ranks; receiver += blockDim.x) {
        uint32_t running = 0;
        for (uint32_t source = 0; source < num_ranks; ++source) {
            running += matrix[source * num_ranks + receiver];
            if (args.rank_prefix_matrix) {
                pointer<int32_t>(args.rank_prefix_matrix)[source * num_ranks + receiver] = static_cast<int>(running);
            }
            if (receiver == rank) pointer<int32_t>(args.psum_ranks)[source] = static_cast<int>(running);
        }
        if (args.is_exact) {
            op.host_word(kHostMissing + num_ranks + 1 + receiver, matrix[rank * num_ranks + receiver]);
            if (receiver == rank) op.host_word(kHostMissing + num_ranks, running);
        }
    }
    return true;
}

// CTA 0, one warp: rows of each local expert and where those of each source begin.
__device__ void place_experts(const Operation& op, const DispatchArgs& args) {
    const uint32_t num_ranks = op.window.num_ranks, num_local = args.num_experts / num_ranks, lane = lane_index();
    uint32_t* expert_base = pointer<uint32_t>(op.window.scratch);
    uint32_t start = 0;
    for (uint32_t first = 0; first < num_local; first += kWarpSize) {
        const uint32_t expert = first + lane;
        uint32_t total = 0;
        if (expert < num_local) {
            for (uint32_t source = 0; source < num_ranks; ++source) {
                const uint64_t* word = reinterpret_cast<uint64_t*>(op.transport.local(op.counts_at(source) + expert * 8));
                total += word_value(load_acquire_sys(word));
            }
        }
        const uint32_t aligned = align_up(total, args.alignment);
        uint32_t inclusive = aligned;
        for (int step = 1; step < kWarpSize; step *= 2) {
            const uint32_t below = __shfl_up_sync(kFullMask, inclusive, step);
            if (static_cast<int>(lane) >= step) inclusive += below;
        }
        if (expert < num_local) {
            uint32_t base = start + inclusive - aligned;
            for (uint32_t source = 0; source < num_ranks; ++source) {
                const uint64_t* word = reinterpret_cast<uint64_t*>(op.transport.local(op.counts_at(source) + expert * 8));
                expert_base[source * num_local + expert] = base;
                base += word_value(load_acquire_sys(word));
            }
            pointer<int32_t>(args.counts_out)[expert] = static_cast<int>(total);
            if (args.stats) pointer<int32_t>(args.stats)[expert] += static_cast<int>(total);
            if (args.is_exact) op.host_word(kHostMissing + 2 * num_ranks + 1 + expert, total);
        }
        start += __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    }
    if (lane == 0 && args.is_expanded && !args.is_exact && start > args.num_rows) {
        op.fail(kOverflow, 0, op.window.rank, start, args.num_rows);
    }
}

}  // namespace deepep

extern "C" __global__ void __launch_bounds__(512, 1) deepep_notify(const __grid_constant__ deepep::DispatchArgs args) {
    using namespace deepep;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ PipeBarriers barriers;
    const Operation op(args.window);
    // Histograms [num_walkers][experts, then ranks].
    uint32_t* counters = reinterpret_cast<uint32_t*>(shared);
    const uint32_t num_columns = (args.num_topk ? args.num_experts : 0) + op.window.num_ranks;
    uint32_t* partial = pointer<uint32_t>(op.window.scratch) + args.num_experts;
    WarpPipe::init(barriers);
    if (blockIdx.x == 0) {
        op.send_headers(args.header, args.num_tokens, static_cast<uint32_t>(args.rows_offset / 16),
                        static_cast<uint32_t>(args.sf_offset / 16), args.ring_rows,
                        args.room, 0, 0, nullptr);
    }
    for (uint32_t i = threadIdx.x; i < args.num_walkers * num_columns; i += blockDim.x) counters[i] = 0;
    __syncthreads();

    const uint32_t warp = warp_index();
    const uint64_t tokens = args.num_tokens;
    const uint64_t cta_begin = tokens * blockIdx.x / gridDim.x, cta_end = tokens * (blockIdx.x + 1) / gridDim.x;
    const uint32_t begin = static_cast<uint32_t>(cta_begin + (cta_end - cta_begin) * warp / args.num_walkers);
    const uint32_t end = static_cast<uint32_t>(cta_begin + (cta_end - cta_begin) * (warp + 1) / args.num_walkers);
    uint32_t* own_counters = counters + warp * num_columns;
    if (warp < args.num_walkers) walk_tokens<false>(op, args, begin, end, own_counters, 0);
    __syncthreads();
    scan_warps(counters, args.num_walkers, num_columns, partial + blockIdx.x * num_columns);
    __threadfence();
    if (!op.grid_barrier(1)) op.fail(kTimeout, 0, op.window.rank, 0, 0);
    add_earlier(op, args, counters, args.num_walkers, num_columns, partial);
    __syncthreads();
    if (warp < args.num_walkers) walk_tokens<true>(op, args, begin, end, own_counters, args.metadata_rows);
    announce_metadata(op);

    if (blockIdx.x == 0) {
        if (receive_counts(op, args, counters) && warp == 0) place_experts(op, args);
        fence_sys();
        __syncthreads();
        if (threadIdx.x == 0 && args.is_exact) {
            store_release_sys(pointer<uint64_t>(op.window.host) + kHostReady, make_word(op.window.ticket, 1));
        }
    }
    if (args.num_early_chunks != 0) {
        op.wait_readers();
        fence_bulk();  // slots overlay the histograms
        __syncthreads();
        WarpPipe pipe(shared, barriers, args.cut);
        if (warp < args.cut.num_warps && !op.failed()) {
            stage_chunks(op, args, pipe, &op.control->next_early, 0, args.num_early_chunks);
        }
    }
    op.leave(false, false);
}
