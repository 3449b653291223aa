// What a team's workers do in low-latency combine: they load rows, add them up and store sums, as tasks say.
#pragma once

#include <deepep/ll_tasks.cuh>

namespace deepep {

constexpr uint32_t kVecsAtOnce = 2;  // vectors of a row, as far apart as there are workers
// Rows of which a worker loads these vectors before it adds the first one: as many as do without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr uint32_t kTaskRowsAtOnce = 4;
#else
constexpr uint32_t kTaskRowsAtOnce = 6;
#endif
using WorkPlace = Place<kVecsAtOnce>;

// A thread among a team's workers.
struct Worker {
    uint32_t thread, step;  // step: vectors that all of them have at once
    __device__ explicit Worker(const Team& team)
        : thread(team.thread - kMostChoices), step(kVecsAtOnce * (team.threads - kMostChoices)) {}
    __device__ __forceinline__ WorkPlace place(uint32_t base, uint32_t row_vecs) const {
        return WorkPlace(thread, step / kVecsAtOnce, base, row_vecs);
    }
};

// A worker's vectors of the weighted sum of a task's rows. The first rows are loaded before ready() is called.
template <typename Ready>
__device__ __forceinline__ void add_rows(const LlCombineArgs& args, const Task& task, const WorkPlace& place,
                                         Vec16 (&out)[kVecsAtOnce], Ready ready) {
    float sum[kVecsAtOnce][8] = {};
#pragma unroll 1
    for (uint32_t word = 0; word < kWords; ++word) {
        const uint32_t end = word * kWarpSize + task.num_rows[word];
#pragma unroll 1
        for (uint32_t first = word * kWarpSize; first < end; first += kTaskRowsAtOnce) {
            Vec16 held[kTaskRowsAtOnce][kVecsAtOnce];
#pragma unroll
            for (uint32_t t = 0; t < kTaskRowsAtOnce; ++t) {
                if (first + t >= end) break;
                const Vec16* row = task.row[first + t];
#pragma unroll
                for (uint32_t i = 0; i < kVecsAtOnce; ++i) held[t][i] = load_stream(row + place.vec[i]);
            }
            ready();
#pragma unroll
            for (uint32_t t = 0; t < kTaskRowsAtOnce; ++t) {
                if (first + t >= end) break;
                const uint32_t weight = task.weight[first + t];
                if (weight == kSkippedWeight) continue;
#pragma unroll
                for (uint32_t i = 0; i < kVecsAtOnce; ++i) add_weighted(held[t][i], __uint_as_float(weight), sum[i]);
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < kVecsAtOnce; ++i) out[i] = round_sum(sum[i], args.use_logfmt != 0);
}

// By a team's workers: send the sum of a token's rows here to its home.
__device__ void send_sum(const LlCombineArgs& args, const Team& team, const Task& task) {
    const uint32_t row_vecs = args.common.shape.hidden / Bf16::kPerVec;
    const Worker worker(team);
    bool awaits_weights = task.awaits_weights != 0;
    const uint32_t end = task.has_rows() ? row_vecs : 0;  // nobody waits for a token that did not come
#pragma unroll 1
    for (uint32_t base = 0; base < end; base += worker.step) {
        const WorkPlace place = worker.place(base, row_vecs);
        Vec16 sum[kVecsAtOnce];
        add_rows(args, task, place, sum, [&] {
            if (awaits_weights) team.sync();
            awaits_weights = false;
        });
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            if (place.is_inside[i]) store_b128(task.out + place.vec[i], to_wire(sum[i]));
        }
    }
    if (awaits_weights) team.sync();
}

// A worker's vectors of the sum of another rank, which are looked at once before they are waited for.
struct Incoming {
    Vec16 v[kVecsAtOnce];

    __device__ __forceinline__ void look(const Vec16* slot, const WorkPlace& place) {
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            if (place.is_inside[i]) v[i] = load_b128(slot + place.vec[i]);
        }
    }
    // Wait for all of them, and leave zeros where they came from. What a lost rank did not send is zeros, which add
    // nothing. (One that dies while it sends may so leave a row of which parts count and others do not; the mask, or
    // the error, says that it was lost.)
    __device__ __forceinline__ void take(const LlCall& call, uint32_t owner, Vec16* slot, const WorkPlace& place) {
        constexpr uint32_t kSpinsPerCheck = 64;
        bool is_all = false, is_lost = false;
        for (uint32_t spin = 1;; ++spin) {
            is_all = true;
#pragma unroll
            for (uint32_t i = 0; i < kVecsAtOnce; ++i) is_all &= !place.is_inside[i] || is_there(v[i]);
            if (is_all || is_lost) break;
            if (spin % kSpinsPerCheck == 0) is_lost = call.has_given_up(owner);
            look(slot, place);
        }
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            const bool is_taken = place.is_inside[i] && (is_all || is_there(v[i]));
            if (is_taken) slot[place.vec[i]] = {};
            v[i] = is_taken ? from_wire(v[i]) : Vec16{};
        }
    }
};

