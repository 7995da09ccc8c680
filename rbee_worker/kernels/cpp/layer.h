// A layer of a decoder: the operators in turn, without a way back to Python between them.

#pragma once

inline int64_t outputs_of(const Linear& l) {
  int64_t outputs = 0;
  for (int64_t i = 0; i < l.count; ++i) outputs += l.matrices[i].rows;
  return outputs;
}

int32_t layer(Pool& pool, Scratch& scratch, const Layer& l, const Tokens& tokens, float* hidden, float* addend,
              bool pending, float* between) {
  const int64_t count = tokens.count, width = l.hidden_size;
  float* const normed = between;
  float* const wide = normed + count * width;
  const auto norm = [&](const float* x, float* residual, const float* weight, float* y) {
    return rms_norm(pool, {x, width, residual, width, weight, y, width, count, 1, width, l.multiplier, l.eps});
  };
  const auto product = [&](const Linear& of, const float* x, float* y) {
    return linear(pool, scratch, of.matrices, static_cast<int32_t>(of.count), x, count, of.bias, y);
  };
  int32_t status = pending ? norm(addend, hidden, l.attention_norm, normed)
                           : norm(hidden, nullptr, l.attention_norm, normed);
  const int64_t qkv_width = outputs_of(l.qkv);
  if (status == 0) status = product(l.qkv, normed, wide);
  Rotation rotation = l.rotation;
  rotation.qkv = wide, rotation.qkv_stride = qkv_width, rotation.tokens = count;
  rotation.rows = tokens.rows, rotation.slots = tokens.slots;
  if (status == 0) status = rotate_and_store(pool, rotation);
  Attention attended = l.attention;
  attended.queries = wide, attended.query_stride = qkv_width, attended.out = wide + count * qkv_width;
  attended.segments = tokens.segments, attended.segment_count = tokens.segment_count, attended.runs = tokens.runs;
  if (status == 0) status = attention(pool, scratch, attended);
  if (status == 0) status = product(l.o, attended.out, addend);
  if (status == 0 && l.attention_post_norm != nullptr) status = norm(addend, nullptr, l.attention_post_norm, addend);

  if (status == 0) status = norm(addend, hidden, l.mlp_norm, normed);
  const int64_t both = outputs_of(l.gate_up);
  if (status == 0) status = product(l.gate_up, normed, wide);
  float* const activated = wide + count * both;
  if (status == 0) status = gated(pool, static_cast<int32_t>(l.activation), wide, count, both / 2, activated);
  if (status == 0) status = product(l.down, activated, addend);
  if (status == 0 && l.mlp_post_norm != nullptr) status = norm(addend, nullptr, l.mlp_post_norm, addend);
  return status;
}
