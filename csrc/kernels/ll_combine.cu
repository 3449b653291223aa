// Low-latency combine: the owner of a token's experts weighs and sums their rows, rounds once and pushes one row to the
// token's home (or, per copy, pushes every row as it is); the home adds up what arrives in the contract's order, its
// own rows straight from where they lie. Weights came with dispatch or, if not, are pushed to the owners first. Where
// there are few tokens teams share a row; where there are many, a team's first warps do what the others would wait for.
#include <deepep/ll_add_up.cuh>

namespace deepep {
namespace {

// What a thread loads before it knows anything: of its team's first debt, of the first token it adds up, and of the
// first weight that it tells.
struct Early {
    Choice debt;
    HomeChoice home;
    OwnWeight weight;
    __device__ Early(const LlCombineArgs& args, const Team& team) {
        if (args.common.phases & kLlSend) debt = load_first(args, team);
        const uint32_t first = divide(first_at_home(team), args.home_parts_magic);
        if (args.common.phases & kLlRecv) home = load_home(args, team, first);
        if (args.common.phases & kLlSend) weight = load_weight(args, global_thread());
    }
};

__device__ void run(const LlCombineArgs& args, const LlCall& call, const Team& team, const Headers& headers,
                    const Early& early, Vec16* own_sums) {
    __shared__ Terms debts_listed[kLlMaxTeams][2];
    __shared__ Home homes_listed[kLlMaxTeams][2];
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const bool is_sending = (args.common.phases & kLlSend) != 0, is_receiving = (args.common.phases & kLlRecv) != 0;
    Terms(&listed)[2] = debts_listed[team.index];
    Home(&homes)[2] = homes_listed[team.index];
    const auto list_first = [&] {
        if (is_receiving) list_home(args, team, early.home, homes[0]);
    };
    if (is_sending) send_weights(args, call, early.weight);
    const Debts debts(args, team, headers);
    if (is_sending && args.has_workers) {
        send_sums(args, call, team, debts, early.debt, listed, list_first);
    } else {
        if (is_sending) send_parts(args, call, team, debts, early.debt, listed);
        list_first();
        team.sync();
    }
    if (is_receiving) receive(args, call, team, homes, own_sums + team.index * row_vecs);
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_combine_kernel(const __grid_constant__ deepep::LlCombineArgs args) {
    using namespace deepep;
    extern __shared__ Vec16 own_sums[];
    __shared__ LlShared shared;
    __shared__ Headers headers;
    await_previous_kernel();
    const LlCommon& common = args.common;
    const Team team(common.team_threads);
    LlCall call(common, kLlCombine, shared);
    const Early early(args, team);
    uint32_t header = 0;
    if (threadIdx.x < common.shape.num_ranks) header = pointer<const uint32_t>(common.sources)[threadIdx.x];
    call.prepare(common.window.combine_credits, args.combine_epoch);
    headers.keep(args, call, header);
    if (args.keeps_own) prefetch_row(args, early.home.own.row);  // their turn comes last
    call.begin(args.combine_epoch);
    run(args, call, team, headers, early, own_sums);
    call.end();
}
