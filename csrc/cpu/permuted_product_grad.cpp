/* dE_j = X_j^T G_j. A chunk of tokens is gathered where it has to be (threads share the tokens), then every block is updated (threads
 * share the blocks), so that the order of every sum is fixed. */
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "blocks.h"
#include "gather.h"
#include "kernels.h"
#include "poet_cpu.h"
#include "scratch.h"

namespace poet {
namespace {

[[maybe_unused]] constexpr std::int64_t group = 32; /* tokens gathered at a time, on tiles */

struct Call {
  const void* x;
  std::int64_t ldx;
  const std::int32_t* gather_x;
  const void* g;
  std::int64_t ldg;
  const std::int32_t* gather_g;
  float *de_full, *de_ragged;
  poet_blocks blocks;
  std::int64_t tokens, width;

  float* target(const Block& block) const { return (block.ragged ? de_ragged : de_full) + block.increment; }
};

/* How the blocks are dealt out, with the same result whatever is chosen: several small neighbours are one task, so that it reads long
 * pieces of rows; a large block is cut into bands of 128 rows of dE if there are few for many threads. */
struct Deal {
  static constexpr std::int64_t piece = 256; /* columns that a task wants */

  poet_blocks blocks;
  std::int64_t rows, together; /* at most that many rows of a block, blocks of a task */

  explicit Deal(const poet_blocks& all) : blocks(all), rows(std::max<std::int64_t>(all.size, all.ragged_size)), together(1) {
    const std::int64_t wanted = 4 * omp_get_max_threads();
    if (block_count(all) < wanted) rows = std::min<std::int64_t>(rows, 128);
    if (all.size > 0) together = std::max<std::int64_t>(1, std::min(piece / all.size, all.count / wanted));
  }

  std::int64_t bands(std::int64_t size) const { return (size + rows - 1) / rows; }
  std::int64_t full_tasks() const { return (blocks.count + together - 1) / together * bands(blocks.size); }
  std::int64_t tasks() const { return full_tasks() + blocks.ragged_count * bands(blocks.ragged_size); }
};

/* Rows [first, first + rows) of dE of `count` blocks of one size, from `block` on. */
struct Task {
  Block block;
  std::int64_t count, first, rows;
};

Task task_at(const Deal& deal, std::int64_t index) {
  const poet_blocks& blocks = deal.blocks;
  const bool ragged = index >= deal.full_tasks();
  if (ragged) index -= deal.full_tasks();
  const std::int64_t bands = deal.bands(ragged ? blocks.ragged_size : blocks.size), number = index / bands;
  const Block block = block_at(blocks, ragged ? blocks.count + number : number * deal.together);
  const std::int64_t count = ragged ? 1 : std::min(deal.together, blocks.count - number * deal.together);
  const std::int64_t first = index % bands * deal.rows;
  return {block, count, first, std::min(deal.rows, block.size - first)};
}

struct F32Io {
  using Element = float;
  static void move(const Kernels& k, const float* in, const std::int32_t* order, float* out, std::int64_t n) { k.move_f32(in, order, out, n); }
  static void widen(const Kernels& k, const float* in, float* out, std::int64_t n) { k.move_f32(in, nullptr, out, n); }
};

struct Bf16Io {
  using Element = bf16;
  static void move(const Kernels& k, const bf16* in, const std::int32_t* order, bf16* out, std::int64_t n) { k.move_bf16(in, order, out, n); }
  static void widen(const Kernels& k, const bf16* in, float* out, std::int64_t n) { k.widen(in, nullptr, out, n); }
};

/* A chunk of one operand: as the caller holds it, or gathered into a work buffer that all threads fill together. */
template <class Element>
struct Operand {
  const Element* data;
  std::int64_t ld;
  const std::int32_t* order;
  Element* staged;
  std::int64_t ld_staged;

