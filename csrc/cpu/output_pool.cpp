#include "output_pool.h"

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace poet {
namespace {

class Pool {
 public:
  void* take(std::size_t bytes) {
    const std::size_t size = (bytes + pooled_bytes - 1) / pooled_bytes * pooled_bytes;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<void*>& waiting = idle_[size];
    if (!waiting.empty()) {
      void* buffer = waiting.back();
      waiting.pop_back();
      idle_bytes_ -= size;
      return buffer;
    }
    void* buffer = std::aligned_alloc(pooled_bytes, size);
    if (buffer == nullptr) return nullptr;
#if defined(__linux__)
    madvise(buffer, size, MADV_HUGEPAGE); /* a request; refused where there are none */
#endif
    sizes_[buffer] = size;
    return buffer;
  }

  void give_back(void* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t size = sizes_.at(buffer);
    for (auto other = idle_.begin(); other != idle_.end() && idle_bytes_ + size > idle_limit; ++other)
      while (other->first != size && !other->second.empty() && idle_bytes_ + size > idle_limit) release_idle(*other);
    if (idle_bytes_ + size > idle_limit) {
      sizes_.erase(buffer);
      std::free(buffer);
      return;
    }
    idle_[size].push_back(buffer);
    idle_bytes_ += size;
  }

 private:
  /* Sizes that are no longer asked for make room for those that are. */
  void release_idle(std::pair<const std::size_t, std::vector<void*>>& waiting) {
    void* buffer = waiting.second.back();
    waiting.second.pop_back();
    idle_bytes_ -= waiting.first;
    sizes_.erase(buffer);
    std::free(buffer);
  }

  std::mutex mutex_;
  std::unordered_map<std::size_t, std::vector<void*>> idle_;
  std::unordered_map<void*, std::size_t> sizes_;
  std::size_t idle_bytes_ = 0;
};

/* Never destroyed: tensors may outlive every static object. */
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

void* take_output(std::size_t bytes) { return pool().take(bytes); }
void give_output_back(void* buffer) { pool().give_back(buffer); }

}  // namespace poet
