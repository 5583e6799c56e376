/* The launchers of poet_cuda.h for memory of the host, by the CPU kernels: what a GPU would compute, so that the CUDA binding can be run
 * without one. The namespace poet_binding_test holds the ops. Thirteen blocks stand for a launch that fails. */
#include "bindings/arguments.h"
#include "poet_cpu.h"
#include "poet_cuda.h"

namespace {
constexpr poet_blocks none{0, 0, 0, 0};
}

extern "C" {

const char* cudaGetErrorString(int error) { return error == 209 ? "no kernel image is available" : "an error of the test"; }

int poet_cuda_permute_columns(int dtype, const void* x, int64_t ldx, const int32_t* order, void* y, int64_t ldy, int64_t rows,
                              int64_t width, void*) {
  return poet_cpu_permuted_product(dtype, x, ldx, order, nullptr, nullptr, none, 0, nullptr, y, ldy, rows, width);
}

int poet_cuda_block_product(int dtype, const void* x, int64_t ldx, const void* e_full, const void* e_ragged, poet_blocks blocks,
                            int transpose, void* y, int64_t ldy, int64_t tokens, int64_t width, void*) {
  return poet_cpu_permuted_product(dtype, x, ldx, nullptr, e_full, e_ragged, blocks, transpose, nullptr, y, ldy, tokens, width);
}

int64_t poet_cuda_block_product_grad_workspace(poet_blocks, int64_t) { return 64; }

int poet_cuda_block_product_grad(int dtype, const void* x, int64_t ldx, const void* g, int64_t ldg, float* de_full, float* de_ragged,
                                 poet_blocks blocks, int64_t tokens, int64_t width, void* workspace, void*) {
  if (workspace == nullptr) return POET_OUT_OF_MEMORY;
  return poet_cpu_permuted_product_grad(dtype, x, ldx, nullptr, g, ldg, nullptr, de_full, de_ragged, blocks, tokens, width);
}

int poet_cuda_skew_unpack(const float* packed, int64_t ld, float* q, int64_t count, int64_t b, void*) {
  if (count == 13) return 700;
  return poet_cpu_skew_unpack(packed, ld, q, count, b);
}

int poet_cuda_skew_pack_grad(const float* dq, float* packed, int64_t ld, int64_t count, int64_t b, void*) {
  if (count == 13) return 209;
  return poet_cpu_skew_pack_grad(dq, packed, ld, count, b);
}

int64_t poet_cuda_series_workspace(int64_t, int64_t, int64_t, int with_grad) { return with_grad ? 64 : 0; }

int poet_cuda_series_increment(const float* q, float* e, int64_t count, int64_t b, const float* coefficients, int64_t degree,
                               void* workspace, void*) {
  return workspace ? POET_BAD_SHAPE : poet_cpu_series_increment(q, e, count, b, coefficients, degree);
}

int poet_cuda_series_grad(const float* q, const float* g, float* dq, int64_t count, int64_t b, const float* coefficients, int64_t degree,
                          void* workspace, void*) {
  return workspace ? poet_cpu_series_grad(q, g, dq, count, b, coefficients, degree) : POET_OUT_OF_MEMORY;
}

int poet_cuda_merge_rows(const float* w, int64_t ldw, const int32_t* rows, const float* e_full, const float* e_ragged, poet_blocks blocks,
                         float* out, int64_t ldo, int64_t height, int64_t width, void*) {
  return poet_cpu_merge(POET_F32, w, ldw, rows, nullptr, nullptr, nullptr, nullptr, none, e_full, e_ragged, blocks, POET_F32, out, ldo,
                        height, width);
}

}  // extern "C"

STABLE_TORCH_LIBRARY(poet_binding_test, m) {
  for (const char* schema : poet::binding::schemas) m.def(schema);
}
