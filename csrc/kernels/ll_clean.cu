// What cleaning the low-latency part of the window takes beside zeros: barriers of all ranks that take part, and a
// state at its beginning.
#include <deepep/ll_common.cuh>

namespace deepep {
namespace {

// What a rank tells another one at a barrier: the number of its own, the other's number that it sees, if that is news,
// and the other's number at the last barrier that they both passed. 0 is no number.
struct BarrierWord {
    static constexpr uint32_t kBits = 21, kMask = (1u << kBits) - 1;
    uint32_t number, sees, met;
    __device__ BarrierWord(uint32_t own, uint32_t seen, uint32_t last) : number(own), sees(seen), met(last) {}
    __device__ explicit BarrierWord(uint64_t word)
        : number(word & kMask), sees(word >> kBits & kMask), met(word >> 2 * kBits & kMask) {}
    __device__ uint64_t packed() const {
        return static_cast<uint64_t>(met) << 2 * kBits | static_cast<uint64_t>(sees) << kBits | number;
    }
};

// By one block: wait until every rank is here. It is if it sees the number of this very barrier, or has passed it
// already and is at the next one. So a barrier that a rank once began alone is nobody's answer.
// tests/unit/test_low_latency_barrier.py plays this through.
__device__ void barrier(const LlCleanArgs& args, LlCall& call) {
    const LlShape& shape = args.common.shape;
    LlState* state = call.state;
    __syncthreads();
    if (threadIdx.x == 0) call.shared.deadline -= args.common.timeout_ns / 2;  // of two barriers
    if (threadIdx.x == 0) state->num_barriers += 1;
    __syncthreads();
    const uint32_t rank = threadIdx.x;
    if (rank < shape.num_ranks && !call.is_masked(rank)) {
        const uint32_t number = static_cast<uint32_t>(state->num_barriers % BarrierWord::kMask) + 1;
        const uint32_t met = state->met[rank];
        const uint64_t offset = args.common.window.state + 8 * (kLlBarrierWord + shape.rank);
        const uint64_t* word =
            reinterpret_cast<const uint64_t*>(call.transport.local(args.common.window.state)) + kLlBarrierWord + rank;
        uint32_t told = BarrierWord::kMask + 1;
        do {
            const BarrierWord seen(load_acquire_sys(word));
            const uint32_t news = seen.number != met ? seen.number : 0;
            if (news != told) call.transport.release_signal(rank, offset, BarrierWord(number, news, met).packed());
            told = news;
            const bool is_here = news != 0 && seen.sees == number, is_ahead = seen.met == number;
            if (!is_here && !is_ahead) continue;
            state->met[rank] = is_here ? news : 0;  // the number of one that is ahead is news at the next barrier
            break;
        } while (!call.has_given_up(rank));
    }
    __syncthreads();
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads)
    ll_clean_kernel(const __grid_constant__ deepep::LlCleanArgs args) {
    using namespace deepep;
    __shared__ LlShared shared;
    LlCall call(args.common, kLlClean, shared);
    const LlCall::Places places = call.find_places(args.common.window.dispatch_credits, 0);
    await_previous_kernel();
    call.prepare(places);
    __syncthreads();
    if (args.resets) {
        uint32_t* counters = reinterpret_cast<uint32_t*>(call.state);
        if (counters + threadIdx.x < call.state->mask) counters[threadIdx.x] = 0;
        if (threadIdx.x < args.common.shape.num_ranks && !call.is_masked(threadIdx.x)) {
            call.state->is_stale[threadIdx.x] = 0;
        }
    }
    if (args.is_barrier) barrier(args, call);
}
