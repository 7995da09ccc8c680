// Memory that a context keeps between calls.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

constexpr size_t kAlign = 64;

constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// A buffer that grows.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }

  // At least so many bytes, aligned; what was in it is lost where it grows. Null: there is no memory.
  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = aligned(bytes);
      data_ = std::aligned_alloc(kAlign, size_);
      if (data_ == nullptr) size_ = 0;
    }
    return static_cast<char*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Scratch {
  explicit Scratch(int threads) : own(threads) {}

  Buffer shared;            // the activations of a call
  std::vector<Buffer> own;  // of each thread
};
