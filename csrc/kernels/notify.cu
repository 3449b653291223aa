// Dispatch, first half: who gets how many rows, where each lies, and which token it is.
//
// Counts per expert and rank are prefix sums over CTAs and warps, so places need no atomics. Every rank sends its counts
// as words, and each row's metadata into the receiver's window. While the counts travel and the CPU allocates, the CTAs
// publish rows.
#include <deepep/stage.cuh>
#include <deepep/walk.cuh>

namespace deepep {

// Where this rank's metadata goes at one peer.
struct Outbox {
    uint32_t* tokens;
    uint32_t* entries;
    float* weights;
};

// Walk one warp's tokens and count; with kPlace, also write where everything goes.
template <bool kPlace>
__device__ void walk_tokens(const Operation& op, const DispatchArgs& args, uint32_t begin, uint32_t end,
                            uint32_t* counters, const Outbox* outboxes) {
    const uint32_t num_experts = args.num_topk ? args.num_experts : 0, num_local = args.num_experts / op.window.num_ranks;
    const Choices choices{pointer<const int64_t>(args.topk_idx), pointer<const uint8_t>(args.is_token_in_rank),
                          args.num_slots, args.num_experts, op.window.num_ranks};
    Group group(args.num_slots);
    group.read(choices, begin, end);
    for (uint32_t first = begin; first < end; first += group.tokens_per_group) {
        group.number(choices, first, end, counters, counters + num_experts);
        if constexpr (kPlace) {
            float weight[2];
            uint32_t entry[2];
            bool is_used[2];
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t slot = group.slot + half * kWarpSize;
                const SlotPlace& here = group.place[half];
                is_used[half] = group.token < end && group.has_slot(half);
                if (!is_used[half]) continue;
                const uint64_t at = uint64_t{group.token} * args.num_slots + slot;
                if (kChecksIndices && args.num_topk) {
                    const int64_t chosen = pointer<const int64_t>(args.topk_idx)[at];
                    if (chosen < -1 || chosen >= args.num_experts) {
                        op.fail(kBadIndex, 0, op.window.rank, static_cast<uint32_t>(chosen), args.num_experts);
                    }
                }
                pointer<int32_t>(args.dst_rank)[at] = here.records ? here.rank : -1;
                pointer<int32_t>(args.dst_row)[at] = here.records ? static_cast<int>(here.in_rank) : -1;
                entry[half] = (here.expert % num_local) << kPositionBits | here.in_expert;
                weight[half] = args.topk_weights ? pointer<const float>(args.topk_weights)[at] : 0.0f;
            }
            for (uint32_t rank = 0; rank < op.window.num_ranks; ++rank) {
                const uint32_t row = group.row_for(static_cast<int>(rank));
                if (row == kNoEntry || !is_used[0]) continue;
                const Outbox& outbox = outboxes[rank];
                if (group.slot == 0) outbox.tokens[row] = group.token;
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half) {
                    const uint32_t slot = group.slot + half * kWarpSize;
                    if (slot >= args.num_topk || !is_used[half]) continue;
                    const uint64_t at = uint64_t{row} * args.num_topk + slot;
                    const bool is_there = group.place[half].rank == static_cast<int>(rank);
                    outbox.entries[at] = is_there ? entry[half] : kNoEntry;
                    if (args.topk_weights) outbox.weights[at] = is_there ? weight[half] : 0.0f;
                }
            }
        }
    }
}

