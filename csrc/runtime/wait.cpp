#include "wait.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace deepep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpinsPerCheck = 256;
constexpr auto kSpinOnlyFor = std::chrono::milliseconds(5);  // counts come within microseconds when all is well
constexpr auto kInterruptPeriod = std::chrono::milliseconds(50);
constexpr auto kNap = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Waited wait_for_words(const volatile uint64_t* words, size_t num_words, uint32_t epoch, double timeout_s,
                      const volatile uint64_t* stop, const std::function<bool()>& interrupted) {
  const auto start = Clock::now();
  const auto deadline = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
  auto next_interrupt = start + kInterruptPeriod;
  size_t first_missing = 0;
  for (bool is_over = false; first_missing < num_words && !is_over;) {
    for (int spin = 0; spin < kSpinsPerCheck && first_missing < num_words; ++spin) {
      while (first_missing < num_words && epoch_of(words[first_missing]) == epoch) ++first_missing;
      relax();
    }
    const auto now = Clock::now();
    is_over = now >= deadline || (stop != nullptr && epoch_of(*stop) == epoch);
    if (now >= next_interrupt) {
      is_over = is_over || interrupted();
      next_interrupt = now + kInterruptPeriod;
    }
    if (now - start > kSpinOnlyFor) std::this_thread::sleep_for(kNap);
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  Waited result;
  result.values.reserve(num_words);
  for (size_t i = 0; i < num_words; ++i) {
    const uint64_t word = words[i];
    result.values.push_back(value_of(word));
    if (epoch_of(word) != epoch) result.missing.push_back(i);
  }
  return result;
}

}  // namespace deepep
