#include "wait.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace deepep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpinsPerCheck = 256;
constexpr auto kSpinOnlyFor = std::chrono::milliseconds(5);  // words come within microseconds when all is well
constexpr auto kInterruptPeriod = std::chrono::milliseconds(50);
constexpr auto kNap = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

bool wait_word(const volatile uint64_t* word, uint64_t value, double timeout_s,
               const std::function<bool()>& interrupted) {
    const auto start = Clock::now();
    const auto deadline = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
    auto next_interrupt = start + kInterruptPeriod;
    while (true) {
        for (int spin = 0; spin < kSpinsPerCheck; ++spin) {
            if (*word == value) {
                std::atomic_thread_fence(std::memory_order_acquire);
                return true;
            }
            relax();
        }
        const auto now = Clock::now();
        if (now >= deadline) return *word == value;
        if (now >= next_interrupt) {
            if (interrupted()) return false;
            next_interrupt = now + kInterruptPeriod;
        }
        if (now - start > kSpinOnlyFor) std::this_thread::sleep_for(kNap);
    }
}

}  // namespace deepep
