// Products with weights that are floats, in float32.
//
// A dot product runs along a row: lane i of one register takes the columns i, i + lanes, i + 2 lanes..., and the lanes are
// added at the end, in one order. No result has more than one such register, whatever the tile is, so that a token's
// result does not depend on how many tokens or threads there are. Tiles exist for reuse alone: of weights over tokens and
// of activations over outputs.
//
// Many tokens: a piece of a few rows is first unpacked into the first-level cache, and then multiplied by one tile of
// tokens after the other; registers of sums are put down between pieces.

#pragma once

// As many sums as there are registers for, and tokens of which batches are often multiples.
constexpr int kTileRows = 4;
constexpr int kTileTokens = simd::kLanes == 16 ? 6 : 3;
constexpr int64_t kDirectTokens = 16;   // no more than these multiply rows where they are stored
constexpr int64_t kTokens = 64;         // whose activations stay in the second-level cache
constexpr int64_t kPiece = 512;        // columns made float32 at a time, where there are many tokens
constexpr int64_t kPieceStride = kPiece + 32;  // so that rows do not share lines of the cache

template <class F>
inline int64_t round_up(int64_t value, F to) {
  return (value + to - 1) / to * to;
}

// A call's activations as float32 [tokens, stride]; columns up to the stride are 0.
struct FloatInput {
  const float* x;
  int64_t stride;
};

// Adds the products of R rows and T tokens to acc [R, T, lanes]. Direct: the rows lie where they are stored, and those of
// the next tile are asked for early: the processor foresees the way along a row, and not to the next ones.
template <class W, bool Direct, int R, int T>
inline void float_tile(const typename W::Stored* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t columns,
                       float* acc, int64_t acc_stride) {
  simd::Floats sums[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sums[r][t] = simd::load(acc + r * acc_stride + t * simd::kLanes);
  for (int64_t k = 0; k < columns; k += simd::kLanes) {
    simd::Floats xs[T];
    for (int t = 0; t < T; ++t) xs[t] = simd::load(x + t * x_stride + k);
    for (int r = 0; r < R; ++r) {
      const simd::Floats ws = W::load(w + r * w_stride + k);
      if constexpr (Direct) _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * w_stride + k), _MM_HINT_T0);
      for (int t = 0; t < T; ++t) sums[r][t] = simd::fma(ws, xs[t], sums[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) simd::store(acc + r * acc_stride + t * simd::kLanes, sums[r][t]);
}

template <class W, bool Direct, int R, int... Ts>
inline void float_tile_of(int tokens, const typename W::Stored* w, int64_t w_stride, const float* x, int64_t x_stride,
                          int64_t columns, float* acc, int64_t acc_stride, std::integer_sequence<int, Ts...>) {
  ((tokens == Ts + 1 ? float_tile<W, Direct, R, Ts + 1>(w, w_stride, x, x_stride, columns, acc, acc_stride) : void()), ...);
}

template <class W, bool Direct>
inline void float_tiles(int rows, int tokens, const typename W::Stored* w, int64_t w_stride, const float* x,
                        int64_t x_stride, int64_t columns, float* acc, int64_t acc_stride) {
  using Tokens = std::make_integer_sequence<int, kTileTokens>;
  if (rows == kTileRows)
    return float_tile_of<W, Direct, kTileRows>(tokens, w, w_stride, x, x_stride, columns, acc, acc_stride, Tokens());
  for (int r = 0; r < rows; ++r)
    float_tile_of<W, Direct, 1>(tokens, w + r * w_stride, w_stride, x, x_stride, columns, acc + r * acc_stride, acc_stride,
                        Tokens());
}

// A piece of a row as float32; zeros up to a whole register.
template <class W>
inline void widen(const typename W::Stored* w, int64_t columns, float* to) {
  int64_t k = 0;
  for (; k + simd::kLanes <= columns; k += simd::kLanes) simd::store(to + k, W::load(w + k));
  if (k < columns) {
    typename W::Stored rest[simd::kLanes] = {};
    std::memcpy(rest, w + k, (columns - k) * sizeof(rest[0]));
    simd::store(to + k, W::load(rest));
  }
}

// Rows [begin, end) of a matrix, whose first output is at y.
template <class W>
void float_rows(const Matrix& m, int64_t begin, int64_t end, const FloatInput& x, int64_t tokens, const float* bias,
                float* y, int64_t y_stride, char* scratch) {
  using Stored = typename W::Stored;
  const int64_t padded = round_up(m.columns, simd::kLanes);
  const bool direct = tokens <= kDirectTokens && padded == m.columns && m.row_bytes % sizeof(Stored) == 0;
  float* pieces = reinterpret_cast<float*>(scratch);
  float* acc = pieces + kTileRows * kPieceStride;
  const int64_t piece = direct ? padded : kPiece;
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, end - row));
    const char* data = static_cast<const char*>(m.data) + row * m.row_bytes;
    for (int64_t token = 0; token < tokens; token += kTokens) {
      const int64_t count = std::min(kTokens, tokens - token);
      const int64_t acc_stride = count * simd::kLanes;
      std::memset(acc, 0, sizeof(float) * rows * acc_stride);
      for (int64_t k = 0; k < padded; k += piece) {
        const int64_t columns = std::min(piece, padded - k);
        if (direct) {
          const int64_t tiles = (count + kTileTokens - 1) / kTileTokens, each = (count + tiles - 1) / tiles;
          for (int64_t t = 0; t < count; t += each)
            (t == 0 ? float_tiles<W, true> : float_tiles<W, false>)(
                rows, static_cast<int>(std::min(each, count - t)), reinterpret_cast<const Stored*>(data),
                m.row_bytes / static_cast<int64_t>(sizeof(Stored)), x.x + t * x.stride, x.stride, padded,
                acc + t * simd::kLanes, acc_stride);
          continue;
        }
        for (int r = 0; r < rows; ++r)
          widen<W>(reinterpret_cast<const Stored*>(data + r * m.row_bytes) + k, std::min(piece, m.columns - k),
                   pieces + r * kPieceStride);
        for (int64_t t = 0; t < count; t += kTileTokens)
          float_tiles<simd::F32, false>(rows, static_cast<int>(std::min<int64_t>(kTileTokens, count - t)), pieces, kPieceStride,
                                 x.x + (token + t) * x.stride + k, x.stride, columns, acc + t * simd::kLanes,
                                 acc_stride);
      }
      for (int64_t t = 0; t < count; ++t) {
        const auto of = [&](int r) { return simd::load(acc + r * acc_stride + t * simd::kLanes); };
        float* to = y + (token + t) * y_stride + row;
        int r = 0;
        for (; r + 4 <= rows; r += 4) {
          const __m128 four = simd::sums(of(r), of(r + 1), of(r + 2), of(r + 3));
          _mm_storeu_ps(to + r, bias == nullptr ? four : _mm_add_ps(four, _mm_loadu_ps(bias + row + r)));
        }
        for (; r < rows; ++r) to[r] = simd::sum(of(r)) + (bias == nullptr ? 0.0f : bias[row + r]);
      }
    }
  }
}
