/* The CUDA implementations of the ops of poet_native: poet_cuda.h behind torch's stable ABI. Every launch goes to the current stream of
 * the tensors' device; temporaries come from torch's allocator, so that ops can be captured in a CUDA graph. Needs no CUDA headers. */
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "poet_cuda.h"

/* A test compiles this file for CPU tensors and launchers that run on a CPU: tests/unit/ops/test_cuda_binding.py. */
#ifndef POET_NAMESPACE
#define POET_NAMESPACE poet_native
#define POET_KEY CUDA
#endif

extern "C" const char* cudaGetErrorString(int error); /* of the CUDA runtime; its enum is an int */

namespace poet::binding {
namespace {

constexpr int no_kernel_image = 209; /* cudaErrorNoKernelImageForDevice */

/* Makes the device of a tensor current, and gives its current stream. */
class Launch {
 public:
  explicit Launch(const Tensor& tensor) {
    if (!tensor.is_cuda()) return; /* in a test only */
    guard_.emplace(tensor.get_device_index());
    stream_.emplace(torch::stable::accelerator::getCurrentStream(tensor.get_device_index()));
  }

  void* stream() const { return stream_ ? stream_->nativeHandle() : nullptr; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<torch::stable::accelerator::Stream> stream_;
};

void require_launched(int status, const char* op, const std::string& shapes) {
  if (status <= 0) return require_ok(status, op, shapes);
  const char* hint = status == no_kernel_image ? "; build with the compute capability of this GPU in POET_CUDA_ARCHS" : "";
  throw std::runtime_error(text("poet_native::", op, ": CUDA error ", status, " (", cudaGetErrorString(status), ") with ", shapes, hint));
}

/* A work buffer of `bytes` bytes, or none. */
std::optional<Tensor> workspace(const Tensor& like, int64_t bytes) {
  if (bytes <= 0) return std::nullopt;
  return empty_like_shape(like, {bytes}, ScalarType::Byte);
}

void* data_of(const std::optional<Tensor>& buffer) { return buffer ? buffer->mutable_data_ptr() : nullptr; }

/* x[:, order], or x itself without an order. */
Matrix permute_columns(const Matrix& x, const Index& order, const Launch& launch, const char* op) {
  if (!order.tensor) return x;
  const Tensor y = empty_like_shape(x.tensor, {x.rows, x.width}, x.tensor.scalar_type());
  const int status = poet_cuda_permute_columns(x.dtype, x.data(), x.ld, order.data(), y.mutable_data_ptr(), x.width, x.rows, x.width,
                                               launch.stream());
  require_launched(status, op, text("columns to permute of ", describe(x.tensor)));
  return {y, x.dtype, x.rows, x.width, x.width};
}

/* x (I + D) or x (I + D)^T on stored columns. */
Matrix block_product(const Matrix& x, const Increments& increments, bool transpose, const Launch& launch, const char* op) {
  const Tensor y = empty_like_shape(x.tensor, {x.rows, x.width}, x.tensor.scalar_type());
  const int status = poet_cuda_block_product(x.dtype, x.data(), x.ld, increments.full(), increments.ragged(), increments.blocks, transpose,
                                             y.mutable_data_ptr(), x.width, x.rows, x.width, launch.stream());
  require_launched(status, op, text("x ", describe(x.tensor), ", ", shapes_of(increments.blocks)));
  return {y, x.dtype, x.rows, x.width, x.width};
}

Tensor permuted_block_product(const Tensor& x, const OptionalTensor& gather, const Tensors& increments, bool transpose,
                              const OptionalTensor& inverse) {
  const Product a = Product::of(x, gather, increments, inverse);
  if (x.numel() == 0) return empty_like_shape(x, {a.x.rows, a.x.width}, x.scalar_type());
  const Launch launch(x);
  const Matrix stored = permute_columns(a.x, a.gather, launch, a.op);
  const bool permuted = a.gather.tensor || a.inverse.tensor;
  const bool only_permuted = permuted && a.increments.empty(); /* else the product copies columns that no block touches */
  const Matrix product = only_permuted ? stored : block_product(stored, a.increments, transpose, launch, a.op);
  return permute_columns(product, a.inverse, launch, a.op).tensor;
}

Tensors permuted_block_product_grad(const Tensor& x, const OptionalTensor& gather_x, const Tensor& g, const OptionalTensor& gather_g,
                                    const std::vector<int64_t>& runs) {
  const ProductGrad a = ProductGrad::of(x, gather_x, g, gather_g, runs);
  const Tensors results = a.results();
  if (a.empty()) return results;
  const Launch launch(x);
  const Matrix stored_x = permute_columns(a.x, a.gather_x, launch, a.op), stored_g = permute_columns(a.g, a.gather_g, launch, a.op);
  const auto buffer = workspace(x, poet_cuda_block_product_grad_workspace(a.blocks, a.x.rows));
  auto* full = static_cast<float*>(results[0].mutable_data_ptr());
  auto* ragged = results.size() > 1 ? static_cast<float*>(results[1].mutable_data_ptr()) : nullptr;
  const int status = poet_cuda_block_product_grad(a.x.dtype, stored_x.data(), stored_x.ld, stored_g.data(), stored_g.ld, full, ragged,
                                                  a.blocks, a.x.rows, a.x.width, data_of(buffer), launch.stream());
  require_launched(status, a.op, a.shapes());
  return results;
}

Tensor skew_unpack(const Tensor& packed, int64_t b) {
  const Packed a = Packed::of(packed, b);
  const Tensor q = torch::stable::new_empty(packed, {a.packed.rows, b, b});
  if (q.numel() == 0) return q;
  const Launch launch(packed);
  const int status = poet_cuda_skew_unpack(static_cast<const float*>(a.packed.data()), a.packed.ld,
                                           static_cast<float*>(q.mutable_data_ptr()), a.packed.rows, b, launch.stream());
  require_launched(status, a.op, text("packed ", describe(packed), ", b = ", b));
  return q;
}

Tensor skew_pack_grad(const Tensor& dq) {
  const Tensor blocks = square_blocks("skew_pack_grad", "dq", dq);
  const int64_t count = blocks.size(0), b = blocks.size(1), length = b * (b - 1) / 2;
  const Tensor packed = torch::stable::new_empty(dq, {count, length});
  if (packed.numel() == 0) return packed;
  const Launch launch(dq);
  const int status = poet_cuda_skew_pack_grad(static_cast<const float*>(blocks.const_data_ptr()),
                                              static_cast<float*>(packed.mutable_data_ptr()), length, count, b, launch.stream());
  require_launched(status, "skew_pack_grad", text("dq ", describe(dq)));
  return packed;
}

Tensor series_increment(const Tensor& q, const std::vector<double>& coefficients) {
  const Series a = Series::of("series_increment", q, coefficients);
  const Tensor e = torch::stable::empty_like(a.q);
  if (e.numel() == 0) return e;
  const Launch launch(q);
  const auto buffer = workspace(q, poet_cuda_series_workspace(a.count(), a.b(), a.degree(), 0));
  const int status = poet_cuda_series_increment(a.data(), static_cast<float*>(e.mutable_data_ptr()), a.count(), a.b(),
                                                a.coefficients.data(), a.degree(), data_of(buffer), launch.stream());
  require_launched(status, a.op, a.shapes());
  return e;
}

Tensor series_grad(const Tensor& q, const std::vector<double>& coefficients, const Tensor& grad) {
  const Series a = Series::of("series_grad", q, coefficients);
  const Tensor g = a.matching("grad", grad), dq = torch::stable::empty_like(a.q);
  if (dq.numel() == 0) return dq;
  const Launch launch(q);
  const auto buffer = workspace(q, poet_cuda_series_workspace(a.count(), a.b(), a.degree(), 1));
  const int status = poet_cuda_series_grad(a.data(), static_cast<const float*>(g.const_data_ptr()),
                                           static_cast<float*>(dq.mutable_data_ptr()), a.count(), a.b(), a.coefficients.data(), a.degree(),
                                           data_of(buffer), launch.stream());
  require_launched(status, a.op, a.shapes());
  return dq;
}

/* The input side acts on columns and the output side on rows, so one follows the other, in fp32. */
void merge(const Tensor& w, const OptionalTensor& rows, const OptionalTensor& columns, const OptionalTensor& inverse_columns,
           const Tensors& increments_in, const Tensors& increments_out, const Tensor& out) {
  const Merge a = Merge::of(w, rows, columns, inverse_columns, increments_in, increments_out, out);
  if (out.numel() == 0) return;
  const Launch launch(w);
  const bool narrow = a.w.dtype != POET_F32;
  Matrix current = narrow ? matrix(a.op, "w", torch::stable::to(a.w.tensor, ScalarType::Float), "[height, width]") : a.w;
  if (!a.in_side.empty()) {
    const Matrix stored = permute_columns(current, a.columns, launch, a.op);
    const Matrix product = block_product(stored, a.in_side, /*transpose=*/true, launch, a.op);
    current = permute_columns(product, a.inverse_columns, launch, a.op);
  }
  if (!a.out_side.empty()) {
    const bool direct = a.out.dtype == POET_F32;
    const Tensor y = direct ? out : empty_like_shape(w, {a.w.rows, a.w.width}, ScalarType::Float);
    const int64_t ld = direct ? a.out.ld : a.w.width;
    const int status = poet_cuda_merge_rows(static_cast<const float*>(current.data()), current.ld, a.rows.data(),
                                            static_cast<const float*>(a.out_side.full()), static_cast<const float*>(a.out_side.ragged()),
                                            a.out_side.blocks, static_cast<float*>(y.mutable_data_ptr()), ld, a.w.rows, a.w.width,
                                            launch.stream());
    require_launched(status, a.op, a.shapes());
    if (direct) return;
    current = {y, POET_F32, a.w.rows, a.w.width, ld};
  }
  if (current.data() == out.const_data_ptr()) return; /* in place with nothing to do */
  Tensor target = out;
  torch::stable::copy_(target, current.tensor);
}

}  // namespace
}  // namespace poet::binding

STABLE_TORCH_LIBRARY_IMPL(POET_NAMESPACE, POET_KEY, m) {
  m.impl("permuted_block_product", TORCH_BOX(&poet::binding::permuted_block_product));
  m.impl("permuted_block_product_grad", TORCH_BOX(&poet::binding::permuted_block_product_grad));
  m.impl("skew_unpack", TORCH_BOX(&poet::binding::skew_unpack));
  m.impl("skew_pack_grad", TORCH_BOX(&poet::binding::skew_pack_grad));
  m.impl("series_increment", TORCH_BOX(&poet::binding::series_increment));
  m.impl("series_grad", TORCH_BOX(&poet::binding::series_grad));
  m.impl("merge", TORCH_BOX(&poet::binding::merge));
}
