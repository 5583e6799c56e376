// Packed strict upper triangles to skew blocks and back, fp32.
//
// A thread block handles a panel: kRows rows i0.. of one b x b block and columns j0.. of them, held in shared memory with an odd pitch.
// Row i of the triangle starts at an address of any alignment, so that reading row by row wastes part of every other sector. While all the
// panel's columns fit (b <= kColumns) the panel is one contiguous range of the packed form and is moved as such, from 128-byte
// boundaries on. The mirrored part, Q[j, i] for j > i, leaves as rows of kRows floats.
//
//        i0 ........ b                     j
//     i0 [\ d d|u u u u]      packed: rows i0, i0 + 1, ... without a gap
//        [  \ d|u u u u]      d: diagonal part, both halves are in the panel
//        [    \|u u u u]      u: written as rows i, mirrored as columns i: rows j of kRows floats
#include "common.cuh"
#include "poet_cuda.h"

namespace poet {
namespace {

constexpr int kRows = 32, kColumns = 256, kPitch = kColumns + 1, kThreads = 256;

struct Panel {
  int64_t b, i0, j0;
  int rows, columns;  // of the panel; its columns are j0, j0 + 1, ...
  bool contiguous;    // the panel's part of the packed form has no gaps

  __device__ Panel(int64_t side) : b(side), i0(int64_t(blockIdx.y) * kRows), j0(i0 + int64_t(blockIdx.z) * kColumns) {
    rows = static_cast<int>(min(int64_t(kRows), b - i0));
    columns = static_cast<int>(max(int64_t(0), min(int64_t(kColumns), b - j0)));
    contiguous = b - i0 <= kColumns;
  }

  // Elements of the triangle in the first r rows of the panel, if it is contiguous.
  __device__ int before(int r) const { return r * (2 * columns - r - 1) / 2; }

  // Position of element (i, j) of the triangle, i < j.
  __device__ int64_t position(int64_t i, int64_t j) const { return i * (2 * b - i - 1) / 2 + (j - i - 1); }

