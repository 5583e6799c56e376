// poet_cuda_merge_rows: Y = (I + D)^T X on the rows of a weight, X[i, :] = w[rows[i], :], out[rows[i], :] = Y[i, :]; fp32.
//
// Y_i = X_i + sum_k E[k][i] X_k. A thread block takes N columns of the b rows of one block: it stages all of X [b, N] in shared memory,
// then computes Y in panels of 64 rows, streaming E in slabs of 16 k x 64 i through shared memory. It reads everything it will overwrite
// before it writes, and nobody else touches those elements: in place is safe, whatever the row permutation.
// Rows are permuted only in whole pieces of N columns: a warp moves 32 neighbouring columns of a row (N = 64), whole sectors either way.
// N = 64 while b x 64 floats fit into shared memory (b <= 620 on sm_80, 880 on sm_90), N = 8 (one sector) up to b = 5,000 / 7,000.
// Columns, b, strides and alignment are free: all global accesses are 4 bytes per lane.
// E is requested once per column panel (from L2): the merge runs once in hundreds of steps, and this keeps X and Y at one pass each.
#include "launch.cuh"
#include "poet_cuda.h"
#include "warp_ops.cuh"

namespace poet {
namespace {

constexpr int kThreads = 256, kPanel = 64, kSlab = 16;

__device__ __forceinline__ int64_t stored_row(const int32_t* rows, int64_t i) { return rows == nullptr ? i : rows[i]; }

// Grid: x = column panels of every block. Threads: 16 x 16, each 4 rows and the columns c0, c0 + 16, ... (N = 64), or 32 x 8, each 2 rows
// and one column (N = 8): neighbouring lanes hold neighbouring columns.
template <int N>
__global__ void __launch_bounds__(kThreads)
    merge_rows(const float* w, int64_t ldw, const int32_t* rows, int64_t first_row, const float* e, int64_t b, int64_t column_panels,
               float* out, int64_t ldo, int64_t width) {
  constexpr int TN = N == 64 ? 4 : 1, TI = N == 64 ? 4 : 2, ACROSS = N / TN;
  static_assert(ACROSS * (kPanel / TI) == kThreads, "every thread has results");
  extern __shared__ __align__(128) float shared[];
  float *const slab = shared, *const x = shared + kSlab * kPanel;  // [kSlab][kPanel], [b][N]
  const int64_t block = blockIdx.x / column_panels, column0 = blockIdx.x % column_panels * N, row0 = first_row + block * b;
  const int columns = static_cast<int>(min(static_cast<int64_t>(N), width - column0));
  const int i0 = threadIdx.x / ACROSS * TI, c0 = threadIdx.x % ACROSS;
  e += block * b * b;

  for (int64_t f = threadIdx.x; f < b * N; f += kThreads) {
    const int64_t r = f / N;
    const int c = static_cast<int>(f % N);
    x[f] = c < columns ? w[stored_row(rows, row0 + r) * ldw + column0 + c] : 0.0f;
  }
  for (int64_t panel = 0; panel < b; panel += kPanel) {
    float acc[TI][TN] = {};
    for (int64_t k0 = 0; k0 < b; k0 += kSlab) {
      block_barrier();  // X is complete, the slab before is used up
#pragma unroll
      for (int f = threadIdx.x; f < kSlab * kPanel; f += kThreads) {
        const int64_t k = k0 + f / kPanel, i = panel + f % kPanel;
#ifdef POET_FAULT_WRONG_TRANSPOSE
        slab[f] = k < b && i < b ? e[i * b + k] : 0.0f;
#else
        slab[f] = k < b && i < b ? e[k * b + i] : 0.0f;
#endif
      }
#ifndef POET_FAULT_NO_REUSE_BARRIER
      block_barrier();
#endif
      float part[TI][TN] = {};  // a sum per slab, then a sum of slabs: shorter chains of roundings than one over all of b
      const int steps = static_cast<int>(min(static_cast<int64_t>(kSlab), b - k0));
#pragma unroll 4
      for (int k = 0; k < steps; ++k) {
        float a[TI], v[TN];
        if constexpr (N == 64) {
          *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(slab + k * kPanel + i0);
        } else {
          *reinterpret_cast<float2*>(a) = *reinterpret_cast<const float2*>(slab + k * kPanel + i0);
        }
#pragma unroll
        for (int c = 0; c < TN; ++c) v[c] = x[(k0 + k) * N + c0 + ACROSS * c];
#pragma unroll
        for (int i = 0; i < TI; ++i)
#pragma unroll
          for (int c = 0; c < TN; ++c) part[i][c] = fmaf(a[i], v[c], part[i][c]);
      }
#pragma unroll
      for (int i = 0; i < TI * TN; ++i) acc[i / TN][i % TN] += part[i / TN][i % TN];
    }
#pragma unroll
    for (int i = 0; i < TI; ++i) {
      const int64_t row = panel + i0 + i;
#ifdef POET_FAULT_TAIL
      if (row >= b + 1) continue;
#else
      if (row >= b) continue;
#endif
      float* to = out + stored_row(rows, row0 + row) * ldo + column0 + c0;
#pragma unroll
      for (int c = 0; c < TN; ++c)
        if (c0 + ACROSS * c < columns) to[ACROSS * c] = x[row * N + c0 + ACROSS * c] + acc[i][c];
    }
  }
}

// Rows of no block, first_row.. of the stored order, to the same place in `out`. Grid: x = rows.
__global__ void __launch_bounds__(kThreads) copy_rows(const float* w, int64_t ldw, const int32_t* rows, int64_t first_row, int64_t height,
                                                      float* out, int64_t ldo, int64_t width) {
  for (int64_t i = first_row + blockIdx.x; i < height; i += gridDim.x) {
    const int64_t row = stored_row(rows, i);
    for (int64_t c = threadIdx.x; c < width; c += kThreads) out[row * ldo + c] = w[row * ldw + c];
  }
}

constexpr int64_t shared_bytes(int64_t b, int64_t n) { return (kSlab * kPanel + b * n) * 4; }

template <int N>
int launch_merge(const float* w, int64_t ldw, const int32_t* rows, int64_t first_row, const float* e, int64_t count, int64_t b, float* out,
                 int64_t ldo, int64_t width, void* stream) {
  const int64_t panels = ceil_div(width, N);
  if (count > kMaxGrid / panels) return POET_BAD_SHAPE;
  const dim3 grid(static_cast<unsigned>(count * panels));
  return launch(merge_rows<N>, grid, kThreads, shared_bytes(b, N), stream, w, ldw, rows, first_row, e, b, panels, out, ldo, width);
}

int merge_run(const float* w, int64_t ldw, const int32_t* rows, int64_t first_row, const float* e, int64_t count, int64_t b, float* out,
              int64_t ldo, int64_t width, void* stream) {
  if (count == 0 || width == 0) return POET_OK;
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kDefaultShared);
  if (shared_bytes(b, 64) <= limit) return launch_merge<64>(w, ldw, rows, first_row, e, count, b, out, ldo, width, stream);
  if (shared_bytes(b, 8) <= limit) return launch_merge<8>(w, ldw, rows, first_row, e, count, b, out, ldo, width, stream);
  return POET_BAD_SHAPE;
}

}  // namespace
}  // namespace poet

extern "C" int poet_cuda_merge_rows(const float* w, int64_t ldw, const int32_t* rows, const float* e_full, const float* e_ragged,
                                    poet_blocks blocks, float* out, int64_t ldo, int64_t height, int64_t width, void* stream) {
  using namespace poet;
  if (width < 0 || !valid_blocks(blocks, height) || ldw < width || ldo < width) return POET_BAD_SHAPE;
  const int64_t full = blocks.count ? blocks.count * blocks.size : 0;
  const int64_t covered = full + (blocks.ragged_count ? blocks.ragged_count * blocks.ragged_size : 0);
  if (int status = merge_run(w, ldw, rows, 0, e_full, blocks.count, blocks.size, out, ldo, width, stream)) return status;
  if (int status = merge_run(w, ldw, rows, full, e_ragged, blocks.ragged_count, blocks.ragged_size, out, ldo, width, stream)) return status;
  if (w == out || covered == height || width == 0) return POET_OK;
  const int64_t grid = std::min<int64_t>(height - covered, kMaxGrid);
  return launch(copy_rows, dim3(static_cast<unsigned>(grid)), kThreads, 0, stream, w, ldw, rows, covered, height, out, ldo, width);
}
