// The block product for any block size, alignment and stride, in 64 x 64 tiles: E is padded with zeros into dense 64 x 64 tiles.
//
// Blocks of up to 64 columns: a panel holds as many whole blocks as fit into 64 columns, its E is the block diagonal of them, loaded once
// for a token range. (Zeros times another block's infinity are NaN: a token with an infinite x may turn NaN in all blocks of its panel.)
// Larger blocks: a panel is 64 columns of one block, and x and E are walked in slabs of 64, the panel's own columns of x last, since the
// residual is read from them. Then x is requested b/64 times (from L2, mostly): these sizes are correct, not fast.
// x is copied 16 bytes at a time where pointers, strides and block sizes allow it (`vectors`), else element by element, neighbouring lanes
// at neighbouring columns either way.
#pragma once

#include "block_product_bf16.cuh"
#include "block_product_f32.cuh"

namespace poet {

constexpr int kTile = 64, kGeneralThreads = 128, kGeneralShared32 = 2 * kTile * kTile * 4, kGeneralShared16 = 2 * kTile * kTile * 2;

// Panels of a run of `count` blocks of side `b`.
struct PanelLayout {
  int64_t count, b;
  int64_t per_panel;  // whole blocks in a panel, 0 if a block takes several panels
  int64_t slabs;      // of 64 columns in a block

