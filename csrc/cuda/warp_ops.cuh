// The few PTX instructions the block-product kernels are built of, and the shared-memory layout they agree on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "common.cuh"

namespace poet {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Asynchronous copy of 16 bytes from global to shared memory, past L1; zeros are written where `valid` is false (nothing is read then).
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same for 4 bytes: a copy that may permute 4-byte words on the way.
__device__ __forceinline__ void copy4(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's newest groups are in flight. A barrier must follow before other threads' copies are read.
template <int N>
__device__ __forceinline__ void copies_wait() {
#ifndef POET_FAULT_NO_CPASYNC_WAIT
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. TRANSPOSE hands out the transposes.
template <bool TRANSPOSE>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  if constexpr (TRANSPOSE) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// d += a b for a 16x16 (row-major fragment), b 16x8 (column-major fragment), fp32 d. Lane l holds d[l/4 (+8)][2 (l%4) + {0,1}].
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of 16-bit elements with COLUMNS columns (a multiple of 64). The chunks
// of a row are exchanged by an XOR with the reversed three low bits of the row number. Eight successive rows then hold the same chunk in
// eight different bank groups (ldmatrix), and so do rows 2i, 2i+1 x four successive chunks (the residual's 16-byte reads).
template <int COLUMNS>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
#ifdef POET_FAULT_NO_SWIZZLE
  return static_cast<uint32_t>(row * COLUMNS * 2 + chunk * 16);
#else
  int exchange = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
  return static_cast<uint32_t>(row * COLUMNS * 2 + (chunk ^ exchange) * 16);
#endif
}

// One 16- or 8-byte store to global memory; written as PTX because the compiler otherwise splits it into words.
__device__ __forceinline__ void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store16(void* to, float a, float b, float c, float d) {
  store16(to, __float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d));
}
__device__ __forceinline__ void store8(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace poet
