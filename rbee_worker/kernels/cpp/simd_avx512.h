// Registers of AVX-512 with VNNI: 16 floats; bytes stay in registers of 32, which is a block of them.

#pragma once

namespace simd {

using Floats = __m512;
constexpr int kLanes = 16;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

inline Floats all(float v) { return _mm512_set1_ps(v); }

// v, in a register: a compiler would rather read it again for each use, and that takes longer.
inline Floats held(Floats v) {
  asm("" : "+v"(v));
  return v;
}

// Of these two the result is b where a or b is not a number.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }

// a where x < limit, else b.
inline Floats below(Floats x, Floats limit, Floats a, Floats b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), b, a);
}

inline Floats without_sign(Floats v) { return _mm512_andnot_ps(all(-0.0f), v); }
inline Floats with_sign_of(Floats v, Floats sign) { return _mm512_or_ps(v, _mm512_and_ps(all(-0.0f), sign)); }
inline Floats root(Floats v) { return _mm512_sqrt_ps(v); }
inline Floats nearest(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats swap_neighbours(Floats v) { return _mm512_permute_ps(v, 0xb1); }

// v * 2^n for whole n from -252 to 254; n that is not a number gives v that is none.
inline Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }

inline Floats from_halves(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

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
  // Four values, and three times four that each lie `stride` further.
  static Floats fours(const float* p, int64_t stride) {
    return from_halves(_mm256_loadu2_m128(p + stride, p), _mm256_loadu2_m128(p + 3 * stride, p + 2 * stride));
  }
};

struct F16 : FloatWords {
  using Words = F32;
  using Stored = uint16_t;
  static Floats load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats fours(const uint16_t* p, int64_t stride) { return _mm512_cvtph_ps(four_of_64(p, stride)); }
};

struct BF16 : FloatWords {
  using Words = F32;
  using Stored = uint16_t;
  static Floats widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static Floats load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(uint16_t* p, Floats v) {
    const __m128i low = bfloat16_of_8(_mm512_castps512_ps256(v)), high = bfloat16_of_8(_mm512_extractf32x8_ps(v, 1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(high, low));
  }
  static Floats fours(const uint16_t* p, int64_t stride) { return widen(four_of_64(p, stride)); }
};

// Pairs of bfloat16, for CPUs that multiply them (AVX512-BF16). Written in assembly, since no flag lets the compiler use
// the instruction here alone.
struct BF16Pairs {
  using Words = BF16Pairs;
  using Stored = uint32_t;
  static constexpr int kColumns = 2;
  static Floats load(const uint32_t* p) { return simd::load(reinterpret_cast<const float*>(p)); }
  static Floats fours(const uint32_t* p, int64_t stride) { return F32::fours(reinterpret_cast<const float*>(p), stride); }
  static Floats add(Floats sum, Floats w, Floats x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

inline bool multiplies_pairs() { return __builtin_cpu_supports("avx512bf16"); }

inline float sum(Floats v) {
  return sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
inline __m128 sums(Floats a, Floats b, Floats c, Floats d) {
  const auto eight = [](Floats v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
  return sums8(eight(a), eight(b), eight(c), eight(d));
}
inline float largest(Floats v) {
  return max8(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

// Turns each square of four registers: value i of a four in register r becomes value r of that four in register i.
inline void turn_fours(Floats* v) {
  const Floats a = _mm512_unpacklo_ps(v[0], v[2]), b = _mm512_unpacklo_ps(v[1], v[3]);
  const Floats c = _mm512_unpackhi_ps(v[0], v[2]), d = _mm512_unpackhi_ps(v[1], v[3]);
  v[0] = _mm512_unpacklo_ps(a, b), v[1] = _mm512_unpackhi_ps(a, b);
  v[2] = _mm512_unpacklo_ps(c, d), v[3] = _mm512_unpackhi_ps(c, d);
}

// Whether products of any bytes, unsigned by signed, can be added.
constexpr bool kLargeProducts = true;

// The sums of w x for eight blocks of 32 bytes, w unsigned: exact. Blocks: 8, or 4 where the others are zeros.
template <class Format, int Blocks>
inline Halves block_sums(const __m256i* w, const uint8_t* x) {
  __m256i fours[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 2
  for (int half = 0; half < Blocks / 4; ++half) {
    __m256i sums[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b)
      sums[b] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), w[4 * half + b], load32(x + (4 * half + b) * 32));
    fours[half] = fold_pairs<add32>(fold_words<add32>(sums[0], sums[1]), fold_words<add32>(sums[2], sums[3]));
  }
  return halves_of(fours[0], fours[1]);
}

// The sums of w x over Fours fours of bytes, of T tokens, a lane for each row: exact. w: [Fours, lanes, 4]; x: [T, 256].
template <class Format, int T, int Fours>
inline __attribute__((always_inline)) void dots(const int8_t* w, const int8_t* x, Floats (&to)[T]) {
  __m512i sums[T];
  each<T>([&](auto t) __attribute__((always_inline)) { sums[t] = _mm512_setzero_si512(); });
  each<Fours>([&](auto q) __attribute__((always_inline)) {
    const __m512i ws = _mm512_load_si512(w + q * 64);
    each<T>([&](auto t) __attribute__((always_inline)) {
      sums[t] = _mm512_dpbusd_epi32(sums[t], ws, _mm512_set1_epi32(word(x + t * 256 + q * 4)));
    });
  });
  each<T>([&](auto t) __attribute__((always_inline)) { to[t] = _mm512_cvtepi32_ps(sums[t]); });
}

}  // namespace simd
