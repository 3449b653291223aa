// What low-latency dispatch and combine share: epochs and banks, bounded waits, teams of threads.
#pragma once

#include <deepep/ll_bits.cuh>
#include <deepep/transport.cuh>
#include <deepep/vec.cuh>

namespace deepep {

enum LlOp : uint32_t { kLlDispatch = 0, kLlCombine = 1, kLlClean = 2 };

constexpr uint32_t kLlThreads = 512;
constexpr uint32_t kLlBlocksPerSm = 1;
constexpr uint32_t kLlMinTeamThreads = 128;
constexpr uint32_t kLlMaxTeams = kLlThreads / kLlMinTeamThreads;
constexpr uint32_t kLlBanks = 2;                                  // of the window
constexpr uint32_t kCountingThread = kLlThreads - kWarpSize - 1;  // of a warp that has little else to do
constexpr uint32_t kFirstLooker = kLlThreads - kMostChoices;      // last threads look at ranks, first ones at tokens

// n / d where their product is less than 2^32. The host has made `magic` of d: 2^32 / d rounded up, 0 for 1.
__device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t magic) { return magic == 0 ? n : __umulhi(n, magic); }

__device__ __forceinline__ uint32_t tokens_of(uint32_t header) { return header & ~kHasWeights; }

__device__ __forceinline__ uint32_t owner_of(const LlShape& shape, uint32_t expert) {
    return divide(expert, shape.local_experts_magic);
}

// The same of a choice, -1 if there is none.
__device__ __forceinline__ int32_t rank_of(const LlShape& shape, int32_t expert) {
    return expert < 0 ? -1 : static_cast<int32_t>(owner_of(shape, expert));
}

// Tell the host what is wrong: first what the status says of it behind its first word, then that something is.
__device__ __forceinline__ void tell_host(const LlCommon& args, uint32_t problem, uint32_t index, uint32_t value) {
    uint64_t* status = pointer<uint64_t>(args.status);
    store_relaxed_sys(status + 1 + index, value);
    store_release_sys(status, problem);
}

__device__ __forceinline__ uint64_t ll_word(uint32_t epoch, uint32_t value) {
    return static_cast<uint64_t>(epoch) << 32 | value;
}

// What every thread of a block wants to know at once; read in one go when the block starts, then kept in shared memory.
struct LlShared {
    uint64_t peers[kMostChoices];
    uint32_t mask[kMostChoices];
    uint32_t waited_us[kMostChoices];  // longest wait of this block for each rank, where statistics are asked for
    uint64_t deadline;
    uint32_t epoch;
};

// Threads that work on one row together, with a barrier of their own.
struct Team {
    uint32_t threads, index, thread;  // size, which of the block, place inside

    __device__ explicit Team(uint32_t team_threads)
        : threads(team_threads),
          index(threadIdx.x >> log2_of(team_threads)),
          thread(threadIdx.x & (team_threads - 1)) {}

    __device__ static uint32_t log2_of(uint32_t power) { return 31 - __clz(static_cast<int>(power)); }

    // Lanes may come here one by one, out of waits of their own.
    __device__ void sync() const { sync_threads(index + 1, threads); }
    // The same, and whether it is so for any thread.
    __device__ bool any(bool is_so) const { return any_thread(index + 1, threads, is_so); }
    __device__ uint32_t global_index() const { return blockIdx.x * per_block() + index; }
    __device__ uint32_t per_block() const { return kLlThreads >> log2_of(threads); }
    __device__ uint32_t global_count() const { return gridDim.x * per_block(); }
};

// One operation under way, as one thread sees it.
struct LlCall {
    const LlCommon& args;
    const LlOp op;
    LlShared& shared;
    const Transport transport;
    LlState* state;
    uint32_t epoch;

    __device__ LlCall(const LlCommon& common, LlOp operation, LlShared& block)
        : args(common),
          op(operation),
          shared(block),
          transport(reinterpret_cast<uint64_t>(block.peers), common.shape.rank, common.shape.num_ranks),
          state(pointer<LlState>(common.own_base + common.window.state)) {}

