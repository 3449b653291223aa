// The instructions C++ has no word for: ordered loads and stores, the clock, and bulk copies with their barriers.
#pragma once

#include <deepep/types.cuh>

namespace deepep {

__device__ __forceinline__ uint64_t global_timer_ns() {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
}

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_release_sys(uint64_t* address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// For words that say all there is to say: nothing else is ordered by them.
__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_relaxed_sys(uint32_t* address, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(uint64_t* address, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// For what only this GPU looks at.
__device__ __forceinline__ uint32_t load_relaxed_gpu(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ uint64_t load_relaxed_gpu(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint32_t load_acquire_gpu(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* address, uint32_t value) {
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
    return old;
}

// Count, for whoever sees it, what this thread and those that met it at a barrier did before.
__device__ __forceinline__ void add_release_gpu(uint32_t* address, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Written once and read by whoever comes next on another SM or GPU: keep it out of L1.
__device__ __forceinline__ Vec16 load_stream(const Vec16* address) {
    Vec16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(address)
                 : "memory");
    return v;
}

// Written once, and a lot of it: let it leave the L2 before what others have there.
__device__ __forceinline__ void store_stream(Vec16* address, const Vec16& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

// Some of the CTA's warps, by one of its 16 barriers; num_threads is a multiple of 32. Warps may come from different
// places, hence not bar.sync, which is short for barrier.sync.aligned. Lanes may come one by one, and are brought
// together first: PTX does not ask for it, but without it a test hung, some lanes of a warp gone on, the others left
// behind (docs/experiments.md).
__device__ __forceinline__ void sync_threads(uint32_t barrier, uint32_t num_threads) {
    __syncwarp();
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Come to such a barrier, and do not wait for the others.
__device__ __forceinline__ void arrive_threads(uint32_t barrier, uint32_t num_threads) {
    __syncwarp();
    asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Wait for them, all in one place, and learn whether it is so for any of these threads. Nothing in shared memory is
// needed to agree.
__device__ __forceinline__ bool any_thread(uint32_t barrier, uint32_t num_threads, bool is_so) {
    uint32_t result;
    __syncwarp();
    asm volatile(
        "{\n .reg .pred mine, some;\n setp.ne.u32 mine, %1, 0;\n bar.red.or.pred some, %2, %3, mine;\n"
        " selp.u32 %0, 1, 0, some;\n}"
        : "=r"(result)
        : "r"(static_cast<uint32_t>(is_so)), "r"(barrier), "r"(num_threads)
        : "memory");
    return result != 0;
}

// A kernel launched with programmatic stream serialization may start before its turn: wait until all work before it in
// the stream is done and can be seen. Until then it reads nothing but its argument.
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Have an address by now, rather than when it is first used or, in loops that wait, each time.
template <typename T>
__device__ __forceinline__ void settle(T*& address) {
    asm volatile("" : "+l"(address));
}

// An address in global memory, which saves every access the question.
template <typename T>
__device__ __forceinline__ T* global(T* address) {
    __builtin_assume(__isGlobal(address));
    return address;
}

// What is at an address in global memory, or `otherwise` if it is null.
template <typename T>
__device__ __forceinline__ T load_if(const T* address, T otherwise) {
    return address == nullptr ? otherwise : *global(address);
}

// Let such a kernel behind this one start, once every block has come here: with no wait for another rank left, lest
// blocks that wait for their turn keep those of other ranks on the same GPU from running.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Between ordinary accesses and bulk copies of the same global memory, in either direction.
__device__ __forceinline__ void fence_bulk() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// Bring a stretch of memory into the L2, where that takes one instruction: address and size are multiples of 16.
__device__ __forceinline__ void bulk_prefetch(const void* global, uint32_t num_bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(num_bytes) : "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n .reg .pred p;\n"
            " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            " selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

// Addresses and sizes are multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t num_bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(num_bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t num_bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(num_bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// The thread's stores have left shared memory: it may be filled again.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// All but the thread's last four groups of stores are done.
__device__ __forceinline__ void bulk_wait_done_but_4() { asm volatile("cp.async.bulk.wait_group 4;" ::: "memory"); }

// The thread's stores are done: others may be told.
__device__ __forceinline__ void bulk_wait_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#else  // never called: `if constexpr (kHasBulkCopies)` stands before every use

__device__ __forceinline__ uint32_t shared_address(const void*) { return 0; }
__device__ __forceinline__ void barrier_init(uint64_t*, uint32_t) {}
__device__ __forceinline__ void barrier_init_fence() {}
__device__ __forceinline__ void barrier_expect(uint64_t*, uint32_t) {}
__device__ __forceinline__ void barrier_wait(uint64_t*, uint32_t) {}
__device__ __forceinline__ void bulk_load(void*, const void*, uint32_t, uint64_t*) {}
__device__ __forceinline__ void bulk_store(void*, const void*, uint32_t) {}
__device__ __forceinline__ void bulk_commit() {}
__device__ __forceinline__ void bulk_wait_read() {}
__device__ __forceinline__ void bulk_wait_done_but_4() {}
__device__ __forceinline__ void bulk_wait_done() {}

#endif

}  // namespace deepep
