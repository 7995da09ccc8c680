#include "pool.h"

#include <chrono>

#include <immintrin.h>

namespace {

using Clock = std::chrono::steady_clock;

// Longer than what lies between two operators of a step, and short beside a step.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kLooksBetweenClocks = 64;

// Spins until `done` holds, for kSpin at most; whether it does.
template <class Done>
bool spin(const Done& done) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int look = 0; look < kLooksBetweenClocks; ++look) {
      if (done()) return true;
      _mm_pause();
    }
  } while (Clock::now() < end);
  return done();
}

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // no thread: those that there are end before their pool does
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run_chunks(int64_t chunks, Call call, const void* data) {
  chunks_ = chunks;
  call_ = call;
  data_ = data;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t closed = state_.load(std::memory_order_relaxed);
  state_.store((closed & ~(kCall - 1)) + (kCall | kOpen));  // sequentially consistent, as asleep_ is: one sees the other
  if (asleep_.load() > 0) {
    // A thread that is about to sleep holds the mutex from its last look at the state on.
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  take_chunks(0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  const auto left = [this] { return (state_.load(std::memory_order_acquire) & (kOpen - 1)) == 0; };
  while (!spin(left)) std::this_thread::yield();
}

void Pool::take_chunks(int thread) {
  for (int64_t chunk; (chunk = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) call_(data_, chunk, thread);
}

void Pool::work(int thread) {
  uint64_t seen = 0;  // the last call that this thread has worked on
  const auto wanted = [this, &seen] {
    const uint64_t state = state_.load();
    return stop_.load(std::memory_order_relaxed) || ((state & kOpen) != 0 && state / kCall != seen);
  };
  while (true) {
    if (!spin(wanted)) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      wake_.wait(lock, wanted);
      asleep_.fetch_sub(1);
    }
    if (stop_.load()) return;
    uint64_t state = state_.load(std::memory_order_acquire);
    while ((state & kOpen) != 0 && state / kCall != seen) {
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      seen = state / kCall;
      take_chunks(thread);
      state_.fetch_sub(1, std::memory_order_acq_rel);
      break;
    }
  }
}
