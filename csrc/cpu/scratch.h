/* Work buffers that outlive a call: fresh pages cost more than many of the kernels that use them. */
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace poet {

/* A growing buffer, aligned to a page; contents do not survive a larger request. */
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  /* At least `count` elements, or nullptr if memory ran out. */
  template <class T>
  T* get(std::size_t count) {
    const std::size_t page = count * sizeof(T) < huge_page ? small_page : huge_page;
    const std::size_t bytes = (count * sizeof(T) / page + 1) * page; /* also for nothing: nullptr means failure */
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(page, bytes);
      size_ = data_ == nullptr ? 0 : bytes;
#if defined(__linux__)
      if (data_ != nullptr && page == huge_page) madvise(data_, bytes, MADV_HUGEPAGE); /* a request; refused where there are none */
#endif
    }
    return static_cast<T*>(data_);
  }

 private:
  static constexpr std::size_t small_page = 4096, huge_page = 2 << 20;

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace poet
