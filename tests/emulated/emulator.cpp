// The turns that fibers take, and the launches of each rank, one after the other.
#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <string>

// Where this library begins and ends.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

namespace emu {

Fiber* current = nullptr;

namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Launch {
    void (*entry)(const void*);
    std::vector<uint64_t> args;
    uint32_t grid, threads, smem;
    bool starts_early;
    uint32_t is_behind = 1;
    std::vector<std::unique_ptr<Block>> blocks;
};

struct Sent {
    const Block* block;
    void* address;
    std::vector<char> value;
};

std::map<uint64_t, std::deque<Launch>> queues;
std::vector<Sent> under_way;  // in the order in which they were sent
std::mt19937_64 random_number;
std::vector<char*> stacks;  // to use again
jmp_buf scheduler;
uint64_t time_ns = 0;
std::string problem;

void run_fiber() {
    Block* block = current->block;
    block->entry(block->args);
    current->is_done = true;
    block->num_done += 1;
    _longjmp(scheduler, 1);
}

// Until it yields. A function of its own: what `_setjmp` returns to twice has no variables that could be lost.
[[gnu::noinline]] void switch_to_current() {
    if (_setjmp(scheduler) != 0) return;
    if (current->has_begun) _longjmp(current->place, 1);
    current->has_begun = true;
    setcontext(&current->context);
}

void begin(Launch& launch) {
    for (uint32_t index = 0; index < launch.grid; ++index) {
        auto block = std::make_unique<Block>();
        block->index = index, block->grid = launch.grid, block->threads = launch.threads;
        block->entry = launch.entry, block->args = launch.args.data();
        block->num_arg_bytes = launch.args.size() * 8, block->is_behind = &launch.is_behind;
        block->warps.resize(launch.threads / kWarp);
        block->known.resize(launch.threads / kWarp);
        for (uint32_t warp = 0; warp < block->known.size(); ++warp) block->known[warp].of[warp] = 1;
        block->smem = launch.smem + 1, block->dynamic_shared = take_shared(block->smem);
        block->fibers.resize(launch.threads);
        for (uint32_t thread = 0; thread < launch.threads; ++thread) {
            Fiber& fiber = block->fibers[thread];
            if (stacks.empty()) stacks.push_back(static_cast<char*>(malloc(kStackBytes)));
            getcontext(&fiber.context);
            fiber.block = block.get(), fiber.thread = thread;
            fiber.context.uc_stack.ss_sp = stacks.back(), fiber.context.uc_stack.ss_size = kStackBytes;
            stacks.pop_back();
            makecontext(&fiber.context, run_fiber, 0);
        }
        launch.blocks.push_back(std::move(block));
    }
}

template <typename Condition>
void deliver(Condition is_due) {
    std::vector<Sent> left;
    for (Sent& sent : under_way) {
        const auto is_same = [&](const Sent& earlier) { return earlier.address == sent.address; };
        if (is_due(sent) && std::none_of(left.begin(), left.end(), is_same)) {
            memcpy(sent.address, sent.value.data(), sent.value.size());
        } else {
            left.push_back(std::move(sent));
        }
    }
    under_way = std::move(left);
}

void end(Block& block) {
    deliver([&](const Sent& sent) { return sent.block == &block; });
    if (!end_bulk(block) && problem.empty()) problem = "a block ends before its bulk copies have left it";
    for (Fiber& fiber : block.fibers) stacks.push_back(static_cast<char*>(fiber.context.uc_stack.ss_sp));
    for (auto& [key, memory] : block.shared) give_shared_back(memory, key.second);
    give_shared_back(block.dynamic_shared, block.smem);
}

void abandon() {
    for (auto& [queue, launches] : queues) {
        for (Launch& launch : launches) {
            for (auto& block : launch.blocks) end(*block);
        }
    }
    queues.clear();
    under_way.clear();
}

bool is_over(const Launch& launch) {
    return !launch.blocks.empty() && std::all_of(launch.blocks.begin(), launch.blocks.end(),
                                                 [](const auto& block) { return block->num_done == block->threads; });
}
bool lets_next_start(const Launch& launch) {
    return std::all_of(launch.blocks.begin(), launch.blocks.end(), [](const auto& block) {
        return block->lets_next_start || block->num_done == block->threads;
    });
}

// End what is over, begin what may, and give the blocks that have something left to do.
std::vector<Block*> running_blocks() {
    std::vector<Block*> blocks;
    for (auto& [queue, launches] : queues) {
        while (!launches.empty() && is_over(launches.front())) {
            for (auto& block : launches.front().blocks) end(*block);
            launches.pop_front();
        }
        for (size_t i = 0; i < launches.size(); ++i) {
            Launch& launch = launches[i];
            if (i == 0) launch.is_behind = 0;
            if (i > 0 && !(launch.starts_early && lets_next_start(launches[i - 1]))) break;
            if (launch.blocks.empty()) begin(launch);
            for (auto& block : launch.blocks) {
                if (block->num_done < block->threads) blocks.push_back(block.get());
            }
        }
    }
    return blocks;
}

// One turn for every fiber of a block that has something to do; who is first is not always thread 0.
bool turn(Block& block) {
    bool has_moved = false;
    const size_t count = block.fibers.size(), first = random_number() % count;
    const bool is_backwards = random_number() % 2 != 0;
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = block.fibers[(first + (is_backwards ? count - i : i)) % count];
        if (fiber.is_done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.last)) continue;
        fiber.waits_for = nullptr;
        current = &fiber;
        switch_to_current();
        has_moved = true;
        if (!problem.empty()) return true;
    }
    return has_moved;
}

}  // namespace

