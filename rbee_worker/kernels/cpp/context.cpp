// The C interface. It is compiled once for each variant: the compiler's flags choose the registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include <immintrin.h>

#include "abi.h"
#include "pool.h"
#include "scratch.h"

namespace {

#include "common.h"
#ifdef __AVX512VNNI__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif
#include "blocks.h"
#include "floats.h"
#include "bytes.h"
#include "linear.h"
#include "rows.h"
#include "functions.h"
#include "attention.h"
#include "elementwise.h"
#include "layer.h"

}  // namespace

struct Context {
  explicit Context(int threads) : pool(threads), scratch(threads) {}

  std::mutex mutex;  // one call at a time
  Pool pool;
  Scratch scratch;
};

int32_t rbee_abi_version() { return kAbiVersion; }

Context* rbee_create(int32_t threads) {
  try {
    return new Context(threads);
  } catch (...) {  // no memory, or no thread
    return nullptr;
  }
}

void rbee_destroy(Context* context) { delete context; }

int32_t rbee_linear(Context* context, const Matrix* matrices, int32_t count, const float* x, int64_t tokens,
                    const float* bias, float* y) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return linear(context->pool, context->scratch, matrices, count, x, tokens, bias, y);
}

int32_t rbee_rows(Context* context, const Matrix* matrix, const int64_t* rows, int64_t count, float* y) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return rows_of(context->pool, *matrix, rows, count, y);
}

int32_t rbee_attention(Context* context, const Attention* arguments) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return attention(context->pool, context->scratch, *arguments);
}

int32_t rbee_rms_norm(Context* context, const Norm* norm) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return rms_norm(context->pool, *norm);
}

int32_t rbee_rotate_and_store(Context* context, const Rotation* rotation) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return rotate_and_store(context->pool, *rotation);
}

int32_t rbee_gated(Context* context, int32_t activation, const float* gate_up, int64_t tokens, int64_t width,
                   float* y) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return gated(context->pool, activation, gate_up, tokens, width, y);
}

int32_t rbee_layer(Context* context, const Layer* of, const Tokens* tokens, float* hidden, float* addend,
                   int32_t pending, float* between) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  return layer(context->pool, context->scratch, *of, *tokens, hidden, addend, pending != 0, between);
}
