/* The checked arguments of each op: what the CPU and the CUDA binding have in common. Each `of` throws std::invalid_argument with the name
 * of the op, of the argument, its dtype and shape, and the bound. `shapes()` describes a call in the message of a failed launch. */
#pragma once

#include "checks.h"

namespace poet::binding {

using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

/* What torch is told of the ops, the same for every device. */
inline constexpr const char* schemas[] = {
    "permuted_block_product(Tensor x, Tensor? gather, Tensor[] increments, bool transpose, Tensor? inverse) -> Tensor",
    "permuted_block_product_grad(Tensor x, Tensor? gather_x, Tensor g, Tensor? gather_g, int[] runs) -> Tensor[]",
    "skew_unpack(Tensor packed, int b) -> Tensor",
    "skew_pack_grad(Tensor dq) -> Tensor",
    "series_increment(Tensor q, float[] coefficients) -> Tensor",
    "series_grad(Tensor q, float[] coefficients, Tensor grad) -> Tensor",
    "merge(Tensor w, Tensor? rows, Tensor? columns, Tensor? inverse_columns, Tensor[] increments_in, Tensor[] increments_out, "
    "Tensor(a!) out) -> ()",
};

/* permuted_block_product: x [tokens, width], gather and inverse [width], increments of x's dtype. */
struct Product {
  static constexpr const char* op = "permuted_block_product";
  Matrix x;
  Index gather, inverse;
  Increments increments;

  static Product of(const Tensor& x, const OptionalTensor& gather, const Tensors& increments, const OptionalTensor& inverse) {
    const Matrix rows = matrix(op, "x", x, "[tokens, width]");
    return {rows, index(op, "gather", gather, x, rows.width), index(op, "inverse", inverse, x, rows.width),
            binding::increments(op, "increments", increments, x.scalar_type(), x, rows.width)};
  }

  std::string shapes() const { return text("x ", describe(x.tensor), ", ", shapes_of(increments.blocks)); }
};

/* permuted_block_product_grad: x and g [tokens, width] of one dtype, gather_x and gather_g [width], runs = [count, size(, count, size)]. */
struct ProductGrad {
  static constexpr const char* op = "permuted_block_product_grad";
  Matrix x, g;
  Index gather_x, gather_g;
  poet_blocks blocks;
  size_t runs;

  static ProductGrad of(const Tensor& x, const OptionalTensor& gather_x, const Tensor& g, const OptionalTensor& gather_g,
                        const std::vector<int64_t>& runs) {
    const Matrix rows = matrix(op, "x", x, "[tokens, width]"), grads = matrix(op, "g", g, "[tokens, width]");
    if (rows.dtype != grads.dtype || rows.rows != grads.rows || rows.width != grads.width) {
      refuse(op, "g must have the shape and dtype of x, ", describe(x), ", got ", describe(g));
    }
    require_device(op, "g", g, x);
    if (runs.size() != 2 && runs.size() != 4) {
      refuse(op, "runs must be [count, size] or [count, size, ragged_count, ragged_size], got ", runs.size(), " numbers");
    }
    const bool ragged = runs.size() == 4;
    const poet_blocks blocks{runs[0], runs[1], ragged ? runs[2] : 0, ragged ? runs[3] : 0};
    require_fit(op, "runs", blocks, rows.width);
    return {rows, grads, index(op, "gather_x", gather_x, x, rows.width), index(op, "gather_g", gather_g, x, rows.width), blocks,
            runs.size() / 2};
  }

  bool empty() const { return x.rows == 0 || blocks.count * blocks.size + blocks.ragged_count * blocks.ragged_size == 0; }

  /* fp32 results, one per run; zeros where there is nothing to sum, uninitialized otherwise. */
  Tensors results() const {
    const auto one = [&](int64_t count, int64_t size) {
      const auto make = empty() ? torch::stable::new_zeros : torch::stable::new_empty;
      return make(x.tensor, {count, size, size}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt);
    };
    Tensors out{one(blocks.count, blocks.size)};
    if (runs == 2) out.push_back(one(blocks.ragged_count, blocks.ragged_size));
    return out;
  }

  std::string shapes() const { return text("x ", describe(x.tensor), ", ", shapes_of(blocks)); }
};

/* skew_unpack: packed [count, b(b-1)/2], fp32, contiguous rows. */
struct Packed {
  static constexpr const char* op = "skew_unpack";
  Matrix packed;
  int64_t b;

