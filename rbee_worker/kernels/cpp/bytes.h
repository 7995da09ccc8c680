// Products with weights in blocks, whose activations are rounded to bytes too.
//
// A result has eight sums, one for every eighth block of its row, and they are added at the end, in one order. A few
// tokens: rows are taken one by one, with a lane of a register for each of the sums. More tokens: as many rows as a
// register has lanes are unpacked once and turned (a panel), and a register for each of the sums has a lane for each row.
// Either way a sum sees the same operations in the same order.

#pragma once

constexpr int kHalfGroup = kGroup / 2;
constexpr int64_t kFewTokens = 3;
constexpr int64_t kAhead = 3072;  // bytes of weights that are asked for early
constexpr int kPanelTokens = simd::kLanes == 16 ? 4 : 2;  // as many as there are registers for their sums,
constexpr int kPanelBlocks = kHalfGroup;                  // of so many blocks of a group

// A call's activations in groups of eight blocks of 32 bytes: x = scale * byte. A last group that is not whole is filled
// up with zeros. Where a block's scale is far above those of the others, the rest of its half group is rounded once more:
// x = scale * byte + fine scale * fine byte. Such blocks hold a few activations that are hundreds of times the others,
// and would otherwise make most of the error of the whole.
struct ByteInput {
  struct Plane {
    int8_t* bytes;  // [groups, tokens, 256]
    float* scales;  // [groups, tokens, kScales, 8]: a block's scale, and scale * sum of its bytes, of its halves' bytes
  };
  Plane coarse, fine;
  uint8_t* refined;  // [groups, 2, tokens]: whether the fine plane has the half group; its scales are 0 if not
  int64_t tokens, groups;
};
constexpr double kFarAbove = 1.5;  // times the mean of the token's scales
constexpr int kScales = 4;

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
    int8_t* bytes = to.fine.bytes + place * kGroupColumns;
    float* fine_scales = to.fine.scales + place * kScales * kGroup;
    std::memset(bytes, 0, kGroupColumns);
    std::memset(fine_scales, 0, sizeof(float) * kScales * kGroup);
    for (int half = 0; half < 2; ++half) {
      const float* of_half = scales + half * kHalfGroup;
      const float largest = *std::max_element(of_half, of_half + kHalfGroup);
      uint8_t& refined = to.refined[(2 * g + half) * to.tokens + token];
      refined = largest * static_cast<double>(blocks) > kFarAbove * total;
      if (!refined) continue;
      for (int64_t b = half * kHalfGroup; b < std::min<int64_t>((half + 1) * kHalfGroup, blocks - g * kGroup); ++b) {
        Block block = Block::load(x + (g * kGroup + b) * kBlock);
        int8_t coarse[kBlock];
        float coarse_scales[kScales * kGroup];
        to_bytes(block, coarse, coarse_scales);
        to_bytes(block, bytes + b * kBlock, fine_scales + b);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- a few tokens

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

// The sums of T tokens for one row.
template <class Format, int T>
inline void row_sums(const uint8_t* row, int64_t columns, const uint8_t* end, const ByteInput& x, __m256* sums) {
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < x.groups; ++g) {
    Group group;
    for (int line = 0; line < kGroupBytes<Format>; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(row + g * kGroupBytes<Format> + kAhead + line), _MM_HINT_T0);
    unpack_some<Format>(row, g, columns - g * kGroupColumns, end, group);
    const bool half = columns - g * kGroupColumns <= kGroupColumns / 2;
    const auto add = [&](const ByteInput::Plane& plane, int t) {
      const int8_t* bytes = plane.bytes + (g * T + t) * kGroupColumns;
      const float* scales = plane.scales + (g * T + t) * kScales * kGroup;
      sums[t] = half ? byte_sums<Format, kGroup / 2>(group, bytes, scales, sums[t])
                     : byte_sums<Format, kGroup>(group, bytes, scales, sums[t]);
    };
    for (int t = 0; t < T; ++t) {
      add(x.coarse, t);
      if (x.refined[2 * g * T + t] || x.refined[(2 * g + 1) * T + t]) add(x.fine, t);
    }
  }
}

// Rows [begin, end) of a matrix, whose first output is at y, for no more than kFewTokens tokens.
template <class Format>
void rows_of_few(const Matrix& m, int64_t begin, int64_t end, const ByteInput& x, const float* bias, float* y,
                 int64_t y_stride) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* data = static_cast<const uint8_t*>(m.data) + row * m.row_bytes;
    __m256 sums[kFewTokens];
    switch (x.tokens) {
      case 1: row_sums<Format, 1>(data, m.columns, end_of(m), x, sums); break;
      case 2: row_sums<Format, 2>(data, m.columns, end_of(m), x, sums); break;
      default: row_sums<Format, 3>(data, m.columns, end_of(m), x, sums);
    }
    for (int64_t t = 0; t < x.tokens; ++t) y[t * y_stride + row] = sum8(sums[t]) + (bias == nullptr ? 0.0f : bias[row]);
  }
}

