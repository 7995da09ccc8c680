// A pool of threads for work of microseconds.
//
// A thread spins for a short while after its last work, so that the operators of one step follow each other without a
// system call, and then sleeps. A call hands its work out in chunks, and waits only for threads that have taken one: a
// thread that the system does not run holds nobody up.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  // `threads`: how many work, the caller's included.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(chunk, thread) for every chunk in [0, chunks), on any thread and in any order; returns when all are done.
  // `thread` is in [0, threads()) and no other chunk runs with the same one at the same time.
  template <class Task>
  void run(int64_t chunks, const Task& task) {
    if (workers_.empty() || chunks < 2) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) task(chunk, 0);
      return;
    }
    run_chunks(chunks, [](const void* data, int64_t chunk, int thread) {
      (*static_cast<const Task*>(data))(chunk, thread);
    }, &task);
  }

 private:
  using Call = void (*)(const void* data, int64_t chunk, int thread);

  void run_chunks(int64_t chunks, Call call, const void* data);
  void work(int thread);
  void take_chunks(int thread);
  void stop();  // ends the threads

  // The low half counts the threads that work on the open call, the next bit says that one is open, and the rest counts
  // the calls. All of it in one word, so that a thread joins the call that it has seen, or none.
  static constexpr uint64_t kOpen = uint64_t{1} << 31;
  static constexpr uint64_t kCall = uint64_t{1} << 32;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  int64_t chunks_ = 0;
  Call call_ = nullptr;
  const void* data_ = nullptr;

  alignas(64) std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};
