// Publishing a source's rows: into the own window, a few at a time, each time with a flag in every peer's window.
#pragma once

#include <deepep/cast_row.cuh>
#include <deepep/operation.cuh>
#include <deepep/pipe.cuh>

namespace deepep {

// Chunks of kFlagRows tokens below `limit`, as `counter` hands them out until `*stop` is set; a Provider for Copier.
struct ChunkCopies {
    const Operation& op;
    const DispatchArgs& args;
    uint32_t* counter;
    uint32_t first, limit;
    const volatile uint32_t* stop;  // or null

    // The next chunk; at least `limit` if there is none.
    __device__ uint32_t take() const {
        uint32_t chunk = limit;
        if (lane_index() == 0 && (stop == nullptr || *stop == 0)) chunk = first + atomicAdd(counter, 1);
        return __shfl_sync(kFullMask, chunk, 0);
    }

    __device__ bool load(CopyJob& job) const {
        job.number = take();
        if (job.number >= limit) return false;
        const uint32_t token = job.number * kFlagRows;
        job.num_rows = min_of(kFlagRows, args.num_tokens - token);
        job.from = pointer<const uint8_t>(args.x) + uint64_t{token} * args.cut.row_bytes;
        job.ring = op.transport.local(args.rows_offset);
        job.first_slot = token % args.ring_rows;
        job.num_slots = args.ring_rows;
        job.sf_from = nullptr;
        if (args.sf_is_bulk) {
            job.sf_pitch = args.sf_pitch;
            job.sf_from_pitch = static_cast<uint64_t>(args.sf_stride_token) * 4;
            job.sf_from = pointer<const uint8_t>(args.sf) + token * job.sf_from_pitch;
            job.sf_ring = op.transport.local(args.sf_offset);
        }
        return true;
    }

    // Before slots are used again, every peer must be through with the lap before.
    __device__ void wait_lap(uint32_t chunk) const {
        const uint32_t lap = chunk * kFlagRows / args.ring_rows;
        if (lap == 0) return;
        for (uint32_t peer = lane_index(); peer < op.window.num_ranks; peer += kWarpSize) {
            op.wait(op.credit_of(peer, lap - 1), op.epoch, 0, peer);
        }
        __syncwarp();
    }

    __device__ bool waits(const CopyJob& job) const { return job.number * kFlagRows >= args.ring_rows; }

    __device__ void begin(const CopyJob& job) const {
        wait_lap(job.number);
        if (args.num_sf != 0 && !args.sf_is_bulk) copy_sf(job.number);
    }

    // Scale factors of any strides, by ordinary accesses.
    __device__ void copy_sf(uint32_t chunk) const {
        const uint32_t token = chunk * kFlagRows, num_rows = min_of(kFlagRows, args.num_tokens - token);
        uint8_t* rows = op.transport.local(args.sf_offset) + uint64_t{token % args.ring_rows} * args.sf_pitch;
        const uint32_t* sf = pointer<const uint32_t>(args.sf);
#pragma unroll 4
        for (uint32_t i = lane_index(); i < num_rows * args.num_sf; i += kWarpSize) {
            const uint32_t row = i / args.num_sf, column = i % args.num_sf;
            reinterpret_cast<uint32_t*>(rows + uint64_t{row} * args.sf_pitch)[column] =
                sf[int64_t{token + row} * args.sf_stride_token + int64_t{column} * args.sf_stride_column];
        }
    }

    __device__ void cast(uint32_t chunk) const {
        const uint32_t token = chunk * kFlagRows, num_rows = min_of(kFlagRows, args.num_tokens - token);
        const uint64_t in_row = uint64_t{args.hidden} * 2, slot = token % args.ring_rows;
        for (uint32_t i = 0; i < num_rows; ++i) {
            uint8_t* row = op.transport.local(args.rows_offset) + (slot + i) * args.cut.row_bytes;
            uint8_t* sf = op.transport.local(args.sf_offset) + (slot + i) * args.sf_pitch;
            warp_cast_row(reinterpret_cast<Vec16*>(row), reinterpret_cast<uint32_t*>(sf),
                          pointer<const Vec16>(args.x + (token + i) * in_row), args.hidden, args.sf_format);
        }
    }

    __device__ void publish(const CopyJob& job) const { raise_flags(job.number); }

    // After the warp has met: whatever its lanes wrote is there.
    __device__ void raise_flags(uint32_t chunk) const {
        const uint32_t token = chunk * kFlagRows;
        const uint64_t index = uint64_t{op.window.rank} * op.window.num_flags + token % args.ring_rows / kFlagRows;
        const uint64_t word = make_word(op.epoch, token / args.ring_rows);
        for (uint32_t peer = lane_index(); peer < op.window.num_ranks; peer += kWarpSize) {
            op.transport.release_signal(peer, op.window.flags + index * 8, word);
        }
    }
};

// A warp stages chunks [first, limit) as long as there are any.
__device__ inline void stage_chunks(const Operation& op, const DispatchArgs& args, WarpPipe& pipe, uint32_t* counter,
                                    uint32_t first, uint32_t limit, const volatile uint32_t* stop) {
    ChunkCopies chunks{op, args, counter, first, limit, stop};
    if (args.sf_format == kSfNone && !args.is_in_window) {
        Copier<ChunkCopies>{pipe, args.cut, chunks}.run();
        return;
    }
    for (CopyJob job; chunks.load(job);) {
        const uint32_t chunk = job.number;
        chunks.wait_lap(chunk);
        if (args.sf_format != kSfNone) {
            chunks.cast(chunk);
        } else {
            chunks.copy_sf(chunk);
        }
        __syncwarp();
        chunks.raise_flags(chunk);
    }
}

}  // namespace deepep
