// y = x W^T over weights as they are stored.
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
constexpr int kTileRows = simd::kLanes == 16 ? 6 : 3;
constexpr int kTileTokens = 4;
constexpr int64_t kTaskRows = 24;       // of a chunk of work: whole tiles
constexpr int64_t kTokens = 64;         // whose activations stay in the second-level cache
constexpr int64_t kPiece = 1024;        // columns made float32 at a time, where there are many tokens
constexpr int64_t kPieceStride = kPiece + 32;  // so that rows do not share lines of the cache
constexpr int64_t kByteLanes = 8;
constexpr int64_t kByteTokens = 16;    // whose piece of activations stays in the first-level cache
constexpr int64_t kPieceBytes = 16384;

template <class F>
inline int64_t round_up(int64_t value, F to) {
  return (value + to - 1) / to * to;
}

// A call's activations as float32 [tokens, stride]; columns up to the stride are 0.
struct FloatInput {
  const float* x;
  int64_t stride;
};

// A call's activations in groups of eight blocks of 32 bytes: x = scale * byte. A last group that is not whole is filled
// up with zeros. Where a block's scale is far above those of the others, the rest of its group is rounded once more:
// x = scale * byte + fine scale * fine byte. Such blocks hold a few activations that are hundreds of times the others,
// and would otherwise make most of the error of the whole.
struct ByteInput {
  struct Plane {
    int8_t* bytes;  // [groups, tokens, 256]
    float* scales;  // [groups, tokens, kScales, 8]: a block's scale, and scale * sum of its bytes, of its halves' bytes
  };
  Plane coarse, fine;
  uint8_t* refined;  // [groups, tokens]: whether the fine plane has the group
  int64_t tokens, groups;
};
constexpr double kFarAbove = 1.5;  // times the mean of the token's scales
constexpr int kScales = 4;

// ------------------------------------------------------------------------------------------------------------ floats

// Adds the products of R rows and T tokens to acc [R, T, lanes].
template <class W, int R, int T>
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
      for (int t = 0; t < T; ++t) sums[r][t] = simd::fma(ws, xs[t], sums[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) simd::store(acc + r * acc_stride + t * simd::kLanes, sums[r][t]);
}

template <class W, int R, int... Ts>
inline void float_tile_of(int tokens, const typename W::Stored* w, int64_t w_stride, const float* x, int64_t x_stride,
                          int64_t columns, float* acc, int64_t acc_stride, std::integer_sequence<int, Ts...>) {
  ((tokens == Ts + 1 ? float_tile<W, R, Ts + 1>(w, w_stride, x, x_stride, columns, acc, acc_stride) : void()), ...);
}

template <class W>
inline void float_tiles(int rows, int tokens, const typename W::Stored* w, int64_t w_stride, const float* x,
                        int64_t x_stride, int64_t columns, float* acc, int64_t acc_stride) {
  using Tokens = std::make_integer_sequence<int, kTileTokens>;
  if (rows == kTileRows)
    return float_tile_of<W, kTileRows>(tokens, w, w_stride, x, x_stride, columns, acc, acc_stride, Tokens());
  for (int r = 0; r < rows; ++r)
    float_tile_of<W, 1>(tokens, w + r * w_stride, w_stride, x, x_stride, columns, acc + r * acc_stride, acc_stride,
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

// ------------------------------------------------------------------------------------------------------------- bytes

// Adds the sums of a group of blocks, a lane for each block, of one token; Blocks: how many of them hold anything.
//   x: 256 bytes; scales: [kScales, 8].
template <class Format, int Blocks>
inline __m256 byte_sums(const Group& w, const int8_t* x, const float* scales, __m256 sum) {
  const __m256 x_scales = _mm256_loadu_ps(scales);
  const Halves dots = simd::block_sums<Format, Blocks>(w.bytes, reinterpret_cast<const uint8_t*>(x));
  if constexpr (Format::kHalves) {
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots.first), _mm256_mul_ps(w.scales, x_scales), sum);
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots.second), _mm256_mul_ps(w.second_scales, x_scales), sum);
    sum = _mm256_fmadd_ps(w.offsets, _mm256_loadu_ps(scales + 2 * kGroup), sum);
    return _mm256_fmadd_ps(w.second_offsets, _mm256_loadu_ps(scales + 3 * kGroup), sum);
  } else {
    const __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(dots.first, dots.second));
    sum = _mm256_fmadd_ps(whole, _mm256_mul_ps(w.scales, x_scales), sum);
    if constexpr (!Format::kSigned) sum = _mm256_fmadd_ps(w.offsets, _mm256_loadu_ps(scales + kGroup), sum);
    return sum;
  }
}

