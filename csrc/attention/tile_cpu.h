// A tile of queries against a block of keys: the scores, as forward and backward both need them.
#pragma once

#include "attention/positions_cpu.h"
#include "attention/score_cpu.h"
#include "attention/vectors_cpu.h"

namespace emblas {
namespace {

// scores[j][c] <- p = 2^(scores[j][c] - shift[c]), total[c] += p. Not inlined, so that the
// constants of exp2 find registers.
template <class A, int vectors, class V>
[[gnu::noinline]] void exponentiate(A* scores, int64_t keys, const V (&shift)[vectors],
                                    V (&total)[vectors]) {
  constexpr int lanes = kLanes<A>;
  V sum[vectors], top[vectors];
  for (int c = 0; c < vectors; ++c) sum[c] = total[c], top[c] = shift[c];
  for (int64_t j = 0; j < keys; ++j, scores += vectors * lanes) {
    for (int c = 0; c < vectors; ++c) {
      const V p = exp2(load(scores + c * lanes) - top[c]);
      sum[c] += p;
      store(scores + c * lanes, p);
    }
  }
  for (int c = 0; c < vectors; ++c) total[c] = sum[c];
}

// The queries [query, query + count) of one sequence and head, and the keys that they may see.
template <class T, int vectors>
struct TileOf {
  static constexpr int64_t lanes = kLanes<T>;
  static constexpr int64_t width = vectors * lanes;
  using A = Accumulator<T>;
  using V = Vector<T>;
  using Index = decltype(V{} < V{});

  const VarlenAttentionArgs<T>& args;
  const int64_t sequence;
  const int64_t head, group;             // of q, of k
  const int64_t first_query, first_key;  // rows of q, k where the tile, the sequence begin
  const int64_t count;                   // of queries
  const int64_t position;                // p_i of the first query
  int64_t begin, end;                    // keys that some query sees

  TileOf(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t head, int64_t query,
         int64_t count)
      : args(args),
        sequence(sequence),
        head(head),
        group(head / args.heads_per_group),
        first_query(args.cu_seqlens_q[sequence] + query),
        first_key(args.cu_seqlens_k[sequence]),
        count(count),
        position(query + args.cu_seqlens_k[sequence + 1] - first_key -
                 (args.cu_seqlens_q[sequence + 1] - args.cu_seqlens_q[sequence])) {
    const int64_t keys = args.cu_seqlens_k[sequence + 1] - first_key;
    begin = args.window_left < 0 ? 0 : larger(0, position - args.window_left);
    end = args.window_right < 0 ? keys : smaller(keys, position + count + args.window_right);
    if (args.scores.prefix_len) {
      end = larger(end, smaller(keys, args.scores.prefix_len[sequence]));
    }
    if (args.scores.block_ids) end = keys;
  }

  // Whether the windows hide some of the keys [first, first + keys) from some query.
  bool cut_by_window(int64_t first, int64_t keys) const {
    const int64_t left = args.window_left, right = args.window_right;
    return (right >= 0 && first + keys - 1 > position + right) ||
           (left >= 0 && first < position + count - 1 - left);
  }

  // s = -inf where the window of the query doesn't hold the key.
  template <int rows>
  void hide(V (&s)[rows][vectors], int64_t key) const {
    // Relative to the first query, and no farther from it than any lane can tell apart.
    constexpr int far = rows + width;
    const auto clamp = [](int64_t x) { return int(smaller(larger(x, -far), far)); };
    const int low = args.window_left < 0 ? -far : clamp(position - args.window_left - key);
    const int high = args.window_right < 0 ? far : clamp(position + args.window_right - key);
    for (int c = 0; c < vectors; ++c) {
      Index lane;
      for (int i = 0; i < lanes; ++i) lane[i] = c * lanes + i;
      for (int r = 0; r < rows; ++r) {
        const Index hidden = (r < lane + low) | (r > lane + high);
        s[r][c] = hidden ? broadcast<V>(A(-INFINITY)) : s[r][c];
      }
    }
  }

