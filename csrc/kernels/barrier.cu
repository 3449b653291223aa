// One CTA: wait for every rank; or end an operation that this rank leaves, so that epochs stay in step.
#include <deepep/operation.cuh>

extern "C" __global__ void __launch_bounds__(128, 1) deepep_barrier(const __grid_constant__ deepep::BarrierArgs args) {
    using namespace deepep;
    __shared__ uint32_t header[kMaxRanks * kHeaderWords];
    const Operation op(args.window, whole_cta());
    if (!args.is_close) {
        op.send_headers(args.header, 0, 0, 0, kNoEntry, kNoEntry, 0, args.is_refusal, nullptr);
        if (!args.is_refusal) {
            op.wait_headers(header);
            op.compare_headers(header);
        }
    }
    op.leave(true, false);
}
