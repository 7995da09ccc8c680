// Registers of AVX2, FMA and F16C.

#pragma once

namespace simd {

using Floats = __m256;
constexpr int kLanes = 8;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

inline Floats all(float v) { return _mm256_set1_ps(v); }

// v, in a register: a compiler would rather read it again for each use, and that takes longer.
inline Floats held(Floats v) {
  asm("" : "+x"(v));
  return v;
}

// Of these two the result is b where a or b is not a number.
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }

// a where x < limit, else b.
inline Floats below(Floats x, Floats limit, Floats a, Floats b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}

inline Floats without_sign(Floats v) { return _mm256_andnot_ps(all(-0.0f), v); }
inline Floats with_sign_of(Floats v, Floats sign) { return _mm256_or_ps(v, _mm256_and_ps(all(-0.0f), sign)); }
inline Floats root(Floats v) { return _mm256_sqrt_ps(v); }
inline Floats nearest(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats swap_neighbours(Floats v) { return _mm256_permute_ps(v, 0xb1); }

// v * 2^n for whole n from -252 to 254; n that is not a number gives v that is none.
inline Floats times_power(Floats v, Floats n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const auto power = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
  return v * power(half) * power(_mm256_sub_epi32(whole, half));
}

// Floats in linear layers: a word of a row is one number as float32.
struct FloatWords {
  static constexpr int kColumns = 1;
  static Floats add(Floats sum, Floats w, Floats x) { return fma(w, x, sum); }
};

struct F32 : FloatWords {
  using Words = F32;
  using Stored = float;
  static Floats load(const float* p) { return simd::load(p); }
  static void store(float* p, Floats v) { simd::store(p, v); }
  // Four values, and four that lie `stride` further.
  static Floats fours(const float* p, int64_t stride) { return _mm256_loadu2_m128(p + stride, p); }
};

struct F16 : FloatWords {
  using Words = F32;
  using Stored = uint16_t;
  static Floats load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(uint16_t* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats fours(const uint16_t* p, int64_t stride) { return _mm256_cvtph_ps(two_of_64(p, p + stride)); }
};

struct BF16 : FloatWords {
  using Words = F32;
  using Stored = uint16_t;
  static Floats widen(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static Floats load(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(uint16_t* p, Floats v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bfloat16_of_8(v)); }
  static Floats fours(const uint16_t* p, int64_t stride) { return widen(two_of_64(p, p + stride)); }
};

using BF16Pairs = BF16;  // no such CPU multiplies pairs

inline bool multiplies_pairs() { return false; }

inline float sum(Floats v) { return sum8(v); }
inline __m128 sums(Floats a, Floats b, Floats c, Floats d) { return sums8(a, b, c, d); }
inline float largest(Floats v) { return max8(v); }

// Turns each square of four registers: value i of a four in register r becomes value r of that four in register i.
inline void turn_fours(Floats* v) {
  const Floats a = _mm256_unpacklo_ps(v[0], v[2]), b = _mm256_unpacklo_ps(v[1], v[3]);
  const Floats c = _mm256_unpackhi_ps(v[0], v[2]), d = _mm256_unpackhi_ps(v[1], v[3]);
  v[0] = _mm256_unpacklo_ps(a, b), v[1] = _mm256_unpackhi_ps(a, b);
  v[2] = _mm256_unpacklo_ps(c, d), v[3] = _mm256_unpackhi_ps(c, d);
}

// Whether products of any bytes, unsigned by signed, can be added.
constexpr bool kLargeProducts = false;

// The sums of w x for eight blocks of 32 bytes: exact. Blocks: 8, or 4 where the others are zeros. vpmaddubsw adds two
// products in 16 bits, and as many such sums are added there as the format's largest byte allows.
template <class Format, int Blocks>
inline Halves block_sums(const __m256i* w, const uint8_t* x) {
  constexpr int kPair = 2 * 127 * Format::kLargest;
  constexpr bool kOnce = !Format::kSigned && 2 * kPair <= 32767, kTwice = kOnce && 4 * kPair <= 32767;
  const __m256i one = _mm256_set1_epi16(1);
  __m256i fours[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 2
  for (int half = 0; half < Blocks / 4; ++half) {
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

// The sums of w x over Fours fours of bytes, of T tokens, a lane for each row: exact. w: [Fours, lanes, 4]; x: [T, 256].
template <class Format, int T, int Fours>
inline __attribute__((always_inline)) void dots(const int8_t* w, const int8_t* x, Floats (&to)[T]) {
  constexpr int kPair = 2 * 127 * (Format::kSigned ? 128 : Format::kLargest);
  constexpr int kTogether = 32767 / kPair < Fours ? 32767 / kPair : Fours;  // sums that 16 bits hold
  each<T>([&](auto t) __attribute__((always_inline)) {
    __m256i words = _mm256_setzero_si256(), sum = words;
    each<Fours>([&](auto q) __attribute__((always_inline)) {
      const __m256i ws = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + q * 32));
      const __m256i xs = _mm256_set1_epi32(word(x + t * 256 + q * 4));
      const __m256i products = Format::kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(ws), _mm256_sign_epi8(xs, ws))
                                               : _mm256_maddubs_epi16(ws, xs);
      words = q % kTogether == 0 ? products : _mm256_add_epi16(words, products);
      if (q % kTogether == kTogether - 1 || q == Fours - 1)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    });
    to[t] = _mm256_cvtepi32_ps(sum);
  });
}

}  // namespace simd