  __host__ __device__ PanelLayout(int64_t count_, int64_t b_)
      : count(count_), b(b_), per_panel(b_ <= kTile ? kTile / b_ : 0), slabs(b_ <= kTile ? 1 : ceil_div(b_, kTile)) {}
  __host__ __device__ int64_t panels() const { return per_panel ? ceil_div(count, per_panel) : count * slabs; }
  __device__ int64_t block(int64_t panel) const { return per_panel ? panel * per_panel : panel / slabs; }
  // First column of slab `slab` of the panel's block(s), relative to the run.
  __device__ int64_t column(int64_t panel, int64_t slab) const { return block(panel) * b + slab * kTile; }
  __device__ int columns(int64_t panel, int64_t slab) const {
    return static_cast<int>(per_panel ? min(per_panel, count - block(panel)) * b : min(int64_t(kTile), b - slab * kTile));
  }
};

// Where element (row, column) of a 64 x 64 tile of tokens lies in shared memory, in bytes.
template <class T>
__device__ __forceinline__ uint32_t tile_offset(int row, int column) {
  if constexpr (sizeof(T) == 2) return swizzled<kTile>(row, column / 8) + column % 8 * 2;
  else return (row * kTile + column) * 4;
}
// The same for the increments of a panel, (k, column).
template <class T>
__device__ __forceinline__ uint32_t increment_offset(int k, int column) {
  if constexpr (sizeof(T) == 2) return tile_offset<T>(k, dealt<4>(column));
  else return increment_word<kTile>(k, column) * 4;
}

// Tile [64, 64] from rows [row0, ...) and columns [column0, column0 + columns) of x, zeros outside.
template <class T>
__device__ __forceinline__ void load_slab(char* to, const T* x, int64_t ldx, int64_t row0, int64_t rows, int64_t column0, int columns,
                                          bool vectors) {
  constexpr int PER = 16 / sizeof(T);
  if (vectors) {
#pragma unroll 4
    for (int i = threadIdx.x; i < kTile * kTile / PER; i += kGeneralThreads) {
      const int row = i / (kTile / PER), column = i % (kTile / PER) * PER;
      const bool valid = row0 + row < rows && column < columns;
      copy16(shared_address(to + tile_offset<T>(row, column)), x + (valid ? (row0 + row) * ldx + column0 + column : 0), valid);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < kTile * kTile; i += kGeneralThreads) {
      const int row = i / kTile, column = i % kTile;
      T value = T(0.0f);
      if (row0 + row < rows && column < columns) value = x[(row0 + row) * ldx + column0 + column];
      *reinterpret_cast<T*>(to + tile_offset<T>(row, column)) = value;
    }
  }
  copies_commit();
}

// The warp's rows [row0, row0 + 16) of the tile to rows [token0 + row0, ...) of y, columns [column0, column0 + columns).
template <class T>
__device__ __forceinline__ void store_rows(const char* from, T* y, int64_t ldy, int64_t token0, int64_t tokens, int row0, int64_t column0,
                                           int columns, bool vectors) {
  constexpr int PER = 16 / sizeof(T);
  const int lane = threadIdx.x & 31, per = vectors ? PER : 1;
#pragma unroll 4
  for (int i = lane; i < 16 * kTile / per; i += 32) {
    const int row = row0 + i / (kTile / per), column = i % (kTile / per) * per;
    if (column >= columns) continue;
#ifndef POET_FAULT_TAIL
    if (token0 + row >= tokens) continue;
#endif
    const char* at = from + tile_offset<T>(row, column);
    T* to = y + (token0 + row) * ldy + column0 + column;
    if (vectors) {
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      store16(to, v.x, v.y, v.z, v.w);
    } else {
      *to = *reinterpret_cast<const T*>(at);
    }
  }
}

// Increments [64, 64] of panel `panel` for slab `slab` of k, as E or E^T. Several blocks: a block diagonal.
template <class T>
__device__ __forceinline__ void load_general_increments(char* to, const T* e, PanelLayout layout, int64_t panel, int64_t slab,
                                                        int transpose) {
  const int b = static_cast<int>(layout.b);
  const int64_t block0 = layout.block(panel);
  const int64_t first = layout.per_panel ? 0 : panel % layout.slabs * kTile;  // output column in the block
  for (int i = threadIdx.x; i < kTile * kTile; i += kGeneralThreads) {
    // Lanes follow the contiguous dimension of E in global memory: 32 columns, or (E^T) 8 rows k of 4 columns, free of bank conflicts.
    const int k = transpose ? (i >> 5) % 8 * 8 + (i & 7) : i / kTile;
    const int n = transpose ? (i >> 8) * 4 + (i >> 3 & 3) : i % kTile;
    int64_t block = block0, row = slab * kTile + k, column = first + n;
    if (layout.per_panel) block += n / b, row = k - n / b * b, column = n % b;
    T value = T(0.0f);
    if (block < layout.count && (!layout.per_panel || n / b < layout.per_panel) && row >= 0 && row < b && column < b)
      value = e[(block * b + (transpose ? column : row)) * b + (transpose ? row : column)];
    *reinterpret_cast<T*>(to + increment_offset<T>(k, n)) = value;
  }
}

// Grid: x = panels, y = token ranges. A warp computes 16 tokens x 64 columns.
template <class T>
__global__ void __launch_bounds__(kGeneralThreads, 3)
    block_product_general(const T* x, int64_t ldx, const T* e, int64_t count, int64_t b, int transpose, T* y, int64_t ldy, int64_t tokens,
                          int64_t tiles_per_range, int vectors) {
  extern __shared__ __align__(128) char shared[];
  char* const increments = shared + kTile * kTile * sizeof(T);
  const PanelLayout layout(count, b);
  const int64_t panel = blockIdx.x, own = layout.per_panel ? 0 : panel % layout.slabs;
  const int64_t column0 = layout.column(panel, own);
  const int columns = layout.columns(panel, own), row0 = (threadIdx.x >> 5) * 16;
  const int64_t first = blockIdx.y * tiles_per_range, last = min(first + tiles_per_range, ceil_div(tokens, kTile));

#ifdef POET_FAULT_WRONG_TRANSPOSE
  transpose = !transpose;
#endif
  if (layout.slabs == 1 && first < last) load_general_increments(increments, e, layout, panel, 0, transpose);
  for (int64_t tile = first; tile < last; ++tile) {
    float acc16[1][8][4] = {}, acc32[8][4] = {};  // one of them is used
    for (int64_t step = 1; step <= layout.slabs; ++step) {
      const int64_t slab = (own + step) % layout.slabs;  // ends with `own`
      load_slab(shared, x, ldx, tile * kTile, tokens, layout.column(panel, slab), layout.columns(panel, slab), vectors);
      if (layout.slabs > 1) load_general_increments(increments, e, layout, panel, slab, transpose);
      copies_wait<0>();
      block_barrier();
      if constexpr (sizeof(T) == 2) {
        multiply_panel<kTile, false, kTile, 16, kTile>(acc16, shared_address(shared), shared_address(increments), row0, 0);
      } else {
        float part[8][4] = {};  // a sum per slab, then a sum of slabs: shorter chains of roundings
        multiply_panel_f32<kTile, kTile, kTile, 8>(part, reinterpret_cast<const float*>(shared),
                                                   reinterpret_cast<const float*>(increments), 0);
#pragma unroll
        for (int i = 0; i < 32; ++i) acc32[i / 4][i % 4] += part[i / 4][i % 4];
      }
      if (step < layout.slabs) block_barrier();
    }
    // The results replace x in the tile (a warp reads and writes its own 16 rows only), then leave row by row.
    __syncwarp();
    if constexpr (sizeof(T) == 2) {
      add_residual<4, kTile, 16, kTile>(acc16, shared, row0, 0, [&](int row, int column, const uint32_t* words) {
        *reinterpret_cast<uint4*>(shared + tile_offset<T>(row, column)) = make_uint4(words[0], words[1], words[2], words[3]);
      });
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float4* at = reinterpret_cast<float4*>(shared + tile_offset<T>(lane_row<kTile, 8>() + i, lane_column<kTile>()));
        *at = make_float4(at->x + acc32[i][0], at->y + acc32[i][1], at->z + acc32[i][2], at->w + acc32[i][3]);
      }
    }
    __syncwarp();
    store_rows(shared, y, ldy, tile * kTile, tokens, row0, column0, columns, vectors);
    block_barrier();
  }
}

}  // namespace poet
