// Registers of AVX-512 with VNNI: 16 floats; bytes stay in registers of 32, which is a block of them.

#pragma once

namespace simd {

using Floats = __m512;
constexpr int kLanes = 16;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

struct F32 {
  using Stored = float;
  static Floats load(const float* p) { return simd::load(p); }
};

struct F16 {
  using Stored = uint16_t;
  static Floats load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

struct BF16 {
  using Stored = uint16_t;
  static Floats load(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};

inline float sum(Floats v) {
  return sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

// Whether products of any bytes, unsigned by signed, can be added.
constexpr bool kLargeProducts = true;

// Sums of eight blocks of products, in integers: a lane for each block's first half, and for its second.
struct Halves {
  __m256i first, second;
};

inline Halves halves_of(__m256i low, __m256i high) {
  return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}

// The sums of w x for eight blocks of 32 bytes, w unsigned: exact.
template <class Format>
inline Halves block_sums(const __m256i* w, const uint8_t* x) {
  __m256i fours[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i sums[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b)
      sums[b] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), w[4 * half + b], load32(x + (4 * half + b) * 32));
    fours[half] = fold_pairs<add32>(fold_words<add32>(sums[0], sums[1]), fold_words<add32>(sums[2], sums[3]));
  }
  return halves_of(fours[0], fours[1]);
}

}  // namespace simd
