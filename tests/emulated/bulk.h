// Bulk copies and the barriers that say how much of them has arrived. A copy reads its source late and writes its target
// later still, in any order: whoever fills a slot again, or tells others, before it has waited gives itself away.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <random>

namespace emu {

struct Block;

constexpr size_t kSharedBytes = size_t{64} << 20, kSharedAlignment = 128;

// Shared memory has 32-bit addresses there; here it lies in one stretch of memory, and they count from its beginning.
void* take_shared(size_t size);
void give_shared_back(void* memory, size_t size);
uint32_t shared_address(const void* memory);
const char* shared_arena();

void init_arrivals(uint32_t barrier, uint32_t count);
void expect_bytes(uint32_t barrier, uint32_t num_bytes);
bool has_ended(uint32_t barrier, uint32_t parity);

void bulk_load(uint32_t to, const void* from, uint32_t num_bytes, uint32_t barrier);
void bulk_store(void* to, uint32_t from, uint32_t num_bytes);
void bulk_commit();
void bulk_wait_read();
// All groups of the thread but its last few are done.
void bulk_wait_done(uint32_t but);

// Let some copies go on; false if there are none.
bool move_bulk(std::mt19937_64& random_number);
// Finish or drop what a block has left; false if its shared memory was still to be read or written.
bool end_bulk(const Block& block);

}  // namespace emu

#define __cvta_generic_to_shared(memory) emu::shared_address(memory)
