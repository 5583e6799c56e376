// Series of blocks up to 64 x 64: one launch, one thread block per matrix block, every intermediate in shared memory or registers.
// Smaller blocks are padded with zeros to 16, 32 or 64. The algorithm is described in cayley.cu.
#pragma once

#include "tf32_product.cuh"

namespace poet {

constexpr int kMaxSeries = 31;

// sum_i c_i Q^i, by value to the kernels.
struct Series {
  int degree;
  float c[kMaxSeries + 1];
  __host__ __device__ int top() const { return degree / 2; }
  __host__ __device__ float even(int j) const { return c[2 * j]; }
  __host__ __device__ float odd(int j) const { return 2 * j + 1 <= degree ? c[2 * j + 1] : 0.0f; }
};

// The warps of a thread block over a B x B matrix: each computes 16 rows and 8 N columns.
template <int B>
struct BlockShape {
  static constexpr int kWarpRows = B / 16, kWarpColumns = B == 64 ? 2 : B / 16, N = B / (8 * kWarpColumns);
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
  static constexpr int kResident = B == 64 ? 3 : B == 32 ? 8 : 32;     // thread blocks per SM to leave registers for
  static constexpr int kResidentGrad = B == 64 ? 2 : B == 32 ? 4 : 20;
};

template <int B>
struct SharedBlock {
  static constexpr int N = BlockShape<B>::N, kThreads = BlockShape<B>::kThreads;
  using Tile = float[1][N][4];  // a warp's part of a matrix, in registers

  Fragment fragment;
  int row0, column0;

  __device__ SharedBlock() {
    const int warp = threadIdx.x / kWarp;
    row0 = 16 * (warp / BlockShape<B>::kWarpColumns);
    column0 = 8 * N * (warp % BlockShape<B>::kWarpColumns);
  }

  __device__ void clear(Tile& tile) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[0][n][i] = 0.0f;
  }

  // result = X Z^T
  __device__ void product(Tile& result, const float* x, const float* z) const {
    clear(result);
    multiply<1, N, B, B>(result, x, row0, z, column0);
  }

  // visit(n, half, row, column) for every pair of neighbouring elements of this thread
  template <class Visit>
  __device__ __forceinline__ void each_pair(Visit visit) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) visit(n, half, row0 + fragment.row(half), column0 + fragment.column(n));
  }

  // matrix = tile
  __device__ void put(float* matrix, const Tile& tile) const {
    each_pair([&](int n, int half, int row, int column) {
      *reinterpret_cast<float2*>(matrix + at<B>(row, column)) = make_float2(tile[0][n][2 * half], tile[0][n][2 * half + 1]);
    });
  }

  // tile = factor * tile
  __device__ void scale(Tile& tile, float factor) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[0][n][i] *= factor;
  }

  // tile += factor * other
  __device__ void add(Tile& tile, float factor, const Tile& other) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[0][n][i] += factor * other[0][n][i];
  }

  // tile += factor * matrix
  __device__ void add(Tile& tile, float factor, const float* matrix) const {
    each_pair([&](int n, int half, int row, int column) {
      const float2 pair = *reinterpret_cast<const float2*>(matrix + at<B>(row, column));
      tile[0][n][2 * half] += factor * pair.x;
      tile[0][n][2 * half + 1] += factor * pair.y;
    });
  }

  // tile += factor * matrix^T
  __device__ void add_mirrored(Tile& tile, float factor, const float* matrix) const {
    each_pair([&](int n, int half, int row, int column) {
      tile[0][n][2 * half] += factor * matrix[at<B>(column, row)];
      tile[0][n][2 * half + 1] += factor * matrix[at<B>(column + 1, row)];
    });
  }

  // tile += value * I
  __device__ void add_diagonal(Tile& tile, float value) const {
    each_pair([&](int n, int half, int row, int column) {
      if (row == column) tile[0][n][2 * half] += value;
      if (row == column + 1) tile[0][n][2 * half + 1] += value;
    });
  }

  // Global [b, b] to shared memory, zeros around it. `whole`: b = B and 16-byte aligned.
  __device__ static void load(float* matrix, const float* source, int b, bool whole) {
    if (whole) {
      for (int chunk = threadIdx.x; chunk < B * B / 4; chunk += kThreads) {
        const int row = chunk / (B / 4), column = chunk % (B / 4) * 4;
        *reinterpret_cast<float4*>(matrix + at<B>(row, column)) = reinterpret_cast<const float4*>(source)[chunk];
      }
      return;
    }
    for (int index = threadIdx.x; index < B * B; index += kThreads) {
      const int row = index / B, column = index % B;
#ifdef POET_FAULT_NO_PADDING
      if (row < b && column < b)
#endif
        matrix[at<B>(row, column)] = row < b && column < b ? source[row * b + column] : 0.0f;
    }
  }

  // Registers to global [b, b].
  __device__ void store(float* target, const Tile& tile, int b, bool whole) const {
#ifdef POET_FAULT_TAIL
    if (b < B) ++b;
#endif
    each_pair([&](int n, int half, int row, int column) {
      const float first = tile[0][n][2 * half], second = tile[0][n][2 * half + 1];
      float* place = target + row * b + column;
      if (whole) {
        *reinterpret_cast<float2*>(place) = make_float2(first, second);
      } else if (row < b) {
        if (column < b) place[0] = first;
        if (column + 1 < b) place[1] = second;
      }
    });
  }
};

