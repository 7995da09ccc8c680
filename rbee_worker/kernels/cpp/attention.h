// Attention of new tokens over the paged pool, each key and value read where it lies.
//
// A sequence's positions are cut into chunks of kChunk, from its first on. Of a chunk a query gets the largest score,
// the sum of exponentials and the values weighted by them (arXiv:1805.02867), and chunks are merged in order. So the
// order of a query's sums depends on its position alone: different threads may compute chunks, and queries may be
// computed side by side.
//
// Rows are queries: those of one or more tokens, for all query heads that share a head of keys. A tile of rows goes
// over the chunks that it sees. Keys are turned, so that a register holds the scores of a row for neighbouring keys.

#pragma once

constexpr int64_t kChunk = 128;              // positions
constexpr int64_t kKeys = 2 * simd::kLanes;  // turned at a time
constexpr int64_t kValues = 32;              // added at a time, while they are in the first-level cache
constexpr int64_t kMostRows = 64, kFewestRows = 8;  // of a tile, where one token has not more
constexpr int kSideRows = 6;                 // computed side by side
constexpr int64_t kPartialBytes = 4 << 20;   // of chunks that wait to be merged

// Rows' results of some chunks.
struct Partial {
  float* values;   // [rows, width]: sums of exponential * value
  float* largest;  // [rows]: score
  float* sums;     // [rows] of exponentials of score - largest; negative: the row has seen nothing
};

inline size_t partial_bytes(int64_t rows, int64_t width) { return aligned(sizeof(float) * rows * (width + 2)); }

inline Partial partial_at(char* memory, int64_t rows, int64_t width) {
  float* values = reinterpret_cast<float*>(memory);
  return {values, values + rows * width, values + rows * (width + 1)};
}

// What a row sees of a chunk, from the chunk's first position on.
struct Seen {
  int64_t from, to;
};

// Queries of a segment, for one head of keys. They see something of the chunks from first_chunk to last_chunk.
struct Tile {
  const Segment* segment;
  int64_t kv_head;
  int64_t query, queries;
  int64_t rows;
  int64_t first_chunk, last_chunk;
  int64_t first_task;  // where each chunk is a task: the number of its first one
};

// A thread's memory.
struct TileMemory {
  float* queries;  // [rows, head_dim], times the scale
  float* scores;   // [rows, kChunk], then their exponentials
  float* keys;     // [head_dim, kKeys]
  float* values;   // [kValues, width]
  Seen* seen;      // [rows]
  char* gathered;  // [lanes, head_dim] as stored
  Partial chunk, total;

  // Takes its memory from the address `memory` on; how many bytes it takes.
  size_t place(uintptr_t memory, int64_t rows, int64_t head_dim, int64_t width) {
    uintptr_t end = memory;
    const auto take = [&](size_t bytes) {
      char* const taken = reinterpret_cast<char*>(end);
      end += aligned(bytes);
      return taken;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(sizeof(float) * count)); };
    queries = floats(rows * head_dim), scores = floats(rows * kChunk);
    keys = floats(head_dim * kKeys), values = floats(kValues * width);
    seen = reinterpret_cast<Seen*>(take(sizeof(Seen) * rows));
    gathered = take(sizeof(float) * simd::kLanes * head_dim);
    chunk = partial_at(take(partial_bytes(rows, width)), rows, width);
    total = partial_at(take(partial_bytes(rows, width)), rows, width);
    return end - memory;
  }
};

// The run in which a position lies.
inline const Run& run_at(const Attention& a, const Segment& segment, int64_t position) {
  const Run* runs = a.runs + segment.first_run;
  const auto before = [](int64_t wanted, const Run& run) { return wanted < run.position; };
  return *(std::upper_bound(runs, runs + segment.runs, position, before) - 1);
}

