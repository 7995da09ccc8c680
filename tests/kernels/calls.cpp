// Calls of the kernels for sanitizers: memory of exactly the size that abi.h names, and many threads.
//
//   calls memory        every format and many shapes; a result is compared with that of its token alone
//   calls threads       many short calls on pools of several threads, from one caller and from several
//   calls short FORMAT  a matrix that lacks its last byte: a sanitizer must stop it
//   calls race          two callers write the same results: a sanitizer must stop it

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "abi.h"

namespace {

struct Layout {
  int32_t format;
  int64_t block, bytes;
  std::vector<int64_t> columns;
};

const std::vector<int64_t> kFloatColumns = {1, 7, 8, 15, 16, 17, 33, 64, 1023, 1024, 1025, 2051};
const std::vector<int64_t> kBlockColumns = {32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 480, 512, 544, 576, 1056};
const std::vector<int64_t> kGroupColumns = {256, 512, 768, 2304};

const Layout kLayouts[] = {
    {kF32, 1, 4, kFloatColumns},    {kF16, 1, 2, kFloatColumns},      {kBF16, 1, 2, kFloatColumns},
    {kQ8_0, 32, 34, kBlockColumns}, {kQ4_0, 32, 18, kBlockColumns},   {kQ4_1, 32, 20, kBlockColumns},
    {kQ4_K, 256, 144, kGroupColumns}, {kQ5_K, 256, 176, kGroupColumns}, {kQ6_K, 256, 210, kGroupColumns},
};

std::mt19937 generator(0);

// Memory of exactly so many elements, freed at the end; its address is no round one where `shift` is not 0.
template <class T>
struct Exact {
  explicit Exact(int64_t count, int64_t shift = 0)
      : memory(static_cast<char*>(std::malloc(count * sizeof(T) + shift))), data(reinterpret_cast<T*>(memory + shift)) {}
  Exact(Exact&& other) noexcept : memory(std::exchange(other.memory, nullptr)), data(other.data) {}
  ~Exact() { std::free(memory); }
  char* memory;
  T* data;
};

Exact<float> numbers(int64_t count) {
  Exact<float> made(count);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) made.data[i] = normal(generator);
  return made;
}

struct Weights {
  // `lacking`: bytes that are not there.
  Weights(const Layout& layout, int64_t rows, int64_t columns, int64_t shift = 0, int64_t lacking = 0)
      : bytes(rows * (columns / layout.block * layout.bytes) - lacking, shift) {
    const int64_t row_bytes = columns / layout.block * layout.bytes;
    // Any bytes without the highest bit of an exponent: finite, wherever a number may be in them.
    for (int64_t i = 0; i < rows * row_bytes - lacking; ++i) bytes.data[i] = generator() & 0xbf;
    matrix = {bytes.data, rows, columns, row_bytes, layout.format, 0};
  }
  Exact<uint8_t> bytes;
  Matrix matrix;
};

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// A product in memory of exactly its size, compared with each token's alone.
void multiply(Context* context, const std::vector<Matrix>& matrices, int64_t tokens, bool biased) {
  const int64_t columns = matrices[0].columns;
  int64_t outputs = 0;
  for (const Matrix& m : matrices) outputs += m.rows;
  const Exact<float> x = numbers(tokens * columns), bias = numbers(outputs);
  const Exact<float> y(tokens * outputs), one(outputs);
  const int32_t count = static_cast<int32_t>(matrices.size());
  const float* b = biased ? bias.data : nullptr;
  check(rbee_linear(context, matrices.data(), count, x.data, tokens, b, y.data) == 0, "status");
  for (int64_t t = 0; t < tokens; t += 1 + tokens / 3) {
    const Exact<float> alone(columns);
    std::memcpy(alone.data, x.data + t * columns, columns * sizeof(float));
    check(rbee_linear(context, matrices.data(), count, alone.data, 1, b, one.data) == 0, "status");
    check(std::memcmp(one.data, y.data + t * outputs, outputs * sizeof(float)) == 0, "a token's bits");
  }
}

void look_up(Context* context, const Matrix& m) {
  const int64_t places[] = {m.rows - 1, 0, m.rows / 2, m.rows - 1};
  for (int64_t count = 0; count <= 4; ++count) {
    const Exact<int64_t> rows(count);
    std::copy(places, places + count, rows.data);
    const Exact<float> y(count * m.columns);
    check(rbee_rows(context, &m, rows.data, count, y.data) == 0, "status");
  }
}

