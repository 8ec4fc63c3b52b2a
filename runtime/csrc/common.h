// Small things every part of the library uses. Not included by the per-ISA kernel files.
#ifndef SPARSECC_COMMON_H_
#define SPARSECC_COMMON_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsecc {

// Thrown inside the library only; every C function turns it into text (see guard() in c_api.cc).
struct Failure {
  std::string message;
};

// The start of a text from outside, fit for a one-line message.
inline std::string quoted(const char* text) {
  constexpr int kMost = 24;
  std::string shown(1, '"');
  for (int i = 0; i < kMost && text[i] != '\0'; ++i)
    shown.push_back(text[i] >= ' ' && text[i] <= '~' ? text[i] : '?');
  shown.push_back('"');
  return shown;
}

inline std::string show(int64_t number) { return std::to_string(number); }  // in a message
inline size_t at(int64_t i) { return static_cast<size_t>(i); }  // of a std::vector

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Memory aligned to a cache line; large blocks on huge pages where the system gives them, which saves
// up to a fifth when weights are streamed once per call (one row of x).
inline void* allocate(size_t bytes) {
  constexpr size_t kHugePage = size_t{1} << 21;
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : 64, whole = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(memory, whole, MADV_HUGEPAGE);  // only a hint: may fail
#endif
  return memory;
}

// A block of memory aligned to a cache line. Contents are zero after the sized constructor.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { reset(size, true); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  // Room for at least `size`; what was inside is lost when it has to grow.
  T* grow(int64_t size) {
    if (size > size_) reset(size, false);
    return data_;
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void reset(int64_t size, bool zero) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const int64_t bytes = round_up(size * static_cast<int64_t>(sizeof(T)), 64);
    if (bytes == 0) return;
    data_ = static_cast<T*>(allocate(static_cast<size_t>(bytes)));
    size_ = size;
    if (zero) __builtin_memset(data_, 0, static_cast<size_t>(bytes));
  }

  T* data_ = nullptr;
  int64_t size_ = 0;
};

template <class T>
Buffer<T> aligned(const std::vector<T>& from) {
  Buffer<T> to(static_cast<int64_t>(from.size()));
  std::copy(from.begin(), from.end(), to.data());
  return to;
}

// Working memory that a thread keeps between calls. A lease takes the thread's buffer away and puts
// it back, so a nested call on the same thread (an executor that steals work) gets one of its own.
template <int Slot, class T = float>
class Scratch {
 public:
  explicit Scratch(int64_t size) : buffer_(std::move(kept())) { buffer_.grow(size); }
  ~Scratch() {
    if (buffer_.size() >= kept().size()) kept() = std::move(buffer_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return buffer_.data(); }

 private:
  static Buffer<T>& kept() {
    static thread_local Buffer<T> buffer;
    return buffer;
  }
  Buffer<T> buffer_;
};

}  // namespace sparsecc
#endif
