// Host side of a launch: argument checks, shared-memory limits, and how many blocks fill the device. No allocation, no synchronization:
// every call here is allowed during stream capture.
#pragma once

#include <algorithm>
#include <cuda_runtime.h>
#include <stdint.h>

#include "common.cuh"

namespace poet {

constexpr int64_t kDefaultShared = 48 * 1024;  // more needs an opt-in per kernel

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, void* stream, Arguments... arguments) {
#ifdef POET_FAULT_LAUNCH
  shared += 1 << 20;
#endif
  if (shared > kDefaultShared) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here, not by the next launch
      return static_cast<int>(error);
    }
  }
  kernel<<<grid, threads, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return launch_status();
}

inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    cudaGetLastError();
    return otherwise;
  }
  return value;
}

// Into how many token ranges to cut `panels` column panels of `tiles` token tiles, at least `least` tiles each, on a device that runs
// `resident` thread blocks at a time: one wave if the panels fit into it (then rounded down, so that no block waits for a second wave),
// else about four waves, so that the last one is short.
inline int64_t token_ranges(int64_t panels, int64_t tiles, int64_t least, int64_t resident) {
  int64_t wanted = 2 * panels <= resident ? resident / panels : ceil_div(4 * resident, panels);
#ifdef POET_TEST_RANGES  // tests: ranges of many tiles with few tokens
  wanted = POET_TEST_RANGES;
#endif
  const int64_t most = std::min<int64_t>(std::max<int64_t>(tiles / least, 1), 65535);
  return std::clamp<int64_t>(wanted, 1, most);
}

inline bool valid_blocks(poet_blocks b, int64_t width) {
  if (b.count < 0 || b.ragged_count < 0 || width < 0 || (b.count && b.size < 1) || (b.ragged_count && b.ragged_size < 1)) return false;
  if ((b.count && b.size > width / b.count) || (b.ragged_count && b.ragged_size > width / b.ragged_count)) return false;
  return (b.count ? b.count * b.size : 0) + (b.ragged_count ? b.ragged_count * b.ragged_size : 0) <= width;
}

}  // namespace poet