// Where the keys or values of a position lie.
template <class Stored>
inline const Stored* row_of(const Attention& a, const Tile& tile, const void* keys_or_values, int64_t position) {
  const Run& run = run_at(a, *tile.segment, position);
  const int64_t row = run.begin + position - run.position;
  return static_cast<const Stored*>(keys_or_values) + tile.kv_head * a.head_stride + row * a.head_dim;
}

// Memory that is used soon, asked for a little at each step of a computation, so that it is on its way meanwhile. The
// processor does not foresee the order of keys and values, nor does it look far enough ahead. It goes to the
// second-level cache, which can wait for more of it at once than the first.
struct Ahead {
  const void* from;
  int64_t bytes;  // for each step of the computation

  void fetch(int64_t step) const {
    const char* begin = static_cast<const char*>(from) + step * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) _mm_prefetch(begin + byte, _MM_HINT_T1);
  }
};

// Calls f(R) with the constant R = rows, from 1 to kSideRows.
template <class F, int... Rs>
inline void with_rows(int64_t rows, const F& f, std::integer_sequence<int, Rs...>) {
  ((rows == Rs + 1 ? f(std::integral_constant<int, Rs + 1>()) : void()), ...);
}

// Calls f(row, R) for `rows` rows, about equally many side by side.
template <class F>
inline void side_by_side(int64_t rows, const F& f) {
  const int64_t parts = (rows + kSideRows - 1) / kSideRows, each = (rows + parts - 1) / parts;
  constexpr std::make_integer_sequence<int, kSideRows> counts;
  for (int64_t row = 0; row < rows; row += each)
    with_rows(std::min(each, rows - row), [&](auto count) { f(row, count); }, counts);
}

// The keys of `count` positions from `position` on, at most a register's lanes, as float32 [head_dim, kKeys].
template <class W>
void turn_keys(const Attention& a, const Tile& tile, int64_t position, int64_t count, char* gathered, float* to) {
  using Stored = typename W::Stored;
  const Stored* head = static_cast<const Stored*>(a.keys) + tile.kv_head * a.head_stride;
  const Run* run = &run_at(a, *tile.segment, position);
  int64_t place = run->begin + position - run->position;
  const Stored* from = head + place * a.head_dim;
  if (count < simd::kLanes || run->end - place < count) {  // the end of the sequence or of a run
    Stored* copy = reinterpret_cast<Stored*>(gathered);
    for (int64_t i = 0; i < count; ++i, ++place) {
      if (place == run->end) place = (++run)->begin;
      std::memcpy(copy + i * a.head_dim, head + place * a.head_dim, sizeof(Stored) * a.head_dim);
    }
    std::memset(copy + count * a.head_dim, 0, sizeof(Stored) * (simd::kLanes - count) * a.head_dim);
    from = copy;
  }
  for (int64_t d = 0; d < a.head_dim; d += 4) {
    simd::Floats fours[4];
    for (int i = 0; i < 4; ++i) fours[i] = W::fours(from + i * a.head_dim + d, 4 * a.head_dim);
    simd::turn_fours(fours);
    for (int i = 0; i < 4; ++i) simd::store(to + (d + i) * kKeys, fours[i]);
  }
}

