// Load/store peers: every rank's window is mapped here (CUDA IPC, VMM, or the same GPU).
#pragma once

#include <deepep/ptx.cuh>

namespace deepep {

struct Transport {
    const uint64_t* table;  // base address of every rank's window as this rank sees it
    uint32_t rank, num_ranks;

    __device__ __forceinline__ Transport(uint64_t peer_table, uint32_t own_rank, uint32_t ranks)
        : table(pointer<const uint64_t>(peer_table)), rank(own_rank), num_ranks(ranks) {}

    __device__ __forceinline__ uint8_t* peer_ptr(uint32_t peer, uint64_t offset) const {
        return pointer<uint8_t>(table[peer] + offset);
    }
    __device__ __forceinline__ uint8_t* local(uint64_t offset) const { return peer_ptr(rank, offset); }

    __device__ __forceinline__ void signal(uint32_t peer, uint64_t offset, uint64_t word) const {
        store_relaxed_sys(reinterpret_cast<uint64_t*>(peer_ptr(peer, offset)), word);
    }
    __device__ __forceinline__ void release_signal(uint32_t peer, uint64_t offset, uint64_t word) const {
        store_release_sys(reinterpret_cast<uint64_t*>(peer_ptr(peer, offset)), word);
    }
};

}  // namespace deepep
