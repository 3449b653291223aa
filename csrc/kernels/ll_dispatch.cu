// Low-latency dispatch: push each token once to every rank of its experts, into the slot [source][token] of the
// receiver, and lay rows out per local expert there. A block first sends its tokens, then its teams receive rows; the
// two phases may also be two launches. Where there are few tokens, blocks share a row; where there are many, rows that
// stay on this rank skip the window. All of a grid runs at once, since blocks wait for rows and counts of their own
// rank.
#include <deepep/ll_push.cuh>
#include <deepep/ll_receive.cuh>

namespace deepep {
namespace {

template <bool kFp8>
__device__ void run(const LlDispatchArgs& args, LlCall& call, uint32_t* table, uint32_t* counts) {
    __shared__ Arrivals from;
    const LlCommon& common = args.common;
    const Range range(args);
    const bool is_sending = (common.phases & kLlSend) != 0, is_receiving = (common.phases & kLlRecv) != 0;
    const bool has_tokens = is_sending && range.begin < range.end;
    Taker<kFp8> taker(args);
    const LlCall::Places places = call.find_places(common.window.dispatch_credits, common.call_epoch);
    from.init();
    if (is_sending) {
        const uint32_t num_earlier = range.part == 0 ? range.begin : 0;
        const uint32_t num_scanned = (range.is_publisher ? common.num_tokens : num_earlier) * common.shape.num_topk;
        ScanAt scan_at = find_scan(args, 0, num_scanned);
        ChoicesAt choices_at = find_choices(args, range.begin, range.end);
        HeldAt held_at = find_unit<kFp8>(args, range.begin, has_tokens ? range.first_unit : Range::kNone);
        scan_at.settle();
        choices_at.settle();
        held_at.settle();
        clear(args, table);
        await_previous_kernel();  // nothing was read before but the arguments
        const Scan scan = scan_at.load(args);
        Choices choices = choices_at.load(args);
        const Held held = held_at.load();
        call.prepare(places);
        count_experts(args, scan, num_scanned, table);
        find_owners(common.shape, choices);
        call.begin(common.call_epoch);
        if (range.is_publisher) {
            publish_counts(args, call, table);
            __syncthreads();
            if (has_tokens) clear(args, table);
        }
        send<kFp8>(args, call, range, held, choices, table, counts, from, [&] {
            taker.start_first(args, call);
            taker.load();
        });
    } else {
        await_previous_kernel();
        call.prepare(places);
        call.begin(common.call_epoch);
    }
    if (!is_receiving) return call.end();
    receive<kFp8>(args, call, taker, counts, from, args.keeps_own && has_tokens);
    if (common.wait_stats != 0) {
        __syncthreads();
        call.note_waits();
    }
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_dispatch_kernel(const __grid_constant__ deepep::LlDispatchArgs args) {
    using namespace deepep;
    extern __shared__ uint32_t tables[];  // [2, E]: of what is sent, and of what comes
    __shared__ LlShared shared;
    LlCall call(args.common, kLlDispatch, shared);
    if (args.sf_format == kSfNone) {
        run<false>(args, call, tables, tables + args.common.shape.num_experts);
    } else {
        run<true>(args, call, tables, tables + args.common.shape.num_experts);
    }
}
