// y_j = x_j + x_j E_j (or E_j^T) in bf16 for block sizes 16 to 256: tensor cores, fp32 accumulation, one rounding.
//
// Grid: x = column panels of P = max(64, B) columns, so that a row of a panel is at least 128 contiguous bytes; y = token ranges.
// A thread block keeps the E of its panel in shared memory for its whole range and streams token tiles [M, P] through two stages of
// cp.async, 16 bytes per thread, a warp reading 512 contiguous bytes per 4 rows (P = 64) or per row (P = 256).
// A warp multiplies ROWS tokens by COLUMNS columns: ldmatrix for both operands, mma m16n8k16.
//
// Dealt columns. In an accumulator fragment a lane holds 2 adjacent columns of each 8-column tile: stored like that, a warp would write 4
// bytes per lane and half sectors. So the columns of E are dealt to the slots of DEAL tiles such that the lane q of a quad ends with 2 DEAL
// adjacent columns: column 2 DEAL q + 2 t + h sits in slot 2 q + h of tile t. The permutation is free: it happens in the copy of E into
// shared memory (4-byte words within a row of E; whole rows for E^T). A quad then stores 64 contiguous bytes straight from registers.
#pragma once

#include "warp_ops.cuh"

namespace poet {

template <int B>
struct ProductTile {
  static constexpr int P = B < 64 ? 64 : B;     // columns of a panel
  static constexpr int M = B == 256 ? 32 : 64;  // tokens of a tile
  static constexpr int WARPS_M = B == 256 ? 1 : 4, WARPS_N = B == 256 ? 8 : 1;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int ROWS = M / WARPS_M, COLUMNS = P / WARPS_N;  // of a warp
  static constexpr int DEAL = B == 16 ? 2 : 4;
  static constexpr int RESIDENT = B == 256 ? 1 : B == 128 ? 2 : 6;  // thread blocks per multiprocessor, by shared memory and registers
  static constexpr int INCREMENT_BYTES = B * P * 2, STAGE_BYTES = M * P * 2, SHARED_BYTES = INCREMENT_BYTES + 2 * STAGE_BYTES;
};

// Slot of column c within its group of 8 DEAL columns.
template <int DEAL>
__device__ __forceinline__ int dealt(int c) {
  int q = c / (2 * DEAL) % 4, t = c / 2 % DEAL;
  return c / (8 * DEAL) * (8 * DEAL) + 8 * t + 2 * q + c % 2;
}

// acc += x E for the warp's rows [row0, row0 + ROWS) and columns [column0, column0 + COLUMNS) of a tile x [M, P] and a panel of increments
// [B, P] in shared memory (swizzled, dealt). Columns of different blocks use the x columns of their own block.
template <int B, bool TRANSPOSE, int P, int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply_panel(float (&acc)[ROWS / 16][COLUMNS / 8][4], uint32_t x, uint32_t e, int row0, int column0) {
  constexpr int SEGMENT = B < COLUMNS ? B : COLUMNS;  // columns of the warp in one block
  const int lane = threadIdx.x & 31, inner = lane & 7, matrix = lane >> 3;
#pragma unroll
  for (int segment = 0; segment < COLUMNS / SEGMENT; ++segment) {
    const int first = column0 + segment * SEGMENT;                // panel column of the segment
    const int block = first / B * B;                              // panel column of its block
#pragma unroll
    for (int k = 0; k < B; k += 16) {
      uint32_t a[ROWS / 16][4];
#pragma unroll
      for (int m = 0; m < ROWS / 16; ++m)
        load_matrices<false>(a[m], x + swizzled<P>(row0 + 16 * m + (lane & 15), (block + k) / 8 + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < SEGMENT; n += 16) {
        uint32_t b[4];  // two tiles of 8 columns, two halves of k each
        if constexpr (TRANSPOSE)
          load_matrices<false>(b, e + swizzled<P>(first - block + n + (matrix >> 1) * 8 + inner, (block + k) / 8 + (matrix & 1)));
        else
          load_matrices<true>(b, e + swizzled<P>(k + (matrix & 1) * 8 + inner, (first + n) / 8 + (matrix >> 1)));
#pragma unroll
        for (int m = 0; m < ROWS / 16; ++m) {
          mma_bf16(acc[m][(segment * SEGMENT + n) / 8], a[m], b[0], b[1]);
          mma_bf16(acc[m][(segment * SEGMENT + n) / 8 + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// Calls emit(row, column, words) for every run of 2 DEAL adjacent results of the lane, the residual x added in fp32, rounded to bf16.
template <int DEAL, int P, int ROWS, int COLUMNS, class Emit>
__device__ __forceinline__ void add_residual(const float (&acc)[ROWS / 16][COLUMNS / 8][4], const char* x, int row0, int column0,
                                             Emit emit) {
  const int lane = threadIdx.x & 31, q = lane & 3;
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half + (lane >> 2);
#pragma unroll
      for (int group = 0; group < COLUMNS / (8 * DEAL); ++group) {
        const int column = column0 + group * 8 * DEAL + 2 * DEAL * q;
        uint32_t words[DEAL];
        const char* from = x + swizzled<P>(row, column / 8) + column % 8 * 2;
        if constexpr (DEAL == 4) *reinterpret_cast<uint4*>(words) = *reinterpret_cast<const uint4*>(from);
        else *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(from);
#pragma unroll
        for (int t = 0; t < DEAL; ++t) {
          const float* sum = acc[m][group * DEAL + t];
          words[t] = pack_bf16(low_bf16(words[t]) + sum[2 * half], high_bf16(words[t]) + sum[2 * half + 1]);
        }
        emit(row, column, words);
      }
    }
}

// Copies the increments of blocks [block0, ...) into the panel's shared memory, dealt; blocks from `count` on become zero.
template <int B, bool TRANSPOSE>
__device__ __forceinline__ void load_increments(uint32_t to, const bf16* e, int64_t block0, int64_t count) {
  using Tile = ProductTile<B>;
  constexpr int P = Tile::P;
  if constexpr (TRANSPOSE) {  // stored row = dealt output column, contiguous k
    for (int i = threadIdx.x; i < B * P / 8; i += Tile::THREADS) {
      const int row = i / (P / 8), chunk = i % (P / 8);
      const int64_t block = block0 + chunk * 8 / B;
      const bool valid = block < count;
      copy16(to + swizzled<P>(dealt<Tile::DEAL>(row), chunk), e + (valid ? (block * B + row) * B + chunk * 8 % B : 0), valid);
    }
  } else {  // stored row = k, dealt columns
    for (int i = threadIdx.x; i < B * P / 2; i += Tile::THREADS) {
      const int row = i / (P / 2), column = i % (P / 2) * 2;
      const int64_t block = block0 + column / B;
      const bool valid = block < count;
      const int slot = dealt<Tile::DEAL>(column);
      copy4(to + swizzled<P>(row, slot / 8) + slot % 8 * 2, e + (valid ? (block * B + row) * B + column % B : 0), valid);
    }
  }
}

template <int B, bool TRANSPOSE>
__global__ void __launch_bounds__(ProductTile<B>::THREADS, ProductTile<B>::RESIDENT)
    block_product_bf16(const bf16* x, int64_t ldx, const bf16* e, int64_t count, bf16* y, int64_t ldy, int64_t tokens,
                       int64_t tiles_per_range) {
  using Tile = ProductTile<B>;
  constexpr int P = Tile::P, M = Tile::M;
  extern __shared__ __align__(128) char shared[];
  char* const stages = shared + Tile::INCREMENT_BYTES;
  const int64_t block0 = static_cast<int64_t>(blockIdx.x) * (P / B), column0 = block0 * B;
  const int columns = static_cast<int>(min(static_cast<int64_t>(P), count * B - column0));
  const int64_t first = blockIdx.y * tiles_per_range, last = min(first + tiles_per_range, (tokens + M - 1) / M);
  const int warp = threadIdx.x >> 5, row0 = warp / Tile::WARPS_N * Tile::ROWS, warp_column = warp % Tile::WARPS_N * Tile::COLUMNS;

  auto load_tile = [&](int stage, int64_t tile) {
    const uint32_t to = shared_address(stages + stage * Tile::STAGE_BYTES);
#pragma unroll
    for (int i = threadIdx.x; i < M * P / 8; i += Tile::THREADS) {
      const int row = i / (P / 8), chunk = i % (P / 8);
      const int64_t token = tile * M + row;
      const bool valid = token < tokens && chunk * 8 < columns;
      copy16(to + swizzled<P>(row, chunk), x + (valid ? token * ldx + column0 + chunk * 8 : 0), valid);
    }
    copies_commit();
  };

#ifdef POET_FAULT_WRONG_TRANSPOSE
  constexpr bool USED = !TRANSPOSE;
#else
  constexpr bool USED = TRANSPOSE;
#endif
  if (first >= last) return;
  load_increments<B, USED>(shared_address(shared), e, block0, count);
  load_tile(0, first);  // one group with the increments
  for (int64_t tile = first; tile < last; ++tile) {
    const int stage = static_cast<int>(tile - first) & 1;
    if (tile + 1 < last) {
      load_tile(stage ^ 1, tile + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    block_barrier();  // everyone's part of this tile has arrived
    const char* current = stages + stage * Tile::STAGE_BYTES;
    float acc[Tile::ROWS / 16][Tile::COLUMNS / 8][4] = {};
    multiply_panel<B, USED, P, Tile::ROWS, Tile::COLUMNS>(acc, shared_address(current), shared_address(shared), row0, warp_column);
    auto store = [&](int row, int column, const uint32_t* words) {
      const int64_t token = tile * M + row;
#ifndef POET_FAULT_TAIL
      if (token >= tokens) return;
#endif
      if (column >= columns) return;
      bf16* to = y + token * ldy + column0 + column;
      if constexpr (Tile::DEAL == 4) store16(to, words[0], words[1], words[2], words[3]);
      else store8(to, words[0], words[1]);
    };
    add_residual<Tile::DEAL, P, Tile::ROWS, Tile::COLUMNS>(acc, current, row0, warp_column, store);
#ifndef POET_FAULT_NO_REUSE_BARRIER
    block_barrier();  // the next copy overwrites this stage
#endif
  }
}

}  // namespace poet
