/* W <- R W P, a block of rows at a time: rows and columns are gathered, multiplied by the input side, then by the output side, and put
 * back, so that W is read and written once. A block of rows is read and written by nobody else, which makes it safe in place. */
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "poet_cpu.h"
#include "scratch.h"
#include "side_product.h"

namespace poet {
namespace {

struct Call {
  int w_dtype;
  const void* w;
  std::int64_t ldw;
  const std::int32_t *rows, *columns, *inverse_columns;
  const float *in_full, *in_ragged;
  poet_blocks blocks_in;
  const float *out_full, *out_ragged;
  poet_blocks blocks_out;
  int out_dtype;
  void* out;
  std::int64_t ldo, height, width;

  std::int64_t row(std::int64_t i) const { return rows == nullptr ? i : rows[i]; }
};

constexpr std::int64_t slice = 24;   /* rows that go through the input side together */
constexpr std::int64_t strip = 128;  /* columns that go through the output side together */
constexpr std::int64_t loose_rows = 96; /* rows of no block, at a time */

void read_row(const Kernels& k, const Call& call, std::int64_t i, float* out) {
  const std::int64_t at = call.row(i) * call.ldw;
  if (call.w_dtype == POET_F32)
    k.move_f32(static_cast<const float*>(call.w) + at, call.columns, out, call.width);
  else
    k.widen(static_cast<const bf16*>(call.w) + at, call.columns, out, call.width);
}

void write_row(const Kernels& k, const Call& call, std::int64_t i, const float* in) {
  const std::int64_t at = call.row(i) * call.ldo;
  if (call.out_dtype == POET_F32)
    k.move_f32(in, call.inverse_columns, static_cast<float*>(call.out) + at, call.width);
  else
    k.narrow(in, call.inverse_columns, static_cast<bf16*>(call.out) + at, call.width);
}

/* Work buffers: what all threads share, and what each has. */
struct Buffers {
  float *packed, *x, *y;
  std::int64_t ld;
};

/* x (I + D_in)^T for `count` rows from `first` on, into buffers.y; run by the whole team. */
void input_side(const Kernels& k, const Call& call, const Buffers& buffers, std::int64_t first, std::int64_t count) {
  const std::int64_t tail = covered(call.blocks_in);
#pragma omp for schedule(dynamic)
  for (std::int64_t start = 0; start < count; start += slice) {
    const std::int64_t rows = std::min(slice, count - start), ld = buffers.ld;
    float *x = buffers.x + start * ld, *y = buffers.y + start * ld;
    for (std::int64_t r = 0; r < rows; ++r) read_row(k, call, first + start + r, x + r * ld);
    side_product(k, call.blocks_in, buffers.packed, rows, x, ld, y, ld);
    for (std::int64_t r = 0; r < rows; ++r) std::memcpy(y + r * ld + tail, x + r * ld + tail, (call.width - tail) * sizeof(float));
  }
}

/* (I + E)^T y for one block of rows, into buffers.x; run by the whole team, strips of columns apart. */
void output_side(const Kernels& k, const Call& call, const Buffers& buffers, const float* e, std::int64_t size, float* packed) {
#pragma omp for schedule(dynamic)
  for (std::int64_t j = 0; j < call.width; j += strip) {
    const std::int64_t columns = std::min(strip, call.width - j), ld = buffers.ld;
    const float* y = buffers.y + j;
    k.pack_f32(y, ld, 1, size, columns, packed);
    k.gemm_f32({size, columns, size, e, 1, size, packed, y, ld, buffers.x + j, ld});
  }
}

void write_rows(const Kernels& k, const Call& call, const float* from, std::int64_t ld, std::int64_t first, std::int64_t count) {
#pragma omp for schedule(dynamic)
  for (std::int64_t r = 0; r < count; ++r) write_row(k, call, first + r, from + r * ld);
}

int run(const Call& call) {
  const Kernels& k = current_kernels();
  const std::int64_t side = std::max({call.blocks_out.size, call.blocks_out.ragged_size, loose_rows});
  const std::int64_t ld = call.width + 16, packed_in = packed_side_size(k, call.blocks_in);
  thread_local Scratch shared_scratch;
  float* packed = shared_scratch.get<float>(packed_in + 2 * side * ld);
  if (packed == nullptr) return POET_OUT_OF_MEMORY;
  const Buffers buffers{packed, packed + packed_in, packed + packed_in + side * ld, ld};
  bool out_of_memory = false;
#pragma omp parallel
  {
    thread_local Scratch own_scratch;
    float* own = own_scratch.get<float>(packed_size(k, side, strip));
    if (own == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp barrier
    if (!out_of_memory) {
#pragma omp for schedule(dynamic)
      for (std::int64_t index = 0; index < block_count(call.blocks_in); ++index) {
        const Block block = block_at(call.blocks_in, index);
        const float* e = (block.ragged ? call.in_ragged : call.in_full) + block.increment;
        k.pack_f32(e, 1, block.size, block.size, block.size, packed + packed_offset(k, call.blocks_in, index));
      }
      for (std::int64_t index = 0; index < block_count(call.blocks_out); ++index) {
        const Block block = block_at(call.blocks_out, index);
        const float* e = (block.ragged ? call.out_ragged : call.out_full) + block.increment;
        input_side(k, call, buffers, block.offset, block.size);
        output_side(k, call, buffers, e, block.size, own);
        write_rows(k, call, buffers.x, ld, block.offset, block.size);
      }
      for (std::int64_t first = covered(call.blocks_out); first < call.height; first += loose_rows) {
        const std::int64_t count = std::min(loose_rows, call.height - first);
        input_side(k, call, buffers, first, count);
        write_rows(k, call, buffers.y, ld, first, count);
      }
    }
  }
  return out_of_memory ? POET_OUT_OF_MEMORY : POET_OK;
}

bool known(int dtype) { return dtype == POET_F32 || dtype == POET_BF16; }

}  // namespace
}  // namespace poet

int poet_cpu_merge(int w_dtype, const void* w, int64_t ldw, const int32_t* rows, const int32_t* columns, const int32_t* inverse_columns,
                   const float* in_full, const float* in_ragged, poet_blocks blocks_in, const float* out_full, const float* out_ragged,
                   poet_blocks blocks_out, int out_dtype, void* out, int64_t ldo, int64_t height, int64_t width) {
  using namespace poet;
  if (height < 0 || width < 0 || !fits(blocks_in, width) || !fits(blocks_out, height) || (columns == nullptr) != (inverse_columns == nullptr))
    return POET_BAD_SHAPE;
  if (!known(w_dtype) || !known(out_dtype)) return POET_BAD_DTYPE;
  return run({w_dtype,   w,         ldw,        rows,       columns,   inverse_columns, in_full, in_ragged, blocks_in,
              out_full,  out_ragged, blocks_out, out_dtype, out,       ldo,             height,  width});
}
