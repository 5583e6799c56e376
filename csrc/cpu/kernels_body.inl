/* Kernels on a vector type, included once per instruction set by kernels_*.cpp inside a namespace of its own, after
 *   struct Vec { static constexpr int width; using T; static T load(const float*); static void store(float*, T); static T set(float);
 *                static T fma(T a, T b, T c); static T zero();
 *                static T gather(const float*, const std::int32_t* order); };
 *   constexpr int tile_rows;
 */

constexpr std::int64_t panel_columns = 2 * Vec::width;

void pack_f32(const float* b, std::int64_t row, std::int64_t col, std::int64_t k, std::int64_t n, float* packed) {
  for (std::int64_t first = 0; first < n; first += panel_columns) {
    const std::int64_t columns = n - first < panel_columns ? n - first : panel_columns;
    for (std::int64_t p = 0; p < k; ++p, packed += panel_columns) {
      const float* source = b + p * row + first * col;
      if (col == 1)
        std::memcpy(packed, source, columns * sizeof(float));
      else
        for (std::int64_t j = 0; j < columns; ++j) packed[j] = source[j * col];
      for (std::int64_t j = columns; j < panel_columns; ++j) packed[j] = 0.0f;
    }
  }
}

/* One full-width tile of `rows` x panel_columns. `ahead` is what the next tiles will read of B, and is brought nearer meanwhile: an E that
 * does not fit into the second-level cache comes from the third, whose latency the hardware's own prefetch does not hide. */
template <int rows>
inline void tile(std::int64_t k, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b, const float* init,
                 std::int64_t ld_init, float* c, std::int64_t ldc, const float* ahead) {
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < 2 * Vec::width; v += 16) __builtin_prefetch(c + i * ldc + v, 1);
  typename Vec::T sum[rows][2];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < 2; ++v) sum[i][v] = init == nullptr ? Vec::zero() : Vec::load(init + i * ld_init + v * Vec::width);
  for (std::int64_t p = 0; p < k; ++p) {
    const typename Vec::T b0 = Vec::load(b), b1 = Vec::load(b + Vec::width);
    b += panel_columns;
    const float* column = a + p * a_col;
    if (p % 2 == 0) __builtin_prefetch(ahead + 8 * p, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const typename Vec::T scale = Vec::set(column[i * a_row]);
      sum[i][0] = Vec::fma(scale, b0, sum[i][0]);
      sum[i][1] = Vec::fma(scale, b1, sum[i][1]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < 2; ++v) Vec::store(c + i * ldc + v * Vec::width, sum[i][v]);
}

/* What a panel of B may take of the first-level cache, in rows: 16 KB on AVX-512. */
constexpr std::int64_t depth = 128;

/* A tile of `columns` < panel_columns goes through a buffer. */
template <int rows>
inline void any_tile(const GemmF32& g, std::int64_t i, std::int64_t j, const float* ahead) {
  const std::int64_t columns = g.n - j;
  const float* a = g.a + i * g.a_row;
  const float* b = g.b + j * g.k;
  const float* init = g.init == nullptr ? nullptr : g.init + i * g.ld_init + j;
  float* c = g.c + i * g.ldc + j;
  if (columns >= panel_columns) {
    tile<rows>(g.k, a, g.a_row, g.a_col, b, init, g.ld_init, c, g.ldc, ahead);
    return;
  }
  float buffer[rows * panel_columns] = {};
  if (init != nullptr)
    for (int r = 0; r < rows; ++r) std::memcpy(buffer + r * panel_columns, init + r * g.ld_init, columns * sizeof(float));
  tile<rows>(g.k, a, g.a_row, g.a_col, b, buffer, panel_columns, buffer, panel_columns, ahead);
  for (int r = 0; r < rows; ++r) std::memcpy(c + r * g.ldc, buffer + r * panel_columns, columns * sizeof(float));
}

/* All rows of one panel of columns. */
void panel_product(const GemmF32& g, std::int64_t j) {
  const float* ahead = g.b + j * g.k + g.k * panel_columns; /* packed panels follow each other, also from block to block */
  std::int64_t i = 0;
  for (; i + tile_rows <= g.m; i += tile_rows, ahead += 8 * g.k) any_tile<tile_rows>(g, i, j, ahead);
  for (; i + 4 <= g.m; i += 4) any_tile<4>(g, i, j, ahead);
  for (; i < g.m; ++i) any_tile<1>(g, i, j, ahead);
}

void gemm_f32(const GemmF32& g) {
  for (std::int64_t j = 0; j < g.n; j += panel_columns)
    for (std::int64_t p = 0; p < g.k; p += depth) {
      /* The panel's rows from p on; sums continue in c. */
      GemmF32 part = g;
      part.k = g.k - p < depth ? g.k - p : depth;
      part.a += p * g.a_col;
      part.b += j * g.k + p * panel_columns - j * part.k;
      if (p > 0) {
        part.init = g.c;
        part.ld_init = g.ldc;
      }
      panel_product(part, j);
    }
}

inline float to_f32(bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline bf16 to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<bf16>(bits >> 16 | 0x40);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Gathers of fp32 use the vector's own instruction where it has one (Vec::gather). */
void move_f32(const float* in, const std::int32_t* order, float* out, std::int64_t n) {
  if (order == nullptr) {
    std::memcpy(out, in, n * sizeof(float));
    return;
  }
  std::int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Vec::store(out + i, Vec::gather(in, order + i));
  for (; i < n; ++i) out[i] = in[order[i]];
}

void move_bf16(const bf16* in, const std::int32_t* order, bf16* out, std::int64_t n) {
  if (order == nullptr) {
    std::memcpy(out, in, n * sizeof(bf16));
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) out[i] = in[order[i]];
}

template <class In, class Out, Out (*convert)(In)>
void move(const In* in, const std::int32_t* order, Out* out, std::int64_t n) {
  if (order == nullptr)
    for (std::int64_t i = 0; i < n; ++i) out[i] = convert(in[i]);
  else
    for (std::int64_t i = 0; i < n; ++i) out[i] = convert(in[order[i]]);
}

constexpr Kernels table = {panel_columns,
                           pack_f32,
                           gemm_f32,
                           move_f32,
                           move_bf16,
                           move<bf16, float, to_f32>,
                           move<float, bf16, to_bf16>};
