/* What the bindings ask of tensors, and the messages that they refuse them with. Shared by the CPU and the CUDA binding.
 * A wrong argument is std::invalid_argument, which Python sees as ValueError; a failed kernel is std::runtime_error. */
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "poet_status.h"

namespace poet::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceIndex;

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return std::move(out).str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

/* "float32 [2, 3] on cuda:0" */
inline std::string describe(const Tensor& tensor) {
  std::ostringstream out;
  out << dtype_name(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << "] on ";
  if (tensor.is_cuda()) {
    out << "cuda:" << tensor.get_device_index();
  } else {
    out << (tensor.is_cpu() ? "cpu" : "another device");
  }
  return std::move(out).str();
}

template <typename... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  throw std::invalid_argument(text("poet_native::", op, ": ", parts...));
}

/* Throws what a launcher's negative status means; `shapes` says what it was called with. */
inline void require_ok(int status, const char* op, const std::string& shapes) {
  if (status == POET_OK) return;
  if (status == POET_BAD_DTYPE || status == POET_BAD_SHAPE) {
    refuse(op, "the kernel refused ", status == POET_BAD_DTYPE ? "the element type" : "the sizes", " of ", shapes);
  }
  const char* reason = status == POET_OUT_OF_MEMORY ? "no memory for a work buffer" : "unknown error";
  throw std::runtime_error(text("poet_native::", op, ": ", reason, " (status ", status, ") with ", shapes));
}

/* "2 blocks of side 8 and 1 of side 4" */
inline std::string shapes_of(const poet_blocks& blocks) {
  const std::string full = text(blocks.count, " blocks of side ", blocks.size);
  return blocks.ragged_count ? text(full, " and ", blocks.ragged_count, " of side ", blocks.ragged_size) : full;
}

inline void require_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* meaning) {
  if (tensor.dim() != dim) refuse(op, name, " must be ", meaning, ", got ", describe(tensor));
}

inline void require_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  const bool same_type = tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu();
  const bool same = same_type && tensor.get_device_index() == like.get_device_index();
  if (!same) refuse(op, name, " is ", describe(tensor), ", on another device than ", describe(like));
}

inline void require_float32(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float) refuse(op, name, " must be float32, got ", describe(tensor));
}

inline int poet_dtype_of(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return POET_F32;
  if (tensor.scalar_type() == ScalarType::BFloat16) return POET_BF16;
  refuse(op, name, " must be float32 or bfloat16, got ", describe(tensor));
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

/* A matrix with contiguous rows, `ld` elements apart. */
struct Matrix {
  Tensor tensor; /* owns the memory: the argument itself, or a contiguous copy of it */
  int dtype;
  int64_t rows, width, ld;

  const void* data() const { return tensor.const_data_ptr(); }
};

inline bool has_contiguous_rows(const Tensor& tensor) {
  return (tensor.stride(1) == 1 || tensor.size(1) <= 1) && (tensor.stride(0) >= tensor.size(1) || tensor.size(0) <= 1);
}

inline Matrix matrix(const char* op, const char* name, const Tensor& tensor, const char* meaning) {
  require_dim(op, name, tensor, 2, meaning);
  const int dtype = poet_dtype_of(op, name, tensor);
  const Tensor held = has_contiguous_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
  const int64_t rows = held.size(0), width = held.size(1);
  return {held, dtype, rows, width, rows <= 1 ? width : held.stride(0)};
}

/* An optional vector of int32 column (or row) numbers; the entries of one on a CPU are checked too. */
struct Index {
  std::optional<Tensor> tensor;

  const int32_t* data() const { return tensor ? static_cast<const int32_t*>(tensor->const_data_ptr()) : nullptr; }
};

inline Index index(const char* op, const char* name, const std::optional<Tensor>& given, const Tensor& like, int64_t length) {
  if (!given) return {};
  if (given->scalar_type() != ScalarType::Int) refuse(op, name, " must be int32, got ", describe(*given));
  if (given->dim() != 1 || given->numel() != length) {
    refuse(op, name, " must be [", length, "] to go with ", describe(like), ", got ", describe(*given));
  }
  require_device(op, name, *given, like);
  const Index found{dense(*given)};
  if (given->is_cpu()) {
    const int32_t* entries = found.data();
    for (int64_t i = 0; i < length; ++i) {
      if (entries[i] < 0 || entries[i] >= length) {
        refuse(op, name, "[", i, "] is ", entries[i], ", must be >= 0 and < ", length, " to go with ", describe(like));
      }
    }
  }
  return found;
}

/* One or two runs of equal blocks, as tensors [count, size, size]. */
struct Increments {
  std::vector<Tensor> tensors;
  poet_blocks blocks;

  bool empty() const { return blocks.count * blocks.size + blocks.ragged_count * blocks.ragged_size == 0; }
  const void* full() const { return tensors.empty() ? nullptr : tensors[0].const_data_ptr(); }
  const void* ragged() const { return tensors.size() < 2 ? nullptr : tensors[1].const_data_ptr(); }
};

/* Throws unless the blocks fit into `width` columns; no product can overflow. */
inline void require_fit(const char* op, const char* name, const poet_blocks& blocks, int64_t width) {
  int64_t left = width;
  for (const auto& [count, size] : {std::pair{blocks.count, blocks.size}, std::pair{blocks.ragged_count, blocks.ragged_size}}) {
    if (count < 0 || size < 0) refuse(op, name, ": ", count, " blocks of side ", size, "; neither may be negative");
    if (count == 0 || size == 0) continue;
    if (count > left / size) {
      refuse(op, name, ": ", shapes_of(blocks), " do not fit into a width of ", width);
    }
    left -= count * size;
  }
}

inline Increments increments(const char* op, const char* name, const std::vector<Tensor>& given, ScalarType dtype, const Tensor& like,
                             int64_t width) {
  if (given.size() > 2) refuse(op, name, " must be at most two tensors (full blocks, ragged blocks), got ", given.size());
  Increments found{{}, {0, 0, 0, 0}};
  for (const Tensor& tensor : given) {
    if (tensor.dim() != 3 || tensor.size(1) != tensor.size(2)) {
      refuse(op, name, " must be [count, size, size], got ", describe(tensor));
    }
    if (tensor.scalar_type() != dtype) refuse(op, name, " must be ", dtype_name(dtype), ", got ", describe(tensor));
    require_device(op, name, tensor, like);
    found.tensors.push_back(dense(tensor));
  }
  if (!given.empty()) found.blocks.count = given[0].size(0), found.blocks.size = given[0].size(1);
  if (given.size() == 2) found.blocks.ragged_count = given[1].size(0), found.blocks.ragged_size = given[1].size(1);
  require_fit(op, name, found.blocks, width);
  return found;
}

}  // namespace poet::binding
