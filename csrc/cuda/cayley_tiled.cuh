// Series of blocks of any size: a sequence of batched products, each with a linear combination of matrices in its epilogue, through a
// workspace in global memory. The algorithm is described in cayley.cu.
#pragma once

#include "tf32_product.cuh"

namespace poet {

constexpr int kTile = 64, kSlab = 32, kTiledThreads = 128, kTerms = 3;
#ifdef POET_FAULT_SPILL
constexpr int kTiledResident = 16;  // 32 registers per thread
#else
constexpr int kTiledResident = 4;
#endif

// sum_i (direct_i T_i + mirrored_i T_i^T) + diagonal I over contiguous [b, b] matrices.
struct Linear {
  const float* matrix[kTerms];
  float direct[kTerms], mirrored[kTerms];
  int terms;
  float diagonal;
};

inline Linear linear(float diagonal = 0.0f) {
  Linear sum = {};
  sum.diagonal = diagonal;
  return sum;
}

inline Linear plus(Linear sum, const float* matrix, float direct, float mirrored = 0.0f) {
  sum.matrix[sum.terms] = matrix, sum.direct[sum.terms] = direct, sum.mirrored[sum.terms] = mirrored;
  ++sum.terms;
  return sum;
}

// The values of `sum` at (row, column) and (row, column + 1) of the block at `offset`. Vector: the pair is 8-byte aligned; otherwise the
// second one may lie outside and is then 0. The lanes of a warp cover 8 rows of 4 pairs: direct and mirrored elements are both read in
// whole 32-byte sectors.
template <bool Vector>
__device__ __forceinline__ float2 pair_at(const Linear& sum, int64_t offset, int64_t b, int64_t row, int64_t column) {
  float2 value = make_float2(row == column ? sum.diagonal : 0.0f, row == column + 1 ? sum.diagonal : 0.0f);
  const bool second = Vector || column + 1 < b;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    if (i >= sum.terms) continue;
    const float *direct = sum.matrix[i] + offset + row * b + column, *mirrored = sum.matrix[i] + offset + column * b + row;
    float2 term;
    if constexpr (Vector)
      term = *reinterpret_cast<const float2*>(direct);
    else
      term = make_float2(direct[0], second ? direct[1] : 0.0f);
    value.x += sum.direct[i] * term.x, value.y += sum.direct[i] * term.y;
    if (sum.mirrored[i] != 0.0f) {
      value.x += sum.mirrored[i] * mirrored[0];
      if (second) value.y += sum.mirrored[i] * mirrored[b];
    }
  }
  return value;
}

template <bool Vector>
__device__ __forceinline__ void store_pair(float* target, float2 value, bool second) {
  if constexpr (Vector) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(value.x), "f"(value.y) : "memory");  // nvcc splits some in two
  } else {
    target[0] = value.x;
    if (second) target[1] = value.y;
  }
}

// The tile of a batch of matrices that a thread block works on.
struct TilePlace {
  int64_t offset;  // of the matrix
  int64_t row0, column0;
  __device__ TilePlace(int64_t b) {
    const int64_t side = ceil_div(b, kTile), tile = int64_t(blockIdx.x) % (side * side);
    offset = int64_t(blockIdx.x) / (side * side) * b * b;
    row0 = tile / side * kTile, column0 = tile % side * kTile;
  }
};

// 64 rows of 32 columns to shared memory, zeros outside the matrix. Asynchronous. Vector: b is a
// multiple of 4 and the matrix 16-byte aligned.
template <bool Vector>
__device__ __forceinline__ void load_slab(float* slab, const float* matrix, int64_t b, int64_t row0, int64_t column0) {
  constexpr int kStep = Vector ? 4 : 1;
#ifdef POET_FAULT_TAIL
  const int64_t last = b + 1;
#else
  const int64_t last = b;
#endif
#pragma unroll 4
  for (int index = threadIdx.x; index < kTile * kSlab / kStep; index += kTiledThreads) {
    const int row = index / (kSlab / kStep), column = index % (kSlab / kStep) * kStep;
    const bool inside = row0 + row < last && column0 + column < b;
    const float* source = matrix + (inside ? (row0 + row) * b + column0 + column : 0);
    const uint32_t target = shared_address(slab + at<kSlab>(row, column));
    if constexpr (Vector)
      copy16(target, source, inside);
    else
      copy4(target, source, inside);
  }
}

// out = factor * X Z^T + linear for a batch of b x b matrices, one 64 x 64 tile per thread block. Slabs of 32 columns of X and Z are double
// buffered; each of the 4 warps computes 32 x 32. `out` may be a matrix of the linear combination that is not mirrored.
template <bool Vector>
__global__ void __launch_bounds__(kTiledThreads, kTiledResident)
    series_product(const float* x, const float* z, float factor, Linear sum, float* out, int64_t b) {
  __shared__ __align__(128) float slabs[2][2][kTile * kSlab];
  const TilePlace place(b);
  x += place.offset, z += place.offset;
  const int warp = threadIdx.x / kWarp, row0 = warp / 2 * 32, column0 = warp % 2 * 32;
  float acc[2][4][4] = {};

  load_slab<Vector>(slabs[0][0], x, b, place.row0, 0);
  load_slab<Vector>(slabs[0][1], z, b, place.column0, 0);
  copies_commit();
  for (int64_t k = 0, buffer = 0; k < b; k += kSlab, buffer ^= 1) {
    copies_wait<0>();
    block_barrier();  // the slab is there, and everyone is done with the other buffer
    if (k + kSlab < b) {
      load_slab<Vector>(slabs[buffer ^ 1][0], x, b, place.row0, k + kSlab);
      load_slab<Vector>(slabs[buffer ^ 1][1], z, b, place.column0, k + kSlab);
      copies_commit();
    }
    multiply<2, 4, kSlab, kSlab>(acc, slabs[buffer][0], row0, slabs[buffer][1], column0);
  }

  const Fragment fragment;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = place.row0 + row0 + 16 * m + fragment.row(half), column = place.column0 + column0 + fragment.column(n);
        if (row >= b || column >= b) continue;
        float2 value = pair_at<Vector>(sum, place.offset, b, row, column);
        value.x += factor * acc[m][n][2 * half], value.y += factor * acc[m][n][2 * half + 1];
        store_pair<Vector>(out + place.offset + row * b + column, value, column + 1 < b);
      }
}

// out = linear, tile by tile; reads no matrix if there is no term. `out` may not be a mirrored matrix.
template <bool Vector>
__global__ void __launch_bounds__(kTiledThreads, 16) series_combine(Linear sum, float* out, int64_t b) {
  constexpr int kPatches = kTile / 8;
  const TilePlace place(b);
  const Fragment fragment;
  for (int patch = threadIdx.x / kWarp; patch < kPatches * kPatches; patch += kTiledThreads / kWarp) {
    const int64_t row = place.row0 + patch / kPatches * 8 + fragment.row(0);
    const int64_t column = place.column0 + fragment.column(patch % kPatches);
    if (row >= b || column >= b) continue;
    store_pair<Vector>(out + place.offset + row * b + column, pair_at<Vector>(sum, place.offset, b, row, column), column + 1 < b);
  }
}

}  // namespace poet