void send(void* address, const void* value, size_t size) {
    const char* bytes = static_cast<const char*>(value);
    under_way.push_back({current->block, address, {bytes, bytes + size}});
}
void release() {
    deliver([](const Sent& sent) { return sent.block == current->block; });
}

[[gnu::noinline]] void yield() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}
uint64_t now() {
    yield();
    return time_ns;
}
void fail(const char* message) {
    problem = std::string(message) + " (block " + std::to_string(current->block->index) + ", thread " +
              std::to_string(current->thread) + ")";
    while (true) yield();
}

// Whether all have arrived.
bool arrive(Meeting& meeting, uint32_t num_threads) {
    if (++meeting.arrived < num_threads) return false;
    meeting.arrived = 0;
    meeting.any[(meeting.generation + 1) % 2] = 0;
    meeting.generation += 1;
    if (meeting.told.came != 0) learn(*current->block, meeting.told);
    return true;
}

void meet(Meeting& meeting, uint32_t num_threads) {
    const uint32_t generation = meeting.generation;
    if (arrive(meeting, num_threads)) return;
    current->waits_for = &meeting.generation, current->last = generation;
    yield();
}

const uint64_t* exchange(uint64_t value, int place) {
    Meeting& meeting = current->block->warps[current->thread / kWarp];
    const uint32_t which = meeting.generation % 2;
    if (meeting.arrived == 0) meeting.place = place;
    if (meeting.place != place) fail("lanes of a warp meet at different places");
    meeting.slots[which][current->thread % kWarp] = value;
    meet(meeting, kWarp);
    return meeting.slots[which];
}

void sync_warp(int place) {
    exchange(0, place);
    current->num_syncs += 1;
}

bool barrier(uint32_t number, uint32_t num_threads, bool is_so) {
    Meeting& meeting = current->block->barriers[number];
    const uint32_t which = meeting.generation % 2;
    if (is_so) meeting.any[which] = 1;
    tell(meeting.told, true);
    meet(meeting, num_threads);
    current->num_syncs += 1;
    return meeting.any[which] != 0;
}

void arrive(uint32_t number, uint32_t num_threads) {
    Meeting& meeting = current->block->barriers[number];
    tell(meeting.told, false);
    arrive(meeting, num_threads);
}

void await_turn() {
    if (*current->block->is_behind == 0) return;
    current->waits_for = current->block->is_behind, current->last = 1;
    yield();
}
void let_next_start() { current->block->lets_next_start = true; }

bool is_private(const void* address) {
    const Block& block = *current->block;
    const auto is_within = [&](const void* begin, size_t size) {
        return static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(begin)) < size;
    };
    return is_within(current->context.uc_stack.ss_sp, kStackBytes) || is_within(block.args, block.num_arg_bytes) ||
           is_within(&block, sizeof(Block)) || is_within(block.fibers.data(), block.fibers.size() * sizeof(Fiber)) ||
           is_within(&__ehdr_start, &_end - &__ehdr_start);
}

void* shared_bytes(int number, size_t size) {
    void*& memory = current->block->shared[{number, size}];
    if (memory == nullptr) memory = take_shared(size);
    return memory;
}

}  // namespace emu

extern "C" void emu_launch(uint64_t queue, void* entry, const void* args, uint64_t num_bytes, uint32_t grid,
                           uint32_t threads, uint32_t smem, bool starts_early) {
    emu::Launch launch{reinterpret_cast<void (*)(const void*)>(entry), {}, grid, threads, smem, starts_early};
    launch.args.resize((num_bytes + 7) / 8);
    memcpy(launch.args.data(), args, num_bytes);
    emu::queues[queue].push_back(std::move(launch));
}

// Drop what was launched and has not been run to its end.
extern "C" void emu_forget() { emu::abandon(); }

// A copy engine's work, to be launched in turn with kernels: target, source, number of bytes.
extern "C" void emu_copy(const void* args) {
    constexpr uint64_t kPiece = 256;
    const uint64_t* words = static_cast<const uint64_t*>(args);
    for (uint64_t at = emu::current->thread * kPiece; at < words[2]; at += emu::current->block->threads * kPiece) {
        emu::yield();
        memcpy(reinterpret_cast<char*>(words[0] + at), reinterpret_cast<char*>(words[1] + at),
               std::min(kPiece, words[2] - at));
    }
}

// Run launches until a word has a value or, without a word, to their end; null, or what went wrong.
extern "C" const char* emu_run(uint64_t seed, uint64_t ns_per_round, uint64_t most_rounds, const uint64_t* word,
                               uint64_t value) {
    using namespace emu;
    random_number.seed(seed);
    problem.clear();
    for (uint64_t round = 0; problem.empty(); ++round, time_ns += ns_per_round) {
        std::vector<Block*> blocks = running_blocks();
        if (!problem.empty()) break;
        if (blocks.empty() || (word != nullptr && *word == value)) return nullptr;
        if (round == most_rounds) problem = "no end in sight";
        std::shuffle(blocks.begin(), blocks.end(), random_number);
        bool has_moved = false;
        for (Block* block : blocks) {
            if (random_number() % 4 == 0) {
                has_moved = true;  // it would be unfair to call this a deadlock
                continue;
            }
            for (uint64_t turns = random_number() % 3 + 1; turns > 0 && problem.empty(); --turns)
                has_moved |= turn(*block);
        }
        has_moved |= move_bulk(random_number) || !under_way.empty();
        deliver([](const Sent&) { return random_number() % 4 == 0; });
        if (!has_moved) problem = "all threads wait for each other";
    }
    abandon();
    return problem.c_str();
}
