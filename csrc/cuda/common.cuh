// What every CUDA kernel here uses: launch status, index arithmetic, the block barrier and planted faults.
//
// Faults (POET_FAULT_*) exist only in builds of the tests, which prove with them that a missing barrier, a wrong bound or a wrong sign
// is found. No shipped build defines one.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "poet_status.h"

namespace poet {

constexpr int kWarp = 32;
constexpr int64_t kMaxGrid = 2147483647;  // blocks along x

// Status of the launch just made: 0 or its cudaError_t.
inline int launch_status() { return static_cast<int>(cudaGetLastError()); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned_to(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// All threads of the block; orders their shared and global memory accesses.
__device__ __forceinline__ void block_barrier() {
#if defined(POET_FAULT_DIVERGENT_BARRIER)
  if (threadIdx.x % 2 == 0) __syncthreads();
#elif !defined(POET_FAULT_NO_BARRIER)
  __syncthreads();
#endif
}

}  // namespace poet
