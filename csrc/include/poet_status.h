/* Status codes and element types shared by every launcher of csrc/. Plain C: no torch, no CUDA headers. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0 is success; positive values of CUDA launchers are cudaError_t. */
enum poet_status {
  POET_OK = 0,
  POET_BAD_DTYPE = -1,     /* element type not supported by this op */
  POET_BAD_SHAPE = -2,     /* a size is negative or the blocks do not fit into the width */
  POET_OUT_OF_MEMORY = -3, /* a work buffer could not be allocated */
};

enum poet_dtype { POET_F32 = 0, POET_BF16 = 1 };

/* The blocks of one side, in stored column order: `count` blocks of side `size` from column 0 on, then `ragged_count` blocks of side
 * `ragged_size` (0 if there are none). Columns after them are not touched by any block. */
typedef struct {
  int64_t count, size;
  int64_t ragged_count, ragged_size;
} poet_blocks;

#ifdef __cplusplus
}
#endif