// The same for some tokens, added to acc [tokens, 8].
//   place: of the first token's group; refined: how many of the tokens have it in the fine plane, and which.
template <class Format, int Blocks>
inline void byte_group(const Group& w, const ByteInput& x, int64_t place, int64_t tokens, const uint8_t* refined,
                       float* acc) {
  const auto add = [&](const ByteInput::Plane& plane, int64_t t) {
    const int8_t* bytes = plane.bytes + (place + t) * kGroupColumns;
    const float* scales = plane.scales + (place + t) * kScales * kGroup;
    float* of_token = acc + t * kByteLanes;
    _mm256_storeu_ps(of_token, byte_sums<Format, Blocks>(w, bytes, scales, _mm256_loadu_ps(of_token)));
  };
  for (int64_t t = 0; t < tokens; ++t) add(x.coarse, t);
  for (int i = 1; i <= refined[0]; ++i) add(x.fine, refined[i]);
}

// Four registers that a block of floats fills.
struct Block {
  __m256 v[4];

  static Block load(const float* x) {
    Block block;
    for (int i = 0; i < 4; ++i) block.v[i] = _mm256_loadu_ps(x + 8 * i);
    return block;
  }
};

// Rounds a block to bytes, half to even, and returns its scale. What is not finite makes that so. A block whose scale is
// below the smallest normal number is zeros: the inverse of such a scale may be infinite. What is left of the block, less
// the bytes, stays in it.
inline float to_bytes(Block& x, int8_t* bytes, float* scales) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_and_ps(x.v[0], no_sign), trace = _mm256_mul_ps(x.v[0], _mm256_setzero_ps());
  for (int i = 1; i < 4; ++i) {
    largest = _mm256_max_ps(largest, _mm256_and_ps(x.v[i], no_sign));
    trace = _mm256_fmadd_ps(x.v[i], _mm256_setzero_ps(), trace);  // 0, or not a number
  }
  float scale = max8(largest) / 127.0f;
  const __m256 inverse = _mm256_set1_ps(scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f);
  scale += sum8(trace);
  __m256i n[4];
  for (int i = 0; i < 4; ++i) {
    n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x.v[i], inverse));
    x.v[i] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(n[i]), _mm256_set1_ps(scale), x.v[i]);
  }
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), _mm256_permutevar8x32_epi32(words, order));
  const float first = static_cast<float>(sum_of_8(_mm256_add_epi32(n[0], n[1])));
  const float second = static_cast<float>(sum_of_8(_mm256_add_epi32(n[2], n[3])));
  scales[0] = scale;
  scales[kGroup] = scale * (first + second);
  scales[2 * kGroup] = scale * first;
  scales[3 * kGroup] = scale * second;
  return scale;
}

// A token's activations as bytes.
inline void to_bytes(const float* x, int64_t columns, const ByteInput& to, int64_t token) {
  const int64_t blocks = columns / kBlock;
  double total = 0;
  for (int64_t g = 0; g < to.groups; ++g) {
    const int64_t place = g * to.tokens + token;
    int8_t* bytes = to.coarse.bytes + place * kGroupColumns;
    float* scales = to.coarse.scales + place * kScales * kGroup;
    const int64_t count = std::min<int64_t>(kGroup, blocks - g * kGroup);
    if (count < kGroup) {
      std::memset(bytes, 0, kGroupColumns);
      std::memset(scales, 0, sizeof(float) * kScales * kGroup);
    }
    for (int64_t b = 0; b < count; ++b) {
      Block block = Block::load(x + (g * kGroup + b) * kBlock);
      total += to_bytes(block, bytes + b * kBlock, scales + b);
    }
  }
  for (int64_t g = 0; g < to.groups; ++g) {
    const int64_t place = g * to.tokens + token;
    const float* scales = to.coarse.scales + place * kScales * kGroup;
    to.refined[place] = max8(_mm256_loadu_ps(scales)) * static_cast<double>(blocks) > kFarAbove * total;
    if (!to.refined[place]) continue;
    int8_t* bytes = to.fine.bytes + place * kGroupColumns;
    float* fine_scales = to.fine.scales + place * kScales * kGroup;
    std::memset(bytes, 0, kGroupColumns);
    std::memset(fine_scales, 0, sizeof(float) * kScales * kGroup);
    for (int64_t b = 0; b < std::min<int64_t>(kGroup, blocks - g * kGroup); ++b) {
      Block block = Block::load(x + (g * kGroup + b) * kBlock);
      int8_t coarse[kBlock];
      float coarse_scales[kScales * kGroup];
      to_bytes(block, coarse, coarse_scales);
      to_bytes(block, bytes + b * kBlock, fine_scales + b);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- call

// Rows [begin, end) of a matrix, whose first output is at y.
template <class W>
void float_rows(const Matrix& m, int64_t begin, int64_t end, const FloatInput& x, int64_t tokens, const float* bias,
                float* y, int64_t y_stride, char* scratch) {
  using Stored = typename W::Stored;
  const int64_t padded = round_up(m.columns, simd::kLanes);
  const bool direct = tokens <= kTileTokens && padded == m.columns && m.row_bytes % sizeof(Stored) == 0;
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
          float_tiles<W>(rows, static_cast<int>(count), reinterpret_cast<const Stored*>(data),
                         m.row_bytes / static_cast<int64_t>(sizeof(Stored)), x.x, x.stride, padded, acc, acc_stride);
          continue;
        }
        for (int r = 0; r < rows; ++r)
          widen<W>(reinterpret_cast<const Stored*>(data + r * m.row_bytes) + k, std::min(piece, m.columns - k),
                   pieces + r * kPieceStride);
        for (int64_t t = 0; t < count; t += kTileTokens)
          float_tiles<simd::F32>(rows, static_cast<int>(std::min<int64_t>(kTileTokens, count - t)), pieces, kPieceStride,
                                 x.x + (token + t) * x.stride + k, x.stride, columns, acc + t * simd::kLanes,
                                 acc_stride);
      }
      for (int r = 0; r < rows; ++r)
        for (int64_t t = 0; t < count; ++t) {
          const float result = simd::sum(simd::load(acc + r * acc_stride + t * simd::kLanes));
          y[(token + t) * y_stride + row + r] = bias == nullptr ? result : result + bias[row + r];
        }
    }
  }
}

