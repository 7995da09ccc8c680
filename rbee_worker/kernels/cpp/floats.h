// Products with weights that are floats, in float32.
//
// Rows and activations are made of words: float32 numbers, or pairs of bfloat16 where the CPU multiplies these. A result
// has as many sums as a register has lanes: sum i takes the words i, i + lanes, i + 2 lanes..., one after the other. They
// are added at the end, in the order of simd::sum. So a token's result does not depend on how many tokens or threads
// there are.
//
// A few tokens: rows are multiplied where they are stored, with a lane of a register for each of the sums. More tokens:
// as many rows as a register has lanes are made words and turned (a panel), and each of the sums is computed alone, with a
// lane for each row. Activations are turned likewise, once for the whole call.

#pragma once

constexpr bool kWide = simd::kLanes == 16;
constexpr int64_t kDirectTokens = kWide ? 16 : 12;  // no more than these multiply rows where they are stored
constexpr int kDirectRows = 3, kDirectTile = kWide ? 8 : 4;  // rows and tokens with as many sums as there are registers
constexpr int64_t kFloatsAhead = 12288;  // bytes of weights that are asked for early
constexpr int kPanels = 3, kPanelTile = kWide ? 8 : 4;  // panels and tokens with as many sums as there are registers
constexpr int64_t kTokens = 64;  // whose sums stay in the second-level cache
constexpr int kTileSums = kPanels * kPanelTile * simd::kLanes;
constexpr int kLevels = kWide ? 4 : 3;  // the lanes of a register are 2^kLevels

template <class F>
inline int64_t round_up(int64_t value, F to) {
  return (value + to - 1) / to * to;
}

// Words in panels, [panel, sum, step, lane]: a lane is a row or a token.
struct Panels {
  float* words;
  int64_t steps;

  // A line more than there is, so that the sums do not share sets of the cache.
  int64_t sum_stride() const { return (steps + 1) * simd::kLanes; }
  int64_t stride() const { return sum_stride() * simd::kLanes; }
};

// A call's activations as words [tokens, stride], those up to the stride 0; many tokens: in panels.
struct FloatInput {
  const float* x;
  int64_t stride;
  Panels panels;
};

// n words, and zeros up to a whole register.
template <class W>
inline simd::Floats load_words(const typename W::Stored* p, int64_t n) {
  if (n >= simd::kLanes) return W::load(p);
  typename W::Stored some[simd::kLanes] = {};
  std::memcpy(some, p, n * sizeof(some[0]));
  return W::load(some);
}

// A piece of a row as float32; zeros up to a whole register.
template <class W>
inline void widen(const typename W::Stored* w, int64_t columns, float* to) {
  for (int64_t k = 0; k < columns; k += simd::kLanes) simd::store(to + k, load_words<W>(w + k, columns - k));
}

// Where a matrix has its rows, as words.
template <class W>
struct Stored {
  const typename W::Stored* data;
  int64_t stride, words;

  explicit Stored(const Matrix& m)
      : data(static_cast<const typename W::Stored*>(m.data)),
        stride(m.row_bytes / static_cast<int64_t>(sizeof(typename W::Stored))),
        words(m.columns / W::kColumns) {}
};

// ------------------------------------------------------------------------------------------------------- a few tokens

// The sums of R rows and T tokens: [R, T, lanes]. ahead: bytes from a weight to one that is asked for early. It comes to the
// second-level cache, whose queue is longer than that of the first.
template <class W, int R, int T>
inline void multiply_rows(const Stored<W>& m, int64_t row, const float* x, int64_t x_stride, int64_t ahead, float* to,
                          int64_t to_stride) {
  simd::Floats sums[R * T];
  each<R * T>([&](auto i) __attribute__((always_inline)) { sums[i] = simd::zero(); });
  const auto add = [&](int64_t k, const auto& load) __attribute__((always_inline)) {
    simd::Floats ws[R];
    each<R>([&](auto r) __attribute__((always_inline)) { ws[r] = load(m.data + (row + r) * m.stride + k); });
    each<T>([&](auto t) __attribute__((always_inline)) {
      const simd::Floats xs = simd::held(simd::load(x + t * x_stride + k));
      each<R>([&](auto r) __attribute__((always_inline)) { sums[r * T + t] = W::add(sums[r * T + t], ws[r], xs); });
    });
  };
  int64_t k = 0;
  for (; k + simd::kLanes <= m.words; k += simd::kLanes)
    add(k, [&](const typename W::Stored* p) __attribute__((always_inline)) {
      _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T1);
      return W::load(p);
    });
  if (k < m.words) add(k, [&](const typename W::Stored* p) { return load_words<W>(p, m.words - k); });
  each<R * T>([&](auto i) __attribute__((always_inline)) {
    simd::store(to + i / T * to_stride + i % T * simd::kLanes, sums[i]);
  });
}

