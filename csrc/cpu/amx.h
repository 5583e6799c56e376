/* bf16 products on AMX tiles: 16 x 32 (A) times 32 x 16 (B, pairs of k interleaved), fp32 sums. Only for Isa::amx. */
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poet::amx {

constexpr std::int64_t tile = 16;           /* rows, and columns of a result */
constexpr std::int64_t depth = 32;          /* k of one tile product */
constexpr std::int64_t pair = 2 * tile;     /* results are formed 2 x 2 tiles at a time */
constexpr std::int64_t elements = 512;      /* of an A or B tile */

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

/* Tile registers are per thread; a thread configures them before products and releases them after. */
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

/* Elements of a packed [k x n] operand, padded with zeros to whole pairs of tiles. */
inline std::int64_t packed_size(std::int64_t k, std::int64_t n) { return round_up(k, depth) * round_up(n, pair); }

/* b: element (p, j) at b[p * row + j * col]. */
void pack(const bf16* b, std::int64_t row, std::int64_t col, std::int64_t k, std::int64_t n, bf16* packed);

/* c[m x n] = bf16(init + a b).
 *   a, init: readable (not necessarily meaningful) up to row round_up(m, 32); a to column round_up(k, 32), where columns from k on are
 *   finite; rows of c from m on and columns from n on are not written. */
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, const bf16* a, std::int64_t lda, const bf16* packed, const bf16* init,
          std::int64_t ld_init, bf16* c, std::int64_t ldc);

/* The operands of x^T g for 32 tokens (rows) and 16 features (columns): left[feature][token] and right[token pair][feature][2]. */
void pack_left(const bf16* x, std::int64_t ldx, bf16* left);
void pack_right(const bf16* g, std::int64_t ldg, bf16* right);

/* c[m x n] (+)= sum over `groups` groups of 32 tokens of left^T right.
 *   left, right: tiles [feature tile][token group]; both hold an even number of feature tiles */
void gemm_grad(std::int64_t m, std::int64_t n, std::int64_t groups, const bf16* left, const bf16* right, std::int64_t tile_stride,
               bool accumulate, float* c, std::int64_t ldc);

}  // namespace poet::amx
