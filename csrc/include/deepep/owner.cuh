// Combine at the owner of the rows: publish them for their homes, as they are or summed per token.
#pragma once

#include <deepep/reduce.cuh>
#include <deepep/stage.cuh>

namespace deepep {

// Rows [begin, end) of a home's segment whose tokens are staged together.
struct Batch {
    uint32_t home, begin, end;
    uint32_t first_row;  // of the segment
};

// Hands out batches in token order, homes side by side. Token order, not row order: a rank that waits for ring space has
// then staged all that the slowest home needs, so ranks cannot wait for each other in a circle.
struct BatchSource {
    const Operation& op;
    const CombineArgs& args;
    const uint32_t* header;
    uint32_t num_blocks;
    bool with_self;

    __device__ BatchSource(const Operation& o, const CombineArgs& a, const uint32_t* headers, bool self)
        : op(o), args(a), header(headers), num_blocks(0), with_self(self) {
        for (uint32_t rank = 0; rank < op.window.num_ranks; ++rank) {
            num_blocks = max_of(num_blocks, ceil_div(header[rank * kHeaderWords + kHeaderTokens], kPassTokens));
        }
    }

    // How many of n ascending tokens are below the limits, looked for around `guess`.
    __device__ static void bounds(const int32_t* tokens, uint32_t n, uint32_t guess, int low, int high, uint32_t& begin,
                                  uint32_t& end) {
        constexpr uint32_t kPerLane = 4, kWide = kPerLane * kWarpSize;
        const uint32_t base = guess > kWide / 2 ? min_of(guess - kWide / 2, n) : 0;
        uint32_t below_low = 0, below_high = 0;
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i) {
            const uint32_t at = base + i * kWarpSize + lane_index();
            const int token = at < n ? tokens[at] : 0x7fffffff;
            below_low += token < low;
            below_high += token < high;
        }
        below_low = __reduce_add_sync(kFullMask, below_low);
        below_high = __reduce_add_sync(kFullMask, below_high);
        begin = base + below_low;
        end = base + below_high;
        if ((base == 0 || below_low != 0) && (base + kWide >= n || below_high != kWide)) return;
        begin = lower_bound(tokens, n, low);
        end = lower_bound(tokens, n, high);
    }

    __device__ static uint32_t lower_bound(const int32_t* tokens, uint32_t n, int limit) {
        uint32_t first = 0;
        while (n > 0) {
            const uint32_t half = n / 2;
            if (tokens[first + half] < limit) {
                first += half + 1;
                n -= half + 1;
            } else {
                n = half;
            }
        }
        return first;
    }

    __device__ bool next(Batch& batch) {
        const uint32_t num_ranks = op.window.num_ranks;
        const int32_t* psum = pointer<const int32_t>(args.psum_ranks);
        for (;;) {
            const uint32_t ticket = take_ticket(&op.control->next_stage);
            const uint32_t block = ticket / num_ranks;
            if (block >= num_blocks) return false;
            batch.home = (ticket + op.window.rank) % num_ranks;
            const uint32_t num_tokens = header[batch.home * kHeaderWords + kHeaderTokens];
            if (block * kPassTokens >= num_tokens || (batch.home == op.window.rank && !with_self)) continue;
            batch.first_row = batch.home == 0 ? 0 : psum[batch.home - 1];
            const uint32_t num_rows = psum[batch.home] - batch.first_row;
            if (num_rows == 0) continue;
            const uint32_t guess = static_cast<uint32_t>(uint64_t{block} * kPassTokens * num_rows / num_tokens);
            bounds(pointer<const int32_t>(args.recv_src_token) + batch.first_row, num_rows, guess,
                   static_cast<int>(block * kPassTokens), static_cast<int>((block + 1) * kPassTokens), batch.begin,
                   batch.end);
            if (batch.begin < batch.end) return true;
        }
    }
};

// The ring of one home in the own window.
struct HomeRing {
    const Operation& op;
    const CombineArgs& args;

    __device__ uint32_t copies() const { return args.is_per_copy ? args.num_topk : 1; }
    __device__ uint8_t* row(uint32_t home, uint32_t index) const {
        const uint64_t slot = uint64_t{home} * args.ring_rows + index % args.ring_rows;
        return op.transport.local(args.rows_offset) + slot * copies() * args.cut.row_bytes;
    }
    __device__ float* weights(uint32_t home, uint32_t index) const {
        const uint64_t slot = uint64_t{home} * args.ring_rows + index % args.ring_rows;
        return reinterpret_cast<float*>(op.transport.local(args.weights_offset) + slot * args.weights_pitch);
    }
    // One lane: wait until the home is through with what the slot held a lap ago.
    __device__ void reclaim(const Batch& batch, uint32_t index) const {
        if (index < args.ring_rows) return;
        const int token = pointer<const int32_t>(args.recv_src_token)[batch.first_row + index - args.ring_rows];
        op.wait(op.credit_of(batch.home, static_cast<uint32_t>(token) / kPassTokens), op.epoch, 0, batch.home);
    }
    // One lane, after a __syncwarp that follows every write of the row.
    __device__ void raise_flag(uint32_t home, uint32_t index) const {
        const uint64_t at = uint64_t{op.window.rank} * op.window.num_flags + index % args.ring_rows;
        op.transport.release_signal(home, op.window.flags + at * 8, make_word(op.epoch, index / args.ring_rows));
    }
    // Weights of a compact row go beside it: its own K, or those of its expanded rows.
    __device__ void stage_weights(const Batch& batch, uint32_t index) const {
        if (args.topk_weights == 0) return;
        const uint64_t first = uint64_t{batch.first_row + index} * args.num_topk;
        const float* from = pointer<const float>(args.topk_weights);
        for (uint32_t k = lane_index(); k < args.num_topk; k += kWarpSize) {
            float weight = 0.0f;
            if (args.expanded_row == 0) {
                weight = from[first + k];
            } else {
                const int row = pointer<const int32_t>(args.expanded_row)[first + k];
                if (row >= 0) weight = from[row];
            }
            weights(batch.home, index)[k] = weight;
        }
    }
};