// The same for rows [begin, end) and for any number of tokens up to T.
template <class W, int T>
inline void multiply_stored(const Stored<W>& m, int64_t begin, int64_t end, int64_t tokens, const float* x,
                            int64_t x_stride, float* to, int64_t to_stride) {
  if constexpr (T > 1)
    if (tokens < T) return multiply_stored<W, T - 1>(m, begin, end, tokens, x, x_stride, to, to_stride);
  constexpr int R = T == 1 ? 2 : kDirectRows;  // one token waits for the memory alone, which likes fewer ways at once
  const int64_t next = R * m.stride * static_cast<int64_t>(sizeof(typename W::Stored));
  const int64_t ahead = T == 1 ? std::max(next, kFloatsAhead) : next;
  int64_t row = begin;
  for (; row + R <= end; row += R, to += R * to_stride) multiply_rows<W, R, T>(m, row, x, x_stride, ahead, to, to_stride);
  for (; row < end; ++row, to += to_stride) multiply_rows<W, 1, T>(m, row, x, x_stride, ahead, to, to_stride);
}

// Rows [begin, end), of which the scratch has room for the sums.
template <class W>
void rows_of_few(const Stored<W>& m, int64_t begin, int64_t end, const FloatInput& x, int64_t tokens, const float* bias,
                 float* y, int64_t y_stride, float* acc) {
  const int64_t acc_stride = tokens * simd::kLanes;
  const int64_t tiles = (tokens + kDirectTile - 1) / kDirectTile, in_tile = (tokens + tiles - 1) / tiles;
  for (int64_t t = 0; t < tokens; t += in_tile)
    multiply_stored<W, kDirectTile>(m, begin, end, std::min(in_tile, tokens - t), x.x + t * x.stride, x.stride,
                                    acc + t * simd::kLanes, acc_stride);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto of = [&](int64_t r) { return simd::load(acc + (r - begin) * acc_stride + t * simd::kLanes); };
    float* to = y + t * y_stride;
    int64_t r = begin;
    for (; r + 4 <= end; r += 4) {
      const __m128 four = simd::sums(of(r), of(r + 1), of(r + 2), of(r + 3));
      _mm_storeu_ps(to + r, bias == nullptr ? four : _mm_add_ps(four, _mm_loadu_ps(bias + r)));
    }
    for (; r < end; ++r) to[r] = simd::sum(of(r)) + (bias == nullptr ? 0.0f : bias[r]);
  }
}

// -------------------------------------------------------------------------------------------------------- many tokens

// Turns rows that lie `stride` apart, no more than a register has lanes, into a panel. What is not there is 0.
template <class W>
void fill_words(const typename W::Stored* w, int64_t stride, int64_t rows, int64_t words, const Panels& to, int64_t panel) {
  float* const begin = to.words + panel * to.stride();
  for (int64_t k = 0; k < to.steps * simd::kLanes; k += 4) {
    typename W::Stored some[4 * simd::kLanes] = {};
    const typename W::Stored* from = w + k;
    int64_t from_stride = stride;
    if (rows < simd::kLanes || k + 4 > words) {
      for (int64_t r = 0; r < rows && k < words; ++r)
        std::memcpy(some + 4 * r, from + r * stride, sizeof(some[0]) * std::min<int64_t>(4, words - k));
      from = some, from_stride = 4;
    }
    simd::Floats fours[4];
    for (int i = 0; i < 4; ++i) fours[i] = W::fours(from + i * from_stride, 4 * from_stride);
    simd::turn_fours(fours);
    for (int i = 0; i < 4; ++i)
      simd::store(begin + (k % simd::kLanes + i) * to.sum_stride() + k / simd::kLanes * simd::kLanes, fours[i]);
  }
}