// -------------------------------------------------------------------------------------------------------- more tokens

// A group of blocks of as many rows as a register has lanes, a lane for each.
template <class Format>
struct Panel {
  static constexpr int kParts = Format::kHalves ? 2 : 1;  // of a block, with scales of their own

  alignas(64) int8_t bytes[kGroup][kBlock / 4][simd::kLanes][4];  // four columns of each row
  float scales[kParts][kGroup][simd::kLanes];
  float offsets[kParts][kGroup][simd::kLanes];
};

// Four registers of fours, turned: fours of rows that lie `stride` floats apart become columns of all rows.
inline void turn_rows(const float* from, int64_t stride, float* to) {
  simd::Floats v[4];
  for (int i = 0; i < 4; ++i) v[i] = simd::F32::fours(from + i * stride, 4 * stride);
  simd::turn_fours(v);
  for (int i = 0; i < 4; ++i) simd::store(to + i * simd::kLanes, v[i]);
}

// Group `g` of the rows from `row` on, of which there are `count`; the others are zeros.
template <class Format>
inline void fill_panel(const Matrix& m, int64_t row, int64_t count, int64_t g, Panel<Format>& to) {
  constexpr int64_t kStride = sizeof(Group) / sizeof(float);
  Group groups[simd::kLanes];
  const uint8_t* data = static_cast<const uint8_t*>(m.data) + row * m.row_bytes;
  // The processor does not foresee that all rows go on a group further, and then to the next rows.
  const bool last = (g + 1) * kGroupColumns >= m.columns;
  const uint8_t* next = last ? data + simd::kLanes * m.row_bytes : data + (g + 1) * kGroupBytes<Format>;
  for (int64_t r = 0; r < count; ++r) {
    for (int line = 0; line < kGroupBytes<Format>; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(next + r * m.row_bytes + line), _MM_HINT_T0);
    unpack_some<Format>(data + r * m.row_bytes, g, m.columns - g * kGroupColumns, end_of(m), groups[r]);
  }
  if (count < simd::kLanes) std::memset(groups + count, 0, sizeof(Group) * (simd::kLanes - count));
  const auto turn = [&](const void* from, void* into) {
    turn_rows(static_cast<const float*>(from), kStride, static_cast<float*>(into));
  };
  for (int b = 0; b < kGroup; ++b)
    for (int c = 0; c < 2; ++c) turn(reinterpret_cast<const char*>(&groups[0].bytes[b]) + 16 * c, to.bytes[b][4 * c]);
  for (int c = 0; c < 2; ++c) {
    const int first = 4 * c;
    turn(reinterpret_cast<const float*>(&groups[0].scales) + first, to.scales[0][first]);
    if constexpr (!Format::kSigned) turn(reinterpret_cast<const float*>(&groups[0].offsets) + first, to.offsets[0][first]);
    if constexpr (Format::kHalves) {
      turn(reinterpret_cast<const float*>(&groups[0].second_scales) + first, to.scales[1][first]);
      turn(reinterpret_cast<const float*>(&groups[0].second_offsets) + first, to.offsets[1][first]);
    }
  }
}

// Adds the blocks of a group from `First` on to the sums of T tokens, a register for each block.
//   bytes: [T, 256]; scales: [T, kScales, 8].
template <class Format, int First, int Blocks, int T>
inline __attribute__((always_inline)) void add_panel(const Panel<Format>& w, const int8_t* bytes, const float* scales,
                                                     simd::Floats (&sums)[T][kPanelBlocks]) {
  constexpr int kParts = Panel<Format>::kParts, kFours = kBlock / 4 / kParts;
  const auto scale = [&](int t, int place) { return simd::all(scales[t * kScales * kGroup + place]); };
  each<Blocks>([&](auto i) __attribute__((always_inline)) {
    constexpr int b = First + decltype(i)::value;
    each<kParts>([&](auto part) __attribute__((always_inline)) {
      simd::Floats dots[T];
      simd::dots<Format, T, kFours>(w.bytes[b][part * kFours][0], bytes + b * kBlock + part * kFours * 4, dots);
      const simd::Floats w_scales = simd::load(w.scales[part][b]);
      each<T>([&](auto t) __attribute__((always_inline)) {
        sums[t][i] = simd::fma(dots[t], w_scales * scale(t, b), sums[t][i]);
      });
    });
    if constexpr (!Format::kSigned) {
      each<kParts>([&](auto part) __attribute__((always_inline)) {
        const simd::Floats w_offsets = simd::load(w.offsets[part][b]);
        each<T>([&](auto t) __attribute__((always_inline)) {
          sums[t][i] = simd::fma(w_offsets, scale(t, (Format::kHalves ? 2 + part : 1) * kGroup + b), sums[t][i]);
        });
      });
    }
  });
}