// Attention of a sequence's last tokens: keys and values of exactly its positions, in runs, compared with one token's.
void attend(Context* context, int32_t format, int64_t size, int64_t kv_heads, int64_t group, int64_t head_dim,
            int64_t before, int64_t tokens, int64_t window) {
  const int64_t heads = kv_heads * group, length = before + tokens, first = length / 3;
  const Exact<float> queries = numbers(tokens * heads * head_dim), sinks = numbers(heads);
  const Exact<float> out(tokens * heads * head_dim), one(heads * head_dim);
  // Small numbers of any format; the runs are the last two thirds of the pool, then the first one.
  const Exact<uint8_t> keys(size * kv_heads * length * head_dim), values(size * kv_heads * length * head_dim);
  for (int64_t i = 0; i < size * kv_heads * length * head_dim; ++i)
    keys.data[i] = generator() & 0x3f, values.data[i] = generator() & 0x3f;
  std::vector<Run> places;
  if (length > first) places.push_back({0, first, length});
  if (first > 0) places.push_back({length - first, 0, first});
  const Exact<Run> runs(places.size());
  std::copy(places.begin(), places.end(), runs.data);
  const auto call = [&](int64_t skipped, int64_t count, float* to) {
    const Segment segment{0, count, before + skipped, 0, static_cast<int64_t>(places.size())};
    const Attention arguments{queries.data + skipped * heads * head_dim, heads * head_dim, heads, kv_heads, head_dim,
                              keys.data, values.data, length * head_dim, format, &segment, 1, runs.data, window, 0.5f,
                              window % 2 == 0 ? 0.0f : 30.0f, window == 0 ? nullptr : sinks.data, to};
    check(rbee_attention(context, &arguments) == 0, "status");
  };
  call(0, tokens, out.data);
  for (int64_t t = 0; t < tokens; t += 1 + tokens / 3) {
    call(t, 1, one.data);
    check(std::memcmp(one.data, out.data + t * heads * head_dim, heads * head_dim * sizeof(float)) == 0, "its bits");
  }
}

// Norm, rotation, the write to the cache and activations, of `tokens` tokens.
void rotate_and_others(Context* context, int32_t format, int64_t size, int64_t head_dim, int64_t tokens) {
  const int64_t heads = 3, kv_heads = 2, both = heads + kv_heads, all = both + kv_heads, rotary_dim = head_dim / 4 * 2;
  const Exact<float> qkv = numbers(tokens * all * head_dim), norm = numbers(both * head_dim);
  const Exact<float> cos = numbers(tokens * rotary_dim), sin = numbers(tokens * rotary_dim);
  const Exact<uint8_t> keys(size * kv_heads * tokens * head_dim), values(size * kv_heads * tokens * head_dim);
  const Exact<int64_t> places(tokens);
  for (int64_t t = 0; t < tokens; ++t) places.data[t] = tokens - 1 - t;
  for (int32_t interleaved : {0, 1}) {
    const Rotation rotation{qkv.data, all * head_dim, tokens, heads, kv_heads, head_dim, norm.data, cos.data, sin.data,
                            places.data, rotary_dim, keys.data, values.data, tokens * head_dim, places.data, format,
                            interleaved, 1e-6f, 0};
    check(rbee_rotate_and_store(context, &rotation) == 0, "status");
  }
  const int64_t width = all * head_dim;
  const Exact<float> residual = numbers(tokens * width), weight = numbers(width), y(tokens * width);
  const Norm rms{qkv.data, width, residual.data, width, weight.data, y.data, width, tokens, 1, width, 0.5f, 1e-6f};
  check(rbee_rms_norm(context, &rms) == 0, "status");
  const Exact<float> gate_up = numbers(tokens * 2 * width);
  for (int32_t activation : {kSilu, kGelu, kGeluTanh})
    check(rbee_gated(context, activation, gate_up.data, tokens, width, y.data) == 0, "status");
}

