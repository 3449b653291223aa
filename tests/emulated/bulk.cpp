// Bulk copies under way, each in two steps: read, then written.
#include "bulk.h"

#include <sys/mman.h>

#include <map>
#include <vector>

#include "emulator.h"

namespace emu {

namespace {

constexpr uint32_t kNoGroup = 0xffffffffu;

struct Arrivals {
    int32_t num_bytes;  // to come
    uint8_t count, left, phase, pad;

    void settle() {
        if (left != 0 || num_bytes != 0) return;
        phase ^= 1;
        left = count;
    }
};

struct Copy {
    const Fiber* fiber;
    char* to;
    const char* from;
    size_t size;
    Arrivals* barrier;  // of a load; null of a store
    uint32_t group;     // of a store
    bool is_read;
    std::vector<char> held;

    // Whether it is done.
    bool step() {
        if (!is_read) {
            held.assign(from, from + size);
            is_read = true;
            return false;
        }
        memcpy(to, held.data(), size);
        if (barrier != nullptr) {
            barrier->num_bytes -= static_cast<int32_t>(size);
            barrier->settle();
        }
        return true;
    }
};

std::vector<Copy> copies;
std::map<size_t, std::vector<void*>> spare;  // shared memory to use again, by size
char* arena = nullptr;
size_t arena_used = kSharedAlignment;  // nothing lies at address 0

size_t rounded(size_t size) { return (size + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment; }

char* at(uint32_t address) { return arena + address; }

Arrivals& arrivals(uint32_t address) { return *reinterpret_cast<Arrivals*>(at(address)); }

template <typename Condition>
void finish(Condition is_due) {
    std::vector<Copy> left;
    for (Copy& copy : copies) {
        if (is_due(copy)) {
            while (!copy.step()) continue;
        } else {
            left.push_back(std::move(copy));
        }
    }
    copies = std::move(left);
}

}  // namespace

void* take_shared(size_t size) {
    if (arena == nullptr) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        arena = static_cast<char*>(mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, flags, -1, 0));
    }
    std::vector<void*>& same = spare[rounded(size)];
    if (same.empty()) {
        same.push_back(arena + arena_used);
        arena_used += rounded(size);
        if (arena_used > kSharedBytes) fail("the emulator has no shared memory left");
    }
    void* memory = same.back();
    same.pop_back();
    memset(memory, 0xcd, size);
    forget(memory, size);
    return memory;
}
void give_shared_back(void* memory, size_t size) { spare[rounded(size)].push_back(memory); }
uint32_t shared_address(const void* memory) { return static_cast<uint32_t>(static_cast<const char*>(memory) - arena); }

const char* shared_arena() { return arena; }

void init_arrivals(uint32_t barrier, uint32_t count) {
    arrivals(barrier) = {0, static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0, 0};
}
void expect_bytes(uint32_t barrier, uint32_t num_bytes) {
    Arrivals& one = arrivals(barrier);
    one.num_bytes += static_cast<int32_t>(num_bytes);
    one.left -= 1;
    one.settle();
}
bool has_ended(uint32_t barrier, uint32_t parity) {
    yield();
    return arrivals(barrier).phase != parity;
}

void bulk_load(uint32_t to, const void* from, uint32_t num_bytes, uint32_t barrier) {
    copies.push_back({current, at(to), static_cast<const char*>(from), num_bytes, &arrivals(barrier), kNoGroup, false, {}});
}
void bulk_store(void* to, uint32_t from, uint32_t num_bytes) {
    copies.push_back({current, static_cast<char*>(to), at(from), num_bytes, nullptr, kNoGroup, false, {}});
}
void bulk_commit() {
    for (Copy& copy : copies) {
        if (copy.fiber == current && copy.barrier == nullptr && copy.group == kNoGroup) copy.group = current->num_groups;
    }
    current->num_groups += 1;
}
void bulk_wait_read() {
    for (Copy& copy : copies) {
        if (copy.fiber == current && copy.group != kNoGroup && !copy.is_read) copy.step();
    }
}
void bulk_wait_done(uint32_t but) {
    finish([&](const Copy& copy) {
        return copy.fiber == current && copy.group != kNoGroup && copy.group + but < current->num_groups;
    });
}

bool move_bulk(std::mt19937_64& random_number) {
    const bool has_some = !copies.empty();
    std::vector<Copy> left;
    for (Copy& copy : copies) {
        if (random_number() % 4 != 0 || !copy.step()) left.push_back(std::move(copy));
    }
    copies = std::move(left);
    return has_some;
}

bool end_bulk(const Block& block) {
    bool is_clean = true;
    finish([&](const Copy& copy) {
        const bool is_its = copy.fiber->block == &block;
        if (is_its && (copy.barrier != nullptr || !copy.is_read)) is_clean = false;
        return is_its;
    });
    return is_clean;
}

}  // namespace emu