// The sums of T tokens from `token` on for a panel's rows, of the blocks from `First` on in each group.
template <class Format, int First, int T>
inline void panel_sums(const Panel<Format>* panels, int64_t blocks, const ByteInput& x, int64_t token,
                       simd::Floats (&sums)[T][kPanelBlocks]) {
  simd::Floats in_registers[T][kPanelBlocks];
  each<T * kPanelBlocks>([&](auto i) __attribute__((always_inline)) {
    in_registers[i / kPanelBlocks][i % kPanelBlocks] = simd::zero();
  });
  const auto add = [&](int64_t g, auto count) __attribute__((always_inline)) {
    constexpr int kBlocks = decltype(count)::value;
    const int64_t place = g * x.tokens + token;
    const ByteInput::Plane* plane = &x.coarse;
    const uint8_t* flags = x.refined + (2 * g + First / kHalfGroup) * x.tokens + token;
    const bool refined = std::any_of(flags, flags + T, [](uint8_t is) { return is != 0; });
#pragma GCC unroll 1
    for (int planes = refined ? 2 : 1; planes > 0; --planes, plane = &x.fine) {
      const Panel<Format>* panel = panels + g;
      asm volatile("" : "+r"(panel));  // or the compiler reads all of it first, and needs the stack to hold it
      add_panel<Format, First, kBlocks>(*panel, plane->bytes + place * kGroupColumns,
                                        plane->scales + place * kScales * kGroup, in_registers);
    }
  };
  const int64_t whole = blocks / kGroup, rest = blocks % kGroup - First;
  for (int64_t g = 0; g < whole; ++g) add(g, std::integral_constant<int, kPanelBlocks>());
  if (rest > kPanelBlocks / 2) {
    add(whole, std::integral_constant<int, kPanelBlocks>());
  } else if (rest > 0) {
    add(whole, std::integral_constant<int, kPanelBlocks / 2>());
  }
  each<T * kPanelBlocks>([&](auto i) __attribute__((always_inline)) {
    sums[i / kPanelBlocks][i % kPanelBlocks] = in_registers[i / kPanelBlocks][i % kPanelBlocks];
  });
}

// The results of T tokens from `token` on for a panel's rows: out [T, lanes].
template <class Format, int T>
void multiply_panels(const Panel<Format>* panels, int64_t blocks, const ByteInput& x, int64_t token, float* out) {
  simd::Floats first[T][kPanelBlocks], second[T][kPanelBlocks];
  panel_sums<Format, 0>(panels, blocks, x, token, first);
  panel_sums<Format, kPanelBlocks>(panels, blocks, x, token, second);
  for (int t = 0; t < T; ++t) {
    const simd::Floats *a = first[t], *b = second[t];  // in the order of sum8
    simd::store(out + t * simd::kLanes, ((a[0] + b[0]) + (a[2] + b[2])) + ((a[1] + b[1]) + (a[3] + b[3])));
  }
}

// Rows [begin, end) of a matrix, whose first output is at y.
template <class Format>
void byte_rows(const Matrix& m, int64_t begin, int64_t end, const ByteInput& x, const float* bias, float* y,
               int64_t y_stride, char* scratch) {
  if (x.tokens <= kFewTokens) return rows_of_few<Format>(m, begin, end, x, bias, y, y_stride);
  Panel<Format>* panels = reinterpret_cast<Panel<Format>*>(scratch);
  for (int64_t row = begin; row < end; row += simd::kLanes) {
    const int64_t count = std::min<int64_t>(simd::kLanes, end - row);
    for (int64_t g = 0; g < x.groups; ++g) fill_panel(m, row, count, g, panels[g]);
    for (int64_t token = 0; token < x.tokens; token += kPanelTokens) {
      const int64_t tokens = std::min<int64_t>(kPanelTokens, x.tokens - token);
      float out[kPanelTokens * simd::kLanes];
      const int64_t blocks = m.columns / kBlock;
      if (tokens == kPanelTokens) {
        multiply_panels<Format, kPanelTokens>(panels, blocks, x, token, out);
      } else {
        if (tokens >= 2) multiply_panels<Format, 2>(panels, blocks, x, token, out);
        if (tokens % 2 == 1)
          multiply_panels<Format, 1>(panels, blocks, x, token + tokens - 1, out + (tokens - 1) * simd::kLanes);
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < count; ++r)
          y[(token + t) * y_stride + row + r] = out[t * simd::kLanes + r] + (bias == nullptr ? 0.0f : bias[row + r]);
    }
  }
}
