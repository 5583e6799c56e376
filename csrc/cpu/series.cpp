/* E = sum c_i Q^i for skew Q, and its gradient, one block per thread.
 *
 * With S = Q^2 (symmetric), E = e(S) + Q o(S): e and o are sums of powers of S, all symmetric, and Q o(S) is skew, so that half of every
 * product of the way forward follows from the other half. For the gradient let A and B be the skew and the symmetric part of G: only A
 * reaches Q o(S), only B reaches e(S). See docs/kernels.md. */
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "poet_cpu.h"
#include "scratch.h"

namespace poet {
namespace {

/* Calls body(i, j) for all i > j >= 0, tile after tile: rows and columns of a tile stay in the cache together. */
template <class Body>
void below_diagonal(std::int64_t b, const Body& body) {
  constexpr std::int64_t tile = 16;
  for (std::int64_t top = 0; top < b; top += tile)
    for (std::int64_t left = 0; left <= top; left += tile)
      for (std::int64_t i = top; i < std::min(top + tile, b); ++i)
        for (std::int64_t j = left; j < std::min(left + tile, i); ++j) body(i, j);
}

/* b x b matrices of one block, in the work space of a thread. */
class Workspace {
 public:
  Workspace(const Kernels& kernels, std::int64_t b) : kernels_(kernels), b_(b) {}

  static std::int64_t size(const Kernels& kernels, std::int64_t b, std::int64_t matrices) {
    return matrices * b * b + packed_size(kernels, b, b);
  }

  void use(float* memory) {
    packed_ = memory;
    next_ = memory + packed_size(kernels_, b_, b_);
  }

  float* matrix() {
    float* result = next_;
    next_ += b_ * b_;
    return result;
  }

  /* The right operand of the products that follow. */
  void right(const float* matrix) { kernels_.pack_f32(matrix, b_, 1, b_, b_, packed_); }

  /* c = init + left right; init may be nullptr or c. */
  void product(const float* left, const float* init, float* c) const { kernels_.gemm_f32({b_, b_, b_, left, b_, 1, packed_, init, b_, c, b_}); }

  /* c = left right where the result is known to be symmetric (sign 1) or skew (sign -1): only what lies on and below the panels of the
   * diagonal is computed. */
  void mirrored_product(const float* left, float sign, float* c) const {
    for (std::int64_t j = 0; j < b_; j += kernels_.panel) {
      const std::int64_t columns = std::min(kernels_.panel, b_ - j);
      kernels_.gemm_f32({b_ - j, columns, b_, left + j * b_, b_, 1, packed_ + j * b_, nullptr, 0, c + j * b_ + j, b_});
    }
    const std::int64_t b = b_, panel = kernels_.panel;
    below_diagonal(b, [=](std::int64_t i, std::int64_t j) {
      if (i / panel != j / panel) c[j * b + i] = sign * c[i * b + j];
    });
  }

 private:
  const Kernels& kernels_;
  std::int64_t b_;
  float* packed_ = nullptr;
  float* next_ = nullptr;
};

struct Series {
  const float* coefficients;
  std::int64_t degree;