    // The rank that a thread looks at when a block starts; of most threads a number that no rank has.
    __device__ static uint32_t looks_at() { return threadIdx.x - kFirstLooker; }

    // What prepare() looks at, known before the kernel's turn. `credits` is where ranks say that they are through with
    // what the bank held before.
    struct Places {
        const uint64_t *credit, *peer;
        uint64_t credits, call_epoch;
    };
    __device__ __forceinline__ Places find_places(uint64_t credits, uint64_t call_epoch) {
        const uint64_t* credit = pointer<const uint64_t>(args.own_base + credits) + looks_at();
        const uint64_t* peer = pointer<const uint64_t>(args.peer_table) + looks_at();
        settle(credit);
        settle(peer);
        settle(state);
        return {credit, peer, credits, call_epoch};
    }

    // Start: issue all loads that nothing depends on, in one trip, and, where the launch sends, wait until every rank
    // is through with what the bank held before. The barrier of begin() then covers it all.
    __device__ void prepare(const Places& at) const {
        prepare_epoch(at.call_epoch);
        prepare_ranks(at);
    }
    __device__ void prepare_epoch(uint64_t call_epoch) const {
        constexpr uint32_t kEpochThread = 3 * kWarpSize;  // neither among a team's first threads nor a looker
        static_assert(kEpochThread < kFirstLooker && kEpochThread % kLlMinTeamThreads >= kMostChoices, "it has time");
        if (threadIdx.x == kEpochThread && args.phases != 0) shared.epoch = load_epoch(call_epoch);
    }
    __device__ void prepare_ranks(const Places& at) const {
        if (threadIdx.x == kFirstLooker) shared.deadline = global_timer_ns() + args.timeout_ns;
        const uint32_t rank = looks_at();
        if (rank >= args.shape.num_ranks) return;
        const bool is_sending = (args.phases & kLlSend) != 0, is_publisher = is_sending && is_first_block();
        const uint64_t* word = at.credit;
        const uint64_t peer = load_relaxed_gpu(at.peer);
        // In this order: a launch beside this one that gives up sets the mask first.
        const uint32_t is_stale = load_relaxed_gpu(&state->is_stale[rank]);
        uint32_t mask = load_relaxed_gpu(&state->mask[rank]);
        static_assert(kLlBanks == 2, "of each bank: what this rank is told, and what it has to tell");
        const uint64_t seen = load_relaxed_sys(word), seen_next = load_relaxed_sys(word + args.window.bank_stride / 8);
        Uses uses[kLlBanks] = {};
        if (is_publisher) uses[0] = load_uses(0), uses[1] = load_uses(1);
        const uint32_t now = load_epoch(at.call_epoch);
        const uint64_t credit = now % kLlBanks == 0 ? seen : seen_next;
        if ((mask | is_stale) != 0) {
            if (mask != 0) {
                state->is_stale[rank] = 1;
            } else if (args.phases != 0) {
                tell_host(args, kLlNotCleaned, rank, 1);
                mask = 1;
            }
        }
        shared.peers[rank] = peer;
        shared.mask[rank] = mask;
        shared.waited_us[rank] = 0;
        if (!is_sending || mask != 0) return;
        // First tell, then wait: a rank may wait for what only this launch tells it.
        if (is_publisher) {
#pragma unroll
            for (uint32_t b = 0; b < kLlBanks; ++b) {
                // Blocks of a combine may have ended before this one starts, hence "at least".
                if (static_cast<int32_t>(uses[b].read - uses[b].readers) < 0) continue;
                const uint64_t told = at.credits + b * args.window.bank_stride + 8 * args.shape.rank;
                transport.signal(rank, told, ll_word(uses[b].last, 0));
            }
        }
        const uint32_t last = static_cast<uint32_t>(credit >> 32);
        if (!is_free(now, last)) await_credit(rank, now, word + now % kLlBanks * (args.window.bank_stride / 8));
    }