// By one worker, where statistics are asked for; `base` is its first vector.
__device__ __forceinline__ void note_waits(const LlCall& call, const Task& task, uint32_t row_vecs, uint32_t base) {
    const uint64_t start = global_timer_ns();
#pragma unroll 1
    for (uint32_t word = 0; word < kWords; ++word) {
#pragma unroll 1
        for (uint32_t i = 0; i < task.num_owners[word]; ++i) {
            const int32_t rank = task.owner[word * kWarpSize + i];
            note_wait(call, rank, task.slots + rank * row_vecs + base, start);
        }
    }
}

// By a team's workers: add up the sums of a token at home, in the contract's order. This rank's own is made here, if it
// does not come like the others.
__device__ void bring_home(const LlCombineArgs& args, const LlCall& call, const Team& team, const Task& task) {
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec;
    const uint32_t kept = args.keeps_own ? shape.rank : kMostChoices;
    const Worker worker(team);
    const uint32_t first_base = task.part * worker.step;
    if (args.common.wait_stats != 0 && worker.thread == 0) note_waits(call, task, row_vecs, first_base);
#pragma unroll 1
    for (uint32_t base = first_base; base < row_vecs; base += args.home_parts * worker.step) {
        const WorkPlace place = worker.place(base, row_vecs);
        Incoming term;
        Vec16 own[kVecsAtOnce];
        // A sum that comes first is on its way while this rank's own is made.
        const uint32_t first = task.owner[0];
        const bool is_looked_at = args.keeps_own && task.num_owners[0] != 0 && first != kept;
        if (is_looked_at) term.look(task.slots + first * row_vecs, place);
        if (args.keeps_own) add_rows(args, task, place, own, [] {});
        float sum[kVecsAtOnce][8] = {};
#pragma unroll 1
        for (uint32_t word = 0; word < kWords; ++word) {
            const uint32_t end = word * kWarpSize + task.num_owners[word];
#pragma unroll 1
            for (uint32_t at = word * kWarpSize; at < end; ++at) {
                const uint32_t owner = task.owner[at];
                if (owner == kept) {
#pragma unroll
                    for (uint32_t i = 0; i < kVecsAtOnce; ++i) term.v[i] = own[i];
                } else {
                    Vec16* slot = task.slots + owner * row_vecs;
                    if (at != 0 || !is_looked_at) term.look(slot, place);
                    term.take(call, owner, slot, place);
                }
#pragma unroll
                for (uint32_t i = 0; i < kVecsAtOnce; ++i) add(term.v[i], sum[i]);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kVecsAtOnce; ++i) {
            if (place.is_inside[i]) task.out[place.vec[i]] = Bf16::pack(sum[i]);
        }
    }
}

__device__ __forceinline__ void work(const LlCombineArgs& args, const LlCall& call, const Team& team,
                                     const Task (&tasks)[2]) {
#pragma unroll 1
    for (uint32_t turn = 0;; turn ^= 1) {
        team.sync();
        const Task& task = tasks[turn];
        if (task.kind == Task::kNone) return;
        if (task.kind == Task::kSend) {
            send_sum(args, team, task);
        } else {
            bring_home(args, call, team, task);
        }
    }
}

}  // namespace deepep