  const Element* at(std::int64_t token, std::int64_t column, std::int64_t chunk_start) const {
    return order == nullptr ? data + token * ld + column : staged + (token - chunk_start) * ld_staged + column;
  }
  std::int64_t stride() const { return order == nullptr ? ld : ld_staged; }
};

template <class Element>
Operand<Element> left_operand(const Call& call, Element* staged, std::int64_t ld) {
  return {static_cast<const Element*>(call.x), call.ldx, call.gather_x, staged, ld};
}

template <class Element>
Operand<Element> right_operand(const Call& call, Element* staged, std::int64_t ld) {
  return {static_cast<const Element*>(call.g), call.ldg, call.gather_g, staged, ld};
}

/* A row of a packed operand: `n` columns per panel, panels `stride` elements apart, the last one filled up with zeros. */
template <class Io>
void copy_panels(const Kernels& kernels, const typename Io::Element* in, std::int64_t size, std::int64_t n, float* out, std::int64_t stride) {
  for (std::int64_t j = 0; j < size; j += n, out += stride) {
    const std::int64_t columns = std::min(n, size - j);
    Io::widen(kernels, in + j, out, columns);
    for (std::int64_t c = columns; c < n; ++c) out[c] = 0.0f;
  }
}

/* Rows are far apart: the hardware does not foresee the next one. */
constexpr std::int64_t ahead = 8;

/* A task copies its columns of X and G to the cache, as fp32, and multiplies there. */
template <class Io>
int run_f32(const Call& call) {
  using Element = typename Io::Element;
  constexpr std::int64_t chunk = 256;
  const Kernels& kernels = current_kernels();
  const std::int64_t n = kernels.panel, ld = call.width + 16, side = std::max(call.blocks.size, call.blocks.ragged_size);
  const Deal deal(call.blocks);
  thread_local Scratch stage_scratch;
  const int gathered = (call.gather_x != nullptr) + (call.gather_g != nullptr);
  Element* staged = stage_scratch.get<Element>(gathered * chunk * ld);
  if (gathered > 0 && staged == nullptr) return POET_OUT_OF_MEMORY;
  const Operand<Element> left = left_operand(call, staged, ld), right = right_operand(call, staged + (gathered - 1) * chunk * ld, ld);
  bool out_of_memory = false;
#pragma omp parallel
  {
    thread_local Scratch task_scratch;
    const std::int64_t panels = (side + n - 1) / n * n;
    float* a = task_scratch.get<float>(deal.together * chunk * (deal.rows + panels));
    if (a == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
    float* b = a + deal.together * chunk * deal.rows;
    for (std::int64_t start = 0; start < call.tokens; start += chunk) {
      const std::int64_t count = std::min(chunk, call.tokens - start);
#pragma omp for schedule(dynamic)
      for (std::int64_t t = 0; t < gathered * count; ++t) {
        const Operand<Element>& operand = t < count && left.order != nullptr ? left : right;
        const std::int64_t row = t % count;
        Io::move(kernels, operand.data + (start + row) * operand.ld, operand.order, operand.staged + row * ld, call.width);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t index = 0; index < deal.tasks(); ++index) {
        if (a == nullptr) continue;
        const Task task = task_at(deal, index);
        const std::int64_t size = task.block.size;
        for (std::int64_t t = 0; t < count; ++t) {
          if (t + ahead < count) {
            fetch(left.at(start + t + ahead, task.block.offset + task.first, start), (task.count - 1) * size + task.rows);
            fetch(right.at(start + t + ahead, task.block.offset, start), task.count * size);
          }
          for (std::int64_t k = 0; k < task.count; ++k) {
            const std::int64_t column = task.block.offset + k * size;
            Io::widen(kernels, left.at(start + t, column + task.first, start), a + (k * chunk + t) * deal.rows, task.rows);
            copy_panels<Io>(kernels, right.at(start + t, column, start), size, n, b + k * chunk * panels + t * n, count * n);
          }
        }
        for (std::int64_t k = 0; k < task.count; ++k) {
          float* c = call.target(task.block) + (k * size + task.first) * size;
          kernels.gemm_f32({task.rows, size, count, a + k * chunk * deal.rows, 1, deal.rows, b + k * chunk * panels,
                            start == 0 ? nullptr : c, size, c, size});
        }
      }
    }
  }
  return out_of_memory ? POET_OUT_OF_MEMORY : POET_OK;
}

#if defined(__x86_64__)
/* 32 tokens of a block, 16 columns at a time, as operands of tiles. Columns that a block lacks, or tokens beyond the last, are zero. */
template <void (*pack)(const bf16*, std::int64_t, bf16*)>
void pack_tiles(const bf16* in, std::int64_t ld, std::int64_t tokens, std::int64_t columns, std::int64_t tile_stride, bf16* out) {
  for (std::int64_t c = 0; c < amx::round_up(columns, amx::pair); c += amx::tile, out += tile_stride) {
    if (tokens == group && c + amx::tile <= columns) {
      pack(in + c, ld, out);
      continue;
    }
    alignas(64) bf16 padded[group * amx::tile] = {};
    const std::int64_t present = std::max<std::int64_t>(std::min(columns - c, amx::tile), 0);
    if (present > 0)
      for (std::int64_t t = 0; t < tokens; ++t) std::memcpy(padded + t * amx::tile, in + t * ld + c, present * sizeof(bf16));
    pack(padded, amx::tile, out);
  }
}

int run_amx(const Call& call) {
  constexpr std::int64_t chunk = 512, groups = chunk / group, tile_stride = groups * amx::elements;
  const Kernels& kernels = current_kernels();
  const std::int64_t ld = call.width + 32, side = std::max(call.blocks.size, call.blocks.ragged_size);
  const Deal deal(call.blocks);
  const std::int64_t band_rows = amx::round_up(deal.rows, amx::pair), right_columns = amx::round_up(side, amx::pair);
  const int gathered = (call.gather_x != nullptr) + (call.gather_g != nullptr);
  const std::int64_t plan_size = gather_plan_size(call.width);
  thread_local Scratch stage_scratch, plan_scratch;
  bf16* staged = stage_scratch.get<bf16>(gathered * chunk * ld);
  std::int32_t* plan_x = plan_scratch.get<std::int32_t>(2 * plan_size);
  if (plan_x == nullptr || (gathered > 0 && staged == nullptr)) return POET_OUT_OF_MEMORY;
  std::int32_t* plan_g = plan_x + plan_size;
  if (call.gather_x != nullptr) plan_gather(call.gather_x, call.width, plan_x);
  if (call.gather_g != nullptr) plan_gather(call.gather_g, call.width, plan_g);
  const Operand<bf16> left = left_operand(call, staged, ld), right = right_operand(call, staged + (gathered - 1) * chunk * ld, ld);
  bool out_of_memory = false;
#pragma omp parallel
  {
    thread_local Scratch task_scratch;
    bf16* a = task_scratch.get<bf16>(deal.together * (right_columns + band_rows) * chunk + gather_buffer_size(call.width));
    if (a == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
    bf16 *b = a + deal.together * band_rows * chunk, *buffer = b + deal.together * right_columns * chunk;
    const amx::Session session;
    for (std::int64_t start = 0; start < call.tokens; start += chunk) {
      const std::int64_t count = std::min(chunk, call.tokens - start), used = (count + group - 1) / group;
#pragma omp for schedule(dynamic)
      for (std::int64_t part = 0; part < gathered * used; ++part) {
        if (a == nullptr) continue;
        const bool is_left = part < used && left.order != nullptr;
        const Operand<bf16>& operand = is_left ? left : right;
        const std::int64_t first = part % used * group, rows = std::min(group, count - first);
        move_rows(kernels, rows, operand.data + (start + first) * operand.ld, operand.ld, operand.order, is_left ? plan_x : plan_g,
                  operand.staged + first * ld, ld, call.width, buffer);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t index = 0; index < deal.tasks(); ++index) {
        if (a == nullptr) continue;
        const Task task = task_at(deal, index);
        const std::int64_t size = task.block.size;
        for (std::int64_t number = 0; number < used; ++number) {
          const std::int64_t token = start + number * group, rows = std::min(group, call.tokens - token);
          for (std::int64_t next = token + group; next < std::min(token + 2 * group, start + count); ++next) {
            fetch(left.at(next, task.block.offset + task.first, start), (task.count - 1) * size + task.rows);
            fetch(right.at(next, task.block.offset, start), task.count * size);
          }
          for (std::int64_t k = 0; k < task.count; ++k) {
            const std::int64_t column = task.block.offset + k * size, place = number * amx::elements;
            pack_tiles<amx::pack_left>(left.at(token, column + task.first, start), left.stride(), rows, task.rows, tile_stride,
                                       a + k * band_rows * chunk + place);
            pack_tiles<amx::pack_right>(right.at(token, column, start), right.stride(), rows, size, tile_stride,
                                        b + k * right_columns * chunk + place);
          }
        }
        for (std::int64_t k = 0; k < task.count; ++k)
          amx::gemm_grad(task.rows, size, used, a + k * band_rows * chunk, b + k * right_columns * chunk, tile_stride, start > 0,
                         call.target(task.block) + (k * size + task.first) * size, size);
      }
    }
  }
  return out_of_memory ? POET_OUT_OF_MEMORY : POET_OK;
}
#endif

}  // namespace
}  // namespace poet

int poet_cpu_permuted_product_grad(int dtype, const void* x, int64_t ldx, const int32_t* gather_x, const void* g, int64_t ldg,
                                   const int32_t* gather_g, float* de_full, float* de_ragged, poet_blocks blocks, int64_t tokens,
                                   int64_t width) {
  using namespace poet;
  if (tokens < 0 || width < 0 || !fits(blocks, width)) return POET_BAD_SHAPE;
  if (dtype != POET_F32 && dtype != POET_BF16) return POET_BAD_DTYPE;
  if (covered(blocks) == 0) return POET_OK;
  if (tokens == 0) {
    std::memset(de_full, 0, blocks.count * blocks.size * blocks.size * sizeof(float));
    if (blocks.ragged_count > 0) std::memset(de_ragged, 0, blocks.ragged_count * blocks.ragged_size * blocks.ragged_size * sizeof(float));
    return POET_OK;
  }
  const Call call{x, ldx, gather_x, g, ldg, gather_g, de_full, de_ragged, blocks, tokens, width};
  if (dtype == POET_F32) return run_f32<F32Io>(call);
#if defined(__x86_64__)
  if (current_isa() == Isa::amx) return run_amx(call);
#endif
  return run_f32<Bf16Io>(call);
}
