// What low-latency dispatch and combine share: epochs and banks, bounded waits, teams of threads.
#pragma once

#include <deepep/ll_layout.cuh>
#include <deepep/transport.cuh>
#include <deepep/vec.cuh>

namespace deepep {

enum LlOp : uint32_t { kLlDispatch = 0, kLlCombine = 1, kLlClean = 2 };

constexpr uint32_t kLlThreads = 512;
constexpr uint32_t kLlBlocksPerSm = 2;
constexpr uint32_t kLlBanks = 2;  // of the window

__device__ __forceinline__ uint64_t ll_word(uint32_t epoch, uint32_t value) {
    return static_cast<uint64_t>(epoch) << 32 | value;
}

// The longest that this block waited for each rank, where statistics are asked for.
__device__ __forceinline__ uint32_t* ll_waited_ns() {
    __shared__ uint32_t waited[kLlMaxRanks];
    return waited;
}

// One operation under way, as one thread sees it.
struct LlCall {
    const LlCommon& args;
    const LlOp op;
    Transport transport;
    LlState* state;
    uint64_t deadline;
    uint32_t epoch;
    uint64_t bank;

    __device__ LlCall(const LlCommon& common, LlOp operation)
        : args(common),
          op(operation),
          transport(common.peer_table, common.shape.rank, common.shape.num_ranks),
          state(reinterpret_cast<LlState*>(transport.local(common.window.state))),
          deadline(global_timer_ns() + common.timeout_ns) {
        if (args.wait_stats != 0) {
            if (threadIdx.x < kLlMaxRanks) ll_waited_ns()[threadIdx.x] = 0;
            __syncthreads();
        }
    }

    __device__ bool is_masked(uint32_t rank) const { return *(volatile uint32_t*)&state->mask[rank] != 0; }
    __device__ const uint64_t* own_word(uint64_t offset, uint64_t index) const {
        return reinterpret_cast<const uint64_t*>(transport.local(offset + bank)) + index;
    }
    __device__ void signal(uint32_t rank, uint64_t offset, uint64_t index, uint32_t value) const {
        transport.signal(rank, offset + bank + 8 * index, ll_word(epoch, value));
    }

    // Give up on a rank: mask it where ranks may leave, else tell the host. Every later wait for it is over at once.
    __device__ void lose(uint32_t rank) const {
        if (args.is_shrinkable) {
            *(volatile uint32_t*)&state->mask[rank] = 1;
            return;
        }
        uint64_t* status = pointer<uint64_t>(args.status);
        store_relaxed_sys(status + 1 + rank, 1);
        store_release_sys(status, op + 1);
    }

    // Wait for a word of this epoch that `rank` writes. False if the rank is masked or did not arrive in time.
    __device__ bool wait(uint32_t rank, const uint64_t* word, uint32_t& value) const {
        constexpr uint32_t kSpinsPerCheck = 64;
        const uint64_t start = args.wait_stats != 0 ? global_timer_ns() : 0;
        for (uint32_t spin = 1;; ++spin) {
            const uint64_t seen = load_acquire_sys(word);
            if (static_cast<uint32_t>(seen >> 32) == epoch) {
                value = static_cast<uint32_t>(seen);
                if (args.wait_stats != 0) {
                    atomicMax(&ll_waited_ns()[rank], static_cast<uint32_t>(global_timer_ns() - start));
                }
                return true;
            }
            if (spin % kSpinsPerCheck == 0 && has_given_up(rank)) return false;
        }
    }

    // Wait until `rank` has read what was in this bank before.
    __device__ void wait_credit(uint32_t rank, const uint64_t* word) const {
        constexpr uint32_t kSpinsPerCheck = 64;
        if (epoch <= kLlBanks) return;
        for (uint32_t spin = 1;; ++spin) {
            const uint32_t last = static_cast<uint32_t>(load_acquire_sys(word) >> 32);
            if (static_cast<int32_t>(last + kLlBanks - epoch) >= 0) return;
            if (spin % kSpinsPerCheck == 0 && has_given_up(rank)) return;
        }
    }

    __device__ bool has_given_up(uint32_t rank) const {
        if (is_masked(rank)) return true;
        if (global_timer_ns() < deadline) return false;
        lose(rank);
        return true;
    }

    // Start a launch: a sending one counts the epoch up and notes it for a receiving one that may come later.
    __device__ static LlCall begin(const LlCommon& common, LlOp op, uint64_t call_epoch) {
        LlCall call(common, op);
        call.epoch = common.phases & kLlSend ? call.state->epoch[op] + 1 : *pointer<const uint32_t>(call_epoch);
        call.bank = (call.epoch % kLlBanks) * common.window.bank_stride;
        if (common.phases == kLlSend && blockIdx.x == 0 && threadIdx.x == 0) *pointer<uint32_t>(call_epoch) = call.epoch;
        return call;
    }

    // End a launch. The last block to come here moves the epoch on once all have read it, and tells the peers once all
    // have read what they sent.
    __device__ void end(uint64_t credits) const {
        __shared__ bool is_last;
        __syncthreads();
        if (args.wait_stats != 0 && args.phases & kLlRecv && blockIdx.x == 0 && threadIdx.x < args.shape.num_ranks) {
            pointer<uint64_t>(args.wait_stats)[threadIdx.x] += ll_waited_ns()[threadIdx.x] / 1000;
        }
        if (threadIdx.x == 0) {
            uint32_t* counter = args.phases & kLlRecv ? &state->num_received[op] : &state->num_sent[op];
            is_last = add_acq_rel_gpu(counter, 1) == gridDim.x - 1;
            if (is_last) *counter = 0;
            if (is_last && args.phases & kLlSend) state->epoch[op] = epoch;
        }
        __syncthreads();
        if (!is_last || !(args.phases & kLlRecv)) return;
        for (uint32_t rank = threadIdx.x; rank < args.shape.num_ranks; rank += blockDim.x) {
            if (is_masked(rank)) continue;
            fence_sys();
            signal(rank, credits, args.shape.rank, 0);
        }
    }
};

// Threads that work on one row together, with a barrier of their own.
struct Team {
    uint32_t threads, index, thread;  // size, which of the block, place inside

    __device__ explicit Team(uint32_t team_threads)
        : threads(team_threads), index(threadIdx.x / team_threads), thread(threadIdx.x % team_threads) {}

    __device__ void sync() const {
        asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(threads) : "memory");
    }
    __device__ uint32_t global_index() const { return blockIdx.x * per_block() + index; }
    __device__ uint32_t per_block() const { return kLlThreads / threads; }
    __device__ uint32_t global_count() const { return gridDim.x * per_block(); }
};

// Barriers 1..15 are for teams, so a block has at most 8 of them.
constexpr uint32_t kLlMinTeamThreads = 64;
constexpr uint32_t kLlMaxTeams = kLlThreads / kLlMinTeamThreads;

}  // namespace deepep
