// What teams with workers do in low-latency combine, one token after the other. A team's first threads find out all
// there is to know of a token, and write it down as a task; its workers load, add up and store, and know nothing else.
#pragma once

#include <deepep/ll_debts.cuh>

namespace deepep {

// What workers are to do with one token.
struct Task {
    enum Kind : uint32_t { kNone, kSend, kBringHome };
    Kind kind;
    uint32_t awaits_weights;
    Vec16* out;     // where the sum goes
    Vec16* slots;   // of a token at home: where the sums of other ranks come in
    uint32_t part;  // of its row
    // Side by side, for each word of top-k positions: rows here and their weights, ranks whose sums add up.
    uint32_t num_rows[kWords], num_owners[kWords];
    const Vec16* row[kMostChoices];
    uint32_t weight[kMostChoices];
    int32_t owner[kMostChoices];
    __device__ bool has_rows() const { return num_rows[0] + num_rows[kWords - 1] != 0; }
};

// By the first threads of a team: a place for each that has something to list, among those of its word.
__device__ __forceinline__ uint32_t place_of(const Team& team, bool is_listed, uint32_t (&count)[kWords]) {
    const uint32_t word = team.thread / kWarpSize, lane = lane_index();
    const uint32_t listed = __ballot_sync(kFullMask, is_listed);
    if (lane == 0) count[word] = __popc(listed);
    return word * kWarpSize + __popc(listed & ((1u << lane) - 1));
}

// By the first threads of a team: list the rows here of one token, and the weights that are known. Gives the place of
// the thread's choice.
__device__ __forceinline__ uint32_t list_rows(const LlCombineArgs& args, const Team& team, const Choice& choice,
                                              Task& task) {
    const uint32_t place = place_of(team, choice.target >= 0, task.num_rows);
    if (choice.target < 0) return place;
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    task.row[place] = pointer<const Vec16>(args.x) + static_cast<uint64_t>(choice.target) * row_vecs;
    task.weight[place] = choice.left_out < 0 ? kSkippedWeight : choice.weight;
    return place;
}

// By the first threads of a team, which in narrow kernels are one warp.
__device__ __forceinline__ void sync_first_threads(const Team& team) {
    if constexpr (kMostChoices == kWarpSize) {
        __syncwarp();
    } else {
        sync_threads(kListBarriers + team.index, kMostChoices);
    }
}

// By the first threads of a team: let its workers have what is listed. The barrier of their own is for
// compute-sanitizer, which loses sight of what is written between such a one and the team's.
__device__ __forceinline__ void hand_over(const Team& team) {
    sync_first_threads(team);
    team.sync();
}

// By the first threads of a team: list whose sums a token at home gets, by the last choice that each rank has.
__device__ __forceinline__ void list_owners(const LlCombineArgs& args, const LlCall& call, const Team& team,
                                            const HomeChoice& choice, int32_t (&owners)[kMostChoices], Task& task) {
    const LlShape& shape = args.common.shape;
    const uint32_t k = team.thread;
    const int32_t owner = owners[k] = rank_of(shape, choice.expert);
    sync_first_threads(team);
    const bool is_owed = is_last_of(owners, k, shape.num_topk) && !call.is_masked(owner);
    const uint32_t place = place_of(team, is_owed, task.num_owners);
    if (is_owed) task.owner[place] = owner;
}

// A token at home, or a part of one, by number.
struct HomeItem {
    uint32_t token, part = 0;
    __device__ HomeItem(const LlCombineArgs& args, uint32_t number) : token(number) {
        for (; token >= args.common.num_tokens; token -= args.common.num_tokens) ++part;
    }
    __device__ static uint32_t count(const LlCombineArgs& args) { return args.common.num_tokens * args.home_parts; }
};

// By the first threads of a team: the number of the next token at home that no team has taken. Tokens have now two rows
// to add up here, now six, so teams are done at different times. Each has its first one without asking.
__device__ uint32_t draw(const LlCall& call, const Team& team) {
    __shared__ uint32_t drawn[kLlMaxTeams];
    if (team.thread == 0) {
        drawn[team.index] = team.global_count() + atomicAdd(&call.state->num_drawn[call.epoch % kLlDrawings], 1);
    }
    sync_first_threads(team);
    return drawn[team.index];
}

// Make ready what the launch after next draws from: none draws from it, since this one has begun.
__device__ __forceinline__ void prepare_drawing(const LlCall& call) {
    if (threadIdx.x == kCountingThread && call.is_first_block()) {
        call.state->num_drawn[(call.epoch + kLlBanks) % kLlDrawings] = 0;
    }
}

// A team's first debt as far as it is known before the block begins.
struct FirstDebt {
    Debt debt;
    Choice choice;
    uint32_t place;
};

// By the first threads of a team: have its workers send a token's sum. `place` is that of the thread's choice in the
// task, which has the rows already.
__device__ __forceinline__ void start_sending(const LlCombineArgs& args, const LlCall& call, const Team& team,
                                              const Headers& headers, const Debt& debt, const Choice& choice,
                                              uint32_t place, Task& task) {
    const bool awaits_weights = headers.weights(args, debt.source) == Weights::kSentNow;
    if (team.thread == 0) {
        task.kind = Task::kSend;
        task.awaits_weights = awaits_weights;
        task.out = home_slot(call, debt.source, debt.offset);
    }
    team.sync();
    if (!awaits_weights) return;
    if (choice.target >= 0) task.weight[place] = await_weight(args, call, debt, team.thread);
    team.sync();
}

// By the first threads of a team: write down all its tasks, each while workers are busy with the one before. The rows
// of its first debt are in the first task already.
__device__ void list_tasks(const LlCombineArgs& args, const LlCall& call, const Team& team, const Headers& headers,
                           const FirstDebt& first, Task (&tasks)[2]) {
    __shared__ int32_t owners[kLlMaxTeams][kMostChoices];
    const LlShape& shape = args.common.shape;
    const bool is_sending = (args.common.phases & kLlSend) != 0, is_receiving = (args.common.phases & kLlRecv) != 0;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    uint32_t turn = 0;
    if (is_sending) {
        // Of the first one nothing is worked out here that could be before.
        if (headers.is_due(first.debt)) {
            start_sending(args, call, team, headers, first.debt, first.choice, first.place, tasks[0]);
            turn = 1;
        }
        const Debts debts(args, team, headers);
        for (uint32_t number = team.global_index() + debts.step; number < debts.count; number += debts.step) {
            const Debt debt(args, debts[number]);
            if (!headers.is_due(debt)) continue;
            const Choice choice = load_choice(args, debt, team.thread);
            const uint32_t place = list_rows(args, team, choice, tasks[turn]);
            start_sending(args, call, team, headers, debt, choice, place, tasks[turn]);
            turn ^= 1;
        }
    }
    const uint32_t num_items = is_receiving ? HomeItem::count(args) : 0;
    for (uint32_t number = first_at_home(team); number < num_items; turn ^= 1) {
        const HomeItem item(args, number);
        const HomeChoice choice = find_home(args, team, item.token).load();
        Task& task = tasks[turn];
        if (team.thread == 0) {
            task.kind = Task::kBringHome;
            task.part = item.part;
            task.out = pointer<Vec16>(args.out) + static_cast<uint64_t>(item.token) * row_vecs;
            task.slots = own_slots(args, call, item.token);
        }
        list_owners(args, call, team, choice, owners[team.index], task);
        list_rows(args, team, choice.own, task);
        hand_over(team);
        number = num_items > team.global_count() ? draw(call, team) : num_items;
    }
    if (team.thread == 0) tasks[turn].kind = Task::kNone;
    hand_over(team);
}

}  // namespace deepep
