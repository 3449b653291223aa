// What the host hands to the low-latency kernels; deepep/cuda/ll_structs.py mirrors it field by field.
#pragma once

#include <deepep/types.cuh>

namespace deepep {

constexpr uint32_t kLlMaxRanks = 64;
constexpr uint32_t kLlMaxTopk = 64;
constexpr uint32_t kLlDrawings = 4;  // twice as many as banks: two in use, two to make ready

// One per rank, at the start of its window; only its owner looks at it. [2] is per operation, [2][2] per bank, too.
struct LlState {
    uint64_t starts[2];               // of sending launches, in shares: all blocks of a launch together add kLlStart
    uint32_t read_epoch[2][2];        // which epoch was last received out of a bank
    uint32_t num_readers[2][2];       // blocks, or teams of dispatch, that were to do so since the window was cleaned
    uint32_t num_read[2][2];          // how many have done so: once both agree, the bank is free
    uint32_t num_drawn[kLlDrawings];  // tokens at home, or halves, that teams of combine drew in an epoch
    uint32_t mask[kLlMaxRanks];
    uint32_t is_stale[kLlMaxRanks];  // since a rank was masked, what it sent may lie where nobody took it
    uint64_t num_barriers;           // that this rank has begun
    uint32_t met[kLlMaxRanks];       // number of each rank at the last barrier passed with it, as it counts
};

// A block reads the count before it adds its share, so all blocks of a launch read the same whole number.
constexpr uint32_t kLlStart = 1u << 16;

// The barrier words, [R] from each rank, follow the state at this 64-bit word.
constexpr uint32_t kLlBarrierWord = 256;
static_assert(sizeof(LlState) <= 8 * kLlBarrierWord, "the state must end before the barrier words");

// Offsets of bank 0 inside every rank's window; bank 1 follows after bank_stride. Words are {epoch << 32 | value}.
struct LlWindow {
    uint64_t state;
    uint64_t headers;           // [R] from each source: number of its tokens, kHasWeights
    uint64_t counts;            // [R, L] rows from each source for each local expert
    uint64_t absent;            // [R, M] per token of each source: it does not come here
    uint64_t dispatch_credits;  // [R] that rank has read all that was dispatched to it in this epoch
    uint64_t weights;           // [R, M * K] per token of each source and choice: bits of the weight
    uint64_t combine_credits;   // [R]
    uint64_t dispatch_slots;    // [R, M] per token of each source: row, a word per scale factor, then K of LlChoice
    uint64_t combine_slots;     // [M, S] per own token and term: row
    uint64_t bank_stride;
};

constexpr uint32_t kHasWeights = 1u << 31;        // in a header: the choices carry weights
constexpr uint32_t kSkippedWeight = 0xffffffffu;  // in place of a weight: leave this choice out

// What a token tells its receiver of one of its choices.
struct alignas(16) LlChoice {
    int32_t expert;     // local number, -1 if the choice lives elsewhere
    uint32_t position;  // among the rows of this source for that expert
    float weight;
    uint32_t epoch;
};

struct LlShape {
    uint32_t rank, num_ranks, num_experts, num_local_experts, num_topk, hidden;
    uint32_t num_max_tokens;                                  // M
    uint32_t num_slots;                                       // S, terms a token has room for
    uint32_t slot_bytes;                                      // of a dispatch slot
    uint32_t choice_offset;                                   // of the choices inside it
    uint32_t local_experts_magic, ranks_magic, others_magic;  // for divide(); others: the ranks but this one
};

// In status[0], beside operations that gave up (LlOp + 1):
constexpr uint32_t kLlBadIndex = 4;    // an expert is out of range, [1 + R] says which
constexpr uint32_t kLlNotCleaned = 5;  // a rank, [1 + r], was taken back in, and the window was not cleaned since

enum LlPhase : uint32_t { kLlSend = 1, kLlRecv = 2 };

struct LlCommon {
    uint64_t peer_table;
    uint64_t own_base;  // of this rank's window
    uint64_t status;    // pinned: [0] what is wrong, [1 + r] rank r was not heard from
    uint64_t timeout_ns;
    LlWindow window;
    LlShape shape;
    uint32_t phases;
    uint32_t num_tokens;     // T of this rank
    uint32_t team_threads;   // threads that work on one row together: a power of two, whole warps
    uint32_t is_shrinkable;  // a rank that does not arrive is masked and not reported
    // From here to the last pointer of dispatch's or combine's own arguments the host writes at once.
    uint64_t wait_stats;  // [R] int64 microseconds, or null
    // Of one dispatch, for its second phase and its combines.
    uint64_t call_epoch;     // [1]
    uint64_t sources;        // [R] headers as they came
    uint64_t home_topk;      // [T, K] int32 experts as dispatched
    uint64_t routes;         // [R * M, K] int32 padded row of each choice, -1 elsewhere
    uint64_t route_weights;  // [R * M, K] float32
};

struct LlDispatchArgs {
    LlCommon common;
    uint64_t x;             // [T, H] bf16
    uint64_t topk_idx;      // [T, K] int64
    uint64_t topk_weights;  // [T, K] float32 or null
    uint64_t recv_x;        // [L, R * M, H] bf16 or e4m3
    uint64_t recv_sf;       // [L, num_sf, R * M] 4-byte elements, where there is a format
    uint64_t recv_count;    // [L] int32
    uint64_t src_info;      // [L, R * M] int32
    uint64_t layout_range;  // [L, R] int64
    uint64_t recv_stats;    // [L] int32, added to, or null
    uint32_t sf_format;
    uint32_t tokens_per_block;  // of those that send
    uint32_t keeps_own;         // rows that stay here skip the window, where one launch does everything
    uint32_t recv_parts;        // teams that share a row where it is laid out, a power of two
    uint32_t send_parts;        // blocks that share a row where it is sent, likewise
    uint32_t pad;
};

struct LlCombineArgs {
    LlCommon common;
    uint64_t x;              // [L, R * M, H] bf16
    uint64_t topk_idx;       // [T, K] int64, -1 leaves a choice out
    uint64_t topk_weights;   // [T, K] float32
    uint64_t out;            // [T, H] bf16
    uint64_t combine_epoch;  // [1] of this combine, for its second phase
    uint32_t is_per_copy;
    uint32_t use_logfmt;
    uint32_t has_sent_weights;        // this rank's dispatch carried the weights
    uint32_t keeps_own;               // sums of its own tokens do not go through the window
    uint32_t has_workers;             // a team's first warps only list and wait, the others add up
    uint32_t debt_parts, home_parts;  // teams that share a row where it is sent, and where it is added up
    uint32_t debt_parts_magic, home_parts_magic;
    uint32_t pad;
};

struct LlCleanArgs {
    LlCommon common;
    uint32_t is_barrier;  // wait for the other ranks
    uint32_t resets;      // bring the state back to its beginning, but for the mask
};

}  // namespace deepep
