// The operators between linear layers and attention: norms, rotation with the write to the cache, activations.
//
// Each row is computed alone, and in one order.

#pragma once

constexpr int64_t kElements = 8192;  // of a chunk of work: fewer are not worth a second thread

// n floats, and zeros up to a whole register.
inline simd::Floats load_some(const float* p, int64_t n) {
  if (n >= simd::kLanes) return simd::load(p);
  float some[simd::kLanes] = {};
  std::memcpy(some, p, sizeof(float) * n);
  return simd::load(some);
}

template <class W>
inline void store_some(typename W::Stored* p, simd::Floats v, int64_t n) {
  if (n >= simd::kLanes) return W::store(p, v);
  typename W::Stored some[simd::kLanes];
  W::store(some, v);
  std::memcpy(p, some, sizeof(some[0]) * n);
}

inline void store_some(float* p, simd::Floats v, int64_t n) { store_some<simd::F32>(p, v, n); }

// Calls f(index) for all in [0, count), some of them in one chunk of work; each is about `elements` numbers.
template <class F>
void in_chunks(Pool& pool, int64_t count, int64_t elements, const F& f) {
  const int64_t each = std::max<int64_t>(kElements / std::max<int64_t>(elements, 1), 1);
  pool.run((count + each - 1) / each, [&](int64_t chunk, int) {
    for (int64_t i = chunk * each; i < std::min((chunk + 1) * each, count); ++i) f(i);
  });
}

// ------------------------------------------------------------------------------------------------------------- norms

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
inline void norm_row(const float* x, const float* weight, float eps, int64_t width, float* y) {
  constexpr int kSums = 4;  // so that additions need not wait for each other
  simd::Floats sums[kSums] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for (int64_t k = 0; k < width; k += kSums * simd::kLanes)
    for (int i = 0; i < kSums && k + i * simd::kLanes < width; ++i) {
      const simd::Floats v = load_some(x + k + i * simd::kLanes, width - k - i * simd::kLanes);
      sums[i] = simd::fma(v, v, sums[i]);
    }
  const float mean = simd::sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(width);
  const simd::Floats factor = simd::all(1.0f / std::sqrt(mean + eps));
  for (int64_t k = 0; k < width; k += simd::kLanes)
    store_some(y + k, load_some(x + k, width - k) * factor * load_some(weight + k, width - k), width - k);
}

int32_t rms_norm(Pool& pool, const Norm& n) {
  in_chunks(pool, n.tokens * n.heads, n.width, [&](int64_t row) {
    const int64_t token = row / n.heads, place = row % n.heads * n.width;
    const float* x = n.x + token * n.x_stride + place;
    if (n.residual != nullptr) {
      float* residual = n.residual + token * n.residual_stride + place;
      const simd::Floats multiplier = simd::all(n.multiplier);
      for (int64_t k = 0; k < n.width; k += simd::kLanes) {
        const int64_t left = n.width - k;
        store_some(residual + k, simd::fma(load_some(x + k, left), multiplier, load_some(residual + k, left)), left);
      }
      x = residual;
    }
    norm_row(x, n.weight + place, n.eps, n.width, n.y + token * n.y_stride + place);
  });
  return 0;
}

// ---------------------------------------------------------------------------------------------------------- rotation

// Rotates a head in place. The sines have signs: x cos + swap(x) sin.
inline void rotate(float* x, const float* cos, const float* sin, int64_t size, bool interleaved) {
  if (interleaved) {
    for (int64_t k = 0; k < size; k += simd::kLanes) {
      const int64_t left = size - k;
      const simd::Floats v = load_some(x + k, left);
      const simd::Floats part = v * load_some(cos + k, left);
      store_some(x + k, simd::fma(simd::swap_neighbours(v), load_some(sin + k, left), part), left);
    }
    return;
  }
  const int64_t half = size / 2;
  for (int64_t k = 0; k < half; k += simd::kLanes) {
    const int64_t left = half - k, other = half + k;
    const simd::Floats a = load_some(x + k, left), b = load_some(x + other, left);
    const simd::Floats a_part = a * load_some(cos + k, left), b_part = b * load_some(cos + other, left);
    store_some(x + k, simd::fma(b, load_some(sin + k, left), a_part), left);
    store_some(x + other, simd::fma(a, load_some(sin + other, left), b_part), left);
  }
}

