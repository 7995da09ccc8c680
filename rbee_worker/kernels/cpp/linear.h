// y = x W^T over weights as they are stored: rows are handed out to the threads.

#pragma once

constexpr int64_t kTaskRows = 48;  // of a chunk of work: whole tiles, and whole panels

// What a format needs beside its matrix: activations as floats, or as bytes.
struct Input {
  FloatInput floats, pairs;
  ByteInput bytes;
};

using Rows = void (*)(const Matrix& m, int64_t begin, int64_t end, const Input& x, int64_t tokens, const float* bias,
                      float* y, int64_t y_stride, char* scratch);

template <class W>
void float_kernel(const Matrix& m, int64_t begin, int64_t end, const Input& x, int64_t tokens, const float* bias,
                  float* y, int64_t y_stride, char* scratch) {
  float_rows<W>(m, begin, end, W::kColumns == 1 ? x.floats : x.pairs, tokens, bias, y, y_stride, scratch);
}

template <class Format>
void byte_kernel(const Matrix& m, int64_t begin, int64_t end, const Input& x, int64_t, const float* bias, float* y,
                 int64_t y_stride, char* scratch) {
  byte_rows<Format>(m, begin, end, x.bytes, bias, y, y_stride, scratch);
}

// Rows that are no whole pairs are made float32, whatever the CPU multiplies.
inline bool in_pairs(const Matrix& m) { return m.format == kBF16 && m.columns % 2 == 0 && simd::multiplies_pairs(); }

inline Rows rows_of_matrix(const Matrix& m) {
  if (in_pairs(m)) return float_kernel<simd::BF16Pairs>;
  switch (m.format) {
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
  bool floats = false, pairs = false, bytes = false;
  for (int32_t i = 0; i < count; ++i) {
    if (rows_of_matrix(matrices[i]) == nullptr) return 2;
    (in_pairs(matrices[i]) ? pairs : is_float(matrices[i].format) ? floats : bytes) = true;
    outputs += matrices[i].rows;
  }
  if (tokens == 0) return 0;
  // Memory: the activations in another form, and for each thread a tile's unpacked weights and its sums.
  const int64_t groups = (columns + kGroupColumns - 1) / kGroupColumns;
  const size_t float_bytes = floats ? bytes_of_floats(columns, tokens) : 0;
  const size_t pair_bytes = pairs ? bytes_of_pairs(columns, tokens) : 0;
  const size_t byte_bytes = bytes ? tokens * groups * kGroupColumns : 0;
  const size_t scale_bytes = bytes ? sizeof(float) * tokens * groups * kScales * kGroup : 0;
  const size_t refined_bytes = bytes ? aligned(2 * tokens * groups) : 0;
  char* shared = scratch.shared.get(float_bytes + pair_bytes + 2 * (byte_bytes + scale_bytes) + refined_bytes + kAlign);
  const size_t own_bytes = std::max(floats || pairs ? bytes_of_rows(kTaskRows, floats ? columns : columns / 2, tokens) : 0,
                                    bytes && tokens > kFewTokens ? sizeof(Panel<Q6_K>) * groups : 0);
  if (shared == nullptr) return 1;
  std::vector<Buffer>& own = scratch.own;
  for (Buffer& buffer : own)
    if (buffer.get(own_bytes) == nullptr) return 1;

  Input input{};
  if (floats) input.floats = make_floats(pool, x, columns, tokens, reinterpret_cast<float*>(shared));
  if (pairs) input.pairs = make_pairs(pool, x, columns, tokens, reinterpret_cast<float*>(shared + float_bytes));
  if (bytes) {
    char* place = shared + float_bytes + pair_bytes;
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
        rows_of_matrix(m)(m, begin, end, input, tokens, bias == nullptr ? nullptr : bias + before, y + before,
                                 outputs, own[thread].get(0));
        return;
      }
      chunk -= of_matrix;
      before += m.rows;
    }
  });
  return 0;
}