template <class Format>
void byte_rows(const Matrix& m, int64_t begin, int64_t end, const ByteInput& x, int64_t tokens, const float* bias,
               float* y, int64_t y_stride, char* scratch) {
  constexpr int kBytes = kGroupBytes<Format>;
  float* acc = reinterpret_cast<float*>(scratch);
  uint8_t* refined = reinterpret_cast<uint8_t*>(acc + kTaskRows * kByteTokens * kByteLanes);
  for (int64_t token = 0; token < tokens; token += kByteTokens) {
    const int64_t count = std::min(kByteTokens, tokens - token);
    // Lists, so that the inner loops have no branch that nobody can foresee.
    for (int64_t g = 0; g < x.groups; ++g) {
      uint8_t* list = refined + g * (kByteTokens + 1);
      list[0] = 0;
      for (int64_t t = 0; t < count; ++t)
        if (x.refined[g * x.tokens + token + t]) list[++list[0]] = static_cast<uint8_t>(t);
    }
    // A piece of the tokens' activations stays in the first-level cache for all rows.
    const int64_t piece = std::max<int64_t>(1, kPieceBytes / (count * kGroupColumns));
    std::memset(acc, 0, sizeof(float) * (end - begin) * count * kByteLanes);
    for (int64_t first = 0; first < x.groups; first += piece) {
      const int64_t last = std::min(first + piece, x.groups);
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* data = static_cast<const uint8_t*>(m.data) + row * m.row_bytes;
        for (int64_t g = first; g < last; ++g) {
          if (piece < x.groups)  // the processor follows a whole row by itself, but does not foresee the jump
            for (int line = 0; line < kBytes; line += 64)
              _mm_prefetch(reinterpret_cast<const char*>(data + m.row_bytes + g * kBytes + line), _MM_HINT_T0);
          Group group;
          unpack_some<Format>(data, g, m.columns - g * kGroupColumns, group);
          const int64_t place = g * x.tokens + token;
          const uint8_t* list = refined + g * (kByteTokens + 1);
          float* of_row = acc + (row - begin) * count * kByteLanes;
          if (m.columns - g * kGroupColumns > kGroupColumns / 2) {
            byte_group<Format, kGroup>(group, x, place, count, list, of_row);
          } else {
            byte_group<Format, kGroup / 2>(group, x, place, count, list, of_row);
          }
        }
      }
    }
    for (int64_t row = begin; row < end; ++row)
      for (int64_t t = 0; t < count; ++t) {
        const float result = sum8(_mm256_loadu_ps(acc + ((row - begin) * count + t) * kByteLanes));
        y[(token + t) * y_stride + row] = bias == nullptr ? result : result + bias[row];
      }
  }
}

// What a format needs beside its matrix: activations as floats, or as bytes.
struct Input {
  FloatInput floats;
  ByteInput bytes;
};

using Rows = void (*)(const Matrix& m, int64_t begin, int64_t end, const Input& x, int64_t tokens, const float* bias,
                      float* y, int64_t y_stride, char* scratch);

template <class W>
void float_kernel(const Matrix& m, int64_t begin, int64_t end, const Input& x, int64_t tokens, const float* bias,
                  float* y, int64_t y_stride, char* scratch) {
  float_rows<W>(m, begin, end, x.floats, tokens, bias, y, y_stride, scratch);
}