    // Once all threads of the block are through with prepare().
    __device__ void begin(uint64_t call_epoch) {
        __syncthreads();
        epoch = shared.epoch;
        if (threadIdx.x != kCountingThread) return;
        if (args.phases & kLlSend) {
            const uint32_t share = kLlStart / gridDim.x;
            atomicAdd(reinterpret_cast<unsigned long long*>(&state->starts[op]),
                      static_cast<unsigned long long>(is_first_block() ? kLlStart - share * (gridDim.x - 1) : share));
        }
        if (!is_first_block()) return;
        if (args.phases & kLlRecv) {
            announce_readers();
        } else {
            *pointer<uint32_t>(call_epoch) = epoch;
        }
    }

    __device__ static bool is_first_block() { return blockIdx.x == 0; }
    __device__ static bool is_last_block() { return blockIdx.x == gridDim.x - 1; }

    // The next one, or that of the call whose second phase this is; of no use to an operation without phases.
    __device__ uint32_t load_epoch(uint64_t call_epoch) const {
        const uint64_t started = load_relaxed_gpu(&state->starts[op % kLlClean]);
        if (args.phases == kLlRecv) return load_relaxed_gpu(pointer<const uint32_t>(call_epoch));
        return static_cast<uint32_t>(started / kLlStart) + 1;
    }

    // The last use of a bank that was to be read, and how many blocks, or teams of dispatch, were to and did.
    struct Uses {
        uint32_t last, readers, read;
    };
    __device__ Uses load_uses(uint32_t b) const {
        return {load_relaxed_gpu(&state->read_epoch[op][b]), load_relaxed_gpu(&state->num_readers[op][b]),
                load_relaxed_gpu(&state->num_read[op][b])};
    }

    __device__ void announce_readers() const {
        // First that there are readers, then of what: a launch beside this one may look at both.
        const uint32_t per_block = op == kLlDispatch ? Team(args.team_threads).per_block() : 1;
        atomicAdd(&state->num_readers[op][epoch % kLlBanks], gridDim.x * per_block);
        state->read_epoch[op][epoch % kLlBanks] = epoch;
    }

    // Whether a rank whose last credit for the bank of epoch `now` is this one is through with what it held before.
    __device__ static bool is_free(uint32_t now, uint32_t last) {
        return now <= kLlBanks || static_cast<int32_t>(last + kLlBanks - now) >= 0;
    }

    // By each thread for one rank: wait until it is through with what the bank of epoch `now` held before. Others wait
    // for this rank meanwhile, so only half of the time; then there is all of it again for the ranks that are left.
    __device__ void await_credit(uint32_t rank, uint32_t now, const uint64_t* word) const {
        constexpr uint32_t kSpinsPerCheck = 64;
        const uint64_t deadline = global_timer_ns() + args.timeout_ns / 2;
        for (uint32_t spin = 1, last = 0;; ++spin) {
            last = static_cast<uint32_t>(load_relaxed_sys(word) >> 32);
            if (is_free(now, last)) return;
            if (spin % kSpinsPerCheck == 0 && gives_up(args, shared, op, rank, deadline)) {
                atomicMax(reinterpret_cast<unsigned long long*>(&shared.deadline),
                          static_cast<unsigned long long>(global_timer_ns() + args.timeout_ns));
                return;
            }
        }
    }

    // By one thread: a block, or a team of dispatch, has read all it will, and left zeros; nobody waits for its count.
    __device__ void count_reader() const { add_release_gpu(&state->num_read[op][epoch % kLlBanks], 1); }

    // By the whole block, which has read all it will. A dispatch that takes in rows ends by teams instead.
    __device__ void end() const {
        __syncthreads();
        let_next_kernel_start();
        if (!(args.phases & kLlRecv)) return;
        if (threadIdx.x == 0) count_reader();
        note_waits();
    }

