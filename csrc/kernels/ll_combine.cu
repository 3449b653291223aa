// Low-latency combine: the owner of a token's experts weighs and sums their rows, rounds once and pushes one row to the
// token's home (or, per copy, pushes every row as it is); the home adds up what arrives in the contract's order, its
// own rows straight from where they lie. Weights came with dispatch or, if not, are pushed to the owners first. Where
// there are few tokens teams share a row; where there are many, a team's first warps do what the others would wait for.
#include <deepep/ll_add_up.cuh>
#include <deepep/ll_workers.cuh>

namespace deepep {
namespace {

// A row of this rank's own that the team adds up first, but last of all it does: null if it has none.
__device__ __forceinline__ const int32_t* find_own_row(const LlCombineArgs& args, const Team& team, uint32_t k) {
    const LlShape& shape = args.common.shape;
    if (!args.keeps_own || k >= shape.num_topk || first_at_home(team) >= HomeItem::count(args)) return nullptr;
    const Item item(shape, shape.rank, HomeItem(args, first_at_home(team)).token);
    return pointer<const int32_t>(args.common.routes) + item.slot * shape.num_topk + k;
}

__device__ void run(const LlCombineArgs& args, LlCall& call, const Team& team, Headers& headers) {
    __shared__ Task tasks[kLlMaxTeams][2];
    __shared__ Terms debts_listed[kLlMaxTeams][2];
    __shared__ Home homes_listed[kLlMaxTeams][2];
    const bool is_sending = (args.common.phases & kLlSend) != 0, is_receiving = (args.common.phases & kLlRecv) != 0;
    const bool is_listing = team.thread < kMostChoices, is_looking = call.looks_at() < kMostChoices;
    // Each warp has one task until the block begins, since warps are in each other's way.
    FirstDebt first;
    HomeChoice home;
    Choice weight;
    if (is_listing) {
        ChoiceAt debt_at;
        HomeChoiceAt home_at;
        if (is_sending) {
            Item item;
            debt_at = find_first(args, team, item);
            if (args.has_workers) first.debt = Debt(args, item);
        }
        if (is_receiving && !args.has_workers) {
            home_at = find_home(args, team, divide(first_at_home(team), args.home_parts_magic));
        }
        debt_at.settle();
        home_at.settle();
        await_previous_kernel();
        first.choice = debt_at.load();
        home = home_at.load();
        if (args.has_workers) first.place = list_rows(args, team, first.choice, tasks[team.index][0]);
    } else if (is_looking) {
        const LlCall::Places places = call.find_places(args.common.window.combine_credits, args.combine_epoch);
        await_previous_kernel();
        const uint32_t rank = call.looks_at();
        uint32_t header = 0;
        if (rank < args.common.shape.num_ranks) header = pointer<const uint32_t>(args.common.sources)[rank];
        call.prepare_ranks(places);
        headers.keep(args, call, header);
    } else {
        ChoiceAt weight_at;
        if (is_sending) weight_at = find_weight(args, global_thread());
        const int32_t* row = find_own_row(args, team, team.thread - kMostChoices);
        weight_at.settle();
        settle(row);
        await_previous_kernel();
        weight = weight_at.load();
        call.prepare_epoch(args.combine_epoch);
        prefetch_row(args, load_if(row, -1));
    }
    call.begin(args.combine_epoch);
    if (is_sending) send_weights(args, call, weight, !is_listing && !is_looking);
    if (is_sending) prepare_drawing(call);
    if (args.has_workers) {
        if (is_listing) {
            list_tasks(args, call, team, headers, first, tasks[team.index]);
        } else {
            work(args, call, team, tasks[team.index]);
        }
        return;
    }
    Terms(&listed)[2] = debts_listed[team.index];
    Home(&homes)[2] = homes_listed[team.index];
    if (is_sending) send_parts(args, call, team, headers, first.choice, listed);
    if (is_receiving) list_home(args, team, home, homes[0]);
    team.sync();
    if (is_receiving) receive(args, call, team, homes);
}

}  // namespace
}  // namespace deepep

extern "C" __global__ void __launch_bounds__(deepep::kLlThreads, deepep::kLlBlocksPerSm)
    ll_combine_kernel(const __grid_constant__ deepep::LlCombineArgs args) {
    using namespace deepep;
    __shared__ LlShared shared;
    __shared__ Headers headers;
    const Team team(args.common.team_threads);
    LlCall call(args.common, kLlCombine, shared);
    run(args, call, team, headers);
    call.end();
}
