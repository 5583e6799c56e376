// y[:, i] = x[:, order[i]], and the plain copy that the block product needs for its untouched columns.
//
// The permutation reaches over the whole row, and an access to x or y that follows it would use 2 or 4 bytes of each 32-byte sector. So a
// thread block stages R whole rows in shared memory, both global sides run along the rows, and only shared memory sees the permutation.
//
//   shared memory: one slot per column, holding that column's elements of the R rows (16 bytes: 4 rows of fp32, 8 of bf16)
//   in:   a warp reads 128 contiguous bytes of each of the R rows, transposes in registers, and writes slots 16 bytes at a time
//   out:  a warp reads the slots order[i], 16 bytes at a time, transposes back, and writes 128 contiguous bytes of each row
//
// A bf16 thread handles two neighbouring columns (4 bytes per row) if all rows start on 4-byte boundaries (PAIRS), else one.
// Bank conflicts: the slots of a request are arbitrary. 8 lanes (the phase of a 16-byte access) meet in 8 bank groups about 2.6 deep; no
// layout avoids that for every permutation. One access serves 4 or 8 rows, so shared memory takes a fifth of the time that HBM does.
// Rows too wide for that (10,400 columns on sm_80, 14,500 on sm_90): slots of 8 bytes, of 4 bytes, and beyond 41,700 or 58,100 columns the
// direct kernel, whose loads follow the permutation. Rows that start on odd 2-byte addresses move 64 bytes per warp and row.
#include "launch.cuh"
#include "poet_cuda.h"
#include "warp_ops.cuh"

namespace poet {
namespace {

constexpr int kThreads = 256, kStagedThreads = 512;  // staged: 512 for wide rows, of which few fit beside each other

// Position of column c. With PAIRS a lane writes slots 2l and 2l + 1, one after the other: at that stride the lanes of a phase would use
// half the banks. Exchanging neighbours in every other group of slots (of 128 bytes) spreads them over all.
template <int WORDS>
__device__ __forceinline__ int64_t slot(int64_t column) {
#ifdef POET_FAULT_NO_SWIZZLE
  return column;
#else
  return column ^ (column / (32 / WORDS) & 1);
#endif
}
constexpr int64_t slots(int64_t width) { return ceil_div(width, 2) * 2; }

template <int WORDS>
struct Slot {
  uint32_t w[WORDS];
};
template <int WORDS>
__device__ __forceinline__ Slot<WORDS> read_slot(const uint32_t* at) {
  Slot<WORDS> s;
  if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(s.w) = *reinterpret_cast<const uint4*>(at);
  else if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(s.w) = *reinterpret_cast<const uint2*>(at);
  else s.w[0] = *at;
  return s;
}
template <int WORDS>
__device__ __forceinline__ void write_slot(uint32_t* at, const Slot<WORDS>& s) {
  if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(s.w);
  else if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(at) = *reinterpret_cast<const uint2*>(s.w);
  else *at = s.w[0];
}

// T: uint32_t (fp32) or uint16_t (bf16). Shared memory: one slot of WORDS words per column.
template <class T, int WORDS, bool PAIRS>
__global__ void __launch_bounds__(kStagedThreads, 2)
    permute_columns(const T* x, int64_t ldx, const int32_t* order, T* y, int64_t ldy, int64_t rows, int64_t width) {
  constexpr int R = WORDS * 4 / sizeof(T), STEP = PAIRS ? 2 : 1;
  extern __shared__ __align__(128) uint32_t shared[];
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * R; row0 < rows; row0 += static_cast<int64_t>(gridDim.x) * R) {
    for (int64_t c = threadIdx.x * STEP; c < width; c += blockDim.x * STEP) {
      const bool pair = PAIRS && c + 1 < width;
      uint32_t v[R];  // rows after the last one: the last one again, so that the R loads need no branches and overlap
      if (pair) {
#pragma unroll
        for (int r = 0; r < R; ++r) v[r] = *reinterpret_cast<const uint32_t*>(x + min(row0 + r, rows - 1) * ldx + c);
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) v[r] = x[min(row0 + r, rows - 1) * ldx + c];
      }
      Slot<WORDS> a, b;
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        a.w[i] = sizeof(T) == 4 ? v[i] : __byte_perm(v[2 * i % R], v[(2 * i + 1) % R], 0x5410);
        b.w[i] = sizeof(T) == 4 ? 0 : __byte_perm(v[2 * i % R], v[(2 * i + 1) % R], 0x7632);
      }
      write_slot<WORDS>(shared + slot<WORDS>(c) * WORDS, a);
      if (pair) write_slot<WORDS>(shared + slot<WORDS>(c + 1) * WORDS, b);
    }
    block_barrier();
    for (int64_t i = threadIdx.x * STEP; i < width; i += blockDim.x * STEP) {
      const bool pair = PAIRS && i + 1 < width;
      int2 from = make_int2(0, 0);
      if (pair) from = *reinterpret_cast<const int2*>(order + i);
      else from.x = order[i];
      const Slot<WORDS> a = read_slot<WORDS>(shared + slot<WORDS>(from.x) * WORDS);
      Slot<WORDS> b = a;
      if (pair) b = read_slot<WORDS>(shared + slot<WORDS>(from.y) * WORDS);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#ifndef POET_FAULT_TAIL
        if (row0 + r >= rows) break;
#endif
        T* to = y + (row0 + r) * ldy + i;
        if constexpr (sizeof(T) == 4) {
          *to = a.w[r];
        } else {
          const uint32_t both = __byte_perm(a.w[r / 2], b.w[r / 2], r % 2 ? 0x7632 : 0x5410);
          if (pair) *reinterpret_cast<uint32_t*>(to) = both;
          else *to = static_cast<T>(both);
        }
      }
    }
