// E = sum_i c_i Q^i for skew blocks Q (the truncated Cayley-Neumann series), and its gradient, in few products.
//
// With S = Q^2, e_j = c_2j and o_j = c_{2j+1}: E = e(S) + Q o(S), e(S) = sum e_j S^j symmetric, Q o(S) skew. Every product below has a
// symmetric or skew second factor Y, so that X Y = +-X Y^T, and rows of both are read (multiply() computes X Z^T only).
//
// Forward, Horner in S; m = degree / 2:
//   H_m = e_m I + o_m Q,   H_j = e_j I + o_j Q + H_{j+1} S,   E = H_0            1 + m products (m for an even degree): 3 for degree 5
//
// Gradient. Let A and B be the skew and symmetric parts of G. Only skew dQ matter, for which dS = Q dQ + dQ Q is symmetric:
//   <G, dE> = <B, de(S)> + <A, dQ o(S)> + <A, Q do(S)> = <B, de(S)> + <A o(S), dQ> + <M, do(S)>,   M = -(QA + (QA)^T) / 2
//   <B, de(S)> + <M, do(S)> = <K, dS>,   K = sum_{j=1..m} sum_{l<j} S^l W_j S^{j-1-l},   W_j = e_j B + o_j M symmetric
//   <K, dS> = -<KQ + QK, dQ>,   KQ + QK = KQ - (KQ)^T
// Hence D - D^T is the folded gradient for  D = A o(S) - 2 K Q.  K is a two-sided Horner scheme:
//   U_m = V_m = W_m,   U_j = W_j + S U_{j+1},   V_j = U_j + V_{j+1} S,   K = V_1
// U is kept transposed (U'_j = W_j + U'_{j+1} S), and U'_{m-1} and V_{m-1} share the product W_m S. Products: S 1, A o(S) m, M 1,
// K 0 (m = 1) or 2m - 3, KQ 1: 6 for degree 5, where reverse mode through Horner's scheme takes 9 with the recomputation.
//
// Blocks up to 64 run in one launch (cayley_shared.cuh), larger ones, or degrees above 31, through the workspace (cayley_tiled.cuh).
// Products are 3xTF32 on tensor cores, fp32-accurate (tf32_product.cuh); in the simulator the rms errors of E and of the folded gradient
// are 0.4 to 1.1 times those of torch's fp32. No atomics; sums have a fixed order. Coefficients are host memory, read before the launcher
// returns.
#include "cayley_shared.cuh"
#include "cayley_tiled.cuh"
#include "launch.cuh"
#include "poet_cuda.h"

namespace poet {
namespace {

// Blocks of a batch, and how they are launched.
struct Batch {
  int64_t count, b;
  void* stream;
  bool vector;  // 16-byte accesses

  int64_t elements() const { return count * b * b; }
  unsigned tiles() const { return static_cast<unsigned>(count * ceil_div(b, kTile) * ceil_div(b, kTile)); }
  bool fits() const { return ceil_div(b, kTile) <= 46340 && count <= kMaxGrid / (ceil_div(b, kTile) * ceil_div(b, kTile)); }