    // By the whole block, once it waits no more.
    __device__ void note_waits() const {
        // Of the block that surely has something to wait for, if any has.
        const bool is_noted = op == kLlCombine ? is_last_block() : is_first_block();
        if (args.wait_stats != 0 && is_noted && threadIdx.x < args.shape.num_ranks) {
            pointer<uint64_t>(args.wait_stats)[threadIdx.x] += shared.waited_us[threadIdx.x];
        }
    }

    __device__ bool is_masked(uint32_t rank) const { return *(volatile uint32_t*)&shared.mask[rank] != 0; }

    // From bank 0 to the one in use, in bytes.
    __device__ uint64_t bank() const { return epoch % kLlBanks * args.window.bank_stride; }
    __device__ const uint64_t* own_word(uint64_t offset, uint64_t index) const {
        return pointer<const uint64_t>(args.own_base + offset + bank()) + index;
    }
    __device__ uint8_t* own_bytes(uint64_t offset) const { return pointer<uint8_t>(args.own_base + offset + bank()); }
    __device__ void signal(uint32_t rank, uint64_t offset, uint64_t index, uint32_t value) const {
        transport.signal(rank, offset + bank() + 8 * index, ll_word(epoch, value));
    }

    // Whether a word that was looked at is of this epoch.
    __device__ bool is_current(uint64_t seen) const { return static_cast<uint32_t>(seen >> 32) == epoch; }

    // Wait for a word of this epoch that `rank` writes. False if the rank is masked or did not arrive in time.
    // A rank that others wait for gives up early itself (`is_early`), see early_ns().
    __device__ bool wait(uint32_t rank, const uint64_t* word, uint32_t& value, bool is_early = false) const {
        constexpr uint32_t kSpinsPerCheck = 64;
        const uint64_t start = args.wait_stats != 0 ? global_timer_ns() : 0;
        uint64_t seen = load_relaxed_sys(word);
        for (uint32_t spin = 1; !is_current(seen); ++spin, seen = load_relaxed_sys(word)) {
            if (spin % kSpinsPerCheck == 0 && has_given_up(rank, is_early)) return false;
        }
        value = static_cast<uint32_t>(seen);
        if (args.wait_stats != 0) note_wait(rank, start);
        return true;
    }

    __device__ void note_wait(uint32_t rank, uint64_t start) const {
        atomicMax(&shared.waited_us[rank], static_cast<uint32_t>((global_timer_ns() - start) / 1000));
    }

    __device__ bool has_given_up(uint32_t rank, bool is_early = false) const {
        return gives_up(args, shared, op, rank, shared.deadline - (is_early ? early_ns() : 0));
    }

    // How much earlier. Of ranks that lose another one in dispatch, some may be that much ahead of others, which is
    // less than what they have for each other in combine.
    __device__ uint64_t early_ns() const { return op == kLlDispatch ? args.timeout_ns / 4 : args.timeout_ns / 2; }

    // Whether a rank is given up on, which is then masked and, unless ranks may leave, reported to the host. Every
    // later wait for it is over at once. Inlined, since around a call sums would not keep their registers.
    __device__ __forceinline__ static bool gives_up(const LlCommon& args, LlShared& shared, LlOp op, uint32_t rank,
                                                    uint64_t deadline) {
        volatile uint32_t* mask = &shared.mask[rank];
        if (*mask != 0) return true;
        LlState* state = pointer<LlState>(args.own_base + args.window.state);
        volatile uint32_t* lasting = &state->mask[rank];
        if (global_timer_ns() < deadline && *lasting == 0) return false;
        *mask = *lasting = 1;
        *(volatile uint32_t*)&state->is_stale[rank] = 1;
        if (!args.is_shrinkable) tell_host(args, op + 1, rank, 1);
        return true;
    }
};

constexpr uint32_t kListBarriers = 1 + kLlMaxTeams;  // of a team's first threads; those of teams come before
constexpr uint32_t kEndBarriers = kListBarriers;     // of teams of dispatch, which lists otherwise

}  // namespace deepep