// One of the sums of P panels' rows and T tokens. They are visited in the order in which simd::sum adds them: what is of
// odd number is added to the one before, what that makes likewise, and so on. waiting: [level, .., T, P, lanes], the sums
// of 2^level sums; the last level has the results.
template <class W, int P, int T>
void multiply_words(const float* w, int64_t w_stride, const float* x, int64_t steps, int visit, float* waiting,
                    int64_t level_stride) {
  simd::Floats sums[P * T];
  each<P * T>([&](auto i) __attribute__((always_inline)) { sums[i] = simd::zero(); });
  for (; steps > 0; --steps, w += simd::kLanes, x += simd::kLanes) {
    simd::Floats ws[P];
    each<P>([&](auto p) __attribute__((always_inline)) { ws[p] = simd::load(w + p * w_stride); });
    each<T>([&](auto t) __attribute__((always_inline)) {
      const simd::Floats xs = simd::held(simd::all(x[t]));
      each<P>([&](auto p) __attribute__((always_inline)) { sums[t * P + p] = W::add(sums[t * P + p], ws[p], xs); });
    });
  }
  for (; visit % 2 == 1; visit /= 2, waiting += level_stride)
    each<P * T>([&](auto i) __attribute__((always_inline)) { sums[i] = simd::load(waiting + i * simd::kLanes) + sums[i]; });
  each<P * T>([&](auto i) __attribute__((always_inline)) { simd::store(waiting + i * simd::kLanes, sums[i]); });
}

template <class W, int P, int T>
inline void multiply_some(int64_t panels, int64_t tokens, const float* w, int64_t w_stride, const float* x, int64_t steps,
                          int visit, float* waiting, int64_t level_stride) {
  if constexpr (P > 1)
    if (panels < P)
      return multiply_some<W, P - 1, T>(panels, tokens, w, w_stride, x, steps, visit, waiting, level_stride);
  if constexpr (T > 1)
    if (tokens < T)
      return multiply_some<W, P, T - 1>(panels, tokens, w, w_stride, x, steps, visit, waiting, level_stride);
  multiply_words<W, P, T>(w, w_stride, x, steps, visit, waiting, level_stride);
}

// Rows [begin, end); the scratch has room for kPanels panels, and for the sums.
template <class W>
void rows_of_many(const Stored<W>& m, int64_t begin, int64_t end, const FloatInput& x, int64_t tokens, const float* bias,
                  float* y, int64_t y_stride, float* scratch) {
  const Panels w{scratch, x.panels.steps};
  float* const waiting = scratch + kPanels * w.stride();
  constexpr int64_t kLevelStride = kTokens / kPanelTile * kTileSums;
  for (int64_t row = begin; row < end; row += kPanels * simd::kLanes) {
    const int64_t rows = std::min<int64_t>(kPanels * simd::kLanes, end - row);
    const int64_t panels = (rows + simd::kLanes - 1) / simd::kLanes;
    for (int64_t p = 0; p < panels; ++p)
      fill_words<W>(m.data + (row + p * simd::kLanes) * m.stride, m.stride,
                    std::min<int64_t>(simd::kLanes, rows - p * simd::kLanes), m.words, w, p);
    for (int64_t block = 0; block < tokens; block += kTokens) {
      const int64_t block_end = std::min(block + kTokens, tokens);
      for (int visit = 0; visit < simd::kLanes; ++visit) {
        int sum = 0;  // the bits of the visit, in the other order
        for (int bit = 0; bit < kLevels; ++bit) sum |= (visit >> bit & 1) << (kLevels - 1 - bit);
        for (int64_t t = block; t < block_end; t += kPanelTile)
          multiply_some<typename W::Words, kPanels, kPanelTile>(
              panels, block_end - t, w.words + sum * w.sum_stride(), w.stride(),
              x.panels.words + t / simd::kLanes * w.stride() + sum * w.sum_stride() + t % simd::kLanes, w.steps, visit,
              waiting + (t - block) / kPanelTile * kTileSums, kLevelStride);
      }
      for (int64_t t = block; t < block_end; ++t) {
        const float* sums = waiting + kLevels * kLevelStride + (t - block) / kPanelTile * kTileSums +
                            (t - block) % kPanelTile * panels * simd::kLanes;
        for (int64_t r = 0; r < rows; ++r)
          y[t * y_stride + row + r] = sums[r] + (bias == nullptr ? 0.0f : bias[row + r]);
      }
    }
  }
}

