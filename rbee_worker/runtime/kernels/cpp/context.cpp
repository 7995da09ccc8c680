// The C interface. It is compiled once for each variant: the compiler's flags choose the registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
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
#include "linear.h"

}  // namespace

struct Context {
  explicit Context(int threads) : pool(threads), scratch(threads) {}

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
  return linear(context->pool, context->scratch, matrices, count, x, tokens, bias, y);
}
