// A GPU for tests: every CUDA thread is a fiber, all fibers of all ranks take turns on one CPU thread, in an order that
// follows from a seed. Stores that others wait for arrive late and in any order, unless a release or the end of the
// kernel is between. What a kernel's C++ cannot say on a CPU is here; translate.py turns its inline PTX into calls.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <utility>
#include <vector>

#include "bulk.h"
#include "races.h"

#define __device__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(what)

namespace emu {

constexpr uint32_t kWarp = 32;

// Where threads wait for each other. Neighbouring meetings have slots of their own, since a thread that leaves one may
// be at the next before the others have read.
struct Meeting {
    uint32_t generation = 0, arrived = 0, any[2] = {};
    int place = -1;
    uint64_t slots[2][kWarp] = {};
    Told told;
};

struct Block;
struct Fiber {
    ucontext_t context;  // to begin with
    jmp_buf place;       // to go on from: switching by contexts would ask the kernel for signal masks
    Block* block;
    uint32_t thread;
    bool has_begun = false;
    bool is_done = false;
    const uint32_t* waits_for = nullptr;  // to be no longer `last`
    uint32_t last = 0;
    uint32_t num_groups = 0;  // of bulk stores
    uint32_t num_syncs = 0;   // that order it after other lanes of its warp
};

struct Block {
    uint32_t index, grid, threads, smem;
    void (*entry)(const void*);
    const void* args;
    size_t num_arg_bytes;
    const uint32_t* is_behind;  // a launch of the same rank that has not ended: 1 or 0
    bool lets_next_start = false;
    uint32_t num_done = 0;
    std::vector<Fiber> fibers;
    Meeting barriers[16];
    std::vector<Meeting> warps;
    std::vector<Clock> known;  // by each of them
    std::map<std::pair<int, size_t>, void*> shared;
    void* dynamic_shared = nullptr;
};

extern Fiber* current;

void yield();
uint64_t now();
[[noreturn]] void fail(const char* message);
void meet(Meeting& meeting, uint32_t num_threads);
void* shared_bytes(int number, size_t size);

template <typename T>
T& shared(int number) {
    return *static_cast<T*>(shared_bytes(number, sizeof(T)));
}

struct Index {
    uint32_t x;
};

// A warp's threads hand each other a value; all have to come to the same place.
const uint64_t* exchange(uint64_t value, int place);
void sync_warp(int place);
bool barrier(uint32_t number, uint32_t num_threads, bool is_so = false);
void arrive(uint32_t number, uint32_t num_threads);
// By a launch that started early: wait until it is its turn. And let the next one start, once all blocks came here.
void await_turn();
void let_next_start();
// Whether an address is of the current thread alone: its stack, its launch's argument, what the emulator knows of it.
bool is_private(const void* address);

template <typename T>
T load(const T* address) {
    yield();
    return *address;
}
// Sooner or later; never before what the same address was sent earlier.
void send(void* address, const void* value, size_t size);
// Let everything arrive that the block has sent.
void release();

template <typename T, typename V>
void store(T* address, V value) {
    const T converted = value;
    send(address, &converted, sizeof(T));
    yield();
}
template <typename T, typename V>
void store_release(T* address, V value) {
    release();
    store(address, value);
}
template <typename T>
EMU_UNWATCHED T add(T* address, T value) {
    const T old = *address;
    *address = old + value;
    yield();
    return old;
}
template <typename T, typename V>
EMU_UNWATCHED T swap_if(T* address, bool is_so, V value) {
    const T old = *address;
    if (is_so) *address = static_cast<T>(value);
    return old;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bf16_of(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// FP8, to nearest even; what is too large becomes the largest.
inline uint32_t e4m3_of(float value) {
    const float magnitude = fminf(fabsf(value), 448.0f);
    int exponent;
    frexpf(magnitude, &exponent);
    exponent = magnitude < 0x1p-6f ? -6 : exponent - 1;
    const float steps = nearbyintf(ldexpf(magnitude, 3 - exponent));
    return (signbit(value) ? 128 : 0) | (static_cast<uint32_t>(exponent + 6) * 8 + static_cast<uint32_t>(steps));
}
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    const float low = fmaxf(float_of(a << 16), float_of(b << 16));
    return bits_of(fmaxf(float_of(a & 0xffff0000), float_of(b & 0xffff0000))) | bits_of(low) >> 16;
}
inline uint32_t ballot(bool is_so, int place) {
    const uint64_t* votes = exchange(is_so, place);
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < kWarp; ++lane) bits |= static_cast<uint32_t>(votes[lane]) << lane;
    return bits;
}
template <typename Step>
uint32_t reduce(uint32_t value, int place, Step step) {
    const uint64_t* all = exchange(value, place);
    uint32_t result = 0;
    for (uint32_t lane = 0; lane < kWarp; ++lane) result = step(result, static_cast<uint32_t>(all[lane]));
    return result;
}
inline uint32_t reduce_or(uint32_t value, int place) {
    return reduce(value, place, [](uint32_t a, uint32_t b) { return a | b; });
}
inline uint32_t reduce_max(uint32_t value, int place) {
    return reduce(value, place, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t reduce_add(uint32_t value, int place) {
    return reduce(value, place, [](uint32_t a, uint32_t b) { return a + b; });
}

template <typename T>
uint64_t pack(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}
// The value of the lane that `lane_of` makes of one's own number.
template <typename T, typename LaneOf>
T shuffle(T value, int place, LaneOf lane_of) {
    const uint64_t* all = exchange(pack(value), place);
    T result;
    memcpy(&result, &all[lane_of(current->thread % kWarp) % kWarp], sizeof(T));
    return result;
}
template <typename T>
T shuffle_from(T value, uint32_t lane, int place) {
    return shuffle(value, place, [=](uint32_t) { return lane; });
}
template <typename T>
T shuffle_xor(T value, uint32_t mask, int place) {
    return shuffle(value, place, [=](uint32_t lane) { return lane ^ mask; });
}
template <typename T>
T shuffle_up(T value, uint32_t distance, int place) {
    return shuffle(value, place, [=](uint32_t lane) { return lane < distance ? lane : lane - distance; });
}
template <typename T>
uint32_t match_any(T value, int place) {
    const uint64_t mine = pack(value);
    const uint64_t* all = exchange(mine, place);
    uint32_t same = 0;
    for (uint32_t lane = 0; lane < kWarp; ++lane) same |= static_cast<uint32_t>(all[lane] == mine) << lane;
    return same;
}

}  // namespace emu

#define threadIdx (emu::Index{emu::current->thread})
#define blockIdx (emu::Index{emu::current->block->index})
#define gridDim (emu::Index{emu::current->block->grid})
#define blockDim (emu::Index{emu::current->block->threads})
#define __syncthreads() emu::barrier(0, blockDim.x)
#define __syncwarp() emu::sync_warp(__COUNTER__)
#define __ballot_sync(mask, is_so) emu::ballot(is_so, __COUNTER__)
#define __reduce_or_sync(mask, value) emu::reduce_or(value, __COUNTER__)
#define __reduce_max_sync(mask, value) emu::reduce_max(value, __COUNTER__)
#define __reduce_add_sync(mask, value) emu::reduce_add(value, __COUNTER__)
#define __match_any_sync(mask, value) emu::match_any(value, __COUNTER__)
#define __shfl_sync(mask, value, lane) emu::shuffle_from(value, lane, __COUNTER__)
#define __shfl_xor_sync(mask, value, lanes) emu::shuffle_xor(value, lanes, __COUNTER__)
#define __shfl_up_sync(mask, value, distance) emu::shuffle_up(value, distance, __COUNTER__)
#define __nanosleep(ns) emu::yield()
#define __popc(value) __builtin_popcount(value)
#define __ffs(value) __builtin_ffs(value)
#define __ffsll(value) __builtin_ffsll(value)
#define __clz(value) __builtin_clz(static_cast<uint32_t>(value))

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline float __uint_as_float(uint32_t bits) { return emu::float_of(bits); }
inline uint32_t __float_as_uint(float value) { return emu::bits_of(value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float value) { return static_cast<int>(nearbyintf(value)); }

template <typename T, typename V>
T atomicAdd(T* address, V value) {
    return emu::add(address, static_cast<T>(value));
}
template <typename T, typename V>
T atomicMax(T* address, V value) {
    return emu::swap_if(address, static_cast<T>(value) > *address, value);
}
template <typename T, typename V>
T atomicMin(T* address, V value) {
    return emu::swap_if(address, static_cast<T>(value) < *address, value);
}
template <typename T, typename C, typename V>
T atomicCAS(T* address, C expected, V value) {
    return emu::swap_if(address, static_cast<T>(expected) == *address, value);
}
