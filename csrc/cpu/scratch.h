/* Work buffers that outlive a call: fresh pages cost more than many of the kernels that use them. */
#pragma once

#include <cstddef>
#include <cstdlib>

namespace poet {

/* A growing, 64-byte aligned buffer; contents do not survive a larger request. */
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  /* At least `count` elements, or nullptr if memory ran out. */
  template <class T>
  T* get(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) / 4096 + 1) * 4096; /* also for nothing: nullptr means failure */
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      size_ = data_ == nullptr ? 0 : bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace poet