  float operator[](std::int64_t i) const { return i <= degree ? coefficients[i] : 0.0f; }
  std::int64_t powers() const { return std::max<std::int64_t>(degree / 2, 0); } /* of S that occur */
};

void scaled(float* out, float factor, const float* in, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = factor * in[i];
}

void add_scaled(float* out, float factor, const float* in, std::int64_t n) {
  if (factor == 0.0f) return;
  for (std::int64_t i = 0; i < n; ++i) out[i] += factor * in[i];
}

/* power[j-1] = S^j for j = 1..powers; S^1 must be there. */
void fill_powers(Workspace& work, float* const* power, std::int64_t powers) {
  if (powers < 2) return;
  work.right(power[0]);
  for (std::int64_t j = 1; j < powers; ++j) work.mirrored_product(power[j - 1], 1.0f, power[j]);
}

constexpr std::int64_t max_powers = 16;

void increment_block(Workspace& work, const Series& series, const float* q, float* e, std::int64_t b) {
  const std::int64_t n = b * b, powers = series.powers();
  float *odd = work.matrix(), *power[max_powers];
  for (std::int64_t j = 0; j < powers; ++j) power[j] = work.matrix();
  if (powers > 0) {
    work.right(q);
    work.mirrored_product(q, 1.0f, power[0]);
    fill_powers(work, power, powers);
  }
  if (series.degree >= 3) {
    std::memset(odd, 0, n * sizeof(float));
    for (std::int64_t j = 1; j <= powers; ++j) add_scaled(odd, series[2 * j + 1], power[j - 1], n);
    work.right(q);
    work.mirrored_product(odd, -1.0f, e); /* o(S) and Q commute */
    add_scaled(e, series[1], q, n);
  } else {
    scaled(e, series[1], q, n);
  }
  for (std::int64_t j = 1; j <= powers; ++j) add_scaled(e, series[2 * j], power[j - 1], n);
}

/* m <- (m + m^T) / 2 */
void symmetrize(float* m, std::int64_t b) {
  below_diagonal(b, [=](std::int64_t i, std::int64_t j) { m[i * b + j] = m[j * b + i] = 0.5f * (m[i * b + j] + m[j * b + i]); });
}

/* The skew and the symmetric part of g; symmetric may be nullptr, and skew may be g. */
void split(const float* g, float* skew, float* symmetric, std::int64_t b) {
  for (std::int64_t i = 0; i < b; ++i) {
    if (symmetric != nullptr) symmetric[i * b + i] = g[i * b + i];
    skew[i * b + i] = 0.0f;
  }
  below_diagonal(b, [=](std::int64_t i, std::int64_t j) {
    const float low = g[i * b + j], high = g[j * b + i];
    skew[i * b + j] = 0.5f * (low - high);
    skew[j * b + i] = 0.5f * (high - low);
    if (symmetric != nullptr) symmetric[i * b + j] = symmetric[j * b + i] = 0.5f * (low + high);
  });
}

/* The reverse of P_j = S P_(j-1): on entry adjoint[j-1] holds the gradient of S^j; on return adjoint[0] that of S. */
void reverse_powers(Workspace& work, float* const* power, float* const* adjoint, std::int64_t powers, float* square, std::int64_t b) {
  const std::int64_t n = b * b;
  for (std::int64_t j = powers; j >= 2; --j) {
    work.right(adjoint[j - 1]);
    work.product(power[0], nullptr, square); /* S Pbar_j */
    symmetrize(square, b);
    if (j > 2) {
      add_scaled(adjoint[j - 2], 1.0f, square, n);
      work.product(power[j - 2], nullptr, square); /* P_(j-1) Pbar_j */
      symmetrize(square, b);
      add_scaled(adjoint[0], 1.0f, square, n);
    } else {
      add_scaled(adjoint[0], 2.0f, square, n); /* P_1 is S: both terms are the same */
    }
  }
}

void grad_block(Workspace& work, const Series& series, const float* q, const float* g, float* d, std::int64_t b) {
  const std::int64_t n = b * b, powers = series.powers();
  float *skew = work.matrix(), *symmetric = work.matrix(), *odd = work.matrix(), *power[max_powers], *adjoint[max_powers];
  for (std::int64_t j = 0; j < powers; ++j) power[j] = work.matrix();
  for (std::int64_t j = 0; j < powers; ++j) adjoint[j] = work.matrix();
  split(g, skew, symmetric, b);
  scaled(d, series[1], skew, n);
  if (powers == 0) return;
  work.right(q);
  work.mirrored_product(q, 1.0f, power[0]);
  const bool has_odd = series.degree >= 3;
  if (has_odd) {
    work.right(skew);
    work.product(q, nullptr, odd); /* Q A; the gradient of o(S) is minus its symmetric part */
    symmetrize(odd, b);
  }
  for (std::int64_t j = 1; j <= powers; ++j) {
    scaled(adjoint[j - 1], series[2 * j], symmetric, n);
    if (has_odd) add_scaled(adjoint[j - 1], -series[2 * j + 1], odd, n);
  }
  fill_powers(work, power, powers);
  reverse_powers(work, power, adjoint, powers, symmetric, b);
  if (has_odd) {
    std::memset(odd, 0, n * sizeof(float));
    for (std::int64_t j = 1; j <= powers; ++j) add_scaled(odd, series[2 * j + 1], power[j - 1], n);
    work.right(odd);
    work.product(skew, d, d); /* A o(S) */
  }
  scaled(symmetric, -2.0f, adjoint[0], n);
  work.right(symmetric);
  work.product(q, d, d); /* S = Q^2: the skew part of -2 Q dS is -(Q dS + dS Q) */
  split(d, d, nullptr, b);
}

template <class Body>
int for_blocks(std::int64_t count, std::int64_t b, std::int64_t matrices, const Body& body) {
  const Kernels& kernels = current_kernels();
  bool out_of_memory = false;
#pragma omp parallel
  {
    thread_local Scratch scratch;
    float* memory = scratch.get<float>(Workspace::size(kernels, b, matrices));
    if (memory == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < count; ++i) {
      if (memory == nullptr) continue;
      Workspace work(kernels, b);
      work.use(memory);
      body(work, i * b * b);
    }
  }
  return out_of_memory ? POET_OUT_OF_MEMORY : POET_OK;
}

bool valid(std::int64_t count, std::int64_t b, std::int64_t degree) { return count >= 0 && b >= 0 && degree >= 1 && degree / 2 <= max_powers; }

}  // namespace
}  // namespace poet

int poet_cpu_series_increment(const float* q, float* e, int64_t count, int64_t b, const float* coefficients, int64_t degree) {
  using namespace poet;
  if (!valid(count, b, degree)) return POET_BAD_SHAPE;
  const Series series{coefficients, degree};
  return for_blocks(count, b, 1 + series.powers(),
                    [&](Workspace& work, std::int64_t at) { increment_block(work, series, q + at, e + at, b); });
}

int poet_cpu_series_grad(const float* q, const float* g, float* dq, int64_t count, int64_t b, const float* coefficients, int64_t degree) {
  using namespace poet;
  if (!valid(count, b, degree)) return POET_BAD_SHAPE;
  const Series series{coefficients, degree};
  return for_blocks(count, b, 3 + 2 * series.powers(),
                    [&](Workspace& work, std::int64_t at) { grad_block(work, series, q + at, g + at, dq + at, b); });
}