template <class W>
int32_t rotate_and_store_as(Pool& pool, const Rotation& r) {
  using Stored = typename W::Stored;
  const int64_t heads = r.heads + 2 * r.kv_heads, values_from = r.heads + r.kv_heads;
  const auto store_head = [&](const float* x, void* pool_of, int64_t head, int64_t slot) {
    Stored* to = static_cast<Stored*>(pool_of) + head * r.head_stride + slot * r.head_dim;
    for (int64_t k = 0; k < r.head_dim; k += simd::kLanes) {
      const int64_t left = r.head_dim - k;
      store_some<W>(to + k, load_some(x + k, left), left);
    }
  };
  in_chunks(pool, r.tokens, heads * r.head_dim, [&](int64_t token) {
    float* const qkv = r.qkv + token * r.qkv_stride;
    for (int64_t head = 0; head < heads; ++head) {
      float* const x = qkv + head * r.head_dim;
      if (head >= values_from) {
        store_head(x, r.values, head - values_from, r.slots[token]);
        continue;
      }
      if (r.norm != nullptr) norm_row(x, r.norm + head * r.head_dim, r.eps, r.head_dim, x);
      if (r.rotary_dim != 0) {
        const int64_t row = r.rows[token] * r.rotary_dim;
        rotate(x, r.cos + row, r.sin + row, r.rotary_dim, r.interleaved != 0);
      }
      if (head >= r.heads) store_head(x, r.keys, head - r.heads, r.slots[token]);
    }
  });
  return 0;
}

int32_t rotate_and_store(Pool& pool, const Rotation& r) {
  switch (r.format) {
    case kF32: return rotate_and_store_as<simd::F32>(pool, r);
    case kF16: return rotate_and_store_as<simd::F16>(pool, r);
    case kBF16: return rotate_and_store_as<simd::BF16>(pool, r);
    default: return 2;
  }
}

// ------------------------------------------------------------------------------------------------------- activations

inline simd::Floats silu(simd::Floats x) { return x / (simd::all(1.0f) + exponential(simd::zero() - x)); }

// 0.5 x (1 + tanh(u)) is x / (1 + e^-2u), which loses nothing where tanh(u) is close to -1.
inline simd::Floats gelu_tanh(simd::Floats x) {
  const simd::Floats inner = simd::fma(x * x * x, simd::all(0.044715f), x);
  return x / (simd::all(1.0f) + exponential(inner * simd::all(-1.5957691216057308f)));
}

inline simd::Floats gelu(simd::Floats x) { return x * normal_below(x); }

template <class F>
int32_t gate(Pool& pool, const float* gate_up, int64_t tokens, int64_t width, float* y, const F& activate) {
  const int64_t pieces = (width + kElements - 1) / kElements;
  in_chunks(pool, tokens * pieces, std::min(width, kElements), [&](int64_t index) {
    const int64_t token = index / pieces, begin = index % pieces * kElements, end = std::min(begin + kElements, width);
    const float *gates = gate_up + token * 2 * width, *ups = gates + width;
    for (int64_t k = begin; k < end; k += simd::kLanes)
      store_some(y + token * width + k, activate(load_some(gates + k, end - k)) * load_some(ups + k, end - k), end - k);
  });
  return 0;
}

int32_t gated(Pool& pool, int32_t activation, const float* gate_up, int64_t tokens, int64_t width, float* y) {
  switch (activation) {
    case kSilu: return gate(pool, gate_up, tokens, width, y, silu);
    case kGelu: return gate(pool, gate_up, tokens, width, y, gelu);
    case kGeluTanh: return gate(pool, gate_up, tokens, width, y, gelu_tanh);
    default: return 2;
  }
}
