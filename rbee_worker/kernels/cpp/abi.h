// The C interface of the kernels: what library.py calls with the addresses of tensors.
//
// No Python and no torch headers. Any thread may call; calls on one context wait for each other. All sizes are in
// elements unless a name says bytes. Nothing here throws, and nothing here checks a pointer:
// library.py does both.

#pragma once

#include <cstdint>

#define RBEE_API extern "C" __attribute__((visibility("default")))

// Changes with every change of this file, so that a stale library is noticed.
constexpr int32_t kAbiVersion = 4;

// How the weights of a matrix are stored. The numbers are those of formats.py too.
enum Format : int32_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kQ8_0 = 3,
  kQ4_0 = 4,
  kQ4_1 = 5,
  kQ4_K = 6,
  kQ5_K = 7,
  kQ6_K = 8,
};

// A weight matrix, outputs first, in the bytes of its file.
struct Matrix {
  const void* data;
  int64_t rows;       // outputs
  int64_t columns;    // inputs
  int64_t row_bytes;  // from one row to the next
  int32_t format;     // a Format
  int32_t unused;
};

struct Context;

RBEE_API int32_t rbee_abi_version();

// A context with `threads` threads, the caller's included; null: there is no memory, or no thread.
RBEE_API Context* rbee_create(int32_t threads);

RBEE_API void rbee_destroy(Context* context);

// y = x W^T + b for several matrices of one width, side by side in y.
//   x: float32 [tokens, columns]; bias: float32 [rows of all matrices] or null; y: float32 [tokens, rows of all].
// A token's result has the same bits whatever the other tokens are, and however many.
// Returns 0; 1: there is no memory; 2: a format that is not known.
RBEE_API int32_t rbee_linear(Context* context, const Matrix* matrices, int32_t count, const float* x, int64_t tokens,
                             const float* bias, float* y);

// Rows of a matrix as float32 [count, columns]: y[i] = W[rows[i]]. Each row must be in the matrix.
// Returns 0; 2: a format that is not known.
RBEE_API int32_t rbee_rows(Context* context, const Matrix* matrix, const int64_t* rows, int64_t count, float* y);

// One sequence's new tokens in a batch.
struct Segment {
  int64_t row;        // of its first token in the batch
  int64_t count;      // its tokens
  int64_t length;     // positions that it had before them
  int64_t first_run;  // of the runs where its positions lie, those of the new tokens too
  int64_t runs;
};

// Positions of a sequence that lie side by side in the pool.
struct Run {
  int64_t position;    // of the sequence: the first of them
  int64_t begin, end;  // in the pool
};

struct Attention {
  const float* queries;  // [tokens, heads, head_dim]
  int64_t query_stride;  // from one token to the next
  int64_t heads, kv_heads, head_dim;
  const void* keys;  // [kv_heads, positions, head_dim] of one layer
  const void* values;
  int64_t head_stride;  // of keys and values: from one head to the next
  int64_t format;       // of keys and values: kF32, kF16 or kBF16
  const Segment* segments;
  int64_t segment_count;
  const Run* runs;
  int64_t window;      // a query sees this many positions, its own included; 0: all before it
  float scale;         // of the products of queries and keys
  float softcap;       // scores become cap * tanh(score / cap); 0: they stay
  const float* sinks;  // [heads]: one more score for each head, without a value; or null
  float* out;          // [tokens, heads * head_dim]
};

// Causal attention of new tokens over the positions of their sequences, their own included.
// A query's result depends on its position and on what it sees: its bits are the same wherever the runs lie, however
// the sequence was cut into steps, whatever else is in the batch and for every number of threads.
// Returns 0; 1: there is no memory; 2: a format that is not known, or a head_dim that is no multiple of 8.
RBEE_API int32_t rbee_attention(Context* context, const Attention* attention);

