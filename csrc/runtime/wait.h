// Waiting on the CPU for words that a kernel, here or on a peer, writes to pinned memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace deepep {

// A word is {epoch, value}: the upper half says which call wrote it, the lower half what it says.
constexpr uint32_t epoch_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
constexpr uint32_t value_of(uint64_t word) { return static_cast<uint32_t>(word); }

struct Waited {
  std::vector<uint32_t> values;   // of all words; unspecified where missing
  std::vector<size_t> missing;    // words that did not carry the epoch in time
};

// Wait until each of `num_words` words carries `epoch`, at most `timeout_s` seconds, or until the word at `stop` (may be
// null) carries it: a kernel that gives up raises it. `interrupted` is asked now and then; when it says true, give up.
Waited wait_for_words(const volatile uint64_t* words, size_t num_words, uint32_t epoch, double timeout_s,
                      const volatile uint64_t* stop, const std::function<bool()>& interrupted);

}  // namespace deepep