// A whole layer, in memory of exactly the size that abi.h names; the same operators one by one are another test's.
void run_layer(Context* context, const Layout& layout, int64_t size, int32_t format, int64_t tokens) {
  const int64_t heads = 4, kv_heads = 2, head_dim = 64, hidden = 256, wide = 512, both = heads + 2 * kv_heads;
  const Weights q(layout, heads * head_dim, hidden), kv(layout, 2 * kv_heads * head_dim, hidden), o(layout, hidden, 256);
  const Weights gate_up(layout, 2 * wide, hidden), down(layout, hidden, wide);
  const Matrix qkv[] = {q.matrix, kv.matrix};
  const Exact<float> bias = numbers(both * head_dim), norm = numbers(hidden), head_norm = numbers(6 * head_dim);
  const Exact<float> cos = numbers(tokens * head_dim), sin = numbers(tokens * head_dim);
  const Exact<uint8_t> keys(size * kv_heads * tokens * head_dim), values(size * kv_heads * tokens * head_dim);
  const Exact<float> x = numbers(tokens * hidden), addend = numbers(tokens * hidden);
  const Exact<float> between(tokens * (hidden + std::max(both * head_dim + heads * head_dim, 3 * wide)));
  const Exact<int64_t> places(tokens);
  for (int64_t t = 0; t < tokens; ++t) places.data[t] = t;
  Rotation rotation{};
  rotation.heads = heads, rotation.kv_heads = kv_heads, rotation.head_dim = rotation.rotary_dim = head_dim;
  rotation.norm = head_norm.data, rotation.cos = cos.data, rotation.sin = sin.data;
  rotation.keys = keys.data, rotation.values = values.data, rotation.head_stride = tokens * head_dim;
  rotation.format = format;
  Attention attention{};
  attention.heads = heads, attention.kv_heads = kv_heads, attention.head_dim = head_dim, attention.keys = keys.data;
  attention.values = values.data, attention.head_stride = tokens * head_dim, attention.format = format;
  attention.scale = 0.1f;
  const Layer layer{hidden, {qkv, 2, bias.data}, {&o.matrix, 1, nullptr}, {&gate_up.matrix, 1, nullptr},
                    {&down.matrix, 1, nullptr}, norm.data, tokens % 2 == 0 ? nullptr : norm.data, norm.data,
                    tokens % 2 == 0 ? norm.data : nullptr, 0.5f, 1e-6f, kSilu, rotation, attention};
  const Segment segment{0, tokens, 0, 0, 1};
  const Run run{0, 0, tokens};
  const Tokens of_step{tokens, places.data, places.data, &segment, 1, &run};
  for (int32_t pending : {0, 1})
    check(rbee_layer(context, &layer, &of_step, x.data, addend.data, pending, between.data) == 0, "status");
}

// One thread and three take turns: every shape comes with either, and each comes once.
struct Turns {
  ~Turns() {
    for (Context* context : contexts) rbee_destroy(context);
  }
  Context* next() { return contexts[turn++ % 2]; }
  Context* contexts[2] = {rbee_create(1), rbee_create(3)};
  size_t turn = 0;
};

void operators(Turns& turns) {
  const std::pair<int32_t, int64_t> formats[] = {{kF32, 4}, {kF16, 2}, {kBF16, 2}};
  for (const auto& [format, size] : formats) {
    for (int64_t head_dim : {8, 24, 64, 72})
      for (int64_t before : {0, 15, 127, 300})
        for (int64_t tokens : {1, 2, 33, 140})
          for (int64_t window : {0, 7, 130})
            attend(turns.next(), format, size, 1 + before % 2, 1 + tokens % 3 * 4, head_dim, before, tokens, window);
    for (int64_t head_dim : {4, 8, 10, 17, 64})
      for (int64_t tokens : {0, 1, 5, 200}) rotate_and_others(turns.next(), format, size, head_dim, tokens);
    for (int64_t tokens : {1, 2, 70})
      for (int32_t weights : {kF16, kQ4_K}) run_layer(turns.next(), kLayouts[weights], size, format, tokens);
  }
}

