// Waiting on the CPU for a word that a kernel writes to pinned memory.
#pragma once

#include <cstdint>
#include <functional>

namespace deepep {

// Wait until `*word == value`, at most `timeout_s` seconds. `interrupted` is asked now and then; when it says true,
// give up. Says whether the word came.
bool wait_word(const volatile uint64_t* word, uint64_t value, double timeout_s,
               const std::function<bool()>& interrupted);

}  // namespace deepep