// Scores of R rows for kKeys keys. `ahead`: what is asked for in the first half of the steps, and in the second.
template <int R, bool fetch>
inline void score_rows(const float* queries, const float* keys, int64_t head_dim, float* scores, const Ahead* ahead) {
  simd::Floats sums[R][2];
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = simd::zero();
  for (int64_t d = 0; d < head_dim; ++d) {
    if constexpr (fetch) d < head_dim / 2 ? ahead[0].fetch(d) : ahead[1].fetch(d - head_dim / 2);
    const simd::Floats first = simd::load(keys + d * kKeys), second = simd::load(keys + d * kKeys + simd::kLanes);
    for (int r = 0; r < R; ++r) {
      const simd::Floats query = simd::all(queries[r * head_dim + d]);
      sums[r][0] = simd::fma(query, first, sums[r][0]);
      sums[r][1] = simd::fma(query, second, sums[r][1]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) simd::store(scores + r * kChunk + i * simd::kLanes, sums[r][i]);
}

// Makes exponentials of a row's scores, less the largest.
inline void weigh(float* scores, const Seen& seen, float softcap, float& largest, float& sum) {
  if (seen.from >= seen.to) {
    sum = -1.0f;
    return;
  }
  const int64_t first = seen.from / simd::kLanes * simd::kLanes, last = round_up(seen.to, simd::kLanes);
  if (softcap != 0.0f)
    for (int64_t i = first; i < last; i += simd::kLanes)
      simd::store(scores + i, hyperbolic_tangent(simd::load(scores + i) / simd::all(softcap)) * simd::all(softcap));
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  std::fill(scores + first, scores + seen.from, kHidden);
  std::fill(scores + seen.to, scores + last, kHidden);
  simd::Floats most = simd::all(kHidden), total = simd::zero();
  for (int64_t i = first; i < last; i += simd::kLanes) most = simd::larger(simd::load(scores + i), most);
  largest = simd::largest(most);
  const simd::Floats base = simd::all(largest == kHidden ? 0.0f : largest);
  for (int64_t i = first; i < last; i += simd::kLanes) {
    const simd::Floats weights = exponential(simd::load(scores + i) - base);
    simd::store(scores + i, weights);
    total = total + weights;
  }
  sum = simd::sum(total);
}

// Adds `count` values, times the weights of R rows [R, kChunk], to sums [R, width].
template <class W, int R, bool fetch>
inline void add_values(const typename W::Stored* values, int64_t stride, int64_t count, const float* weights,
                       float* sums, int64_t width, const Ahead& ahead) {
  int64_t d = 0;
  const auto registers = [&](auto number) {
    constexpr int D = decltype(number)::value;
    for (; d + D * simd::kLanes <= width; d += D * simd::kLanes) {
      simd::Floats of_rows[R][D];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) of_rows[r][i] = simd::load(sums + r * width + d + i * simd::kLanes);
      for (int64_t p = 0; p < count; ++p) {
        if constexpr (fetch) if (d == 0) ahead.fetch(p);
        simd::Floats value[D];
        for (int i = 0; i < D; ++i) value[i] = W::load(values + p * stride + d + i * simd::kLanes);
        for (int r = 0; r < R; ++r) {
          const simd::Floats weight = simd::all(weights[r * kChunk + p]);
          for (int i = 0; i < D; ++i) of_rows[r][i] = simd::fma(weight, value[i], of_rows[r][i]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) simd::store(sums + r * width + d + i * simd::kLanes, of_rows[r][i]);
    }
  };
  if constexpr (R * 4 <= 2 * kSideRows) registers(std::integral_constant<int, 4>());
  registers(std::integral_constant<int, 2>());
  registers(std::integral_constant<int, 1>());
}

// Adds the values of positions [begin, end) of a chunk, which lie side by side, to the rows that see them. What a row
// does not see is left out rather than weighed with 0, since it may be infinite.
template <class W>
void add_seen(const typename W::Stored* values, int64_t stride, int64_t begin, int64_t end, const Tile& tile,
              const TileMemory& memory, int64_t width, const Ahead& ahead) {
  side_by_side(tile.rows, [&](int64_t row, auto count) {
    constexpr int R = decltype(count)::value;
    // Later rows see later positions.
    const auto clip = [&](int64_t position) { return std::clamp(position, begin, end); };
    const int64_t together = clip(memory.seen[row + R - 1].from);
    const int64_t apart = std::max(clip(memory.seen[row].to), together);
    const auto add = [&](auto rows, int64_t first, int64_t from, int64_t to) {
      constexpr int N = decltype(rows)::value;
      if (from < to)
        (first == 0 && N == R ? add_values<W, N, true> : add_values<W, N, false>)(
            values + (from - begin) * stride, stride, to - from, memory.scores + first * kChunk + from,
            memory.chunk.values + first * width, width, ahead);
    };
    constexpr std::integral_constant<int, 1> one;
    for (int64_t r = row; r < row + R; ++r)
      add(one, r, clip(memory.seen[r].from), std::min(together, clip(memory.seen[r].to)));
    add(count, row, together, apart);
    for (int64_t r = row; r < row + R; ++r) add(one, r, apart, clip(memory.seen[r].to));
  });
}

// What a tile's rows see of a chunk, to memory.chunk.
template <class W>
void attend_to_chunk(const Attention& a, const Tile& tile, int64_t chunk, const TileMemory& memory, int64_t width) {
  using Stored = typename W::Stored;
  constexpr int64_t kStored = sizeof(Stored);
  const int64_t group = a.heads / a.kv_heads, start = chunk * kChunk;
  for (int64_t q = 0; q < tile.queries; ++q) {
    const int64_t position = tile.segment->length + tile.query + q;
    const int64_t from = a.window == 0 ? 0 : std::clamp<int64_t>(position - a.window + 1 - start, 0, kChunk);
    const int64_t to = std::clamp<int64_t>(position + 1 - start, 0, kChunk);
    std::fill_n(memory.seen + q * group, group, Seen{from, to});
  }
  const int64_t from = memory.seen[0].from, to = memory.seen[tile.rows - 1].to;
  if (chunk == tile.first_chunk)  // no earlier chunk has asked for these keys
    for (int64_t key = from; key < to; key += simd::kLanes)
      Ahead{row_of<Stored>(a, tile, a.keys, start + key), simd::kLanes * a.head_dim * kStored}.fetch(0);
  for (int64_t key = from / kKeys * kKeys; key < to; key += kKeys) {
    for (int64_t i = key; i < std::min(key + kKeys, to); i += simd::kLanes) {
      turn_keys<W>(a, tile, start + i, std::min<int64_t>(simd::kLanes, to - i), memory.gathered,
                   memory.keys + i - key);
    }
    const auto values_at = [&](int64_t i) {  // the same positions' values, a register's lanes of them
      return Ahead{row_of<Stored>(a, tile, a.values, start + std::min(i, to - 1)), kKeys * kStored};
    };
    const Ahead ahead[2] = {values_at(key), values_at(key + simd::kLanes)};
    side_by_side(tile.rows, [&](int64_t row, auto count) {
      constexpr int R = decltype(count)::value;
      (row == 0 ? score_rows<R, true> : score_rows<R, false>)(
          memory.queries + row * a.head_dim, memory.keys, a.head_dim, memory.scores + row * kChunk + key, ahead);
    });
  }
  for (int64_t row = 0; row < tile.rows; ++row)
    weigh(memory.scores + row * kChunk, memory.seen[row], a.softcap, memory.chunk.largest[row], memory.chunk.sums[row]);

  std::memset(memory.chunk.values, 0, sizeof(float) * tile.rows * width);
  const bool direct = width == a.head_dim && (std::is_same_v<W, simd::F32> || tile.rows <= kSideRows);
  for (int64_t begin = from, end; begin < to; begin = end) {
    const Run& run = run_at(a, *tile.segment, start + begin);
    end = std::min({begin + kValues, run.position + run.end - run.begin - start, to});
    const Stored* values = row_of<Stored>(a, tile, a.values, start + begin);
    const int64_t next = std::min(start + begin + kChunk, tile.segment->length + tile.query + tile.queries - 1);
    const Ahead ahead{row_of<Stored>(a, tile, a.keys, next), a.head_dim * kStored};
    if (direct) {
      add_seen<W>(values, a.head_dim, begin, end, tile, memory, width, ahead);
      continue;
    }
    for (int64_t p = 0; p < end - begin; ++p) widen<W>(values + p * a.head_dim, a.head_dim, memory.values + p * width);
    add_seen<simd::F32>(memory.values, width, begin, end, tile, memory, width, ahead);
  }
}

// Adds the results of the next chunk to those of the ones before it.
inline void merge(const Partial& total, const Partial& next, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    float* to = total.values + row * width;
    const float* from = next.values + row * width;
    if (next.sums[row] < 0.0f) continue;
    if (total.sums[row] < 0.0f) {
      std::memcpy(to, from, sizeof(float) * width);
      total.largest[row] = next.largest[row], total.sums[row] = next.sums[row];
      continue;
    }
    const float largest = std::max(total.largest[row], next.largest[row]);
    // Both may be infinite.
    const auto share = [&](float of) { return of == largest ? 1.0f : exponential(of - largest); };
    const float before = share(total.largest[row]), now = share(next.largest[row]);
    const simd::Floats before_all = simd::all(before), now_all = simd::all(now);
    for (int64_t d = 0; d < width; d += simd::kLanes)
      simd::store(to + d, simd::fma(simd::load(to + d), before_all, simd::load(from + d) * now_all));
    total.sums[row] = total.sums[row] * before + next.sums[row] * now;
    total.largest[row] = largest;
  }
}

// Divides the sums of a tile's rows by those of their weights, and of the sinks'.
inline void finish(const Attention& a, const Tile& tile, const Partial& total, int64_t width) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t token = tile.segment->row + tile.query + row / group, head = tile.kv_head * group + row % group;
    float factor = 1.0f, sum = total.sums[row];
    if (a.sinks != nullptr) {
      const float largest = std::max(total.largest[row], a.sinks[head]);
      factor = total.largest[row] == largest ? 1.0f : exponential(total.largest[row] - largest);
      sum = sum * factor + exponential(a.sinks[head] - largest);
    }
    factor /= sum;
    const float* from = total.values + row * width;
    float* to = a.out + (token * a.heads + head) * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; ++d) to[d] = from[d] * factor;
  }
}

