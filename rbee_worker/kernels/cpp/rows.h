// Rows of a stored matrix as float32: an embedding.

#pragma once

template <class W>
void float_row(const Matrix& m, int64_t row, float* y) {
  using Stored = typename W::Stored;
  const Stored* data = reinterpret_cast<const Stored*>(static_cast<const char*>(m.data) + row * m.row_bytes);
  const int64_t whole = m.columns / simd::kLanes * simd::kLanes;
  for (int64_t k = 0; k < whole; k += simd::kLanes) simd::store(y + k, W::load(data + k));
  float rest[simd::kLanes];
  widen<W>(data + whole, m.columns - whole, rest);
  std::copy(rest, rest + (m.columns - whole), y + whole);
}

template <class Format>
void block_row(const Matrix& m, int64_t row, float* y) {
  const uint8_t* data = static_cast<const uint8_t*>(m.data) + row * m.row_bytes;
  for (int64_t column = 0; column < m.columns; column += kGroupColumns) {
    const int64_t columns = std::min<int64_t>(kGroupColumns, m.columns - column);
    Group group;
    unpack_some<Format>(data, column / kGroupColumns, columns, end_of(m), group);
    alignas(32) uint8_t bytes[kGroupColumns];
    alignas(32) float scales[kGroup], offsets[kGroup], second_scales[kGroup], second_offsets[kGroup];
    for (int b = 0; b < kGroup; ++b) _mm256_store_si256(reinterpret_cast<__m256i*>(bytes) + b, group.bytes[b]);
    _mm256_store_ps(scales, group.scales);
    if constexpr (!Format::kSigned) _mm256_store_ps(offsets, group.offsets);
    if constexpr (Format::kHalves) {
      _mm256_store_ps(second_scales, group.second_scales);
      _mm256_store_ps(second_offsets, group.second_offsets);
    }
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t b = i / kBlock;
      const bool second = Format::kHalves && i % kBlock >= kBlock / 2;
      const float byte = Format::kSigned ? static_cast<float>(static_cast<int8_t>(bytes[i])) : bytes[i];
      const float offset = Format::kSigned ? 0.0f : second ? second_offsets[b] : offsets[b];
      y[column + i] = byte * (second ? second_scales[b] : scales[b]) + offset;
    }
  }
}

using Row = void (*)(const Matrix& m, int64_t row, float* y);

inline Row row_of_format(int32_t format) {
  switch (format) {
    case kF32: return float_row<simd::F32>;
    case kF16: return float_row<simd::F16>;
    case kBF16: return float_row<simd::BF16>;
    case kQ8_0: return block_row<Q8_0>;
    case kQ4_0: return block_row<Q4_0>;
    case kQ4_1: return block_row<Q4_1>;
    case kQ4_K: return block_row<Q4_K>;
    case kQ5_K: return block_row<Q5_K>;
    case kQ6_K: return block_row<Q6_K>;
    default: return nullptr;
  }
}

int32_t rows_of(Pool& pool, const Matrix& m, const int64_t* rows, int64_t count, float* y) {
  const Row row = row_of_format(m.format);
  if (row == nullptr) return 2;
  pool.run(count, [&](int64_t i, int) { row(m, rows[i], y + i * m.columns); });
  return 0;
}