struct Norm {
  const float* x;  // [tokens, heads, width]
  int64_t x_stride;  // from one token to the next, as those below
  float* residual;  // as x, or null: residual += multiplier * x, and what comes out is normed
  int64_t residual_stride;
  const float* weight;  // [heads, width]
  float* y;             // as x; it may be x
  int64_t y_stride;
  int64_t tokens, heads, width;
  float multiplier, eps;
};

// y = x / sqrt(mean(x^2) + eps) * weight over each head; a norm of whole rows has one head.
// Returns 0.
RBEE_API int32_t rbee_rms_norm(Context* context, const Norm* norm);

struct Rotation {
  float* qkv;  // [tokens, heads + 2 kv_heads, head_dim]: queries, keys, values; the first two are changed in place
  int64_t qkv_stride;  // from one token to the next
  int64_t tokens, heads, kv_heads, head_dim;
  const float* norm;  // [heads + kv_heads, head_dim]: weights of an RMS norm of each query and key head; or null
  const float* cos;   // [.., rotary_dim]
  const float* sin;   // with signs: x becomes x * cos + swap(x) * sin
  const int64_t* rows;  // [tokens]: of cos and sin
  int64_t rotary_dim;   // the first dimensions of a head; 0: none is rotated, and cos, sin, rows are not read
  void* keys;           // [kv_heads, positions, head_dim] of one layer's cache
  void* values;
  int64_t head_stride;   // of keys and values: from one head to the next
  const int64_t* slots;  // [tokens]: positions that take the tokens' keys and values
  int32_t format;        // of keys and values: kF32, kF16 or kBF16, rounded half to even
  int32_t interleaved;   // swap(x) exchanges neighbours; else halves
  float eps;
  int32_t unused;
};

// Norms and rotates queries and keys, and writes keys and values to the cache.
// Returns 0; 2: a format that is not known.
RBEE_API int32_t rbee_rotate_and_store(Context* context, const Rotation* rotation);

enum Activation : int32_t {
  kSilu = 0,
  kGelu = 1,
  kGeluTanh = 2,
};

// y = f(gate) * up; gate_up: float32 [tokens, 2 width], gate and up side by side; y: float32 [tokens, width].
// Returns 0; 2: an activation that is not known.
RBEE_API int32_t rbee_gated(Context* context, int32_t activation, const float* gate_up, int64_t tokens, int64_t width,
                            float* y);

// Matrices of one width, their outputs side by side, as rbee_linear takes them.
struct Linear {
  const Matrix* matrices;
  int64_t count;
  const float* bias;  // or null
};

// A layer of a decoder: RMS norm, attention, RMS norm, gated MLP; both are added to the residual stream.
// Of rotation and attention only what is the same in every step is read; the rest comes from Tokens.
struct Layer {
  int64_t hidden_size;
  Linear qkv, o, gate_up, down;
  const float* attention_norm;       // [hidden_size]
  const float* attention_post_norm;  // of what attention gives, before it is added; or null
  const float* mlp_norm;
  const float* mlp_post_norm;  // or null
  float multiplier;            // of what is added
  float eps;
  int64_t activation;  // an Activation
  Rotation rotation;
  Attention attention;
};

// One step's tokens, for all layers.
struct Tokens {
  int64_t count;
  const int64_t* rows;   // [count]: of cos and sin
  const int64_t* slots;  // [count]: positions of the cache that take their keys and values
  const Segment* segments;
  int64_t segment_count;
  const Run* runs;
};

// A whole layer: the same operators as above, and so the same bits.
//   hidden: float32 [tokens, hidden_size], the residual stream; addend: as hidden, what the layer before gave. It is
//   added first if `pending`; what this layer gives is in it afterwards, and not yet added.
//   between: memory for what lies between the operators. Of each token hidden_size floats, and as many again as qkv has
//   outputs and o has inputs, or as gate_up has outputs and down has inputs, whichever is more.
// Returns 0; 1: there is no memory; 2: a format or an activation that is not known.
RBEE_API int32_t rbee_layer(Context* context, const Layer* layer, const Tokens* tokens, float* hidden, float* addend,
                            int32_t pending, float* between);
