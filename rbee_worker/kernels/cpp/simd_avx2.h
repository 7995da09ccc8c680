// Registers of AVX2, FMA and F16C.

#pragma once

namespace simd {

using Floats = __m256;
constexpr int kLanes = 8;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

struct F32 {
  using Stored = float;
  static Floats load(const float* p) { return simd::load(p); }
};

struct F16 {
  using Stored = uint16_t;
  static Floats load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

struct BF16 {
  using Stored = uint16_t;
  static Floats load(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};

inline float sum(Floats v) { return sum8(v); }

// Whether products of any bytes, unsigned by signed, can be added.
constexpr bool kLargeProducts = false;

// Sums of eight blocks of products, in integers: a lane for each block's first half, and for its second.
struct Halves {
  __m256i first, second;
};

inline Halves halves_of(__m256i low, __m256i high) {
  return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}

// The sums of w x for eight blocks of 32 bytes: exact. vpmaddubsw adds two products in 16 bits, and as many such sums are
// added there as the format's largest byte allows.
template <class Format>
inline Halves block_sums(const __m256i* w, const uint8_t* x) {
  constexpr int kPair = 2 * 127 * Format::kLargest;
  constexpr bool kOnce = !Format::kSigned && 2 * kPair <= 32767, kTwice = kOnce && 4 * kPair <= 32767;
  const __m256i one = _mm256_set1_epi16(1);
  __m256i fours[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i sums[4], folded[2];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const __m256i ws = w[4 * half + b], xs = load32(x + (4 * half + b) * 32);
      sums[b] = Format::kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(ws), _mm256_sign_epi8(xs, ws))
                                : _mm256_maddubs_epi16(ws, xs);
      if constexpr (!kOnce) sums[b] = _mm256_madd_epi16(sums[b], one);
    }
    for (int i = 0; i < 2; ++i) {
      if constexpr (kOnce) {
        folded[i] = fold_words<add16>(sums[2 * i], sums[2 * i + 1]);
        if constexpr (!kTwice) folded[i] = _mm256_madd_epi16(folded[i], one);
      } else {
        folded[i] = fold_words<add32>(sums[2 * i], sums[2 * i + 1]);
      }
    }
    if constexpr (kTwice) {
      fours[half] = _mm256_madd_epi16(fold_pairs<add16>(folded[0], folded[1]), one);
    } else {
      fours[half] = fold_pairs<add32>(folded[0], folded[1]);
    }
  }
  return halves_of(fours[0], fours[1]);
}

}  // namespace simd
