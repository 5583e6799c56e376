/* CUDA launchers, C ABI: device pointers in, an asynchronous launch on `stream` (a cudaStream_t), no allocation, no synchronization.
 * Returns 0, a negative poet_status, or a cudaError_t. Matrices are row-major with row strides in elements. */
#pragma once

#include "poet_status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[:, i] = x[:, order[i]] for x, y [rows, width]; order NULL copies. Rows are staged in shared memory: global accesses are contiguous. */
int poet_cuda_permute_columns(int dtype, const void* x, int64_t ldx, const int32_t* order, void* y, int64_t ldy, int64_t rows,
                              int64_t width, void* stream);

/* y = x (I + D) on stored columns, D = Diag(E) or Diag(E^T); columns after the blocks are copied. x, y [tokens, width], not overlapping. */
int poet_cuda_block_product(int dtype, const void* x, int64_t ldx, const void* e_full, const void* e_ragged, poet_blocks blocks,
                            int transpose, void* y, int64_t ldy, int64_t tokens, int64_t width, void* stream);

/* dE_j = x_j^T g_j, fp32, deterministic: token ranges are summed into `workspace` and reduced in a fixed order.
 * poet_cuda_block_product_grad_workspace gives the bytes needed (0: none). */
int64_t poet_cuda_block_product_grad_workspace(poet_blocks blocks, int64_t tokens);
int poet_cuda_block_product_grad(int dtype, const void* x, int64_t ldx, const void* g, int64_t ldg, float* de_full, float* de_ragged,
                                 poet_blocks blocks, int64_t tokens, int64_t width, void* workspace, void* stream);

/* As poet_cpu_skew_unpack, poet_cpu_skew_pack_grad (fp32). */
int poet_cuda_skew_unpack(const float* packed, int64_t ld, float* q, int64_t count, int64_t b, void* stream);
int poet_cuda_skew_pack_grad(const float* dq, float* packed, int64_t ld, int64_t count, int64_t b, void* stream);

/* As poet_cpu_series_increment, poet_cpu_series_grad (fp32); workspace of the bytes given, device memory. */
int64_t poet_cuda_series_workspace(int64_t count, int64_t b, int64_t degree, int with_grad);
int poet_cuda_series_increment(const float* q, float* e, int64_t count, int64_t b, const float* coefficients, int64_t degree,
                               void* workspace, void* stream);
int poet_cuda_series_grad(const float* q, const float* g, float* dq, int64_t count, int64_t b, const float* coefficients, int64_t degree,
                          void* workspace, void* stream);

/* The merge of one side on an fp32 weight in stored order: side 0: out = w (I + D)^T on columns (poet_cuda_block_product does it);
 * side 1: out = (I + D)^T w on rows. Rows and columns are permuted on load and on store: out[rows[i], :] = Y[i, :], X[i, :] = w[rows[i], :].
 *   w, out [height, width] fp32, in place if out == w; rows [height] or NULL */
int poet_cuda_merge_rows(const float* w, int64_t ldw, const int32_t* rows, const float* e_full, const float* e_ragged, poet_blocks blocks,
                         float* out, int64_t ldo, int64_t height, int64_t width, void* stream);

#ifdef __cplusplus
}
#endif