// Rows [begin, end) of a matrix, whose first output is at y.
template <class W>
void float_rows(const Matrix& m, int64_t begin, int64_t end, const FloatInput& x, int64_t tokens, const float* bias,
                float* y, int64_t y_stride, char* scratch) {
  (tokens <= kDirectTokens ? rows_of_few<W> : rows_of_many<W>)(Stored<W>(m), begin, end, x, tokens, bias, y, y_stride,
                                                               reinterpret_cast<float*>(scratch));
}

// ---------------------------------------------------------------------------------------- activations, and the memory

inline int64_t steps_of(int64_t words) { return (words + simd::kLanes - 1) / simd::kLanes; }

// Bytes of the words of so many tokens: as rows, and in panels.
inline size_t row_words(int64_t words, int64_t tokens) { return sizeof(float) * tokens * steps_of(words) * simd::kLanes; }
inline size_t panel_words(int64_t words, int64_t tokens) {
  if (tokens <= kDirectTokens) return 0;
  return sizeof(float) * (tokens + simd::kLanes - 1) / simd::kLanes * Panels{nullptr, steps_of(words)}.stride();
}

// Bytes that float_rows needs for up to `rows` rows.
inline size_t bytes_of_rows(int64_t rows, int64_t words, int64_t tokens) {
  if (tokens <= kDirectTokens) return sizeof(float) * rows * tokens * simd::kLanes;
  constexpr int64_t kSums = (kLevels + 1) * kTokens / kPanelTile * kTileSums;
  return sizeof(float) * (kPanels * Panels{nullptr, steps_of(words)}.stride() + kSums);
}

// Activations [tokens, columns] as float32 words and as pairs, and the bytes of memory that this needs.
inline size_t bytes_of_floats(int64_t columns, int64_t tokens) {
  if (tokens > kDirectTokens) return panel_words(columns, tokens);
  return columns % simd::kLanes == 0 ? 0 : aligned(row_words(columns, tokens));
}

inline size_t bytes_of_pairs(int64_t columns, int64_t tokens) {
  return aligned(row_words(columns / 2, tokens)) + panel_words(columns / 2, tokens);
}

template <class W>
void fill_panels(Pool& pool, const float* rows, int64_t stride, int64_t words, int64_t tokens, const Panels& to) {
  pool.run((tokens + simd::kLanes - 1) / simd::kLanes, [&](int64_t panel, int) {
    const int64_t first = panel * simd::kLanes, count = std::min<int64_t>(simd::kLanes, tokens - first);
    fill_words<W>(reinterpret_cast<const typename W::Stored*>(rows + first * stride), stride, count, words, to, panel);
  });
}

inline FloatInput make_floats(Pool& pool, const float* x, int64_t columns, int64_t tokens, float* memory) {
  const int64_t steps = steps_of(columns), padded = steps * simd::kLanes;
  if (tokens > kDirectTokens) {
    fill_panels<simd::F32>(pool, x, columns, columns, tokens, {memory, steps});
    return {nullptr, 0, {memory, steps}};
  }
  if (padded == columns) return {x, columns, {}};
  for (int64_t t = 0; t < tokens; ++t) widen<simd::F32>(x + t * columns, columns, memory + t * padded);
  return {memory, padded, {}};
}

inline FloatInput make_pairs(Pool& pool, const float* x, int64_t columns, int64_t tokens, float* memory) {
  const int64_t steps = steps_of(columns / 2), padded = steps * simd::kLanes;
  const auto round = [&](int64_t t, int) {
    uint16_t* to = reinterpret_cast<uint16_t*>(memory + t * padded);
    for (int64_t k = 0; k < 2 * padded; k += simd::kLanes)
      simd::BF16::store(to + k, k < columns ? load_words<simd::F32>(x + t * columns + k, columns - k) : simd::zero());
  };
  if (tokens <= kDirectTokens) {
    for (int64_t t = 0; t < tokens; ++t) round(t, 0);
    return {memory, padded, {}};
  }
  pool.run(tokens, round);
  const Panels panels{memory + aligned(row_words(columns / 2, tokens)) / sizeof(float), steps};
  fill_panels<simd::BF16Pairs>(pool, memory, padded, columns / 2, tokens, panels);
  return {nullptr, 0, panels};
}
