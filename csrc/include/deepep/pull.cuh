// Fetching rows: each warp loads the rows that are its own from wherever they are published, and stores them where they
// belong, once per destination.
#pragma once

#include <deepep/stage.cuh>

namespace deepep {

// Rows of one source for this rank.
struct Source {
    const uint8_t* rows;      // of token 0, or of slot 0 of its ring
    const uint8_t* sf;        // likewise, or null
    const uint64_t* flags;    // that say what is staged, or null if everything is there
    const uint32_t* tokens;   // metadata: token of each row
    const uint32_t* entries;  // [rows, K]
    const float* weights;     // [rows, K]
    uint32_t ring, first_row, num_rows;
    uint32_t sf_pitch;
    uint32_t is_direct_sf;    // scale factors are read from the user's tensor, whatever its strides
};

// What a lane holds of a batch of rows.
struct Item {
    uint32_t source, index, row, token, slot;
};

template <bool kExpanded>
struct Puller {
    const Operation& op;
    const DispatchArgs& args;
    const Source* sources;
    WarpPipe& pipe;
    uint32_t worker, num_workers;
    const uint32_t* expert_base;  // [R, L]: first row of an expert's rows from a source
    uint32_t num_local;

    __device__ const uint64_t* flag_for(const Source& source, uint32_t slot) const {
        return source.flags + slot / kFlagRows;
    }

    // Destination rows of a compact row: lane k holds those of top-k positions k and k + 32; kNoEntry for none.
    __device__ void destinations(uint32_t from, uint32_t index, uint32_t row, uint32_t (&place)[2]) const {
        const uint32_t lane = lane_index();
        place[0] = lane == 0 ? row : kNoEntry;
        place[1] = kNoEntry;
        if constexpr (kExpanded) {
            const uint32_t* entries = args.is_cached
                                          ? pointer<const uint32_t>(args.expanded_row) + uint64_t{row} * args.num_topk
                                          : sources[from].entries + uint64_t{index} * args.num_topk;
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t k = lane + half * kWarpSize;
                const uint32_t entry = k < args.num_topk ? entries[k] : kNoEntry;
                place[half] = entry == kNoEntry || args.is_cached ? entry : place_of(entry, from);
            }
        }
        if constexpr (kChecksIndices) {
            for (int half = 0; half < 2; ++half) {
                if (place[half] == kNoEntry || place[half] < args.num_rows) continue;
                op.fail(kBadIndex, 0, from, place[half], args.num_rows);
                place[half] = kNoEntry;
            }
        }
    }

    __device__ uint32_t place_of(uint32_t entry, uint32_t from) const {
        return expert_base[from * num_local + (entry >> kPositionBits)] + (entry & ((1u << kPositionBits) - 1));
    }

    // The warp copies the scale factors of one row to each destination.
    __device__ void copy_sf(const uint32_t* sf, int64_t stride, const uint32_t (&place)[2]) const {
        for (int half = 0; half < (kExpanded ? 2 : 1); ++half) {
            for (uint32_t left = __ballot_sync(kFullMask, place[half] != kNoEntry); left != 0; left &= left - 1) {
                const uint64_t to = __shfl_sync(kFullMask, place[half], __ffs(left) - 1);
                for (uint32_t i = lane_index(); i < args.num_sf; i += kWarpSize) {
                    pointer<uint32_t>(args.recv_sf)[to * args.num_sf + i] = sf[static_cast<int64_t>(i) * stride];
                }
            }
        }
    }

    // Scale factors of one row that do not travel by bulk copies all the way. held: in shared memory, or null.
    __device__ void sf_of(const Source& source, uint32_t token, uint32_t slot, const uint8_t* held,
                          const uint32_t (&place)[2]) const {
        if (source.is_direct_sf) {
            copy_sf(pointer<const uint32_t>(args.sf) + int64_t{token} * args.sf_stride_token, args.sf_stride_column, place);
        } else if (held != nullptr) {
            copy_sf(reinterpret_cast<const uint32_t*>(held), 1, place);
        } else {
            copy_sf(reinterpret_cast<const uint32_t*>(source.sf + uint64_t{slot} * source.sf_pitch), 1, place);
        }
    }

