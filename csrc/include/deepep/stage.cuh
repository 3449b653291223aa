// Publishing a source's rows: into the own window, a few at a time, each time with a flag in every peer's window.
#pragma once

#include <deepep/operation.cuh>
#include <deepep/pipe.cuh>
#include <deepep/cast_row.cuh>

namespace deepep {

// The next number of a counter, the same for all lanes of a warp.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
    uint32_t ticket = 0;
    if (lane_index() == 0) ticket = atomicAdd(counter, 1);
    return __shfl_sync(kFullMask, ticket, 0);
}

// One warp stages tokens [chunk * kFlagRows, ..).
__device__ inline void stage_chunk(const Operation& op, const DispatchArgs& args, WarpPipe& pipe, uint32_t chunk) {
    const uint32_t first = chunk * kFlagRows, num_rows = min_of(kFlagRows, args.num_tokens - first);
    const uint32_t lap = first / args.ring_rows, slot = first % args.ring_rows, lane = lane_index();
    uint8_t* rows = op.transport.local(args.rows_offset) + uint64_t{slot} * args.cut.row_bytes;
    uint8_t* sf_rows = op.transport.local(args.sf_offset) + uint64_t{slot} * args.sf_pitch;
    if (lap > 0) {
        for (uint32_t peer = lane; peer < op.window.num_ranks; peer += kWarpSize) {
            op.wait(op.credit_of(peer, lap - 1), op.epoch, 0, peer);
        }
        __syncwarp();
    }
    if (args.sf_format != kSfNone) {
        const uint64_t in_row = uint64_t{args.hidden} * 2;
        for (uint32_t i = 0; i < num_rows; ++i) {
            warp_cast_row(reinterpret_cast<Vec16*>(rows + uint64_t{i} * args.cut.row_bytes),
                          reinterpret_cast<uint32_t*>(sf_rows + uint64_t{i} * args.sf_pitch),
                          pointer<const Vec16>(args.x + (first + i) * in_row), args.hidden, args.sf_format);
        }
    } else {
        const uint32_t* sf = pointer<const uint32_t>(args.sf);
        for (uint32_t i = lane; i < num_rows * args.num_sf; i += kWarpSize) {
            const uint32_t row = i / args.num_sf, column = i % args.num_sf;
            reinterpret_cast<uint32_t*>(sf_rows + uint64_t{row} * args.sf_pitch)[column] =
                sf[int64_t{first + row} * args.sf_stride_token + int64_t{column} * args.sf_stride_column];
        }
        if (!args.is_in_window) {
            const uint8_t* x = pointer<const uint8_t>(args.x) + uint64_t{first} * args.cut.row_bytes;
            warp_copy_rows(
                pipe, args.cut, num_rows, [&](uint32_t i) { return x + uint64_t{i} * args.cut.row_bytes; },
                [&](uint32_t i) { return rows + uint64_t{i} * args.cut.row_bytes; });
        }
    }
    __syncwarp();
    for (uint32_t peer = lane; peer < op.window.num_ranks; peer += kWarpSize) {
        const uint64_t index = uint64_t{op.window.rank} * op.window.num_flags + slot / kFlagRows;
        fence_bulk();
        fence_sys();
        op.transport.release_signal(peer, op.window.flags + index * 8, make_word(op.epoch, lap));
    }
}

// A warp stages chunks [first, limit) as long as there are any; `counter` hands them out.
__device__ inline void stage_chunks(const Operation& op, const DispatchArgs& args, WarpPipe& pipe, uint32_t* counter,
                                    uint32_t first, uint32_t limit) {
    for (;;) {
        const uint32_t chunk = first + take_ticket(counter);
        if (chunk >= limit) return;
        stage_chunk(op, args, pipe, chunk);
    }
}

}  // namespace deepep