void memory() {
  const int64_t tokens[] = {0, 1, 2, 3, 4, 5, 8, 17, 65, 130};
  Turns turns;
  size_t call = 0;
  for (const Layout& layout : kLayouts)
    for (int64_t columns : layout.columns)
      for (int64_t rows : {1, 2, 3, 5, 23, 24, 25, 49}) {
        const int64_t shift = layout.block > 1 ? columns / layout.block % 4 : 0;
        const Weights weights(layout, rows, columns, shift);
        // Every number of tokens comes with every format; not each with each shape.
        for (int i = 0; i < 3; ++i)
          multiply(turns.next(), {weights.matrix}, tokens[call++ % std::size(tokens)], i != 1);
        look_up(turns.contexts[call % 2], weights.matrix);
      }
  // All formats side by side.
  std::vector<Weights> parts;
  std::vector<Matrix> matrices;
  for (const Layout& layout : kLayouts) parts.emplace_back(layout, 1 + parts.size() * 7, 768);
  for (const Weights& part : parts) matrices.push_back(part.matrix);
  for (int64_t count : tokens) multiply(turns.next(), matrices, count, count % 2 == 0);
  // What is not a number, or hardly one.
  for (const Weights& part : parts)
    for (float value : {std::nanf(""), INFINITY, -INFINITY, std::numeric_limits<float>::max(),
                        std::numeric_limits<float>::denorm_min(), 1e-37f}) {
      const Exact<float> x = numbers(5 * 768), y(5 * part.matrix.rows);
      std::fill(x.data + 768, x.data + 2 * 768, value);
      x.data[4 * 768 - 1] = value;
      check(rbee_linear(turns.next(), &part.matrix, 1, x.data, 5, nullptr, y.data) == 0, "status");
    }
  operators(turns);
}

void threads() {
  using std::chrono::microseconds;
  for (int count = 1; count <= 5; ++count) {
    Context* context = rbee_create(count);
    std::vector<std::thread> callers;
    std::vector<Weights> weights;
    for (int i = 0; i < 3; ++i) weights.emplace_back(kLayouts[i * 3], 30 + 40 * i, 256);
    std::vector<Matrix> matrices;
    for (const Weights& part : weights) matrices.push_back(part.matrix);
    for (int i = 0; i < 200; ++i) multiply(context, matrices, i % 7, i % 2 == 0);
    for (int i = 0; i < 20; ++i) {  // about when threads go to sleep, and after it
      std::this_thread::sleep_for(microseconds(i < 10 ? 90 + 5 * i : 2000));
      multiply(context, {matrices[i % 3]}, 5, false);
    }
    for (int64_t tokens : {1, 3, 90})
      for (int i = 0; i < 5; ++i) attend(context, kF32, 4, 2, 3, 16, 400, tokens, 0);
    for (int i = 0; i < 5; ++i) rotate_and_others(context, kF16, 2, 64, 150);
    for (int64_t tokens : {1, 20}) run_layer(context, kLayouts[kQ8_0], 2, kF16, tokens);
    const Exact<float> x = numbers(6 * 256), right(6 * 210);
    check(rbee_linear(context, matrices.data(), 3, x.data, 6, nullptr, right.data) == 0, "status");
    for (int caller = 0; caller < 3; ++caller)
      callers.emplace_back([&] {
        const Exact<float> y(6 * 210), row(256);
        const int64_t last = 29;
        for (int i = 0; i < 100; ++i) {
          check(rbee_linear(context, matrices.data(), 3, x.data, 6, nullptr, y.data) == 0, "status");
          check(std::memcmp(y.data, right.data, sizeof(float) * 6 * 210) == 0, "results of several callers");
          check(rbee_rows(context, matrices.data(), &last, 1, row.data) == 0, "status");
        }
      });
    for (std::thread& caller : callers) caller.join();
    rbee_destroy(context);
  }
  for (int i = 0; i < 50; ++i) rbee_destroy(rbee_create(1 + i % 6));
}

void lacking(int32_t format) {
  const Layout& layout = kLayouts[format];
  const Weights weights(layout, 3, layout.columns.back(), 0, 1);
  const Exact<float> x = numbers(layout.columns.back()), y(3);
  Context* context = rbee_create(1);
  rbee_linear(context, &weights.matrix, 1, x.data, 1, nullptr, y.data);
}

void race() {
  const Weights weights(kLayouts[0], 40, 64);
  const Exact<float> x = numbers(64), y(40);
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i)
    callers.emplace_back([&] {
      Context* context = rbee_create(1);
      for (int call = 0; call < 100; ++call) rbee_linear(context, &weights.matrix, 1, x.data, 1, nullptr, y.data);
      rbee_destroy(context);
    });
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int count, char** words) {
  const std::string_view what = count > 1 ? words[1] : "";
  if (what == "memory") memory();
  if (what == "threads") threads();
  if (what == "short" && count > 2) lacking(std::atoi(words[2]));
  if (what == "race") race();
  std::puts("done");
}