  // Whether some query sees some of the keys [first, first + keys).
  bool sees(int64_t first, int64_t keys) const {
    return !args.scores.masked() || Mask<A, vectors>(place()).any(first, keys);
  }

  // scores[j][query] = k_j . qt for the keys [first, first + keys), with all that shapes them; -inf
  // where hidden. top becomes the largest of it and the scores. Softcap leaves its derivative in
  // slope, unless null; scratch of bias_scratch() is for biases.
  void score(Rows<const A> k, const A* qt, int64_t first, int64_t keys, A* scores,
             V (&top)[vectors], A* slope, A* scratch) const {
    const bool plain = args.scores.plain(), cut = cut_by_window(first, keys);
    for_rows(keys, [&]<int rows>(Constant<rows>, int64_t j) {
      V s[rows][vectors] = {};
      multiply_add(s, k.data + j * k.stride, k.stride, 1, qt, width, args.head_dim);
      if (plain && cut) hide(s, first + j);
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < vectors; ++c) {
          if (plain) top[c] = larger(top[c], s[r][c]);
          store(scores + (j + r) * width + c * lanes, s[r][c]);
        }
      }
    });
    if (plain) return;
    if (args.scores.softcap != 0) {
      cap_scores(scores, keys * width, args.scores.softcap * A(kLog2E), slope);
    }
    if (args.scores.biased()) add_distance_bias<A, vectors>(place(), first, keys, scores);
    if (args.scores.positions.any()) {
      add_position_scores(k, qt, first, keys, scores, scratch);
    }
    if (args.scores.pair_bias.data) {
      add_pair_bias<A, vectors>(place(), first, keys, scores, scratch);
    }
    if (cut || args.scores.masked()) Mask<A, vectors>(place()).apply(first, keys, scores);
    for (int64_t j = 0; j < keys; ++j) {
      for (int c = 0; c < vectors; ++c) {
        top[c] = larger(top[c], load(scores + j * width + c * lanes));
      }
    }
  }

  // Not inlined: it is long, and seldom asked for.
  [[gnu::noinline]] void add_position_scores(Rows<const A> k, const A* qt, int64_t first,
                                             int64_t keys, A* scores, A* scratch) const {
    const Place<A> place = this->place();
    Positions<A, vectors>(place, first, keys, args.head_dim, scratch)
        .add_scores(qt, k, args.scale, scores);
  }

  Place<A> place() const {
    const int64_t query = first_query - args.cu_seqlens_q[sequence];
    const int64_t length = args.cu_seqlens_k[sequence + 1] - first_key;
    return {args.scores,      sequence,  head,  group,    query,
            length,           first_key, count, position, args.window_left,
            args.window_right};
  }
};

inline int64_t longest(const int32_t* cu_seqlens, int64_t batch) {
  int64_t length = 0;
  for (int64_t b = 0; b < batch; ++b) length = larger(length, cu_seqlens[b + 1] - cu_seqlens[b]);
  return length;
}

// The keys and values that some queries of one head see, as accumulators.
template <class T>
struct KeyValues {
  using A = Accumulator<T>;

  int64_t first;  // of the keys
  Rows<const A> k, v;
  A* free;  // the rest of the scratch

  static int64_t scratch_size(const VarlenAttentionArgs<T>& args, int64_t keys) {
    return keys * (round_up(args.head_dim, kLanes<T>) + round_up(args.value_dim, kLanes<T>));
  }

  // Of the queries [query, query + count).
  KeyValues(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t head, int64_t query,
            int64_t count, A* scratch) {
    const TileOf<T, 1> tile(args, sequence, head, query, count);
    const int64_t keys = larger(0, tile.end - tile.begin), token = tile.first_key + tile.begin;
    first = tile.begin;
    k = near(args.k, token, tile.group, keys, args.head_dim, scratch);
    v = near(args.v, token, tile.group, keys, args.value_dim,
             scratch + keys * round_up(args.head_dim, kLanes<T>));
    free = scratch + scratch_size(args, keys);
  }

  Rows<const A> keys(int64_t key) const { return k.from(key - first); }
  Rows<const A> values(int64_t key) const { return v.from(key - first); }
};

}  // namespace
}  // namespace emblas
