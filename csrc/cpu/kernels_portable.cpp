#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace poet {
namespace portable {
namespace {

struct Vec {
  static constexpr int width = 4;
  typedef float T __attribute__((vector_size(16)));
  static T load(const float* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static void store(float* p, T value) { std::memcpy(p, &value, sizeof value); }
  static T set(float value) { return T{value, value, value, value}; }
  static T fma(T a, T b, T c) { return a * b + c; }
  static T zero() { return T{}; }
  static T gather(const float* p, const std::int32_t* order) { return T{p[order[0]], p[order[1]], p[order[2]], p[order[3]]}; }
};

constexpr int tile_rows = 4;

#include "kernels_body.inl"

}  // namespace
}  // namespace portable

const Kernels portable_kernels = portable::table;

}  // namespace poet
