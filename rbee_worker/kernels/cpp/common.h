// What both variants need: sums over registers of eight, in one order, and moves of 16-bit values.

#pragma once

inline float sum8(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// sum8 of four registers, in the same order.
inline __m128 sums8(__m256 a, __m256 b, __m256 c, __m256 d) {
  const auto four = [](__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
  const auto two = [](__m128 v, __m128 w) { return _mm_add_ps(_mm_unpacklo_ps(v, w), _mm_unpackhi_ps(v, w)); };
  const __m128 first = two(four(a), four(b)), second = two(four(c), four(d));
  return _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first));
}

inline float max8(__m256 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline int32_t sum_of_8(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// [a0 + a2, b0 + b2, a1 + a3, b1 + b3] of the words of each half of a and b, as `Add` adds.
template <__m256i (*Add)(__m256i, __m256i)>
inline __m256i fold_words(__m256i a, __m256i b) {
  return Add(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}

// [a0 + a2, a1 + a3, b0 + b2, b1 + b3], likewise.
template <__m256i (*Add)(__m256i, __m256i)>
inline __m256i fold_pairs(__m256i a, __m256i b) {
  return Add(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

inline __m256i add16(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
inline __m256i add32(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }

inline __m128i two_of_64(const uint16_t* low, const uint16_t* high) {
  return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)),
                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high)));
}

inline __m256i four_of_64(const uint16_t* p, int64_t stride) {
  return _mm256_set_m128i(two_of_64(p + 2 * stride, p + 3 * stride), two_of_64(p, p + stride));
}

// Rounds half to even. What is not a number becomes one that is none.
inline __m128i bfloat16_of_8(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), none);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// Sums of eight blocks of products, in integers: a lane for each block's first half, and for its second.
struct Halves {
  __m256i first, second;
};

inline Halves halves_of(__m256i low, __m256i high) {
  return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}

// Calls f(i) for i in [0, n), each a constant, so that arrays which it indexes can stay in registers.
template <int n, class F>
inline __attribute__((always_inline)) void each(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, n>());
}

// Four bytes as one number.
inline int32_t word(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return four;
}