  static Packed of(const Tensor& packed, int64_t b) {
    require_float32(op, "packed", packed);
    const Matrix rows = matrix(op, "packed", packed, "[count, b (b - 1) / 2]");
    if (b < 1 || b > (int64_t{1} << 24)) refuse(op, "b is ", b, ", must be >= 1 and <= 2^24");
    if (rows.width != b * (b - 1) / 2) {
      refuse(op, "packed must have b (b - 1) / 2 = ", b * (b - 1) / 2, " columns for b = ", b, ", got ", describe(packed));
    }
    return {rows, b};
  }
};

/* Square fp32 blocks [count, b, b], made contiguous. */
inline Tensor square_blocks(const char* op, const char* name, const Tensor& blocks) {
  require_float32(op, name, blocks);
  if (blocks.dim() != 3 || blocks.size(1) != blocks.size(2)) refuse(op, name, " must be [count, b, b], got ", describe(blocks));
  return dense(blocks);
}

/* series_increment and series_grad: q [count, b, b] fp32, coefficients c_0 = 0, c_1, ..., c_degree. */
struct Series {
  const char* op;
  Tensor q;
  std::vector<float> coefficients;

  static Series of(const char* op, const Tensor& q, const std::vector<double>& coefficients) {
    const Tensor blocks = square_blocks(op, "q", q);
    if (coefficients.size() < 2 || coefficients[0] != 0.0) {
      refuse(op, "coefficients must be 0, c_1, ..., c_degree with degree >= 1, got ", coefficients.size(), " numbers",
             coefficients.empty() ? std::string() : text(" from ", coefficients[0], " on"));
    }
    return {op, blocks, {coefficients.begin(), coefficients.end()}};
  }

  /* The gradient of the increments, in the shape of q. */
  Tensor matching(const char* name, const Tensor& grad) const {
    const Tensor blocks = square_blocks(op, name, grad);
    if (blocks.size(0) != count() || blocks.size(1) != b()) refuse(op, name, " must be ", describe(q), " like q, got ", describe(grad));
    require_device(op, name, grad, q);
    return blocks;
  }

  int64_t count() const { return q.size(0); }
  int64_t b() const { return q.size(1); }
  int64_t degree() const { return static_cast<int64_t>(coefficients.size()) - 1; }
  const float* data() const { return static_cast<const float*>(q.const_data_ptr()); }
  std::string shapes() const { return text("q ", describe(q), ", degree ", degree()); }
};

/* merge: w and out [height, width] in feature order, rows [height], columns and inverse_columns [width], fp32 increments of both sides. */
struct Merge {
  static constexpr const char* op = "merge";
  Matrix w, out;
  Index rows, columns, inverse_columns;
  Increments in_side, out_side;

  static Merge of(const Tensor& w, const OptionalTensor& rows, const OptionalTensor& columns, const OptionalTensor& inverse_columns,
                  const Tensors& increments_in, const Tensors& increments_out, const Tensor& out) {
    require_dim(op, "out", out, 2, "[height, width]");
    if (!has_contiguous_rows(out)) refuse(op, "out must have contiguous rows, got strides [", out.stride(0), ", ", out.stride(1), "]");
    const Matrix source = matrix(op, "w", w, "[height, width]"), target = matrix(op, "out", out, "[height, width]");
    if (source.rows != target.rows || source.width != target.width) {
      refuse(op, "out must have the shape of w, ", describe(w), ", got ", describe(out));
    }
    require_device(op, "out", out, w);
    if (columns.has_value() != inverse_columns.has_value()) refuse(op, "give both columns and inverse_columns, or neither");
    const Merge found{source,
                      target,
                      index(op, "rows", rows, w, source.rows),
                      index(op, "columns", columns, w, source.width),
                      index(op, "inverse_columns", inverse_columns, w, source.width),
                      increments(op, "increments_in", increments_in, ScalarType::Float, w, source.width),
                      increments(op, "increments_out", increments_out, ScalarType::Float, w, source.rows)};
    if (found.overlaps() && !found.in_place()) refuse(op, "out overlaps w but is not the same matrix in the same dtype");
    return found;
  }

  bool in_place() const { return w.data() == out.data() && w.ld == out.ld && w.dtype == out.dtype; }

  std::string shapes() const {
    return text("w ", describe(w.tensor), ", out ", describe(out.tensor), ", in: ", shapes_of(in_side.blocks), ", out: ",
                shapes_of(out_side.blocks));
  }

 private:
  bool overlaps() const {
    const auto [w_first, w_last] = extent(w);
    const auto [out_first, out_last] = extent(out);
    return w_first < out_last && out_first < w_last;
  }

  static std::pair<uintptr_t, uintptr_t> extent(const Matrix& matrix) {
    const auto first = reinterpret_cast<uintptr_t>(matrix.data());
    const int64_t elements = matrix.rows == 0 ? 0 : (matrix.rows - 1) * matrix.ld + matrix.width;
    return {first, first + static_cast<uintptr_t>(elements) * (matrix.dtype == POET_BF16 ? 2 : 4)};
  }
};

inline Tensor empty_like_shape(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace poet::binding
