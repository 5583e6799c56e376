/* The ops of the namespace poet_native (schemas of every device), and their CPU implementations: poet_cpu.h behind torch's stable ABI.
 * Autograd, fake kernels and the choice between these ops and the reference are Python's. */
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "cpu/output_pool.h"
#include "poet_cpu.h"

namespace poet::binding {
namespace {

/* An uninitialized, contiguous tensor, from the pool if it is large. */
Tensor pooled_output(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::size_t bytes = dtype == ScalarType::BFloat16 ? 2 : 4;
  for (const int64_t size : sizes) bytes *= static_cast<std::size_t>(size);
  void* buffer = bytes < pooled_bytes ? nullptr : take_output(bytes);
  if (buffer == nullptr) return empty_like_shape(like, sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (std::size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(buffer, sizes, strides, like.device(), dtype, give_output_back);
}

Tensor permuted_block_product(const Tensor& x, const OptionalTensor& gather, const Tensors& increments, bool transpose,
                              const OptionalTensor& inverse) {
  const Product a = Product::of(x, gather, increments, inverse);
  const Tensor y = pooled_output(x, {a.x.rows, a.x.width}, x.scalar_type());
  if (y.numel() == 0) return y;
  const int status = poet_cpu_permuted_product(a.x.dtype, a.x.data(), a.x.ld, a.gather.data(), a.increments.full(), a.increments.ragged(),
                                               a.increments.blocks, transpose, a.inverse.data(), y.mutable_data_ptr(), a.x.width, a.x.rows,
                                               a.x.width);
  require_ok(status, a.op, a.shapes());
  return y;
}

Tensors permuted_block_product_grad(const Tensor& x, const OptionalTensor& gather_x, const Tensor& g, const OptionalTensor& gather_g,
                                    const std::vector<int64_t>& runs) {
  const ProductGrad a = ProductGrad::of(x, gather_x, g, gather_g, runs);
  if (a.empty()) return a.results();
  Tensors results{pooled_output(x, {a.blocks.count, a.blocks.size, a.blocks.size}, ScalarType::Float)};
  if (runs.size() == 4)
    results.push_back(pooled_output(x, {a.blocks.ragged_count, a.blocks.ragged_size, a.blocks.ragged_size}, ScalarType::Float));
  auto* full = static_cast<float*>(results[0].mutable_data_ptr());
  auto* ragged = results.size() > 1 ? static_cast<float*>(results[1].mutable_data_ptr()) : nullptr;
  const int status = poet_cpu_permuted_product_grad(a.x.dtype, a.x.data(), a.x.ld, a.gather_x.data(), a.g.data(), a.g.ld, a.gather_g.data(),
                                                    full, ragged, a.blocks, a.x.rows, a.x.width);
  require_ok(status, a.op, a.shapes());
  return results;
}

Tensor skew_unpack(const Tensor& packed, int64_t b) {
  const Packed a = Packed::of(packed, b);
  const Tensor q = torch::stable::new_empty(packed, {a.packed.rows, b, b});
  if (q.numel() == 0) return q;
  const int status = poet_cpu_skew_unpack(static_cast<const float*>(a.packed.data()), a.packed.ld,
                                          static_cast<float*>(q.mutable_data_ptr()), a.packed.rows, b);
  require_ok(status, a.op, text("packed ", describe(packed), ", b = ", b));
  return q;
}

Tensor skew_pack_grad(const Tensor& dq) {
  const Tensor blocks = square_blocks("skew_pack_grad", "dq", dq);
  const int64_t count = blocks.size(0), b = blocks.size(1), length = b * (b - 1) / 2;
  const Tensor packed = torch::stable::new_empty(dq, {count, length});
  if (packed.numel() == 0) return packed;
  const int status = poet_cpu_skew_pack_grad(static_cast<const float*>(blocks.const_data_ptr()),
                                             static_cast<float*>(packed.mutable_data_ptr()), length, count, b);
  require_ok(status, "skew_pack_grad", text("dq ", describe(dq)));
  return packed;
}

Tensor series_increment(const Tensor& q, const std::vector<double>& coefficients) {
  const Series a = Series::of("series_increment", q, coefficients);
  const Tensor e = torch::stable::empty_like(a.q);
  if (e.numel() == 0) return e;
  const int status = poet_cpu_series_increment(a.data(), static_cast<float*>(e.mutable_data_ptr()), a.count(), a.b(), a.coefficients.data(),
                                               a.degree());
  require_ok(status, a.op, a.shapes());
  return e;
}

Tensor series_grad(const Tensor& q, const std::vector<double>& coefficients, const Tensor& grad) {
  const Series a = Series::of("series_grad", q, coefficients);
  const Tensor g = a.matching("grad", grad), dq = torch::stable::empty_like(a.q);
  if (dq.numel() == 0) return dq;
  const int status = poet_cpu_series_grad(a.data(), static_cast<const float*>(g.const_data_ptr()),
                                          static_cast<float*>(dq.mutable_data_ptr()), a.count(), a.b(), a.coefficients.data(), a.degree());
  require_ok(status, a.op, a.shapes());
  return dq;
}

void merge(const Tensor& w, const OptionalTensor& rows, const OptionalTensor& columns, const OptionalTensor& inverse_columns,
           const Tensors& increments_in, const Tensors& increments_out, const Tensor& out) {
  const Merge a = Merge::of(w, rows, columns, inverse_columns, increments_in, increments_out, out);
  if (out.numel() == 0) return;
  const int status = poet_cpu_merge(a.w.dtype, a.w.data(), a.w.ld, a.rows.data(), a.columns.data(), a.inverse_columns.data(),
                                    static_cast<const float*>(a.in_side.full()), static_cast<const float*>(a.in_side.ragged()),
                                    a.in_side.blocks, static_cast<const float*>(a.out_side.full()),
                                    static_cast<const float*>(a.out_side.ragged()), a.out_side.blocks, a.out.dtype, out.mutable_data_ptr(),
                                    a.out.ld, a.w.rows, a.w.width);
  require_ok(status, a.op, a.shapes());
}

}  // namespace
}  // namespace poet::binding

STABLE_TORCH_LIBRARY(poet_native, m) {
  for (const char* schema : poet::binding::schemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(poet_native, CPU, m) {
  m.impl("permuted_block_product", TORCH_BOX(&poet::binding::permuted_block_product));
  m.impl("permuted_block_product_grad", TORCH_BOX(&poet::binding::permuted_block_product_grad));
  m.impl("skew_unpack", TORCH_BOX(&poet::binding::skew_unpack));
  m.impl("skew_pack_grad", TORCH_BOX(&poet::binding::skew_pack_grad));
  m.impl("series_increment", TORCH_BOX(&poet::binding::series_increment));
  m.impl("series_grad", TORCH_BOX(&poet::binding::series_grad));
  m.impl("merge", TORCH_BOX(&poet::binding::merge));
}