  int product(const float* x, const float* z, float factor, const Linear& sum, float* out) const {
    return launch(vector ? series_product<true> : series_product<false>, tiles(), kTiledThreads, 0, stream, x, z, factor, sum, out, b);
  }
  int combine(const Linear& sum, float* out) const {
    return launch(vector ? series_combine<true> : series_combine<false>, tiles(), kTiledThreads, 0, stream, sum, out, b);
  }
};

// Coefficients of any degree, on the host.
struct Coefficients {
  const float* c;
  int64_t degree;
  int64_t top() const { return degree / 2; }
  float even(int64_t j) const { return 2 * j <= degree ? c[2 * j] : 0.0f; }
  float odd(int64_t j) const { return 2 * j + 1 <= degree ? c[2 * j + 1] : 0.0f; }
};

bool in_shared_memory(int64_t b, int64_t degree) { return b <= 64 && degree <= kMaxSeries; }

// Work matrices per block of the tiled path.
int64_t work_matrices(int64_t degree, bool with_grad) {
  const int64_t top = degree / 2;
  if (with_grad) return top == 0 ? 1 : top == 1 ? 3 : top == 2 ? 4 : 6;
  return top == 0 ? 0 : top == 1 ? 1 : 2;
}

// Runs steps until one fails.
#define POET_STEP(call)             \
  do {                              \
    const int status = (call);      \
    if (status != 0) return status; \
  } while (0)

int tiled_increment(const Batch& batch, const float* q, float* e, const Coefficients& c, float* work) {
  const int64_t top = c.top();
  if (top == 0) return batch.combine(plus(linear(c.even(0)), q, c.odd(0)), e);
  float *s = work, *other = work + batch.elements();
  POET_STEP(batch.product(q, q, -1.0f, linear(), s));
  float* h = top % 2 == 1 ? e : other;  // H_0 lands in e
  const Linear rest = plus(plus(linear(c.even(top - 1)), q, c.odd(top - 1)), s, c.even(top));
  POET_STEP(c.odd(top) != 0.0f ? batch.product(q, s, c.odd(top), rest, h) : batch.combine(rest, h));
  for (int64_t j = top - 2; j >= 0; --j) {
    float* next = h == e ? other : e;
    POET_STEP(batch.product(h, s, 1.0f, plus(linear(c.even(j)), q, c.odd(j)), next));
    h = next;
  }
  return 0;
}

int tiled_grad(const Batch& batch, const float* q, const float* g, float* d, const Coefficients& c, float* work) {
  const int64_t top = c.top(), n = batch.elements();
  float *a = work, *s = work + n, *m = work + 2 * n, *p = work + 3 * n;
  const Linear skew_part = plus(linear(), g, 0.5f, -0.5f);
  if (top == 0) return batch.combine(plus(linear(), g, 0.5f * c.odd(0), -0.5f * c.odd(0)), d);
  POET_STEP(batch.combine(skew_part, a));
  POET_STEP(batch.product(q, q, -1.0f, linear(), s));

  // d = A o(S)
  float* y = top % 2 == 1 ? d : p;
  const Linear start = plus(linear(), a, c.odd(top - 1));
  POET_STEP(c.odd(top) != 0.0f ? batch.product(a, s, c.odd(top), start, y) : batch.combine(start, y));
  for (int64_t j = top - 2; j >= 0; --j) {
    float* next = y == d ? p : d;
    POET_STEP(batch.product(y, s, 1.0f, plus(linear(), a, c.odd(j)), next));
    y = next;
  }

  // m = -QA, of which W takes the symmetric part; a = W_top
  POET_STEP(batch.product(q, a, 1.0f, linear(), m));
  auto plus_w = [&](Linear sum, int64_t j) {
    const float even = 0.5f * c.even(j), odd = 0.5f * c.odd(j);
    return plus(plus(sum, g, even, even), m, odd, odd);
  };
  POET_STEP(batch.combine(plus_w(linear(), top), a));
  float* k = a;
  if (top == 2) {  // a is free once p = W_2 S is there
    POET_STEP(batch.product(a, s, 1.0f, linear(), p));
    POET_STEP(batch.combine(plus_w(plus(linear(), p, 1.0f, 1.0f), 1), a));
  } else if (top > 2) {
    float *u = work + 4 * n, *v = a, *u_next = p, *v_next = work + 5 * n;
    POET_STEP(batch.product(a, s, 1.0f, linear(), p));
    POET_STEP(batch.combine(plus_w(plus(linear(), p, 1.0f), top - 1), u));
    POET_STEP(batch.combine(plus_w(plus(linear(), p, 1.0f, 1.0f), top - 1), v));
    for (int64_t j = top - 2; j >= 1; --j) {
      POET_STEP(batch.product(u, s, 1.0f, plus_w(linear(), j), u_next));
      POET_STEP(batch.product(v, s, 1.0f, plus(linear(), u_next, 0.0f, 1.0f), v_next));
      std::swap(u, u_next), std::swap(v, v_next);
    }
    k = v;
  }
#ifdef POET_FAULT_SIGN
  const float fold = -2.0f;
#else
  const float fold = 2.0f;
#endif
  return batch.product(k, q, fold, plus(linear(), d, 1.0f), d);
}

template <int B>
int shared_increment(const Batch& batch, const float* q, float* e, const Series& series) {
  const int64_t memory = 3 * B * B * sizeof(float);
  const bool whole = batch.vector && batch.b == B;
  return launch(series_increment_shared<B>, static_cast<unsigned>(batch.count), BlockShape<B>::kThreads, memory, batch.stream, q, e,
                static_cast<int>(batch.b), series, whole);
}

template <int B>
int shared_grad(const Batch& batch, const float* q, const float* g, float* d, const Series& series) {
  const int64_t memory = 4 * B * B * sizeof(float);
  const bool whole = batch.vector && batch.b == B;
  return launch(series_grad_shared<B>, static_cast<unsigned>(batch.count), BlockShape<B>::kThreads, memory, batch.stream, q, g, d,
                static_cast<int>(batch.b), series, whole);
}

Series by_value(const Coefficients& coefficients) {
  Series series = {};
  series.degree = static_cast<int>(coefficients.degree);
  std::copy(coefficients.c, coefficients.c + coefficients.degree + 1, series.c);
  return series;
}

bool valid(int64_t count, int64_t b, int64_t degree) {
  return count >= 0 && b >= 0 && degree >= 0 && (count == 0 || b == 0 || (count <= kMaxGrid && Batch{count, b, nullptr, false}.fits()));
}

}  // namespace
}  // namespace poet