// E for one block: H_j = c_2j I + c_{2j+1} Q + H_{j+1} S from the top down; E = H_0. Shared: Q, S, H.
template <int B>
__global__ void __launch_bounds__(BlockShape<B>::kThreads, BlockShape<B>::kResident)
    series_increment_shared(const float* __restrict__ q_all, float* __restrict__ e_all, int b, Series series, bool whole) {
  extern __shared__ float4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *s = q + B * B, *h = s + B * B;
  const int64_t offset = int64_t(blockIdx.x) * b * b;
  const SharedBlock<B> block;
  typename SharedBlock<B>::Tile tile;

  block.load(q, q_all + offset, b, whole);
  block_barrier();
  const int top = series.top();
  if (top > 0) {
    block.product(tile, q, q);  // Q Q^T = -S
    block.scale(tile, -1.0f);
    block.put(s, tile);
    block_barrier();
  }
  block.clear(tile);
  if (top > 0 && series.odd(top) != 0.0f) {
    block.product(tile, q, s);
    block.scale(tile, series.odd(top));
  }
  if (top > 0) block.add(tile, series.even(top), s);
  for (int j = max(top - 1, 0); j >= 0; --j) {
    if (j < top - 1) {
      block_barrier();  // the previous product has read H
      block.put(h, tile);
      block_barrier();
      block.product(tile, h, s);
    }
    block.add(tile, series.odd(j), q);
    block.add_diagonal(tile, series.even(j));
  }
  block.store(e_all + offset, tile, b, whole);
}

// D for one block, D - D^T the folded gradient of Q. Shared: Q, S and two slots: `a` holds A, then the W, V and K that are multiplied next;
// `t` holds what is needed transposed, G first.
template <int B>
__global__ void __launch_bounds__(BlockShape<B>::kThreads, BlockShape<B>::kResidentGrad)
    series_grad_shared(const float* __restrict__ q_all, const float* __restrict__ g_all, float* __restrict__ d_all, int b, Series series,
                       bool whole) {
  extern __shared__ float4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *s = q + B * B, *a = s + B * B, *t = a + B * B;
  const int64_t offset = int64_t(blockIdx.x) * b * b;
  const SharedBlock<B> block;
  typename SharedBlock<B>::Tile tile, result, symmetric, mixed;  // `result` becomes D; `symmetric` is B, `mixed` is M
  const int top = series.top();

  block.load(q, q_all + offset, b, whole);
  block.load(t, g_all + offset, b, whole);
  block_barrier();
  block.clear(symmetric);
  block.add(symmetric, 0.5f, t);
  block.clear(result);
  block.add(result, 1.0f, symmetric);
  block.add_mirrored(symmetric, 0.5f, t);
  block.add_mirrored(result, -0.5f, t);
  block.put(a, result);
  if (top == 0) {
    block.scale(result, series.odd(0));
    block.store(d_all + offset, result, b, whole);
    return;
  }
  block.product(tile, q, q);  // Q Q^T = -S
  block.scale(tile, -1.0f);
  block.put(s, tile);
  block_barrier();

  // result = A o(S)
  block.scale(result, series.odd(top - 1));
  if (series.odd(top) != 0.0f) {
    block.product(tile, a, s);
    block.add(result, series.odd(top), tile);
  }
  for (int j = top - 2; j >= 0; --j) {
    block_barrier();
    block.put(t, result);
    block_barrier();
    block.product(result, t, s);
    block.add(result, series.odd(j), a);
  }

  // mixed = M = -(Q A + (Q A)^T) / 2
  block.product(mixed, q, a);  // Q A^T = -Q A
  block_barrier();
  block.put(t, mixed);
  block_barrier();
  block.scale(mixed, 0.5f);
  block.add_mirrored(mixed, 0.5f, t);

  // a = K: W_top, then with U' in t:  U'_j = U'_{j+1} S + W_j,  V_j = V_{j+1} S + U'_j^T
  auto add_w = [&](int j) {
    block.add(tile, series.even(j), symmetric);
    block.add(tile, series.odd(j), mixed);
  };
  block.clear(tile);
  add_w(top);
  block.put(a, tile);
  block_barrier();
  if (top > 1) {  // both from P = W_top S: U' = P + W, V = P + P^T + W
    block.product(tile, a, s);
    block.put(t, tile);
    block_barrier();
    block.add_mirrored(tile, 1.0f, t);
    add_w(top - 1);
    block.put(a, tile);
    block_barrier();
  }
  if (top > 2) {
    block.clear(tile);
    block.add(tile, 1.0f, t);
    add_w(top - 1);
    block.put(t, tile);
    block_barrier();
  }
  for (int j = top - 2; j >= 1; --j) {
    block.product(tile, t, s);
    add_w(j);
    block_barrier();
    block.put(t, tile);
    block.product(tile, a, s);
    block_barrier();
    block.add_mirrored(tile, 1.0f, t);
    block.put(a, tile);
    block_barrier();
  }

  block.product(tile, a, q);  // K Q^T = -K Q
#ifdef POET_FAULT_SIGN
  block.add(result, -2.0f, tile);
#else
  block.add(result, 2.0f, tile);
#endif
  block.store(d_all + offset, result, b, whole);
}

}  // namespace poet
