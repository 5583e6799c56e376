/* CPU kernels, C ABI. All matrices are row-major with a row stride in elements and contiguous rows; increments are contiguous
 * [count, size, size]. Every function runs on the OpenMP threads of the caller, and its results depend neither on their number nor on the
 * alignment of its arguments. Returns a poet_status. */
#pragma once

#include "poet_status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Instruction set in use: 0 portable, 1 AVX2 + FMA, 2 AVX-512, 3 AVX-512 + AMX bf16. Capped by the environment variable POET_CPU_ISA
 * (portable, avx2, avx512, amx), read at the first call. */
int poet_cpu_isa(void);

/* y = scatter(gather(x) (I + D)), D = Diag(E) or Diag(E^T).
 *   x [tokens, width], y [tokens, width]; not overlapping
 *   gather   [width] or NULL: stored column i is column gather[i] of x
 *   inverse  [width] or NULL: column i of y is stored column inverse[i]
 *   e_full, e_ragged: increments, dtype of x
 * bf16 products are accumulated in fp32 and rounded once. */
int poet_cpu_permuted_product(int dtype, const void* x, int64_t ldx, const int32_t* gather, const void* e_full, const void* e_ragged,
                              poet_blocks blocks, int transpose, const int32_t* inverse, void* y, int64_t ldy, int64_t tokens,
                              int64_t width);

/* dE_j = X_j^T G_j for every block, X = gather_x(x), G = gather_g(g); fp32 results, overwritten.
 *   x, g [tokens, width]; gather_x, gather_g [width] or NULL */
int poet_cpu_permuted_product_grad(int dtype, const void* x, int64_t ldx, const int32_t* gather_x, const void* g, int64_t ldg,
                                   const int32_t* gather_g, float* de_full, float* de_ragged, poet_blocks blocks, int64_t tokens,
                                   int64_t width);

/* packed [count, b(b-1)/2] with row stride ld -> Q [count, b, b], Q = -Q^T. fp32. */
int poet_cpu_skew_unpack(const float* packed, int64_t ld, float* q, int64_t count, int64_t b);

/* dQ [count, b, b] -> dQ_ij - dQ_ji for i < j, [count, b(b-1)/2] with row stride ld. fp32. */
int poet_cpu_skew_pack_grad(const float* dq, float* packed, int64_t ld, int64_t count, int64_t b);

/* E = sum_{i=1..degree} coefficients[i] Q^i for skew Q [count, b, b]; coefficients[0] = 0. fp32. */
int poet_cpu_series_increment(const float* q, float* e, int64_t count, int64_t b, const float* coefficients, int64_t degree);

/* The skew part of the gradient of Q for the gradient g of E; all [count, b, b], fp32. */
int poet_cpu_series_grad(const float* q, const float* g, float* dq, int64_t count, int64_t b, const float* coefficients, int64_t degree);

/* out[rows[i], columns[j]] = Y[i, j] with Y = (I + D_out)^T X (I + D_in)^T and X[i, j] = w[rows[i], columns[j]]: R and P folded into a
 * weight [out, in] that stays in feature order. In place if out == w (with the same stride and dtype).
 *   w, out     [height, width], dtype w_dtype and out_dtype; the arithmetic is fp32
 *   rows       [height] or NULL, columns, inverse_columns [width] or NULL (both or neither)
 *   e_*        fp32 increments of the two sides; blocks with count = 0 leave a side alone */
int poet_cpu_merge(int w_dtype, const void* w, int64_t ldw, const int32_t* rows, const int32_t* columns, const int32_t* inverse_columns,
                   const float* in_full, const float* in_ragged, poet_blocks blocks_in, const float* out_full, const float* out_ragged,
                   poet_blocks blocks_out, int out_dtype, void* out, int64_t ldo, int64_t height, int64_t width);

#ifdef __cplusplus
}
#endif
