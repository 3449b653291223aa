// The structs that host and device share (twins: deepep/cuda/arguments.py, compared by a unit test), and the map of the
// window. Addresses and byte offsets are 64 bits wide; every struct keeps its 8-byte members first.
#pragma once

#include <deepep/types.cuh>

namespace deepep {

constexpr int kMaxRanks = 64;
constexpr int kMaxTopk = 64;
constexpr uint32_t kNoEntry = 0xffffffffu;
constexpr uint32_t kPositionBits = 20;  // a metadata entry is local expert << 20 | position among its source's rows
constexpr uint32_t kFlagRows = 4;       // rows staged by dispatch that share a flag
constexpr uint32_t kPassTokens = 4;     // combine: tokens of a home that are staged together, and given back together

// What a rank says to every peer when an operation begins. The first kNumAgreed must be equal on all ranks.
enum Header : int {
    kHeaderOp = 0,  // which operation and layout
    kHeaderExperts,
    kHeaderSlots,
    kHeaderHidden,
    kHeaderDtype,
    kHeaderNumSf,
    kHeaderMaxTokens,
    kNumAgreed,
    kHeaderRefused = kNumAgreed,  // 1: this rank found its arguments wrong and will not take part
    kHeaderTokens,                // T
    kHeaderRows,                  // where its rows begin, 16 bytes; relative to the window
    kHeaderSf,                    // dispatch: scale factors; combine: weights; same unit
    kHeaderRing,                  // rows the ring holds, kNoEntry if rows lie side by side (not staged)
    kHeaderFirstRow,              // combine: this peer's first row in its compact rows
    kHeaderRoom,                  // dispatch: most rows it has room for, kNoEntry if any number
    kHeaderInPlace,               // 1 if all lies in the window in its order before the operation begins: nothing is flagged
    kHeaderWords = 16,
};

// Words of the host's status page; each is ticket << 32 | value. Behind the missing ranks [R] come, in an exact
// dispatch: rows received, rows sent to each rank [R], rows of each local expert [L].
enum HostWord : int {
    kHostCode = 0,
    kHostField = 1,
    kHostRank = 2,
    kHostTheirs = 3,
    kHostOurs = 4,
    kHostReady = 5,  // 1: the counts are there, or the code says why not
    kHostMissing = 8,
};

enum Code : uint32_t { kOk = 0, kTimeout = 1, kDisagree = 2, kOverflow = 3, kRefused = 4, kBadIndex = 5 };

// Own state, at offset 0 of the window; peers never look at it.
struct Control {
    uint32_t epoch;       // operations finished
    uint32_t error;       // Code of the running operation
    uint32_t arrivals;    // grid barrier
    uint32_t exits;       // CTAs that have left
    uint32_t next_early;  // tickets for staging in notify
    uint32_t next_stage;  // tickets for staging later
    uint32_t next_job;    // tickets for combine's tokens; dispatch: warps that have finished a pass
    uint32_t metadata;    // CTAs that have sent their metadata
};

// Where things are. Words and metadata have two banks, by parity of the epoch: whoever is in epoch e knows that every
// peer has begun e-1, so has finished e-2. The payload has one: an operation is over when every peer has said `done`.
struct Window {
    uint64_t peers;     // table for the Transport
    uint64_t host;      // status page, as the device sees it
    uint64_t scratch;   // own memory: partial histograms, then expert_base
    uint64_t timeout_ns;
    uint64_t header;    // [2][R][kHeaderWords] words
    uint64_t matrix;    // [2][R source][R receiver] words: rows sent
    uint64_t counts;    // [2][R source][max_local_experts] words
    uint64_t ready;     // [2][R] words: metadata of that source is here
    uint64_t done;      // [R] words: that peer has read all it wanted of us
    uint64_t flags;     // [R][num_flags] words: rows of that owner are staged
    uint64_t credits;   // [R][num_passes] words: that home has finished a pass
    uint64_t finished;  // [num_passes] u32, own: tokens of each pass finished
    uint64_t metadata;  // [2][R][metadata_bytes]
    uint64_t metadata_bytes;
    uint64_t payload;
    uint64_t payload_bytes;
    uint32_t rank, num_ranks;
    uint32_t max_local_experts, num_flags, num_passes;
    uint32_t ticket;  // marks what this launch writes to the host's page
};

// How a warp cuts rows for its shared-memory slots.
struct Cut {
    uint32_t row_bytes, piece_bytes, num_pieces;
    uint32_t slot_bytes, slots_per_warp, num_warps, num_stage_warps;
    uint32_t pad;
};

struct DispatchArgs {
    Window window;
    uint64_t x, sf;                    // source rows; scale factors or 0
    int64_t sf_stride_token, sf_stride_column;  // elements
    uint64_t topk_idx, topk_weights, is_token_in_rank, tokens_per_expert;
    uint64_t dst_rank, dst_row;        // [T, S] i32
    uint64_t rank_prefix_matrix, psum_ranks, counts_out;  // [R, R], [R], [L] i32
    uint64_t psum_experts;             // [L] i32: aligned start plus count if expanded, else the aligned end
    uint64_t stats, wait_stats;        // [L] i32, [R] i64 or 0
    uint64_t recv_x, recv_sf, recv_topk_idx, recv_topk_weights, recv_src_token, expanded_row;
    uint64_t rows_offset, sf_offset;   // of own published rows and scale factors, relative to the window
    uint32_t header[kNumAgreed];
    uint32_t num_tokens, num_slots, num_topk, num_experts, num_sf, sf_format, hidden;
    uint32_t ring_rows, sf_pitch, is_in_window, room, num_rows, num_compact_rows, alignment;
    uint32_t do_zero_padding, is_cached, is_exact, is_expanded, num_early_chunks, num_walkers, num_counters, metadata_rows;
    uint32_t sf_is_bulk, recv_sf_is_bulk;  // rows of scale factors whose addresses and sizes are multiples of 16
    uint32_t is_staging_shared;            // notify stages while it counts, the other kernel goes on
    uint32_t is_in_place;                  // rows and scale factors lie in the window already
    Cut cut;
};

struct CombineArgs {
    Window window;
    uint64_t x, topk_weights, out, out_weights, bias0, bias1;
    uint64_t topk_idx, dst_rank, dst_row, psum_ranks, recv_src_token, expanded_row;
    uint64_t rows_offset, weights_offset, wait_stats;
    uint32_t header[kNumAgreed];
    uint32_t num_tokens, num_slots, num_topk, num_local_experts;
    uint32_t ring_rows, weights_pitch, is_in_window, is_owner_only, is_per_copy;
    Cut cut;  // of rows to stage
};

struct BarrierArgs {
    Window window;
    uint32_t header[kNumAgreed];
    uint32_t is_refusal, is_close, pad;
};

__device__ __forceinline__ uint64_t make_word(uint32_t epoch, uint32_t value) {
    return static_cast<uint64_t>(epoch) << 32 | value;
}
__device__ __forceinline__ uint32_t word_epoch(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
__device__ __forceinline__ uint32_t word_value(uint64_t word) { return static_cast<uint32_t>(word); }

}  // namespace deepep
