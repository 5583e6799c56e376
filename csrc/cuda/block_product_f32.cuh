// The fp32 block product in plain FMA: the increments (a 128-column half of them for B = 256) stay in shared memory, tokens are streamed as
// in block_product_bf16.cuh. Error: that of an fp32 dot product of length B in ascending k, plus one rounding for the residual.
//
// A lane computes RT rows x 4 adjacent columns; 16 or 32 lanes cover the N columns of the tile, so that increments are read and results
// stored as float4 by consecutive lanes (512 contiguous bytes per warp and row pair) and x as float4 along k, the same address for all
// lanes of a row.
// With B = 256 a thread block needs 256 x 128 increments (128 KiB) and reads all 256 columns of x for its 128 results: x is requested
// twice.
#pragma once

#include "warp_ops.cuh"

namespace poet {

template <int B>
struct ProductTileF32 {
  static constexpr int N = B < 64 ? 64 : B > 128 ? 128 : B;  // columns computed
  static constexpr int K = B < 64 ? 64 : B;                  // columns of x that are read
  static constexpr int RT = B == 256 ? 4 : 8;                // rows per lane
  static constexpr int M = 4 * (128 / N) * RT, THREADS = 128;
  static constexpr int RESIDENT = B == 256 ? 1 : B == 128 ? 2 : 3;
  static constexpr int INCREMENT_BYTES = B * N * 4, STAGE_BYTES = M * K * 4, SHARED_BYTES = INCREMENT_BYTES + 2 * STAGE_BYTES;
};

// Word of element (row, column) of increments [*, N] in shared memory: chunks of 4 words, exchanged by the row, so that the transposed copy
// (8 rows x 4 columns at a time) and the float4 reads of a row are both free of bank conflicts.
template <int N>
__device__ __forceinline__ int increment_word(int row, int column) {
#ifdef POET_FAULT_NO_SWIZZLE
  return row * N + column;
#else
  return row * N + (((column >> 2) ^ (row & 7)) << 2) + (column & 3);
#endif
}

// Row and column in the tile of the first of a lane's RT x 4 results; its rows are consecutive.
template <int N, int RT>
__device__ __forceinline__ int lane_row() {
  return ((threadIdx.x >> 5) * (128 / N) + (threadIdx.x & 31) / (N / 4)) * RT;
}
template <int N>
__device__ __forceinline__ int lane_column() {
  return (threadIdx.x & 31) % (N / 4) * 4;
}

// acc += x E; x [M, K], the lane's block starts at column `block` of x.
template <int B, int N, int K, int RT>
__device__ __forceinline__ void multiply_panel_f32(float (&acc)[RT][4], const float* x, const float* e, int block) {
  const float* rows = x + lane_row<N, RT>() * K + block;
  const int column = lane_column<N>();
#pragma unroll 2
  for (int k = 0; k < B; k += 4) {
    float4 a[RT];
#pragma unroll
    for (int i = 0; i < RT; ++i) a[i] = *reinterpret_cast<const float4*>(rows + i * K + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 b = *reinterpret_cast<const float4*>(e + increment_word<N>(k + j, column));
#pragma unroll
      for (int i = 0; i < RT; ++i) {
        const float s = j == 0 ? a[i].x : j == 1 ? a[i].y : j == 2 ? a[i].z : a[i].w;
        acc[i][0] = fmaf(s, b.x, acc[i][0]);
        acc[i][1] = fmaf(s, b.y, acc[i][1]);
        acc[i][2] = fmaf(s, b.z, acc[i][2]);
        acc[i][3] = fmaf(s, b.w, acc[i][3]);
      }
    }
  }
}

template <int B>
__device__ __forceinline__ void load_increments_f32(float* to, const float* e, int64_t block0, int64_t count, int half, int transpose) {
  constexpr int N = ProductTileF32<B>::N, THREADS = ProductTileF32<B>::THREADS;
  if (transpose) {  // a warp copies 4 rows x 8 columns of E (whole sectors) to 8 rows x 4 columns
    for (int i = threadIdx.x; i < B * N; i += THREADS) {
      const int tile = i >> 5, k = tile % (B / 8) * 8 + (i & 7), n = tile / (B / 8) * 4 + (i >> 3 & 3);
      const int64_t block = block0 + n / B;
      const bool valid = block < count;
      copy4(shared_address(to + increment_word<N>(k, n)), e + (valid ? (block * B + half * N + n % B) * B + k : 0), valid);
    }
  } else {
    for (int i = threadIdx.x; i < B * N / 4; i += THREADS) {
      const int k = i / (N / 4), n = i % (N / 4) * 4;
      const int64_t block = block0 + n / B;
      const bool valid = block < count;
      copy16(shared_address(to + increment_word<N>(k, n)), e + (valid ? (block * B + k) * B + half * N + n % B : 0), valid);
    }
  }
}

// Grid: x = column panels of N, y = token ranges.
template <int B>
__global__ void __launch_bounds__(ProductTileF32<B>::THREADS, ProductTileF32<B>::RESIDENT)
    block_product_f32(const float* x, int64_t ldx, const float* e, int64_t count, int transpose, float* y, int64_t ldy, int64_t tokens,
                      int64_t tiles_per_range) {
  using Tile = ProductTileF32<B>;
  constexpr int N = Tile::N, K = Tile::K, M = Tile::M, RT = Tile::RT;
  extern __shared__ __align__(128) char shared[];
  float* const increments = reinterpret_cast<float*>(shared);
  float* const stages = reinterpret_cast<float*>(shared + Tile::INCREMENT_BYTES);
  const int64_t panel = blockIdx.x / (K / N), block0 = panel * (K / B), column0 = block0 * B;
  const int half = static_cast<int>(blockIdx.x % (K / N));  // which N of the K columns are computed
  const int columns = static_cast<int>(min(static_cast<int64_t>(K), count * B - column0));
  const int64_t first = blockIdx.y * tiles_per_range, last = min(first + tiles_per_range, (tokens + M - 1) / M);
  const int row0 = lane_row<N, RT>(), column = lane_column<N>();

  auto load_tile = [&](int stage, int64_t tile) {
    float* to = stages + stage * (M * K);
#pragma unroll 4
    for (int i = threadIdx.x; i < M * K / 4; i += Tile::THREADS) {
      const int row = i / (K / 4), c = i % (K / 4) * 4;
      const int64_t token = tile * M + row;
      const bool valid = token < tokens && c < columns;
      copy16(shared_address(to + row * K + c), x + (valid ? token * ldx + column0 + c : 0), valid);
    }
    copies_commit();
  };

#ifdef POET_FAULT_WRONG_TRANSPOSE
  transpose = !transpose;
#endif
  if (first >= last) return;
  load_increments_f32<B>(increments, e, block0, count, half, transpose);
  load_tile(0, first);
  for (int64_t tile = first; tile < last; ++tile) {
    const int stage = static_cast<int>(tile - first) & 1;
    if (tile + 1 < last) {
      load_tile(stage ^ 1, tile + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    block_barrier();
    const float* current = stages + stage * (M * K);
    float acc[RT][4] = {};
    multiply_panel_f32<B, N, K, RT>(acc, current, increments, column / B * B);
#pragma unroll
    for (int i = 0; i < RT; ++i) {
      const int64_t token = tile * M + row0 + i;
      if (half * N + column >= columns) continue;
#ifndef POET_FAULT_TAIL
      if (token >= tokens) continue;
#endif
      const float4 own = *reinterpret_cast<const float4*>(current + (row0 + i) * K + half * N + column);
      store16(y + token * ldy + column0 + half * N + column, own.x + acc[i][0], own.y + acc[i][1], own.z + acc[i][2], own.w + acc[i][3]);
    }
#ifndef POET_FAULT_NO_REUSE_BARRIER
    block_barrier();
#endif
  }
}

}  // namespace poet
