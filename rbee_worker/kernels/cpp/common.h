// Sums over registers of eight, in one order.

#pragma once

inline float sum8(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
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