extern "C" int64_t poet_cuda_series_workspace(int64_t count, int64_t b, int64_t degree, int with_grad) {
  if (!poet::valid(count, b, degree) || poet::in_shared_memory(b, degree)) return 0;
  return count * b * b * poet::work_matrices(degree, with_grad != 0) * static_cast<int64_t>(sizeof(float));
}

extern "C" int poet_cuda_series_increment(const float* q, float* e, int64_t count, int64_t b, const float* coefficients, int64_t degree,
                                          void* workspace, void* stream) {
  if (!poet::valid(count, b, degree)) return POET_BAD_SHAPE;
  if (count == 0 || b == 0) return POET_OK;
  const bool vector = b % 4 == 0 && poet::aligned_to(q, 16) && poet::aligned_to(e, 16) && poet::aligned_to(workspace, 16);
  const poet::Batch batch{count, b, stream, vector};
  const poet::Coefficients c{coefficients, degree};
  if (!poet::in_shared_memory(b, degree)) return poet::tiled_increment(batch, q, e, c, static_cast<float*>(workspace));
  const poet::Series series = poet::by_value(c);
  if (b <= 16) return poet::shared_increment<16>(batch, q, e, series);
  if (b <= 32) return poet::shared_increment<32>(batch, q, e, series);
  return poet::shared_increment<64>(batch, q, e, series);
}

extern "C" int poet_cuda_series_grad(const float* q, const float* g, float* dq, int64_t count, int64_t b, const float* coefficients,
                                     int64_t degree, void* workspace, void* stream) {
  if (!poet::valid(count, b, degree)) return POET_BAD_SHAPE;
  if (count == 0 || b == 0) return POET_OK;
  const bool vector = b % 4 == 0 && poet::aligned_to(q, 16) && poet::aligned_to(g, 16) && poet::aligned_to(dq, 16) &&
                      poet::aligned_to(workspace, 16);
  const poet::Batch batch{count, b, stream, vector};
  const poet::Coefficients c{coefficients, degree};
  if (!poet::in_shared_memory(b, degree)) return poet::tiled_grad(batch, q, g, dq, c, static_cast<float*>(workspace));
  const poet::Series series = poet::by_value(c);
  if (b <= 16) return poet::shared_grad<16>(batch, q, g, dq, series);
  if (b <= 32) return poet::shared_grad<32>(batch, q, g, dq, series);
  return poet::shared_grad<64>(batch, q, g, dq, series);
}
