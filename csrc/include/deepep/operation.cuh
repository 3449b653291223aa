// What every kernel of an operation does besides moving rows: epochs, bounded waits, headers, the grid barrier, leaving.
#pragma once

#include <deepep/layout.cuh>
#include <deepep/ptx.cuh>
#include <deepep/transport.cuh>

namespace deepep {

// Threads of a CTA that work together: whole warps, with a barrier of their own.
struct Team {
    uint32_t index, size, barrier;

    __device__ void sync() const { sync_threads(barrier, size); }
    __device__ bool any(bool is_so) const { return any_thread(barrier, size, is_so); }
};

__device__ __forceinline__ Team whole_cta() { return {threadIdx.x, blockDim.x, 0}; }

// One CTA's view of the running operation. Made by every thread.
struct Operation {
    const Window& window;
    Transport transport;
    Control* control;
    uint32_t epoch, bank;
    uint64_t deadline;
    Team team;

    __device__ Operation(const Window& w, const Team& members)
        : window(w), transport(w.peers, w.rank, w.num_ranks), team(members) {
        control = reinterpret_cast<Control*>(transport.local(0));
        epoch = *reinterpret_cast<volatile uint32_t*>(&control->epoch) + 1;
        bank = epoch % 2;
        deadline = global_timer_ns() + w.timeout_ns;
    }

    __device__ uint64_t header_at(uint32_t source) const {
        return window.header + ((bank * window.num_ranks + source) * uint64_t{kHeaderWords}) * 8;
    }
    __device__ uint64_t matrix_at(uint32_t source) const {
        return window.matrix + (bank * window.num_ranks + source) * uint64_t{window.num_ranks} * 8;
    }
    __device__ uint64_t counts_at(uint32_t source) const {
        return window.counts + (bank * window.num_ranks + source) * uint64_t{window.max_local_experts} * 8;
    }
    __device__ uint64_t ready_at(uint32_t source) const { return window.ready + (bank * window.num_ranks + source) * 8; }
    __device__ uint64_t metadata_at(uint32_t source) const {
        return window.metadata + (bank * window.num_ranks + source) * window.metadata_bytes;
    }
    __device__ uint64_t* flag_of(uint32_t owner, uint32_t index) const {
        return reinterpret_cast<uint64_t*>(
            transport.local(window.flags + (uint64_t{owner} * window.num_flags + index) * 8));
    }

    // "Peer `home` is through with pass `pass` of what this rank staged for it."
    __device__ uint64_t* credit_of(uint32_t home, uint32_t pass) const {
        return reinterpret_cast<uint64_t*>(
            transport.local(window.credits + (uint64_t{home} * window.num_passes + pass) * 8));
    }

    // One of `total` parties has finished its part of a pass; the last one tells every peer.
    __device__ void finish_part(uint32_t pass, uint32_t total) const {
        uint32_t* finished = reinterpret_cast<uint32_t*>(transport.local(window.finished)) + pass;
        if (add_acq_rel_gpu(finished, 1) != total - 1) return;
        *finished = 0;
        for (uint32_t peer = 0; peer < window.num_ranks; ++peer) {
            const uint64_t at = window.credits + (uint64_t{window.rank} * window.num_passes + pass) * 8;
            transport.release_signal(peer, at, make_word(epoch, 0));
        }
    }

    __device__ bool failed() const { return *reinterpret_cast<volatile uint32_t*>(&control->error) != kOk; }

    // The same answer for the whole team, which meets here: what follows may have barriers.
    __device__ bool has_failed() const { return team.any(team.index == 0 && failed()); }

    __device__ void host_word(int index, uint32_t value) const {
        store_relaxed_sys(pointer<uint64_t>(window.host) + index, make_word(window.ticket, value));
    }

    // Say once what went wrong; the code is written last, so that the host finds the rest in place.
    __device__ __noinline__ void fail(Code code, uint32_t field, uint32_t other, uint32_t theirs, uint32_t ours) const {
        if (atomicCAS(&control->error, kOk, code) != kOk) return;
        host_word(kHostField, field);
        host_word(kHostRank, other);
        host_word(kHostTheirs, theirs);
        host_word(kHostOurs, ours);
        fence_sys();
        store_release_sys(pointer<uint64_t>(window.host) + kHostCode, make_word(window.ticket, code));
    }

    // Wait for a word of this epoch with at least this value. False: out of time, or another wait already failed.
    __device__ bool wait(const uint64_t* word, uint32_t wanted_epoch, uint32_t wanted_value, uint32_t peer) const {
        uint64_t found;
        return wait_counted(word, wanted_epoch, wanted_value, peer, found);
    }

    __device__ bool wait_counted(const uint64_t* word, uint32_t wanted_epoch, uint32_t wanted_value, uint32_t peer,
                                 uint64_t& found) const {
        found = load_acquire_sys(word);
        if (is_reached(found, wanted_epoch, wanted_value)) return true;
        found = wait_on(*this, word, wanted_epoch, wanted_value, peer);
        return is_reached(found, wanted_epoch, wanted_value);
    }

    // Epochs wrap: compare by distance.
    __device__ static bool is_reached(uint64_t word, uint32_t wanted_epoch, uint32_t wanted_value) {
        const int32_t lead = static_cast<int32_t>(word_epoch(word) - wanted_epoch);
        return lead > 0 || (lead == 0 && word_value(word) >= wanted_value);
    }

