// What cleaning the low-latency part of the window takes beside zeros: barriers of all ranks that take part, and a state at
// its beginning.
#include <deepep/ll_common.cuh>

namespace deepep {
namespace {

// By one block: a rank has arrived when its word is no longer what it was at the last barrier here.
__device__ void barrier(const LlCleanArgs& args, LlCall& call) {
    const LlShape& shape = args.common.shape;
    LlState* state = call.state;
    __syncthreads();
    if (threadIdx.x == 0) call.shared.deadline -= args.common.timeout_ns / 2;  // of two barriers
    if (threadIdx.x == 0) state->num_barriers += 1;
    __syncthreads();
    const uint32_t rank = threadIdx.x;
    if (rank < shape.num_ranks && !call.is_masked(rank)) {
        const uint64_t offset = args.common.window.state + 8 * (kLlBarrierWord + shape.rank);
        fence_sys();
        call.transport.signal(rank, offset, state->num_barriers);
        const uint64_t* word =
            reinterpret_cast<const uint64_t*>(call.transport.local(args.common.window.state)) + kLlBarrierWord + rank;
        uint64_t seen = load_acquire_sys(word);
        while (seen == state->last_barrier[rank] && !call.has_given_up(rank)) seen = load_acquire_sys(word);
        state->last_barrier[rank] = seen;
    }
    __syncthreads();
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads)
    ll_clean_kernel(const __grid_constant__ deepep::LlCleanArgs args) {
    using namespace deepep;
    __shared__ LlShared shared;
    await_previous_kernel();
    LlCall call(args.common, kLlClean, shared);
    call.prepare(args.common.window.dispatch_credits, 0);
    __syncthreads();
    if (args.resets) {
        uint32_t* counters = reinterpret_cast<uint32_t*>(call.state);
        if (counters + threadIdx.x < call.state->mask) counters[threadIdx.x] = 0;
        if (threadIdx.x < kLlMaxRanks) call.state->is_stale[threadIdx.x] = 0;
    }
    if (args.is_barrier) barrier(args, call);
}
