// C += X Z^T for matrices in shared memory with fp32 accuracy on tensor cores (3xTF32), and the layout that keeps it free of bank
// conflicts.
//
// An fp32 number is the sum of two tf32 numbers up to 2^-22 of it: x = hi + lo. Of the four products the smallest, lo lo, is left out:
// an error of at most 3 * 2^-22 |x z| per product, typically that of fp32 (2^-24). Tensor cores do not round their sums to nearest, they
// cut off; so each 8 terms are summed there from zero, and added to the rest by an ordinary fp32 addition. The order over k is fixed.
//
// Layout: P floats per row (16, 32 or 64), no padding. The 16-byte chunks of a row are exchanged: chunk c of row r lies at c ^ swizzle(r).
// Eight rows of a chunk (ldmatrix), four rows of two chunks (accumulators) and rows r, r + 2, r + 4, r + 6 of two chunks (mirrored
// elements) then cover all banks. With P = 16 the last of these takes two cycles.
//
//     chunk   0 1 2 3 4 5 6 7
//     row 0   0 1 2 3 4 5 6 7        row 4   3 2 1 0 7 6 5 4
//     row 1   2 3 0 1 6 7 4 5        row 5   1 0 3 2 5 4 7 6
//     row 2   4 5 6 7 0 1 2 3        row 6   7 6 5 4 3 2 1 0
//     row 3   6 7 4 5 2 3 0 1        row 7   5 4 7 6 1 0 3 2
#pragma once

#include "common.cuh"
#include "warp_ops.cuh"

namespace poet {

template <int P>
__device__ __forceinline__ int swizzle(int row) {
#ifdef POET_FAULT_NO_SWIZZLE
  return 0;
#endif
  if constexpr (P == 16) return (row & 2) | ((row >> 2) & 1);  // two rows share the 32 banks
  const int high = (row >> 2) & 1;
  return (((row & 3) ^ high) << 1) | high;
}

// Index of element (row, column).
template <int P>
__device__ __forceinline__ int at(int row, int column) {
  return row * P + (((column >> 2) ^ swizzle<P>(row)) << 2) + (column & 3);
}

// Where a thread's accumulator elements lie in a warp's tile: rows row(i) and columns column(n), column(n) + 1.
struct Fragment {
  int group, pair;
  __device__ Fragment() : group(static_cast<int>(threadIdx.x % kWarp) >> 2), pair((static_cast<int>(threadIdx.x) & 3) * 2) {}
  __device__ int row(int half) const { return group + 8 * half; }
  __device__ int column(int n) const { return 8 * n + pair; }
};

struct Tf32Pair {
  uint32_t hi, lo;
};

// Both parts to the nearest tf32, ties away from zero. The instruction keeps NaN; for lo, integer arithmetic will do.
__device__ __forceinline__ Tf32Pair split_tf32(uint32_t bits) {
  uint32_t hi;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(hi) : "f"(__uint_as_float(bits)));
  const uint32_t rest = __float_as_uint(__uint_as_float(bits) - __uint_as_float(hi));
  return {hi, (rest + 0x1000u) & 0xffffe000u};
}

// Four 8 x 4 tiles of fp32; lane l gives the address of row l % 8 of tile l / 8 and receives element (l / 4, l % 4) of each.
__device__ __forceinline__ void load_tiles(uint32_t (&tiles)[4], const float* row) { load_matrices<false>(tiles, shared_address(row)); }

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc += X Z^T for one warp: rows x_row.. (16 M) of X, rows z_row.. (8 N, N even) of Z, K columns of both.
template <int M, int N, int P, int K>
__device__ __forceinline__ void multiply(float (&acc)[M][N][4], const float* x, int x_row, const float* z, int z_row) {
  const int lane = threadIdx.x % kWarp;
  const int flip = swizzle<P>(lane % 8);  // tiles start at multiples of 8 rows
  const float* x_lane = x + (x_row + lane % 16) * P;
  const float* z_lane = z + (z_row + lane % 8 + 8 * (lane / 16)) * P;
#pragma unroll 1  // one step has enough independent products, more steps take too many registers
  for (int chunk = 0; chunk < K / 4; chunk += 2) {
    uint32_t a_hi[M][4], a_lo[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t bits[4];
      load_tiles(bits, x_lane + 16 * m * P + (((chunk + lane / 16) ^ flip) << 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Tf32Pair pair = split_tf32(bits[i]);
        a_hi[m][i] = pair.hi, a_lo[m][i] = pair.lo;
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t bits[4];
      load_tiles(bits, z_lane + 8 * n * P + (((chunk + lane / 8 % 2) ^ flip) << 2));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Tf32Pair b0 = split_tf32(bits[2 * half]), b1 = split_tf32(bits[2 * half + 1]);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float step[4] = {};
#ifndef POET_FAULT_ONE_TF32
          mma_tf32(step, a_lo[m], b0.hi, b1.hi);
          mma_tf32(step, a_hi[m], b0.lo, b1.lo);
#endif
          mma_tf32(step, a_hi[m], b0.hi, b1.hi);
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n + half][i] += step[i];
        }
      }
    }
  }
}

}  // namespace poet
