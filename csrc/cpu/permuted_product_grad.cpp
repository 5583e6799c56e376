/* dE_j = X_j^T G_j. A chunk of tokens is gathered where it has to be (threads share the tokens), then every block is updated (threads
 * share the blocks), so that the order of every sum is fixed. */
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

constexpr std::int64_t group = 32; /* tokens gathered at a time */

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

/* Rows of dE that one task updates: a block of 256 is several tasks. */
constexpr std::int64_t task_rows = 128;

struct Task {
  Block block;
  std::int64_t first, rows;
};

std::int64_t tasks_per_block(std::int64_t size) { return (size + task_rows - 1) / task_rows; }

std::int64_t task_count(const poet_blocks& blocks) {
  return blocks.count * tasks_per_block(blocks.size) + blocks.ragged_count * tasks_per_block(blocks.ragged_size);
}

Task task_at(const poet_blocks& blocks, std::int64_t index) {
  const std::int64_t per_full = tasks_per_block(blocks.size), in_full = blocks.count * per_full;
  const bool ragged = index >= in_full;
  const std::int64_t per_block = ragged ? tasks_per_block(blocks.ragged_size) : per_full, local = ragged ? index - in_full : index;
  const Block block = block_at(blocks, local / per_block + (ragged ? blocks.count : 0));
  const std::int64_t first = local % per_block * task_rows;
  return {block, first, std::min(task_rows, block.size - first)};
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

/* A task copies its columns of X and G to the cache, as fp32, and multiplies there. */
template <class Io>
int run_f32(const Call& call) {
  using Element = typename Io::Element;
  constexpr std::int64_t chunk = 256;
  const Kernels& kernels = current_kernels();
  const std::int64_t n = kernels.panel, ld = call.width + 16, side = std::max(call.blocks.size, call.blocks.ragged_size);
  thread_local Scratch stage_scratch;
  const int gathered = (call.gather_x != nullptr) + (call.gather_g != nullptr);
  Element* staged = stage_scratch.get<Element>(gathered * chunk * ld);
  if (gathered > 0 && staged == nullptr) return POET_OUT_OF_MEMORY;
  const Operand<Element> left = left_operand(call, staged, ld), right = right_operand(call, staged + (gathered - 1) * chunk * ld, ld);
  bool out_of_memory = false;
#pragma omp parallel
  {
    thread_local Scratch task_scratch;
    float* a = task_scratch.get<float>(chunk * (task_rows + (side + n - 1) / n * n) + n);
    if (a == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
    float* b = a + chunk * task_rows;
    for (std::int64_t start = 0; start < call.tokens; start += chunk) {
      const std::int64_t count = std::min(chunk, call.tokens - start);
#pragma omp for schedule(static)
      for (std::int64_t t = 0; t < gathered * count; ++t) {
        const Operand<Element>& operand = t < count && left.order != nullptr ? left : right;
        const std::int64_t row = t % count;
        Io::move(kernels, operand.data + (start + row) * operand.ld, operand.order, operand.staged + row * ld, call.width);
      }
#pragma omp for schedule(static)
      for (std::int64_t index = 0; index < task_count(call.blocks); ++index) {
        if (a == nullptr) continue;
        const Task task = task_at(call.blocks, index);
        const std::int64_t size = task.block.size;
        for (std::int64_t t = 0; t < count; ++t) {
          Io::widen(kernels, left.at(start + t, task.block.offset + task.first, start), a + t * task_rows, task.rows);
          const Element* source = right.at(start + t, task.block.offset, start);
          for (std::int64_t j = 0; j < size; j += n) {
            float* panel = b + j * count + t * n;
            const std::int64_t columns = std::min(n, size - j);
            Io::widen(kernels, source + j, panel, columns);
            for (std::int64_t c = columns; c < n; ++c) panel[c] = 0.0f;
          }
        }
        float* c = call.target(task.block) + task.first * size;
        kernels.gemm_f32({task.rows, size, count, a, 1, task_rows, b, start == 0 ? nullptr : c, size, c, size});
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
    bf16* a = task_scratch.get<bf16>((amx::round_up(side, amx::pair) + task_rows) * chunk + gather_buffer_size(call.width));
    if (a == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
    bf16 *b = a + task_rows * chunk, *buffer = b + amx::round_up(side, amx::pair) * chunk;
    const amx::Session session;
    for (std::int64_t start = 0; start < call.tokens; start += chunk) {
      const std::int64_t count = std::min(chunk, call.tokens - start), used = (count + group - 1) / group;
#pragma omp for schedule(static)
      for (std::int64_t part = 0; part < gathered * used; ++part) {
        if (a == nullptr) continue;
        const bool is_left = part < used && left.order != nullptr;
        const Operand<bf16>& operand = is_left ? left : right;
        const std::int64_t first = part % used * group, rows = std::min(group, count - first);
        move_rows(kernels, rows, operand.data + (start + first) * operand.ld, operand.ld, operand.order, is_left ? plan_x : plan_g,
                  operand.staged + first * ld, ld, call.width, buffer);
      }
#pragma omp for schedule(static)
      for (std::int64_t index = 0; index < task_count(call.blocks); ++index) {
        if (a == nullptr) continue;
        const Task task = task_at(call.blocks, index);
        for (std::int64_t number = 0; number < used; ++number) {
          const std::int64_t token = start + number * group, rows = std::min(group, call.tokens - token);
          pack_tiles<amx::pack_left>(left.at(token, task.block.offset + task.first, start), left.stride(), rows, task.rows, tile_stride,
                                     a + number * amx::elements);
          pack_tiles<amx::pack_right>(right.at(token, task.block.offset, start), right.stride(), rows, task.block.size, tile_stride,
                                      b + number * amx::elements);
        }
        amx::gemm_grad(task.rows, task.block.size, used, a, b, tile_stride, start > 0,
                       call.target(task.block) + task.first * task.block.size, task.block.size);
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