    // The last that was seen of the word. Out of line: waits are everywhere, and code that is not in the cache costs time.
    __device__ __noinline__ static uint64_t wait_on(const Operation& op, const uint64_t* word, uint32_t wanted_epoch,
                                                    uint32_t wanted_value, uint32_t peer) {
        for (uint32_t spins = 1;; ++spins) {
            const uint64_t now = load_acquire_sys(word);
            if (is_reached(now, wanted_epoch, wanted_value)) return now;
            if (spins > 4) __nanosleep(40);  // leave the issue slots to warps that move rows
            if (spins % 32 != 0) continue;
            if (global_timer_ns() > op.deadline) {
                op.host_word(kHostMissing + static_cast<int>(peer), 1);
                fence_sys();
                op.fail(kTimeout, 0, peer, 0, 0);
                return now;
            }
            // A timeout elsewhere is no reason to stop: this wait has the same limit, and names its own peer.
            const uint32_t error = *reinterpret_cast<volatile uint32_t*>(&op.control->error);
            if (error != kOk && error != kTimeout) return now;
        }
    }

    // All CTAs' teams; the n-th barrier of a kernel. They are few enough to be resident together.
    __device__ bool grid_barrier(uint32_t n) const {
        bool is_late = false;
        team.sync();
        if (team.index == 0) {
            add_acq_rel_gpu(&control->arrivals, 1);
            for (uint32_t spins = 1; !is_late && load_acquire_gpu(&control->arrivals) < n * gridDim.x; ++spins) {
                is_late = spins % 64 == 0 && global_timer_ns() > deadline;
            }
        }
        return !team.any(is_late);
    }

    // One CTA tells every peer about this rank. psum: inclusive, of own compact rows by source (combine), or null.
    __device__ void send_headers(const uint32_t* agreed, uint32_t tokens, uint32_t rows, uint32_t sf, uint32_t ring,
                                 uint32_t room, uint32_t is_in_place, uint32_t refused, const int32_t* psum) const {
        for (uint32_t i = team.index; i < window.num_ranks * kHeaderWords; i += team.size) {
            const uint32_t peer = i / kHeaderWords, field = i % kHeaderWords;
            uint32_t value = 0;
            if (field < kNumAgreed) value = agreed[field];
            if (field == kHeaderRefused) value = refused;
            if (field == kHeaderTokens) value = tokens;
            if (field == kHeaderRows) value = rows;
            if (field == kHeaderSf) value = sf;
            if (field == kHeaderRing) value = ring;
            if (field == kHeaderRoom) value = room;
            if (field == kHeaderInPlace) value = is_in_place;
            if (field == kHeaderFirstRow && psum != nullptr && peer > 0) value = static_cast<uint32_t>(psum[peer - 1]);
            // A zero-copy input was written by earlier kernels: release it together with the words.
            transport.release_signal(peer, header_at(window.rank) + field * 8, make_word(epoch, value));
        }
    }

    // Wait for all words of a peer's header; the threads of a CTA share the work. header: [R][kHeaderWords] in shared.
    __device__ void wait_headers(uint32_t* header) const {
        for (uint32_t i = team.index; i < window.num_ranks * kHeaderWords; i += team.size) {
            const uint32_t peer = i / kHeaderWords, field = i % kHeaderWords;
            header[i] = 0;
            uint64_t word;
            const uint64_t* address = reinterpret_cast<const uint64_t*>(transport.local(header_at(peer) + field * 8));
            if (wait_counted(address, epoch, 0, peer, word)) header[i] = word_value(word);
        }
        team.sync();
    }

    // Compare headers; one thread per rank finds the first difference.
    __device__ void compare_headers(const uint32_t* header) const {
        const uint32_t peer = team.index;
        if (peer < window.num_ranks && peer != window.rank) {
            const uint32_t* theirs = header + peer * kHeaderWords;
            const uint32_t* ours = header + window.rank * kHeaderWords;
            if (theirs[kHeaderRefused]) {
                fail(kRefused, kHeaderRefused, peer, 1, 0);
            } else {
                for (uint32_t field = 0; field < kNumAgreed; ++field) {
                    if (theirs[field] != ours[field]) {
                        fail(kDisagree, field, peer, theirs[field], ours[field]);
                        break;
                    }
                }
            }
        }
        team.sync();
    }

    // Every CTA leaves here. `closes`: the operation ends with this kernel. `has_readers`: peers may still be reading this
    // rank's window; as soon as the kernel is over, anything may be written there.
    __device__ void leave(bool closes, bool has_readers) const {
        const Team all = whole_cta();
        all.sync();
        const bool is_last = all.any(all.index == 0 && add_acq_rel_gpu(&control->exits, 1) == gridDim.x - 1);
        if (!is_last) return;
        if (closes) {
            for (uint32_t peer = threadIdx.x; peer < window.num_ranks; peer += blockDim.x) {
                transport.release_signal(peer, window.done + window.rank * 8, make_word(epoch, 0));
            }
            if (has_readers && !failed()) {
                for (uint32_t peer = threadIdx.x; peer < window.num_ranks; peer += blockDim.x) {
                    wait(reinterpret_cast<const uint64_t*>(transport.local(window.done + peer * 8)), epoch, 0, peer);
                }
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            control->arrivals = control->exits = 0;
            if (closes) {
                control->next_early = control->next_stage = control->next_job = control->metadata = 0;
                control->error = kOk;
                control->epoch = epoch;
            }
        }
    }
};

}  // namespace deepep
