// Weights in blocks of 32, as GGUF files store them: each is unpacked into bytes, with a scale and an offset:
//
//   weight = scale * byte + offset
//
// The layouts are those of ggml's block_q8_0, block_q4_0, block_q4_1, block_q4_K, block_q5_K and block_q6_K. Eight blocks
// are unpacked at once, into registers.

#pragma once

constexpr int kBlock = 32;
constexpr int kGroup = 8;  // blocks
constexpr int kGroupColumns = kBlock * kGroup;

// Eight blocks. Where the halves of a block have scales and offsets of their own, these are the first halves'.
struct Group {
  __m256i bytes[kGroup];
  __m256 scales, offsets;
  __m256 second_scales, second_offsets;
};

inline float half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return _cvtsh_ss(bits);
}

inline __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

// The low nibbles of 16 bytes, then the high ones.
inline __m256i nibbles(const uint8_t* p) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return low_nibbles(_mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)));
}

// Two float16 that lie at the beginning of each of eight blocks of `size` bytes: as eight first ones, and eight second.
struct Heads {
  __m256 first, second;
};

template <int size>
inline Heads heads(const uint8_t* p) {
  const auto four = [&](int b) {
    const auto one = [&](int i) {
      int32_t word;
      std::memcpy(&word, p + i * size, 4);
      return _mm_cvtsi32_si128(word);
    };
    const auto two = [&](int i) { return _mm_unpacklo_epi32(one(i), one(i + 1)); };
    return _mm_unpacklo_epi64(two(b), two(b + 2));
  };
  const __m256i both = _mm256_set_m128i(four(4), four(0));
  const __m256i first = _mm256_and_si256(both, _mm256_set1_epi32(0xffff)), second = _mm256_srli_epi32(both, 16);
  const __m256i sorted = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(sorted)), _mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1))};
}

// Of every format: how large its bytes are, whether they are signed (such a one has no offsets), whether the halves of a
// block have scales of their own, how many blocks are stored together and in how many bytes.

struct Q8_0 {
  static constexpr bool kSigned = !simd::kLargeProducts, kHalves = false;
  static constexpr int kLargest = 255, kTogether = 1, kBytes = 34;
  static void unpack(const uint8_t* p, Group& to) {
    to.scales = heads<kBytes>(p).first;
    if constexpr (!kSigned) to.offsets = _mm256_mul_ps(to.scales, _mm256_set1_ps(-128.0f));
    for (int b = 0; b < kGroup; ++b) {
      const __m256i v = load32(p + b * kBytes + 2);
      to.bytes[b] = kSigned ? v : _mm256_xor_si256(v, _mm256_set1_epi8(-128));
    }
  }
};

struct Q4_0 {
  static constexpr bool kSigned = false, kHalves = false;
  static constexpr int kLargest = 15, kTogether = 1, kBytes = 18;
  static void unpack(const uint8_t* p, Group& to) {
    to.scales = heads<kBytes>(p).first;
    to.offsets = _mm256_mul_ps(to.scales, _mm256_set1_ps(-8.0f));
    for (int b = 0; b < kGroup; ++b) to.bytes[b] = nibbles(p + b * kBytes + 2);
  }
};

struct Q4_1 {
  static constexpr bool kSigned = false, kHalves = false;
  static constexpr int kLargest = 15, kTogether = 1, kBytes = 20;
  static void unpack(const uint8_t* p, Group& to) {
    const Heads found = heads<kBytes>(p);
    to.scales = found.first;
    to.offsets = found.second;
    for (int b = 0; b < kGroup; ++b) to.bytes[b] = nibbles(p + b * kBytes + 4);
  }
};

// The scales and minima of Q4_K and Q5_K: six bits each, eight and eight in twelve bytes.
inline void unpack_k_scales(const uint8_t* p, Group& to) {
  uint32_t words[3];
  std::memcpy(words, p + 4, 12);
  const __m128i six = _mm_set_epi32(static_cast<int>(((words[2] >> 4) & 0x0f0f0f0fu) | ((words[1] >> 2) & 0x30303030u)),
                                    static_cast<int>(words[1] & 0x3f3f3f3fu),
                                    static_cast<int>((words[2] & 0x0f0f0f0fu) | ((words[0] >> 2) & 0x30303030u)),
                                    static_cast<int>(words[0] & 0x3f3f3f3fu));
  const __m256 scales = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(six));
  const __m256 minima = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(six, 8)));
  to.scales = _mm256_mul_ps(scales, _mm256_set1_ps(half(p)));
  to.offsets = _mm256_mul_ps(minima, _mm256_set1_ps(-half(p + 2)));
}

