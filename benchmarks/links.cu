// What a link can carry: plain copies of rows by threads and by the bulk copy engine. Pull or push is decided by which of
// the two addresses lies on the peer.
#include <deepep/ptx.cuh>

using namespace deepep;

// One warp a row, 16 bytes a thread and step.
extern "C" __global__ void copy_by_threads(const Vec16* source, Vec16* target, int num_rows, int row_bytes) {
    const int num_vecs = row_bytes / 16, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    for (long long row = (long long)blockIdx.x * num_warps + threadIdx.x / 32; row < num_rows;
         row += (long long)gridDim.x * num_warps) {
        const Vec16* from = source + row * num_vecs;
        Vec16* to = target + row * num_vecs;
        int i = lane;
        for (; i + 96 < num_vecs; i += 128) {  // four loads in flight
            const Vec16 a = load_stream(from + i), b = load_stream(from + i + 32);
            const Vec16 c = load_stream(from + i + 64), d = load_stream(from + i + 96);
            to[i] = a, to[i + 32] = b, to[i + 64] = c, to[i + 96] = d;
        }
        for (; i < num_vecs; i += 32) to[i] = load_stream(from + i);
    }
}

// One warp a row, one row in flight per warp, through shared memory.
extern "C" __global__ void copy_by_bulk(const char* source, char* target, int num_rows, int row_bytes) {
    extern __shared__ __align__(128) char rows[];
    __shared__ uint64_t barriers[32];
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    if (threadIdx.x % 32 != 0) return;
    char* mine = rows + (long long)warp * row_bytes;
    barrier_init(&barriers[warp], 1);
    barrier_init_fence();
    uint32_t parity = 0;
    for (long long row = (long long)blockIdx.x * num_warps + warp; row < num_rows;
         row += (long long)gridDim.x * num_warps) {
        barrier_expect(&barriers[warp], row_bytes);
        bulk_load(mine, source + row * row_bytes, row_bytes, &barriers[warp]);
        barrier_wait(&barriers[warp], parity);
        parity ^= 1;
        bulk_store(target + row * row_bytes, mine, row_bytes);
        bulk_commit();
        bulk_wait_read();
    }
    bulk_wait_done();
}