// Exclusive prefix over this CTA's warps, in place; totals go to scratch.
__device__ void scan_warps(const Team& team, uint32_t* counters, uint32_t num_warps, uint32_t num_columns,
                           uint32_t* totals) {
    for (uint32_t column = team.index; column < num_columns; column += team.size) {
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
    for (uint32_t column = op.team.index; column < num_columns; column += op.team.size) {
        uint32_t earlier = 0, total = 0;
#pragma unroll 8
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
        for (uint32_t expert = op.team.index; expert < args.num_experts; expert += op.team.size) {
            op.transport.signal(expert / num_local, op.counts_at(rank) + expert % num_local * 8,
                                make_word(op.epoch, given == nullptr ? 0 : given[expert]));
        }
    }
}

// The last CTA to have sent its metadata says so to every peer.
__device__ void announce_metadata(const Operation& op) {
    __shared__ uint32_t is_last;
    op.team.sync();
    if (op.team.index == 0) {
        fence_sys();  // for the whole team: the barrier has put its writes before this
        is_last = add_acq_rel_gpu(&op.control->metadata, 1) == gridDim.x - 1;
    }
    op.team.sync();
    if (!is_last) return;
    for (uint32_t peer = op.team.index; peer < op.window.num_ranks; peer += op.team.size) {
        op.transport.release_signal(peer, op.window.ready + (op.bank * op.window.num_ranks + op.window.rank) * 8,
                                    make_word(op.epoch, 0));
    }
}

// CTA 0: everybody's headers and counts. Returns whether the operation can go on. shared: R*16 + R*R + E words, of which
// the last E are the counts of each local expert by source, [R, L].
__device__ bool receive_counts(const Operation& op, const DispatchArgs& args, uint32_t* shared) {
    const uint32_t num_ranks = op.window.num_ranks, num_local = args.num_experts / num_ranks, rank = op.window.rank;
    const Team& team = op.team;
    uint32_t* header = shared;
    uint32_t* matrix = shared + num_ranks * kHeaderWords;
    const uint64_t start = global_timer_ns();
    op.wait_headers(header);
    if (args.wait_stats != 0 && team.index < num_ranks) {
        pointer<int64_t>(args.wait_stats)[team.index] += static_cast<int64_t>((global_timer_ns() - start) / 1000);
    }
    op.compare_headers(header);
    if (op.has_failed()) return false;
    for (uint32_t i = team.index; i < num_ranks * (num_ranks + num_local); i += team.size) {
        const bool is_matrix = i < num_ranks * num_ranks;
        const uint32_t j = is_matrix ? i : i - num_ranks * num_ranks, width = is_matrix ? num_ranks : num_local;
        const uint32_t source = j / width;
        const uint64_t at = (is_matrix ? op.matrix_at(source) : op.counts_at(source)) + j % width * 8;
        uint64_t word = 0;
        op.wait_counted(reinterpret_cast<uint64_t*>(op.transport.local(at)), op.epoch, 0, source, word);
        matrix[i] = word_value(word);  // counts follow the matrix
    }
    team.sync();
    // Every rank sees who has too little room, so all of them stop.
    for (uint32_t receiver = team.index; receiver < num_ranks; receiver += team.size) {
        uint32_t arriving = 0;
        for (uint32_t source = 0; source < num_ranks; ++source) arriving += matrix[source * num_ranks + receiver];
        const uint32_t room = header[receiver * kHeaderWords + kHeaderRoom];
        if (arriving > room) op.fail(kOverflow, 0, receiver, arriving, room);
    }
    team.sync();
    if (op.has_failed()) return false;
    for (uint32_t receiver = team.index; receiver < num_ranks; receiver += team.size) {
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

// CTA 0, one warp: rows of each local expert and where those of each source begin. counts: [R, L] in shared.
__device__ void place_experts(const Operation& op, const DispatchArgs& args, const uint32_t* counts) {
    const uint32_t num_ranks = op.window.num_ranks, num_local = args.num_experts / num_ranks, lane = lane_index();
    uint32_t* expert_base = pointer<uint32_t>(op.window.scratch);
    uint32_t start = 0;
    for (uint32_t first = 0; first < num_local; first += kWarpSize) {
        const uint32_t expert = first + lane;
        uint32_t total = 0;
        if (expert < num_local) {
            for (uint32_t source = 0; source < num_ranks; ++source) total += counts[source * num_local + expert];
            if (args.is_exact) op.host_word(kHostMissing + 2 * num_ranks + 1 + expert, total);
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
                expert_base[source * num_local + expert] = base;
                base += counts[source * num_local + expert];
            }
            pointer<int32_t>(args.counts_out)[expert] = static_cast<int>(total);
            const uint32_t aligned_end = start + inclusive;
            pointer<uint32_t>(args.psum_experts)[expert] = args.is_expanded ? aligned_end - aligned + total : aligned_end;
            if (args.stats) pointer<int32_t>(args.stats)[expert] += static_cast<int>(total);
        }
        start += __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    }
    if (lane == 0 && args.is_expanded && !args.is_exact && start > args.num_rows) {
        op.fail(kOverflow, 0, op.window.rank, start, args.num_rows);
    }
}

// The warps that count. shared: histograms [num_walkers][experts, then ranks].
__device__ void count_and_place(const Operation& op, const DispatchArgs& args, uint32_t* shared, Outbox* outboxes) {
    const uint32_t num_columns = (args.num_topk ? args.num_experts : 0) + op.window.num_ranks;
    uint32_t* partial = pointer<uint32_t>(op.window.scratch) + args.num_experts;
    if (blockIdx.x == 0) {
        op.send_headers(args.header, args.num_tokens, static_cast<uint32_t>(args.rows_offset / 16),
                        static_cast<uint32_t>(args.sf_offset / 16), args.ring_rows, args.room, args.is_in_place, 0, nullptr);
    }
    for (uint32_t peer = op.team.index; peer < op.window.num_ranks; peer += op.team.size) {
        uint32_t* metadata = reinterpret_cast<uint32_t*>(op.transport.peer_ptr(peer, op.metadata_at(op.window.rank)));
        uint32_t* entries = metadata + args.metadata_rows;
        outboxes[peer] = {metadata, entries,
                          reinterpret_cast<float*>(entries + uint64_t{args.metadata_rows} * args.num_topk)};
    }
    for (uint32_t i = op.team.index; i < args.num_walkers * num_columns; i += op.team.size) shared[i] = 0;
    op.team.sync();

    const uint32_t warp = op.team.index / kWarpSize;
    const uint64_t tokens = args.num_tokens;
    const uint64_t cta_begin = tokens * blockIdx.x / gridDim.x, cta_end = tokens * (blockIdx.x + 1) / gridDim.x;
    const uint32_t begin = static_cast<uint32_t>(cta_begin + (cta_end - cta_begin) * warp / args.num_walkers);
    const uint32_t end = static_cast<uint32_t>(cta_begin + (cta_end - cta_begin) * (warp + 1) / args.num_walkers);
    uint32_t* own_counters = shared + warp * num_columns;
    walk_tokens<false>(op, args, begin, end, own_counters, outboxes);
    op.team.sync();
    scan_warps(op.team, shared, args.num_walkers, num_columns, partial + blockIdx.x * num_columns);
    if (!op.grid_barrier(1)) op.fail(kTimeout, 0, op.window.rank, 0, 0);
    add_earlier(op, args, shared, args.num_walkers, num_columns, partial);
    op.team.sync();
    walk_tokens<true>(op, args, begin, end, own_counters, outboxes);
    announce_metadata(op);
}

// CTA 0, some warps that will stage rows afterwards: take the counts in as soon as they are there, for the host waits.
__device__ void receive(const Operation& op, const DispatchArgs& args, uint32_t* shared) {
    if (receive_counts(op, args, shared) && op.team.index < kWarpSize) {
        const uint32_t num_ranks = op.window.num_ranks;
        place_experts(op, args, shared + num_ranks * (kHeaderWords + num_ranks));
    }
    op.team.sync();
    if (op.team.index == 0 && args.is_exact) {
        store_release_sys(pointer<uint64_t>(op.window.host) + kHostReady, make_word(op.window.ticket, 1));
    }
}

}  // namespace deepep

extern "C" __global__ void __launch_bounds__(768, 1) deepep_notify(const __grid_constant__ deepep::DispatchArgs args) {
    using namespace deepep;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ PipeBarriers barriers;
    __shared__ Outbox outboxes[kMaxRanks];
    __shared__ uint32_t is_counted;
    // Warps that count, warps that move rows; in CTA 0 some of the latter take the other ranks' counts in first.
    constexpr uint32_t kNumReceivers = 4 * kWarpSize;
    const uint32_t num_walking = args.num_walkers * kWarpSize, warp = warp_index();
    const bool is_walker = threadIdx.x < num_walking;
    const Team walkers{threadIdx.x, num_walking, 1};
    const Team others{threadIdx.x - num_walking, min_of(kNumReceivers, blockDim.x - num_walking), 2};
    const Operation op(args.window, is_walker ? walkers : others);
    WarpPipe::init(barriers);
    if (threadIdx.x == 0) is_counted = 0;
    __syncthreads();
    const uint32_t stage_bytes = args.cut.num_warps * args.cut.slots_per_warp * args.cut.slot_bytes;
    uint32_t* counters = reinterpret_cast<uint32_t*>(shared + stage_bytes);
    if (is_walker) {
        count_and_place(op, args, counters, outboxes);
        if (threadIdx.x == 0) *const_cast<volatile uint32_t*>(&is_counted) = 1;
    } else {
        if (blockIdx.x == 0 && others.index < others.size) receive(op, args, counters + args.num_counters);
        if (args.num_early_chunks != 0) {
            const uint32_t number = warp - args.num_walkers;
            WarpPipe pipe(shared + number * args.cut.slots_per_warp * args.cut.slot_bytes, barriers, number, args.cut);
            stage_chunks(op, args, pipe, &op.control->next_early, 0, args.num_early_chunks,
                         args.is_staging_shared ? &is_counted : nullptr);
        }
    }
    op.leave(false, false);
}