struct Q4_K {
  static constexpr bool kSigned = false, kHalves = false;
  static constexpr int kLargest = 15, kTogether = 8, kBytes = 144;
  static void unpack(const uint8_t* p, Group& to) {
    unpack_k_scales(p, to);
    for (int pair = 0; pair < 4; ++pair) {
      const __m256i v = load32(p + 16 + pair * 32);
      to.bytes[2 * pair] = low_nibbles(v);
      to.bytes[2 * pair + 1] = high_nibbles(v);
    }
  }
};

struct Q5_K {
  static constexpr bool kSigned = false, kHalves = false;
  static constexpr int kLargest = 31, kTogether = 8, kBytes = 176;
  static void unpack(const uint8_t* p, Group& to) {
    unpack_k_scales(p, to);
    const __m256i fifth = _mm256_set1_epi8(16), high = load32(p + 16);  // a bit of each block, the first the lowest
    for (int pair = 0; pair < 4; ++pair) {
      const __m256i v = load32(p + 48 + pair * 32);
      const auto bit = [&](int block) {
        return _mm256_and_si256(block < 4 ? _mm256_slli_epi16(high, 4 - block) : _mm256_srli_epi16(high, block - 4), fifth);
      };
      to.bytes[2 * pair] = _mm256_or_si256(low_nibbles(v), bit(2 * pair));
      to.bytes[2 * pair + 1] = _mm256_or_si256(high_nibbles(v), bit(2 * pair + 1));
    }
  }
};

struct Q6_K {
  static constexpr bool kSigned = false, kHalves = true;
  static constexpr int kLargest = 63, kTogether = 8, kBytes = 210;
  static void unpack(const uint8_t* p, Group& to) {
    const __m256i two_bits = _mm256_set1_epi8(0x30);
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 192));
    // Scales of first halves are the even bytes, those of second halves the odd ones.
    const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m128i sorted = _mm_shuffle_epi8(stored, order);
    const __m256 scale = _mm256_set1_ps(half(p + 208));
    to.scales = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(sorted)), scale);
    to.second_scales = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(sorted, 8))), scale);
    to.offsets = _mm256_mul_ps(to.scales, _mm256_set1_ps(-32.0f));
    to.second_offsets = _mm256_mul_ps(to.second_scales, _mm256_set1_ps(-32.0f));
    for (int part = 0; part < 2; ++part) {
      const __m256i first = load32(p + part * 64), second = load32(p + part * 64 + 32);
      const __m256i high = load32(p + 128 + part * 32);
      const auto six = [&](__m256i low, __m256i bits) {
        return _mm256_or_si256(low, _mm256_and_si256(bits, two_bits));
      };
      to.bytes[part * 4] = six(low_nibbles(first), _mm256_slli_epi16(high, 4));
      to.bytes[part * 4 + 1] = six(low_nibbles(second), _mm256_slli_epi16(high, 2));
      to.bytes[part * 4 + 2] = six(high_nibbles(first), high);
      to.bytes[part * 4 + 3] = six(high_nibbles(second), _mm256_srli_epi16(high, 2));
    }
  }
};

template <class Format>
constexpr int kGroupBytes = kGroup / Format::kTogether * Format::kBytes;

// The group of a row that begins at `row`, which has so many columns left from there on. The scales and offsets of what is
// not there are 0. end: of the matrix; what lies before it may be read.
template <class Format>
inline void unpack_some(const uint8_t* row, int64_t group, int64_t columns, const uint8_t* end, Group& to) {
  const uint8_t* data = row + group * kGroupBytes<Format>;
  if (columns >= kGroupColumns) return Format::unpack(data, to);  // formats of more than one block have no rest
  if (data + kGroupBytes<Format> <= end) {
    Format::unpack(data, to);
  } else {
    uint8_t filled[kGroupBytes<Format>] = {};
    std::memcpy(filled, data, columns / kBlock * Format::kBytes);
    Format::unpack(filled, to);
  }
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 there = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(columns / kBlock)), lane));
  to.scales = _mm256_and_ps(to.scales, there);
  if constexpr (!Format::kSigned) to.offsets = _mm256_and_ps(to.offsets, there);
}

inline const uint8_t* end_of(const Matrix& m) { return static_cast<const uint8_t*>(m.data) + m.rows * m.row_bytes; }
