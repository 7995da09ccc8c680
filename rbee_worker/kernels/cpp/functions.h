// Functions of whole registers. The coefficients are this project's own fits of the smallest largest error. The errors
// were measured on every seventh float. What is not a number stays so.

#pragma once

// v[0] + x v[1] + x^2 v[2] + ...
template <int n>
inline simd::Floats polynomial(simd::Floats x, const float (&v)[n]) {
  simd::Floats sum = simd::all(v[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = simd::fma(sum, x, simd::all(v[i]));
  return sum;
}

// e^x, within 1.1 units in the last place. What would be below the smallest normal float is 0.
inline simd::Floats exponential(simd::Floats x) {
  static constexpr float kTerms[] = {0.5f, 0.166665181517601f, 0.04166620597243309f, 0.008368889801204205f,
                                     0.001395049155689776f};
  const simd::Floats smallest = simd::all(-87.33654f), largest = simd::all(89.0f);
  const simd::Floats kept = simd::smaller(largest, simd::larger(smallest, x));
  const simd::Floats n = simd::nearest(kept * simd::all(1.44269504f));
  // The logarithm of 2 in two parts, so that the product of the first is exact.
  simd::Floats r = simd::fma(n, simd::all(-0.693359375f), kept);
  r = simd::fma(n, simd::all(2.12194440e-4f), r);
  const simd::Floats power = simd::fma(polynomial(r, kTerms), r * r, r) + simd::all(1.0f);
  return simd::below(x, smallest, simd::zero(), simd::times_power(power, n));
}

inline float exponential(float x) {
  float of_all[simd::kLanes];
  simd::store(of_all, exponential(simd::all(x)));
  return of_all[0];
}

// tanh(x), within 1.4 units in the last place.
inline simd::Floats hyperbolic_tangent(simd::Floats x) {
  static constexpr float kTerms[] = {-0.3333328366279602f, 0.13331490755081177f, -0.05374349653720856f,
                                     0.02065058797597885f, -0.005717045161873102f};
  const simd::Floats size = simd::without_sign(x), square = x * x, one = simd::all(1.0f);
  const simd::Floats near = simd::fma(polynomial(square, kTerms) * square, x, x);
  const simd::Floats far = one - simd::all(2.0f) / (exponential(size + size) + one);
  return simd::below(size, simd::all(0.625f), near, simd::with_sign_of(far, x));
}

// What part of a normal distribution lies below x: erfc(-x / sqrt(2)) / 2. erfc(t) is e^(-t^2) times a function of
// 1 / (1 + t / 2).
inline simd::Floats normal_below(simd::Floats x) {
  static constexpr float kTerms[] = {-7.847767847124487e-06f, 0.28226056694984436f, 0.28074386715888977f,
                                     0.2515789568424225f,     0.17572222650051117f, 0.028015591204166412f,
                                     0.2073185294866562f,     -0.43057170510292053f, 0.25906679034233093f,
                                     -0.054127033799886703f};
  const simd::Floats one = simd::all(1.0f), half = simd::all(0.5f);
  const simd::Floats t = simd::without_sign(x) * simd::all(0.70710678f);
  const simd::Floats terms = polynomial(one / simd::fma(t, half, one), kTerms);
  const simd::Floats beyond = half * terms * exponential(simd::zero() - t * t);
  return simd::below(x, simd::zero(), beyond, one - beyond);
}