#ifndef POET_FAULT_NO_REUSE_BARRIER
    block_barrier();  // the next rows overwrite the slots
#endif
  }
}

// One output element per thread, for rows wider than shared memory: loads follow the permutation.
template <class T>
__global__ void __launch_bounds__(kThreads)
    permute_columns_direct(const T* x, int64_t ldx, const int32_t* order, T* y, int64_t ldy, int64_t rows, int64_t width) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t i = threadIdx.x; i < width; i += kThreads) y[row * ldy + i] = x[row * ldx + order[i]];
}

// Copies `units` units of T per row; consecutive threads take consecutive units.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_columns(const T* x, int64_t ldx, T* y, int64_t ldy, int64_t rows, int64_t units) {
  const int64_t all = rows * units;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / units, unit = i - row * units;
    y[row * ldy + unit] = x[row * ldx + unit];
  }
}

struct Matrix {  // rows of `width` bytes, `ldx` and `ldy` bytes apart
  const void* x;
  int64_t ldx;
  void* y;
  int64_t ldy, rows, width;
  bool divisible(int64_t bytes) const { return aligned_to(x, bytes) && aligned_to(y, bytes) && (ldx | ldy) % bytes == 0; }
};

template <class T>
int launch_copy(const Matrix& m, void* stream) {
  constexpr int64_t size = sizeof(T);
  const int64_t units = m.width / size, grid = std::min<int64_t>(ceil_div(m.rows * units, kThreads), 132 * 16);
  return launch(copy_columns<T>, dim3(static_cast<unsigned>(grid)), kThreads, 0, stream, static_cast<const T*>(m.x), m.ldx / size,
                static_cast<T*>(m.y), m.ldy / size, m.rows, units);
}

int copy(const Matrix& m, void* stream) {
  if (m.divisible(16) && m.width % 16 == 0) return launch_copy<uint4>(m, stream);
  if (m.divisible(4) && m.width % 4 == 0) return launch_copy<uint32_t>(m, stream);
  return launch_copy<uint16_t>(m, stream);
}

template <class T, int WORDS, bool PAIRS>
int launch_staged(const Matrix& m, const int32_t* order, void* stream) {
  constexpr int64_t size = sizeof(T), r = WORDS * 4 / size;
  const int64_t width = m.width / size, grid = std::min<int64_t>(ceil_div(m.rows, r), kMaxGrid);
  const int threads = width >= 4096 ? kStagedThreads : kThreads;
  return launch(permute_columns<T, WORDS, PAIRS>, dim3(static_cast<unsigned>(grid)), threads, slots(width) * WORDS * 4, stream,
                static_cast<const T*>(m.x), m.ldx / size, order, static_cast<T*>(m.y), m.ldy / size, m.rows, width);
}

template <class T, int WORDS>
int launch_staged(const Matrix& m, const int32_t* order, void* stream) {
  if constexpr (sizeof(T) == 2)
    if (m.divisible(4) && aligned_to(order, 8)) return launch_staged<T, WORDS, true>(m, order, stream);
  return launch_staged<T, WORDS, false>(m, order, stream);
}

template <class T>
int permute(const Matrix& m, const int32_t* order, void* stream) {
  constexpr int64_t size = sizeof(T);
  const int64_t width = m.width / size, limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kDefaultShared);
  if (slots(width) * 16 <= limit) return launch_staged<T, 4>(m, order, stream);
  if (slots(width) * 8 <= limit) return launch_staged<T, 2>(m, order, stream);
  if (slots(width) * 4 <= limit) return launch_staged<T, 1>(m, order, stream);
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(m.rows, kMaxGrid));
  return launch(permute_columns_direct<T>, dim3(grid), kThreads, 0, stream, static_cast<const T*>(m.x), m.ldx / size, order,
                static_cast<T*>(m.y), m.ldy / size, m.rows, width);
}

}  // namespace
}  // namespace poet

extern "C" int poet_cuda_permute_columns(int dtype, const void* x, int64_t ldx, const int32_t* order, void* y, int64_t ldy, int64_t rows,
                                         int64_t width, void* stream) {
  using namespace poet;
  if (dtype != POET_F32 && dtype != POET_BF16) return POET_BAD_DTYPE;
  if (rows < 0 || width < 0) return POET_BAD_SHAPE;
  if (rows == 0 || width == 0) return POET_OK;
  const int64_t bytes = dtype == POET_F32 ? 4 : 2;
  const Matrix m{x, ldx * bytes, y, ldy * bytes, rows, width * bytes};
  if (order == nullptr) return copy(m, stream);
  return dtype == POET_F32 ? permute<uint32_t>(m, order, stream) : permute<uint16_t>(m, order, stream);
}