  // Calls visit(r, c, position) for the triangle's elements (i0 + r, j0 + c), neighbouring threads at neighbouring positions;
  // `misalignment` is the packed form's start, in floats, past a 128-byte boundary.
  template <class Visit>
  __device__ void for_packed(int misalignment, Visit visit) const {
    if (contiguous) {
      const int64_t start = position(i0, i0 + 1);
      const int shift = static_cast<int>((start + misalignment) % kWarp);
#ifdef POET_FAULT_TAIL
      const int count = before(rows) + 1;
#else
      const int count = before(rows);
#endif
      for (int f = static_cast<int>(threadIdx.x) - shift; f < count; f += kThreads) {
        if (f < 0) continue;
        int r = 0;
        for (int step = kRows / 2; step > 0; step /= 2)
          if (r + step < rows && before(r + step) <= f) r += step;
        visit(r, f - before(r) + r + 1, start + f);
      }
    } else {
      for (int r = threadIdx.x / kWarp; r < rows; r += kThreads / kWarp) {
        const int64_t start = position(i0 + r, j0);
        const int shift = static_cast<int>((start + misalignment + kWarp) % kWarp);
        for (int c = static_cast<int>(threadIdx.x % kWarp) - shift; c < columns; c += kWarp)
          if (c >= 0 && j0 + c > i0 + r) visit(r, c, start + c);
      }
    }
  }
};

__device__ int floats_past_boundary(const float* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(float) % kWarp);
}

// Q = U - U^T for the strict upper triangle U. One panel per thread block: triangle to shared memory, then the panel's rows of Q from its
// first diagonal element on, then the mirrored columns below it.
__global__ void __launch_bounds__(kThreads, 4)
    skew_unpack_kernel(const float* __restrict__ packed, int64_t ld, float* __restrict__ q, int64_t b) {
  __shared__ float tile[kRows * kPitch];
  const Panel panel(b);
  if (panel.columns == 0) return;
  packed += int64_t(blockIdx.x) * ld;
  q += int64_t(blockIdx.x) * b * b;
  panel.for_packed(floats_past_boundary(packed), [&](int r, int c, int64_t position) { tile[r * kPitch + c] = packed[position]; });
  block_barrier();
  const bool has_diagonal = panel.j0 == panel.i0;
  for (int index = threadIdx.x; index < panel.rows * panel.columns; index += kThreads) {
    const int r = index / panel.columns, c = index - r * panel.columns;
    float value;
    if (has_diagonal && c <= r)
#ifdef POET_FAULT_SIGN
      value = c == r ? 0.0f : tile[c * kPitch + r];
#else
      value = c == r ? 0.0f : -tile[c * kPitch + r];
#endif
    else
      value = tile[r * kPitch + c];
    q[(panel.i0 + r) * b + panel.j0 + c] = value;
  }
  const int first = has_diagonal ? panel.rows : 0;
  const int r = threadIdx.x % kRows;
  for (int c = first + threadIdx.x / kRows; c < panel.columns; c += kThreads / kRows)
    if (r < panel.rows) q[(panel.j0 + c) * b + panel.i0 + r] = -tile[r * kPitch + c];
}

// packed = dQ_ij - dQ_ji, i < j: the same panels read the other way round. The panel's rows go to shared memory, the mirrored columns are
// subtracted there, and the triangle leaves contiguously.
__global__ void __launch_bounds__(kThreads, 4)
    skew_pack_grad_kernel(const float* __restrict__ dq, float* __restrict__ packed, int64_t ld, int64_t b) {
  __shared__ float tile[kRows * kPitch];
  const Panel panel(b);
  if (panel.columns == 0) return;
  packed += int64_t(blockIdx.x) * ld;
  dq += int64_t(blockIdx.x) * b * b;
  for (int index = threadIdx.x; index < panel.rows * panel.columns; index += kThreads) {
    const int r = index / panel.columns, c = index - r * panel.columns;
    tile[r * kPitch + c] = dq[(panel.i0 + r) * b + panel.j0 + c];
  }
  block_barrier();
  const bool has_diagonal = panel.j0 == panel.i0;
  const int first = has_diagonal ? panel.rows : 0;
  const int lane = threadIdx.x % kRows;
  for (int c = first + threadIdx.x / kRows; c < panel.columns; c += kThreads / kRows)
    if (lane < panel.rows) tile[lane * kPitch + c] -= dq[(panel.j0 + c) * b + panel.i0 + lane];
  block_barrier();
  panel.for_packed(floats_past_boundary(packed), [&](int r, int c, int64_t position) {
    const bool inside = has_diagonal && c < panel.rows;  // its mirror image is in the panel
    const float mirrored = inside ? tile[c * kPitch + r] : 0.0f;
#ifdef POET_FAULT_SIGN
    packed[position] = tile[r * kPitch + c] + mirrored;
#else
    packed[position] = tile[r * kPitch + c] - mirrored;
#endif
  });
}

// Grid over (block, row panel, column chunk); false where it would not fit.
bool panels(int64_t count, int64_t b, dim3* grid) {
  const int64_t rows = ceil_div(b, kRows), chunks = ceil_div(b, kColumns);
  if (count > kMaxGrid || rows > 65535 || chunks > 65535) return false;
  *grid = dim3(static_cast<unsigned>(count), static_cast<unsigned>(rows), static_cast<unsigned>(chunks));
  return true;
}

}  // namespace
}  // namespace poet

extern "C" int poet_cuda_skew_unpack(const float* packed, int64_t ld, float* q, int64_t count, int64_t b, void* stream) {
  dim3 grid;
  if (count < 0 || b < 0 || !poet::panels(count, b, &grid)) return POET_BAD_SHAPE;
  if (count == 0 || b == 0) return POET_OK;
  poet::skew_unpack_kernel<<<grid, poet::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(packed, ld, q, b);
  return poet::launch_status();
}

extern "C" int poet_cuda_skew_pack_grad(const float* dq, float* packed, int64_t ld, int64_t count, int64_t b, void* stream) {
  dim3 grid;
  if (count < 0 || b < 0 || !poet::panels(count, b, &grid)) return POET_BAD_SHAPE;
  if (count == 0 || b <= 1) return POET_OK;
  poet::skew_pack_grad_kernel<<<grid, poet::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(dq, packed, ld, b);
  return poet::launch_status();
}
