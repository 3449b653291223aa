// What kernels ask of a transport. They are written over these names only; which type stands behind `Transport` is
// decided when they are compiled (DEEPEP_TRANSPORT_HEADER). Offsets are bytes into the symmetric window.
//
//   Transport(table, rank, num_ranks)        table: what the host hands over, opaque to kernels
//   uint8_t* local(offset)                   own window
//   uint8_t* peer_ptr(rank, offset)          a peer's window if loads and stores reach it, else nullptr
//   void signal(rank, offset, word)          write a 64-bit word at the peer, ordered by nothing and ordering nothing
//   void release_signal(rank, offset, word)  the same, after everything this thread has seen or done
#pragma once

#include <deepep/types.cuh>
#include DEEPEP_TRANSPORT_HEADER