template <class Format>
void byte_kernel(const Matrix& m, int64_t begin, int64_t end, const Input& x, int64_t tokens, const float* bias,
                 float* y, int64_t y_stride, char* scratch) {
  byte_rows<Format>(m, begin, end, x.bytes, tokens, bias, y, y_stride, scratch);
}

inline Rows rows_of_format(int32_t format) {
  switch (format) {
    case kF32: return float_kernel<simd::F32>;
    case kF16: return float_kernel<simd::F16>;
    case kBF16: return float_kernel<simd::BF16>;
    case kQ8_0: return byte_kernel<Q8_0>;
    case kQ4_0: return byte_kernel<Q4_0>;
    case kQ4_1: return byte_kernel<Q4_1>;
    case kQ4_K: return byte_kernel<Q4_K>;
    case kQ5_K: return byte_kernel<Q5_K>;
    case kQ6_K: return byte_kernel<Q6_K>;
    default: return nullptr;
  }
}

constexpr bool is_float(int32_t format) { return format == kF32 || format == kF16 || format == kBF16; }

int32_t linear(Pool& pool, Scratch& scratch, const Matrix* matrices, int32_t count, const float* x, int64_t tokens,
               const float* bias, float* y) {
  const int64_t columns = matrices[0].columns;
  int64_t outputs = 0;
  bool floats = false, bytes = false;
  for (int32_t i = 0; i < count; ++i) {
    if (rows_of_format(matrices[i].format) == nullptr) return 2;
    (is_float(matrices[i].format) ? floats : bytes) = true;
    outputs += matrices[i].rows;
  }
  // Memory: the activations in another form, and for each thread a tile's unpacked weights and its sums.
  const int64_t padded = round_up(columns, simd::kLanes), groups = (columns + kGroupColumns - 1) / kGroupColumns;
  const size_t pad_bytes = floats && padded != columns ? aligned(sizeof(float) * tokens * padded) : 0;
  const size_t byte_bytes = bytes ? tokens * groups * kGroupColumns : 0;
  const size_t scale_bytes = bytes ? sizeof(float) * tokens * groups * kScales * kGroup : 0;
  const size_t refined_bytes = bytes ? aligned(tokens * groups) : 0;
  char* shared = scratch.shared.get(pad_bytes + 2 * (byte_bytes + scale_bytes) + refined_bytes + kAlign);
  const size_t own_bytes = std::max(sizeof(float) * kTileRows * (kPieceStride + kTokens * simd::kLanes),
                                    sizeof(float) * kTaskRows * kByteTokens * kByteLanes + groups * (kByteTokens + 1));
  if (shared == nullptr) return 1;
  std::vector<Buffer>& own = scratch.own;
  for (Buffer& buffer : own)
    if (buffer.get(own_bytes) == nullptr) return 1;

  Input input{{x, columns}, {}};
  if (pad_bytes != 0) {
    float* copy = reinterpret_cast<float*>(shared);
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(copy + t * padded, x + t * columns, sizeof(float) * columns);
      std::fill(copy + t * padded + columns, copy + (t + 1) * padded, 0.0f);
    }
    input.floats = {copy, padded};
  }
  if (bytes) {
    char* place = shared + pad_bytes;
    ByteInput::Plane planes[2];
    for (ByteInput::Plane& plane : planes) {
      plane = {reinterpret_cast<int8_t*>(place), reinterpret_cast<float*>(place + byte_bytes)};
      place += byte_bytes + scale_bytes;
    }
    input.bytes = {planes[0], planes[1], reinterpret_cast<uint8_t*>(place), tokens, groups};
    const auto token = [&](int64_t t, int) { to_bytes(x + t * columns, columns, input.bytes, t); };
    if (tokens < 4) {
      for (int64_t t = 0; t < tokens; ++t) token(t, 0);
    } else {
      pool.run(tokens, token);
    }
  }

  // Chunks of rows, of all matrices in turn.
  int64_t chunks = 0;
  for (int32_t i = 0; i < count; ++i) chunks += (matrices[i].rows + kTaskRows - 1) / kTaskRows;
  pool.run(chunks, [&](int64_t chunk, int thread) {
    int64_t before = 0;
    for (int32_t i = 0; i < count; ++i) {
      const Matrix& m = matrices[i];
      const int64_t of_matrix = (m.rows + kTaskRows - 1) / kTaskRows;
      if (chunk < of_matrix) {
        const int64_t begin = chunk * kTaskRows, end = std::min(begin + kTaskRows, m.rows);
        rows_of_format(m.format)(m, begin, end, input, tokens, bias == nullptr ? nullptr : bias + before, y + before,
                                 outputs, own[thread].get(0));
        return;
      }
      chunk -= of_matrix;
      before += m.rows;
    }
  });
  return 0;
}