    __device__ uint8_t* sf_address(uint32_t row) const {
        return pointer<uint8_t>(args.recv_sf) + uint64_t{row} * args.num_sf * 4;
    }
    __device__ uint8_t* place_address(uint32_t row) const {
        return pointer<uint8_t>(args.recv_x) + uint64_t{row} * args.cut.row_bytes;
    }

    __device__ void await(const Item& item, uint32_t of, uint32_t& ready) const {
        if (ready >> of & 1) return;
        const Source& source = sources[__shfl_sync(kFullMask, item.source, static_cast<int>(of))];
        const uint32_t slot = __shfl_sync(kFullMask, item.slot, static_cast<int>(of));
        const uint32_t token = __shfl_sync(kFullMask, item.token, static_cast<int>(of));
        const uint32_t peer = __shfl_sync(kFullMask, item.source, static_cast<int>(of));
        if (lane_index() == 0) op.wait(flag_for(source, slot), op.epoch, token / source.ring, peer);
        fence_bulk();
        __syncwarp();
        ready |= 1u << of;
    }

    // Move the rows of the batch that `todo` names, by bulk copies.
    __device__ void move_bulk(const Item& item, uint32_t todo, uint32_t ready) {
        const Cut& cut = args.cut;
        uint32_t to_load = todo, load_piece = 0, store_piece = 0;
        auto issue = [&] {
            const uint32_t of = __ffs(to_load) - 1;
            await(item, of, ready);
            const Source& source = sources[__shfl_sync(kFullMask, item.source, static_cast<int>(of))];
            const uint64_t slot = __shfl_sync(kFullMask, item.slot, static_cast<int>(of));
            bulk_wait_read();  // each lane's last store out of the slot began one load ago
            __syncwarp();
            const bool with_sf = load_piece == 0 && args.num_sf != 0 && !source.is_direct_sf;
            pipe.issue(source.rows + slot * cut.row_bytes + load_piece * cut.piece_bytes, piece_length(cut, load_piece),
                       source.sf + slot * source.sf_pitch, cut.piece_bytes, with_sf ? args.sf_pitch : 0);
            if (++load_piece == cut.num_pieces) {
                load_piece = 0;
                to_load &= to_load - 1;
            }
        };
        while (to_load != 0 && pipe.issued - pipe.used + 1 < pipe.num_slots) issue();
        while (todo != 0) {
            const int of = __ffs(todo) - 1;
            const uint32_t from = __shfl_sync(kFullMask, item.source, of), index = __shfl_sync(kFullMask, item.index, of);
            const Source& source = sources[from];
            uint32_t place[2];
            destinations(from, index, __shfl_sync(kFullMask, item.row, of), place);
            const uint32_t token = __shfl_sync(kFullMask, item.token, of), slot = __shfl_sync(kFullMask, item.slot, of);
            const uint8_t* held = pipe.front();
            const bool with_sf = store_piece == 0 && args.num_sf != 0;
            const bool is_bulk_sf = with_sf && args.recv_sf_is_bulk && !source.is_direct_sf;
            if (with_sf && !is_bulk_sf) sf_of(source, token, slot, held + cut.piece_bytes, place);
            if (to_load != 0) issue();
            for (int half = 0; half < (kExpanded ? 2 : 1); ++half) {
                if (place[half] == kNoEntry) continue;
                bulk_store(place_address(place[half]) + store_piece * cut.piece_bytes, held,
                           piece_length(cut, store_piece));
                if (is_bulk_sf) bulk_store(sf_address(place[half]), held + cut.piece_bytes, args.sf_pitch);
            }
            bulk_commit();
            ++pipe.used;
            if (++store_piece == cut.num_pieces) {
                store_piece = 0;
                todo &= todo - 1;
            }
        }
    }

    // The same by ordinary loads and stores.
    __device__ void move_plain(const Item& item, uint32_t todo, uint32_t ready) {
        for (; todo != 0; todo &= todo - 1) {
            const int of = __ffs(todo) - 1;
            await(item, static_cast<uint32_t>(of), ready);
            const uint32_t from = __shfl_sync(kFullMask, item.source, of), index = __shfl_sync(kFullMask, item.index, of);
            const Source& source = sources[from];
            const uint32_t token = __shfl_sync(kFullMask, item.token, of), slot = __shfl_sync(kFullMask, item.slot, of);
            uint32_t place[2];
            destinations(from, index, __shfl_sync(kFullMask, item.row, of), place);
            if (args.num_sf != 0) sf_of(source, token, slot, nullptr, place);
            for (int half = 0; half < (kExpanded ? 2 : 1); ++half) {
                for (uint32_t left = __ballot_sync(kFullMask, place[half] != kNoEntry); left != 0; left &= left - 1) {
                    const uint32_t to = __shfl_sync(kFullMask, place[half], __ffs(left) - 1);
                    warp_copy(place_address(to), source.rows + uint64_t{slot} * args.cut.row_bytes, args.cut.row_bytes);
                }
            }
        }
    }