// Rows as they are; a Provider for Copier.
struct BatchCopies {
    const Operation& op;
    const CombineArgs& args;
    BatchSource source;
    HomeRing ring;

    __device__ BatchCopies(const Operation& o, const CombineArgs& a, const uint32_t* header)
        : op(o), args(a), source(o, a, header, false), ring{o, a} {}

    __device__ uint32_t first_row(uint32_t home) const {
        return home == 0 ? 0 : pointer<const uint32_t>(args.psum_ranks)[home - 1];
    }
    __device__ Batch batch_of(const CopyJob& job) const {
        return {job.group, job.number, job.number + job.num_rows, first_row(job.group)};
    }

    __device__ bool load(CopyJob& job) {
        Batch batch;
        if (!source.next(batch)) return false;
        job.number = batch.begin;
        job.group = batch.home;
        job.num_rows = batch.end - batch.begin;
        job.from = pointer<const uint8_t>(args.x) + uint64_t{batch.first_row + batch.begin} * args.cut.row_bytes;
        job.ring = ring.row(batch.home, 0);
        job.num_slots = args.ring_rows;
        job.first_slot = batch.begin % args.ring_rows;
        job.sf_from = nullptr;
        return true;
    }
    __device__ bool waits(const CopyJob& job) const { return job.number + job.num_rows > args.ring_rows; }
    __device__ void begin(const CopyJob& job) const {
        const Batch batch = batch_of(job);
        if (lane_index() < job.num_rows) ring.reclaim(batch, batch.begin + lane_index());
        __syncwarp();
        for (uint32_t index = batch.begin; index < batch.end; ++index) ring.stage_weights(batch, index);
    }
    __device__ void publish(const CopyJob& job) const {
        if (lane_index() < job.num_rows) ring.raise_flag(job.group, job.number + lane_index());
    }
};

// A warp stages batches until none are left.
__device__ inline void stage_batches(const Operation& op, const CombineArgs& args, WarpPipe& pipe,
                                     const uint32_t* header) {
    BatchCopies copies(op, args, header);
    if (!args.is_in_window && !args.is_per_copy) {
        Copier<BatchCopies>{pipe, args.cut, copies}.run();
        return;
    }
    const uint8_t* x = pointer<const uint8_t>(args.x);
    const uint64_t row_bytes = args.cut.row_bytes;
    Batch batch;
    while (copies.source.next(batch)) {
        const uint32_t lane = lane_index(), num_rows = batch.end - batch.begin;
        if (lane < num_rows) copies.ring.reclaim(batch, batch.begin + lane);
        __syncwarp();
        for (uint32_t index = batch.begin; index < batch.end; ++index) {
            copies.ring.stage_weights(batch, index);
            if (!args.is_per_copy) continue;
            const uint64_t first = uint64_t{batch.first_row + index} * args.num_topk;
            for (uint32_t k = 0; k < args.num_topk; ++k) {
                const int from = pointer<const int32_t>(args.expanded_row)[first + k];
                if (from >= 0) warp_copy(copies.ring.row(batch.home, index) + k * row_bytes, x + from * row_bytes, row_bytes);
            }
        }
        __syncwarp();
        if (lane < num_rows) copies.ring.raise_flag(batch.home, batch.begin + lane);
    }
}

// Sums the expanded rows of each compact row, in ascending top-k position, into the rings; a Provider for Reducer.
template <typename Type>
struct OwnerSums {
    const Operation& op;
    const CombineArgs& args;
    BatchSource source;
    HomeRing ring;
    Batch batch{0, 0, 0, 0};
    uint8_t* out = nullptr;

    __device__ OwnerSums(const Operation& o, const CombineArgs& a, const uint32_t* header)
        : op(o), args(a), source(o, a, header, true), ring{o, a} {}

    __device__ bool load(Job& job) {
        if (batch.begin == batch.end && !source.next(batch)) return false;
        job.clear();
        job.number = batch.begin++;
        const uint64_t first = uint64_t{batch.first_row + job.number} * args.num_topk;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t k = lane_index() + half * kWarpSize;
            const int row = k < args.num_topk ? pointer<const int32_t>(args.expanded_row)[first + k] : -1;
            if (row >= 0) job.row[half] = pointer<const uint8_t>(args.x) + uint64_t{static_cast<uint32_t>(row)} * args.cut.row_bytes;
        }
        job.settle();
        return true;
    }
    __device__ void start(const Job& job) {
        if (lane_index() == 0) ring.reclaim(batch, job.number);
        __syncwarp();
        out = ring.row(batch.home, job.number);
        ring.stage_weights(batch, job.number);
    }
    __device__ void begin(const Job&, uint32_t, float (&total)[Type::kPerVec]) const {
#pragma unroll
        for (int j = 0; j < Type::kPerVec; ++j) total[j] = 0.0f;
    }
    __device__ void write(const Job&, uint32_t vec, const Vec16& value) const {
        reinterpret_cast<Vec16*>(out)[vec] = value;
    }
    __device__ void finish(const Job& job) {
        __syncwarp();
        if (lane_index() == 0) ring.raise_flag(batch.home, job.number);
    }
};

}  // namespace deepep
