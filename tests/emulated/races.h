// Races for shared memory: two threads of a block touch the same word, one of them writes, and no barrier is between.
// The compiler is asked to announce every access (as for ThreadSanitizer, of which nothing else is here). Left out are
// atomic and volatile ones, calls of memset and memcpy, bulk copies, and global memory; lanes that store to one word at
// once are taken to store the same. Words are 4 bytes: neighbours in one count as the same.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define EMU_UNWATCHED __attribute__((no_sanitize("thread")))

namespace emu {

constexpr uint32_t kMostWarps = 32;

// For each warp of a block, how much of what it did is known.
struct Clock {
    uint32_t of[kMostWarps] = {};
    void join(const Clock& other) {
        for (uint32_t warp = 0; warp < kMostWarps; ++warp) {
            if (of[warp] < other.of[warp]) of[warp] = other.of[warp];
        }
    }
};

// What those who come to a barrier tell those who wait there.
struct Told {
    Clock clock;
    uint32_t came = 0, waits = 0;  // bit per warp
};

struct Block;

// By a thread that comes to a barrier; then, once all are there, by the last one.
void tell(Told& told, bool waits);
void learn(Block& block, Told& told);
// New shared memory was touched by nobody.
void forget(const void* memory, size_t size);

}  // namespace emu