    // All rows r with r % num_workers == worker, the sources side by side so that every link is busy from the start.
    __device__ void run(uint32_t num_passes) {
        const uint32_t num_ranks = op.window.num_ranks;
        uint32_t most = 0;
        for (uint32_t source = 0; source < num_ranks; ++source) most = max_of(most, sources[source].num_rows);
        const uint32_t num_steps = ceil_div(most, num_workers) * num_ranks;
        for (uint32_t pass = 0; pass < num_passes; ++pass) {
            for (uint32_t base = 0; base < num_steps; base += kWarpSize) {
                const uint32_t step = base + lane_index();
                Item item;
                item.source = (step + worker) % num_ranks;
                const Source& source = sources[item.source];
                const uint32_t first = (worker + num_workers - source.first_row % num_workers) % num_workers;
                item.index = first + step / num_ranks * num_workers;
                item.row = source.first_row + item.index;
                const bool is_valid = step < num_steps && item.index < source.num_rows;
                item.token = 0;
                if (is_valid) {
                    item.token = args.is_cached ? pointer<const uint32_t>(args.recv_src_token)[item.row]
                                                : source.tokens[item.index];
                }
                item.slot = item.token % source.ring;
                const bool is_mine = is_valid && (num_passes == 1 || item.token / source.ring == pass);
                const bool is_ready =
                    !is_mine || source.flags == nullptr ||
                    load_acquire_sys(flag_for(source, item.slot)) == make_word(op.epoch, item.token / source.ring);
                const uint32_t ready = __ballot_sync(kFullMask, is_ready);
                fence_bulk();
                const uint32_t todo = __ballot_sync(kFullMask, is_mine);
                if constexpr (kHasBulkCopies) {
                    move_bulk(item, todo, ready);
                } else {
                    move_plain(item, todo, ready);
                }
            }
            if (num_passes > 1) {
                __syncwarp();
                if (lane_index() == 0) op.finish_part(pass, num_workers);
            }
        }
        if constexpr (kHasBulkCopies) bulk_wait_done();
    }
};

// Write what the metadata says about the received rows into the user's tensors. A team of threads over the whole grid.
template <bool kExpanded>
__device__ void unpack_metadata(const Operation& op, const DispatchArgs& args, const Source* sources,
                                const uint32_t* expert_base, uint32_t num_local, uint32_t thread, uint32_t num_threads) {
    const uint32_t num_topk = args.num_topk;
    for (uint32_t from = 0; from < op.window.num_ranks; ++from) {
        const Source& source = sources[from];
        const uint64_t total = uint64_t{source.num_rows} * num_topk, first = uint64_t{source.first_row} * num_topk;
#pragma unroll 4
        for (uint32_t i = thread; i < source.num_rows; i += num_threads) {
            pointer<uint32_t>(args.recv_src_token)[source.first_row + i] = source.tokens[i];
        }
#pragma unroll 4
        for (uint64_t i = thread; i < total; i += num_threads) {
            const uint32_t entry = source.entries[i], expert = entry >> kPositionBits;
            const float weight = args.recv_topk_weights ? source.weights[i] : 0.0f;
            const bool is_here = entry != kNoEntry;
            if constexpr (kExpanded) {
                const uint32_t position = entry & ((1u << kPositionBits) - 1);
                const uint32_t place = is_here ? expert_base[from * num_local + expert] + position : kNoEntry;
                pointer<uint32_t>(args.expanded_row)[first + i] = place;
                if (is_here && args.recv_topk_weights) pointer<float>(args.recv_topk_weights)[place] = weight;
            } else {
                pointer<int64_t>(args.recv_topk_idx)[first + i] = is_here ? static_cast<int64_t>(expert) : -1;
                if (args.recv_topk_weights) pointer<float>(args.recv_topk_weights)[first + i] = weight;
            }
        }
    }
}

}  // namespace deepep