inline void scale_queries(const Attention& a, const Tile& tile, float* to) {
  const int64_t width = a.heads / a.kv_heads * a.head_dim;
  for (int64_t q = 0; q < tile.queries; ++q) {
    const float* from = a.queries + (tile.segment->row + tile.query + q) * a.query_stride + tile.kv_head * width;
    for (int64_t i = 0; i < width; ++i) to[q * width + i] = from[i] * a.scale;
  }
}

// Calls f(tile) for all tiles of `queries` queries each.
template <class F>
void each_tile(const Attention& a, int64_t queries, const F& f) {
  for (const Segment* segment = a.segments; segment < a.segments + a.segment_count; ++segment)
    for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head)
      for (int64_t query = 0; query < segment->count; query += queries) {
        const int64_t count = std::min(queries, segment->count - query);
        const int64_t position = segment->length + query;
        const int64_t first = a.window == 0 ? 0 : std::max<int64_t>(position - a.window + 1, 0) / kChunk;
        const int64_t last = (position + count - 1) / kChunk;
        f(Tile{segment, kv_head, query, count, count * (a.heads / a.kv_heads), first, last, 0});
      }
}

template <class W>
int32_t attend(Pool& pool, Scratch& scratch, const Attention& a) {
  const int64_t width = round_up(a.head_dim, simd::kLanes), group = a.heads / a.kv_heads;
  const int64_t wanted = pool.threads() == 1 ? 1 : 2 * pool.threads();
  // Tiles as large as leave enough of them.
  int64_t queries = 0, tiles_count = 0, tasks = 0;
  for (int64_t rows = kMostRows; rows >= kFewestRows && tiles_count < wanted; rows /= 2) {
    queries = std::max<int64_t>(rows / group, 1);
    tiles_count = tasks = 0;
    each_tile(a, queries, [&](const Tile& tile) { ++tiles_count, tasks += tile.last_chunk - tile.first_chunk + 1; });
  }
  if (tiles_count == 0) return 0;
  const int64_t rows = queries * group;
  // Where there are too few tiles, each of their chunks is a task; some tasks at once, since their results take memory.
  const bool apart = tiles_count < wanted && tasks > tiles_count;
  const int64_t bytes = partial_bytes(rows, width);
  const int64_t at_once = apart ? std::min<int64_t>(tasks, std::max<int64_t>(kPartialBytes / bytes, wanted)) : 0;
  const size_t tile_bytes = aligned(sizeof(Tile) * tiles_count);
  char* shared = scratch.shared.get(tile_bytes + bytes * (at_once + (apart ? tiles_count : 0)));
  if (shared == nullptr) return 1;
  const size_t own_bytes = TileMemory().place(0, rows, a.head_dim, width);
  for (Buffer& buffer : scratch.own)
    if (buffer.get(own_bytes) == nullptr) return 1;
  Tile* tiles = reinterpret_cast<Tile*>(shared);
  int64_t placed = 0, task = 0;
  each_tile(a, queries, [&](Tile tile) {
    tile.first_task = task;
    task += tile.last_chunk - tile.first_chunk + 1;
    tiles[placed++] = tile;
  });
  const auto memory_of = [&](int thread) {
    TileMemory memory;
    memory.place(reinterpret_cast<uintptr_t>(scratch.own[thread].get(0)), rows, a.head_dim, width);
    return memory;
  };

  if (!apart) {
    pool.run(tiles_count, [&](int64_t index, int thread) {
      const Tile& tile = tiles[tiles_count - 1 - index];  // the last ones see most
      const TileMemory memory = memory_of(thread);
      scale_queries(a, tile, memory.queries);
      std::fill_n(memory.total.sums, tile.rows, -1.0f);
      for (int64_t chunk = tile.first_chunk; chunk <= tile.last_chunk; ++chunk) {
        attend_to_chunk<W>(a, tile, chunk, memory, width);
        merge(memory.total, memory.chunk, tile.rows, width);
      }
      finish(a, tile, memory.total, width);
    });
    return 0;
  }

  const auto partial = [&](int64_t index) { return partial_at(shared + tile_bytes + index * bytes, rows, width); };
  for (int64_t i = 0; i < tiles_count; ++i) std::fill_n(partial(at_once + i).sums, rows, -1.0f);
  for (int64_t begin = 0; begin < tasks; begin += at_once) {
    const int64_t end = std::min(begin + at_once, tasks);
    pool.run(end - begin, [&](int64_t index, int thread) {
      const auto before = [](int64_t wanted_task, const Tile& tile) { return wanted_task < tile.first_task; };
      const Tile& tile = *(std::upper_bound(tiles, tiles + tiles_count, begin + index, before) - 1);
      TileMemory memory = memory_of(thread);
      memory.chunk = partial(index);
      scale_queries(a, tile, memory.queries);
      attend_to_chunk<W>(a, tile, tile.first_chunk + begin + index - tile.first_task, memory, width);
    });
    pool.run(tiles_count, [&](int64_t index, int) {
      const Tile& tile = tiles[index];
      const int64_t after = tile.first_task + tile.last_chunk - tile.first_chunk + 1;
      for (int64_t next = std::max(begin, tile.first_task); next < std::min(end, after); ++next)
        merge(partial(at_once + index), partial(next - begin), tile.rows, width);
      if (begin < after && after <= end) finish(a, tile, partial(at_once + index), width);
    });
  }
  return 0;
}

int32_t attention(Pool& pool, Scratch& scratch, const Attention& a) {
  if (a.head_dim % 8 != 0) return 2;
  switch (a.format) {
    case kF32: return attend<simd::F32>(pool, scratch, a);
    case kF16: return attend<simd::F16>(pool, scratch, a);
    case kBF16: return attend<simd::BF16>(pool, scratch, a);
    default: return 2;
  }
}
