// dE_j = x_j^T g_j in fp32 for aligned blocks of 16 to 256: the token dimension is the inner one, so both operands of the product are read
// from [token, column] tiles, streamed with 16-byte cp.async through two stages as in block_product_bf16.cuh.
//
// Grid: x = output tiles [OI, OC] of a panel (i: columns of x, c: columns of g), y = token ranges. Every range writes its own partial sum,
// laid out like dE, which `sum_ranges` adds up in order: no atomics, and the number of ranges depends on the shapes alone, not on the
// device.
// bf16: tensor cores, both fragments through transposing ldmatrix; a quad stores 32 contiguous bytes. fp32: outer products of float4s.
// B = 256: the fp32 sums of a 256 x 256 tile would fill the register file, so a thread block takes half of g's columns and x is requested
// twice.
#pragma once

#include "block_product_general.cuh"

namespace poet {

template <int B>
struct GradTile {
  static constexpr int OI = B < 64 ? 64 : B, OC = B < 64 ? 64 : B > 128 ? 128 : B;
  static constexpr int KT = B <= 64 ? 64 : 32;                                        // tokens of a tile
  static constexpr int WARP_I = B <= 64 ? 16 : 32, WARP_C = B <= 64 ? B : 64;         // results of a warp
  static constexpr int WARPS_C = B <= 64 ? 1 : OC / WARP_C, WARPS = OI / WARP_I * WARPS_C, THREADS = 32 * WARPS;
  static constexpr int RESIDENT = B <= 64 ? 4 : B == 128 ? 2 : 1;
  static constexpr int STAGE_BYTES = KT * (OI + OC) * 2, SHARED_BYTES = 2 * STAGE_BYTES;
};

// acc += x^T g over KT tokens, for columns i0.. of x [KT, OI] and c0.. of g [KT, OC] in (swizzled) shared memory.
template <int KT, int OI, int OC, int WARP_I, int WARP_C>
__device__ __forceinline__ void accumulate_outer(float (&acc)[WARP_I / 16][WARP_C / 8][4], uint32_t x, uint32_t g, int i0, int c0) {
  const int lane = threadIdx.x & 31, inner = lane & 7, matrix = lane >> 3;
#pragma unroll
  for (int k = 0; k < KT; k += 16) {
    uint32_t a[WARP_I / 16][4];
#pragma unroll
    for (int m = 0; m < WARP_I / 16; ++m)
      load_matrices<true>(a[m], x + swizzled<OI>(k + (matrix >> 1) * 8 + inner, i0 / 8 + 2 * m + (matrix & 1)));
#pragma unroll
    for (int n = 0; n < WARP_C; n += 16) {
      uint32_t b[4];
      load_matrices<true>(b, g + swizzled<OC>(k + (matrix & 1) * 8 + inner, (c0 + n) / 8 + (matrix >> 1)));
#pragma unroll
      for (int m = 0; m < WARP_I / 16; ++m) {
        mma_bf16(acc[m][n / 8], a[m], b[0], b[1]);
        mma_bf16(acc[m][n / 8 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Calls emit(i, c, v0, v1) for every pair of results (i, c), (i, c + 1) of the lane, relative to the warp's.
template <int WARP_I, int WARP_C, class Emit>
__device__ __forceinline__ void for_results(const float (&acc)[WARP_I / 16][WARP_C / 8][4], Emit emit) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < WARP_I / 16; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < WARP_C / 8; ++n)
        emit(16 * m + 8 * half + (lane >> 2), 8 * n + 2 * (lane & 3), acc[m][n][2 * half], acc[m][n][2 * half + 1]);
}

// Where thread block (blockIdx.x, blockIdx.y) works: the same for both precisions.
template <int OI, int OC, int B>
struct GradPlace {
  int64_t block0, column0;  // first block of the panel and its first column
  int columns, c0;          // columns of the panel; first column of g relative to column0
  int64_t first, last;      // token tiles
  float* out;               // this range's partial dE

  __device__ GradPlace(int64_t count, int64_t tokens, int tile, int64_t tiles_per_range, float* out_) {
    block0 = blockIdx.x / (OI / OC) * (OI / B), column0 = block0 * B;
    c0 = static_cast<int>(blockIdx.x % (OI / OC)) * OC;
    columns = static_cast<int>(min(static_cast<int64_t>(OI), count * B - column0));
    first = blockIdx.y * tiles_per_range, last = min(first + tiles_per_range, ceil_div(tokens, tile));
    out = out_ + blockIdx.y * (count * B * B);
  }
};

template <int B>
__global__ void __launch_bounds__(GradTile<B>::THREADS, GradTile<B>::RESIDENT)
    block_product_grad_bf16(const bf16* x, int64_t ldx, const bf16* g, int64_t ldg, float* out, int64_t count, int64_t tokens,
                            int64_t tiles_per_range) {
  using Tile = GradTile<B>;
  constexpr int OI = Tile::OI, OC = Tile::OC, KT = Tile::KT;
  extern __shared__ __align__(128) char shared[];
  const GradPlace<OI, OC, B> place(count, tokens, KT, tiles_per_range, out);
  const int warp = threadIdx.x >> 5, i0 = warp / Tile::WARPS_C * Tile::WARP_I;
  const int c0 = B <= 64 ? i0 / B * B : warp % Tile::WARPS_C * Tile::WARP_C;  // small blocks: the diagonal block of row i0

  auto load_part = [&](uint32_t to, const bf16* from, int64_t ld, int64_t tile, int64_t column, int columns, auto side) {
    constexpr int SIDE = decltype(side)::value;
#pragma unroll
    for (int i = threadIdx.x; i < KT * SIDE / 8; i += Tile::THREADS) {
      const int row = i / (SIDE / 8), chunk = i % (SIDE / 8);
      const int64_t token = tile * KT + row;
      const bool valid = token < tokens && chunk * 8 < columns;
      copy16(to + swizzled<SIDE>(row, chunk), from + (valid ? token * ld + column + chunk * 8 : 0), valid);
    }
  };
  auto load_tile = [&](int stage, int64_t tile) {
    const uint32_t to = shared_address(shared + stage * Tile::STAGE_BYTES);
    load_part(to, x, ldx, tile, place.column0, place.columns, std::integral_constant<int, OI>());
    load_part(to + KT * OI * 2, g, ldg, tile, place.column0 + place.c0, place.columns - place.c0, std::integral_constant<int, OC>());
    copies_commit();
  };

  float acc[Tile::WARP_I / 16][Tile::WARP_C / 8][4] = {};
  if (place.first < place.last) load_tile(0, place.first);
  for (int64_t tile = place.first; tile < place.last; ++tile) {
    const int stage = static_cast<int>(tile - place.first) & 1;
    if (tile + 1 < place.last) {
      load_tile(stage ^ 1, tile + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    block_barrier();
    const uint32_t at = shared_address(shared + stage * Tile::STAGE_BYTES);
    accumulate_outer<KT, OI, OC, Tile::WARP_I, Tile::WARP_C>(acc, at, at + KT * OI * 2, i0, c0);
#ifndef POET_FAULT_NO_REUSE_BARRIER
    block_barrier();
#endif
  }
  for_results<Tile::WARP_I, Tile::WARP_C>(acc, [&](int i, int c, float v0, float v1) {
    const int row = i0 + i, column = place.c0 + c0 + c;  // in the panel
#ifndef POET_FAULT_TAIL
    if (row >= place.columns) return;
#endif
#ifdef POET_FAULT_WRONG_TRANSPOSE
    const int64_t at = (place.block0 + row / B) * B * B + column % B * B + row % B;
    place.out[at] = v0, place.out[at + B] = v1;
#else
    store8(place.out + (place.block0 + row / B) * B * B + row % B * B + column % B, __float_as_uint(v0), __float_as_uint(v1));
#endif
  });
}

// A warp computes 16 rows i, a lane 8 of them x 4 (OC = 64) or 2 x 4 (OC = 128) columns c.
template <int B>
struct GradTileF32 {
  static constexpr int OI = B < 128 ? 64 : 128, OC = OI, KT = 32, THREADS = OI * 2, RESIDENT = B < 128 ? 3 : 1;
  static constexpr int STAGE_BYTES = KT * (OI + OC) * 4, SHARED_BYTES = 2 * STAGE_BYTES;
};

// acc[a][j][4] += x[t][i0 + a] g[t][c0 + 64 j + 0..3] over `tokens` tokens; x and g have rows of OI and OC floats.
template <int OI, int OC>
__device__ __forceinline__ void accumulate_outer_f32(float (&acc)[8][OC / 64][4], const float* x, const float* g, int i0, int c0,
                                                     int tokens) {
#pragma unroll 2
  for (int t = 0; t < tokens; ++t) {
    float a[8];
    *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(x + t * OI + i0);
    *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<const float4*>(x + t * OI + i0 + 4);
#pragma unroll
    for (int j = 0; j < OC / 64; ++j) {
      const float4 b = *reinterpret_cast<const float4*>(g + t * OC + c0 + 64 * j);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        acc[i][j][0] = fmaf(a[i], b.x, acc[i][j][0]);
        acc[i][j][1] = fmaf(a[i], b.y, acc[i][j][1]);
        acc[i][j][2] = fmaf(a[i], b.z, acc[i][j][2]);
        acc[i][j][3] = fmaf(a[i], b.w, acc[i][j][3]);
      }
    }
  }
}

template <int N, int J>
__device__ __forceinline__ void add_part(float (&sum)[N][J][4], const float (&part)[N][J][4]) {
#pragma unroll
  for (int i = 0; i < N * J * 4; ++i) sum[i / (J * 4)][i / 4 % J][i % 4] += part[i / (J * 4)][i / 4 % J][i % 4];
}

// fp32 for any aligned b that is a multiple of 64 or divides it; OI x OC tiles of a block, or of a panel of blocks up to 64 columns, of
// which the diagonal blocks are stored.
template <int B>
__global__ void __launch_bounds__(GradTileF32<B>::THREADS, GradTileF32<B>::RESIDENT)
    block_product_grad_f32(const float* x, int64_t ldx, const float* g, int64_t ldg, float* out, int64_t count, int64_t tokens,
                           int64_t tiles_per_range) {
  using Tile = GradTileF32<B>;
  constexpr int OI = Tile::OI, OC = Tile::OC, KT = Tile::KT, ACROSS = B <= OI ? 1 : B / OI;  // tiles along each side of a block
  extern __shared__ __align__(128) char shared[];
  const int64_t panel = blockIdx.x / (ACROSS * ACROSS), block0 = B <= OI ? panel * (OI / B) : panel, column0 = block0 * B;
  const int tile_i = blockIdx.x % (ACROSS * ACROSS) / ACROSS * OI, tile_c = blockIdx.x % ACROSS * OC;
  const int columns = B <= OI ? static_cast<int>(min(static_cast<int64_t>(OI), count * B - column0)) : OI;
  const int64_t first = blockIdx.y * tiles_per_range, last = min(first + tiles_per_range, ceil_div(tokens, KT));
  const int i0 = (threadIdx.x >> 4) * 8, c0 = (threadIdx.x & 15) * 4;
  out += blockIdx.y * (count * B * B);

  auto load_part = [&](uint32_t to, const float* from, int64_t ld, int64_t tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < KT * OI / 4; i += Tile::THREADS) {
      const int row = i / (OI / 4), column = i % (OI / 4) * 4;
      const int64_t token = tile * KT + row;
      const bool valid = token < tokens && column < columns;
      copy16(to + (row * OI + column) * 4, from + (valid ? token * ld + column : 0), valid);
    }
  };
  auto load_tile = [&](int stage, int64_t tile) {
    const uint32_t to = shared_address(shared + stage * Tile::STAGE_BYTES);
    load_part(to, x + column0 + tile_i, ldx, tile);
    load_part(to + KT * OI * 4, g + column0 + tile_c, ldg, tile);
    copies_commit();
  };

  float acc[8][OC / 64][4] = {};
  if (first < last) load_tile(0, first);
  for (int64_t tile = first; tile < last; ++tile) {
    const int stage = static_cast<int>(tile - first) & 1;
    if (tile + 1 < last) {
      load_tile(stage ^ 1, tile + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    block_barrier();
    const float* at = reinterpret_cast<const float*>(shared + stage * Tile::STAGE_BYTES);
    float part[8][OC / 64][4] = {};  // a sum per tile, then a sum of tiles: shorter chains of roundings than one over all tokens
    accumulate_outer_f32<OI, OC>(part, at, at + KT * OI, i0, c0, KT);
    add_part(acc, part);
#ifndef POET_FAULT_NO_REUSE_BARRIER
    block_barrier();
#endif
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < OC / 64; ++j) {
      const int row = tile_i + i0 + i, column = tile_c + c0 + 64 * j;  // in the panel
      if (B < OI && row / B != column / B) continue;
#ifndef POET_FAULT_TAIL
      if (i0 + i >= columns) continue;
#endif
      store16(out + (block0 + row / B) * B * B + row % B * B + column % B, acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
    }
}

// Any size, alignment and stride: 64 x 64 tiles, as block_product_general. Grid: x = pairs of slabs (i, c) of every panel, y = token
// ranges.
template <class T>
__global__ void __launch_bounds__(kGeneralThreads, 3)
    block_product_grad_general(const T* x, int64_t ldx, const T* g, int64_t ldg, float* out, int64_t count, int64_t b, int64_t tokens,
                               int vectors, int64_t tiles_per_range) {
  extern __shared__ __align__(128) char shared[];
  char* const tile_g = shared + kTile * kTile * sizeof(T);
  const PanelLayout layout(count, b);
  // Panels of larger blocks are their 64-column slabs: the slab pair is (panel's slab, one of `slabs`).
  const int64_t panel = blockIdx.x / layout.slabs, slab_i = layout.per_panel ? 0 : panel % layout.slabs, slab_c = blockIdx.x % layout.slabs;
  const int64_t first = blockIdx.y * tiles_per_range, last = min(first + tiles_per_range, ceil_div(tokens, kTile));
  const int columns_i = layout.columns(panel, slab_i), columns_c = layout.columns(panel, slab_c), row0 = (threadIdx.x >> 5) * 16;
  out += blockIdx.y * (count * b * b);

  float acc16[1][8][4] = {}, acc32[8][1][4] = {};  // one of them is used
  for (int64_t tile = first; tile < last; ++tile) {
    load_slab(shared, x, ldx, tile * kTile, tokens, layout.column(panel, slab_i), columns_i, vectors);
    load_slab(tile_g, g, ldg, tile * kTile, tokens, layout.column(panel, slab_c), columns_c, vectors);
    copies_wait<0>();
    block_barrier();
    if constexpr (sizeof(T) == 2) {
      accumulate_outer<kTile, kTile, kTile, 16, kTile>(acc16, shared_address(shared), shared_address(tile_g), row0, 0);
    } else {
      float part[8][1][4] = {};
      accumulate_outer_f32<kTile, kTile>(part, reinterpret_cast<const float*>(shared), reinterpret_cast<const float*>(tile_g),
                                         (threadIdx.x >> 4) * 8, (threadIdx.x & 15) * 4, kTile);
      add_part(acc32, part);
    }
    block_barrier();
  }
  // Through shared memory, so that neighbouring lanes store neighbouring columns.
  float* const result = reinterpret_cast<float*>(shared);
  if constexpr (sizeof(T) == 2) {
    for_results<16, kTile>(acc16, [&](int i, int c, float v0, float v1) {
      *reinterpret_cast<float2*>(result + increment_word<kTile>(row0 + i, c)) = make_float2(v0, v1);
    });
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      *reinterpret_cast<float4*>(result + increment_word<kTile>((threadIdx.x >> 4) * 8 + i, (threadIdx.x & 15) * 4)) =
          make_float4(acc32[i][0][0], acc32[i][0][1], acc32[i][0][2], acc32[i][0][3]);
  }
  block_barrier();
  for (int f = threadIdx.x; f < kTile * kTile; f += kGeneralThreads) {
    const int i = f / kTile, c = f % kTile;
    if (i >= columns_i || c >= columns_c) continue;
    int64_t block = layout.block(panel), row = slab_i * kTile + i, column = slab_c * kTile + c;
    if (layout.per_panel) {
      const int side = static_cast<int>(b);
      if (i / side != c / side) continue;
      block += i / side, row = i % side, column = c % side;
    }
    out[(block * b + row) * b + column] = result[increment_word<kTile>(i, c)];
  }
}

// sum[i] = partial[0][i] + partial[1][i] + ..., in this order; neighbouring threads, neighbouring elements.
static __global__ void __launch_bounds__(256) sum_ranges(const float* partial, float* sum, int64_t elements, int64_t ranges) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < elements; i += static_cast<int64_t>(gridDim.x) * 256) {
    float total = 0.0f;
#pragma unroll 4
    for (int64_t r = 0; r < ranges; ++r) total += partial[r * elements + i];
    sum[i] = total;
  }
}

}  // namespace poet
