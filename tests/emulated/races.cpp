// What the compiler announces, and what of it is a race.
#include "races.h"

#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>

#include "emulator.h"

namespace emu {

namespace {

constexpr uint8_t kSeveral = 0xff;

// Of one thread, or of several of one warp.
struct Access {
    uint32_t clock, order;  // none if the clock is 0
    uint32_t pc;
    uint8_t warp, lane;
};

struct Word {
    uint32_t number;  // of the memory it was part of when it was touched
    Access write;
    Access reads[kMostWarps];
};

uint32_t numbers[kSharedBytes / kSharedAlignment];  // of the memory that each stretch is part of
uint32_t num_taken = 0;

// What is known of a word; nothing of what the memory before it held.
Word& word_at(size_t offset) {
    static Word* words = nullptr;
    if (words == nullptr) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, kSharedBytes / 4 * sizeof(Word), PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED) fail("no room to remember who touched shared memory");
        words = static_cast<Word*>(memory);
    }
    Word& word = words[offset / 4];
    const uint32_t number = numbers[offset / kSharedAlignment];
    if (word.number != number) word = {}, word.number = number;
    return word;
}

uint32_t code_offset(const void* pc) {
    static Dl_info info;
    if (info.dli_fbase == nullptr) dladdr(pc, &info);
    return static_cast<uint32_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase));
}

[[noreturn]] void report(const Access& before, const char* what, const Access& now) {
    char text[200];
    snprintf(text, sizeof(text), "race for shared memory: %s at +%#x by thread %u%s, then +%#x", what, before.pc,
             before.warp * kWarp + (before.lane == kSeveral ? 0 : before.lane), before.lane == kSeveral ? " or so" : "",
             now.pc);
    fail(text);
}

[[noreturn]] void report_early(const void* pc) {
    char text[100];
    snprintf(text, sizeof(text), "memory is touched before the launch's turn at +%#x", code_offset(pc));
    fail(text);
}

bool is_ordered(const Access& before, const Access& now, const Clock& known) {
    if (before.clock == 0) return true;
    if (before.warp != now.warp) return known.of[before.warp] >= before.clock;
    return before.order != now.order || before.lane == now.lane;
}

void read(Word& word, const Access& now, const Clock& known) {
    const bool is_own = word.write.lane == kSeveral && word.write.warp == now.warp;
    if (!is_own && !is_ordered(word.write, now, known)) report(word.write, "written", now);
    Access& last = word.reads[now.warp];
    const bool is_one_of_several = last.clock == now.clock && last.order == now.order && last.lane != now.lane;
    last = now;
    if (is_one_of_several) last.lane = kSeveral;
}

void write(Word& word, const Access& now, const Clock& known) {
    const Access& last = word.write;
    const bool is_one_of_several = last.warp == now.warp && last.pc == now.pc && last.order == now.order &&
                                   last.clock == now.clock && last.lane != now.lane;
    if (!is_one_of_several && !is_ordered(last, now, known)) report(last, "written", now);
    for (Access& before : word.reads) {
        if (!is_ordered(before, now, known)) report(before, "read", now);
        before.clock = 0;
    }
    word.write = now;
    if (is_one_of_several) word.write.lane = kSeveral;
}

void touch(const void* memory, size_t size, bool is_write, const void* pc) {
    const size_t offset = static_cast<const char*>(memory) - shared_arena();
    if (current == nullptr) return;
    if (offset >= kSharedBytes) {
        if (*current->block->is_behind != 0 && !is_private(memory)) report_early(pc);
        return;
    }
    const uint32_t warp = current->thread / kWarp, lane = current->thread % kWarp;
    const Clock& known = current->block->known[warp];
    const Access now = {known.of[warp], current->num_syncs, code_offset(pc), static_cast<uint8_t>(warp),
                        static_cast<uint8_t>(lane)};
    for (size_t at = offset / 4 * 4; at < offset + size; at += 4) {
        is_write ? write(word_at(at), now, known) : read(word_at(at), now, known);
    }
}

}  // namespace

void tell(Told& told, bool waits) {
    const uint32_t warp = current->thread / kWarp, bit = 1u << warp;
    Clock& known = current->block->known[warp];
    if (waits) {
        told.clock.join(known);
    } else if ((told.came & bit) == 0) {
        // Its lanes came together, and what they do from now on nobody is told of.
        told.clock.join(known);
        known.of[warp] += 1;
    }
    told.came |= bit;
    if (waits) told.waits |= bit;
}

void learn(Block& block, Told& told) {
    for (uint32_t warp = 0; warp < kMostWarps; ++warp) {
        if ((told.waits >> warp & 1) == 0) continue;
        block.known[warp].join(told.clock);
        block.known[warp].of[warp] += 1;
    }
    told = {};
}

void forget(const void* memory, size_t size) {
    const size_t offset = static_cast<const char*>(memory) - shared_arena();
    num_taken += 1;
    for (size_t at = offset / kSharedAlignment; at * kSharedAlignment < offset + size; ++at) numbers[at] = num_taken;
}

}  // namespace emu

#define ANNOUNCED(name, size, is_write) \
    extern "C" void __tsan_##name(void* memory) { emu::touch(memory, size, is_write, __builtin_return_address(0)); }
#define UNANNOUNCED(name) \
    extern "C" void __tsan_##name(void*) {}

ANNOUNCED(read1, 1, false)
ANNOUNCED(read2, 2, false)
ANNOUNCED(read4, 4, false)
ANNOUNCED(read8, 8, false)
ANNOUNCED(read16, 16, false)
ANNOUNCED(write1, 1, true)
ANNOUNCED(write2, 2, true)
ANNOUNCED(write4, 4, true)
ANNOUNCED(write8, 8, true)
ANNOUNCED(write16, 16, true)
ANNOUNCED(unaligned_read2, 2, false)
ANNOUNCED(unaligned_read4, 4, false)
ANNOUNCED(unaligned_read8, 8, false)
ANNOUNCED(unaligned_read16, 16, false)
ANNOUNCED(unaligned_write2, 2, true)
ANNOUNCED(unaligned_write4, 4, true)
ANNOUNCED(unaligned_write8, 8, true)
ANNOUNCED(unaligned_write16, 16, true)
UNANNOUNCED(volatile_read1)
UNANNOUNCED(volatile_read4)
UNANNOUNCED(volatile_read8)
UNANNOUNCED(volatile_write1)
UNANNOUNCED(volatile_write4)
UNANNOUNCED(volatile_write8)
UNANNOUNCED(func_entry)

extern "C" void __tsan_read_range(void* memory, size_t size) {
    emu::touch(memory, size, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* memory, size_t size) {
    emu::touch(memory, size, true, __builtin_return_address(0));
}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
