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
    Access write;
    Access reads[kMostWarps];
};

Word* words = nullptr;

Word& word_at(size_t offset) {
    if (words == nullptr) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        const size_t size = kSharedBytes / 4 * sizeof(Word);
        words = static_cast<Word*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0));
    }
    return words[offset / 4];
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

bool is_ordered(const Access& before, const Access& now, const Clock& known) {
    if (before.clock == 0) return true;
    if (before.warp != now.warp) return known.of[before.warp] >= before.clock;
    return before.order != now.order || before.lane == now.lane;
}

void touch(const void* memory, size_t size, bool is_write, const void* pc) {
    const size_t offset = static_cast<const char*>(memory) - shared_arena();
    if (offset >= kSharedBytes || current == nullptr) return;
    const uint32_t warp = current->thread / kWarp;
    const Known& known = current->block->known[warp];
    const uint32_t order = current->block->warps[warp].generation + known.num_barriers;
    const Access now = {known.clock.of[warp], order, code_offset(pc), static_cast<uint8_t>(warp),
                        static_cast<uint8_t>(current->thread % kWarp)};
    for (size_t at = offset / 4 * 4; at < offset + size; at += 4) {
        Word& word = word_at(at);
        // Lanes that store at once are taken to store the same.
        const bool is_same_store = is_write && word.write.warp == warp && word.write.pc == now.pc;
        if (!is_same_store && !is_ordered(word.write, now, known.clock)) report(word.write, "written", now);
        if (!is_write) {
            Access& read = word.reads[warp];
            const bool is_shared = read.clock == now.clock && read.order == order && read.lane != now.lane;
            read = now;
            if (is_shared) read.lane = kSeveral;
            continue;
        }
        for (Access& read : word.reads) {
            if (!is_ordered(read, now, known.clock)) report(read, "read", now);
            read.clock = 0;
        }
        word.write = now;
    }
}

}  // namespace

void tell(Told& told, bool waits) {
    const uint32_t warp = current->thread / kWarp;
    told.clock.join(current->block->known[warp].clock);
    told.came |= 1u << warp;
    if (waits) told.waits |= 1u << warp;
}

void learn(Block& block, Told& told) {
    for (uint32_t warp = 0; warp < kMostWarps; ++warp) {
        if ((told.came >> warp & 1) == 0) continue;
        Known& known = block.known[warp];
        if (told.waits >> warp & 1) {
            known.clock.join(told.clock);
            known.num_barriers += 1;
        }
        known.clock.of[warp] += 1;
    }
    told = {};
}

void forget(const void* memory, size_t size) {
    const size_t offset = static_cast<const char*>(memory) - shared_arena();
    memset(&word_at(offset), 0, (size + 3) / 4 * sizeof(Word));
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
