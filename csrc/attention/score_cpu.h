// What shapes a block of scores [keys][queries] after q . k: softcap, biases by distance and by
// pair, masks; and the dropout of the probabilities made from them.
//
// Each is a pass of its own over a block that lies in the first-level cache, made only where it is
// asked for: plain attention pays nothing, and a pass costs a few instructions for each vector of
// scores. Functions here depend on the accumulator alone, so the 16-bit types share them.
#pragma once

#include "attention/vectors_cpu.h"
#include "common/philox.h"

namespace emblas {
namespace {

// Which queries a block of scores belongs to.
template <class A>
struct Place {
  const ScoreArgs<A>& args;
  int64_t sequence;
  int64_t head, group;  // of q, of k
  int64_t query;        // the first, within the sequence
  int64_t length;       // keys of the sequence
  int64_t first_key;    // row of k where the sequence begins
  int64_t count;        // of queries
  int64_t position;     // p_i of the first
  int64_t window_left, window_right;
};

// tanh, error about one unit of the last place: from exp2, and by its series near 0, where the
// difference of exponentials would cancel.
template <class V>
inline V tanh(V x) {
  using A = std::remove_reference_t<decltype(x[0])>;
  constexpr A far = 20, near = A(0.25);
  const V clamped = x < -far ? broadcast<V>(-far) : x > far ? broadcast<V>(far) : x;
  const V e = exp2(clamped * A(2 * kLog2E));
  const V square = x * x;
  V series = square * A(21844.0 / 6081075) - A(1382.0 / 155925);
  series = series * square + A(62.0 / 2835);
  series = series * square - A(17.0 / 315);
  series = series * square + A(2.0 / 15);
  series = series * square - A(1.0 / 3);
  series = x + x * square * series;
  if constexpr (std::is_same_v<A, double>) return (e - 1) / (e + 1);
  return (x < near) & (x > -near) ? series : (e - 1) / (e + 1);
}

// scores <- cap tanh(scores / cap), slope <- the derivative.
template <class A>
[[gnu::noinline]] void cap_scores(A* scores, int64_t count, A cap, A* slope) {
  const A inverse = 1 / cap;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const Vector<A> t = tanh(inverse * load(scores + i));
    store(scores + i, cap * t);
    if (slope) store(slope + i, 1 - t * t);
  }
}

// The distances key - p_i in a block: those of key j fill the vectors at band + origin - j, one
// query after another. At element e of the band the distance is `last` - e.
template <class A, int vectors>
struct Band {
  static constexpr int64_t width = vectors * kLanes<A>;
  alignas(64) A values[kKeyBlock + width];
  const int64_t origin, size, last;

  Band(const Place<A>& place, int64_t first, int64_t keys)
      : origin(keys - 1), size(keys - 1 + width), last(first + origin - place.position) {}
};

template <class A, int vectors>
[[gnu::noinline]] void add_distance_bias(const Place<A>& place, int64_t first, int64_t keys,
                                         A* scores) {
  constexpr int64_t lanes = kLanes<A>, width = vectors * lanes;
  const ScoreArgs<A>& args = place.args;
  Band<A, vectors> band(place, first, keys);
  const A slope =
      args.alibi_slopes ? args.alibi_slopes[place.sequence * args.alibi_stride + place.head] : 0;
  const int64_t radius = args.distance_radius;
  const A* table =
      args.distance_bias ? args.distance_bias + place.head * (2 * radius + 1) + radius : nullptr;
  for (int64_t e = 0; e < band.size; ++e) {
    const int64_t distance = band.last - e;
    A bias = slope * A(distance < 0 ? distance : -distance);
    if (table) bias += table[smaller(larger(distance, -radius), radius)];
    band.values[e] = bias * A(kLog2E);
  }
  for (int64_t j = 0; j < keys; ++j) {
    const A* bias = band.values + band.origin - j;
    A* row = scores + j * width;
    for (int64_t c = 0; c < width; c += lanes) store(row + c, load(row + c) + load(bias + c));
  }
}

// sums[x] += ds_ij over the pairs of distance x in the block; sums points at distance 0.
template <class A, int vectors>
[[gnu::noinline]] void add_by_distance(const Place<A>& place, int64_t first, int64_t keys,
                                       const A* ds, A* sums) {
  constexpr int64_t lanes = kLanes<A>, width = vectors * lanes;
  Band<A, vectors> band(place, first, keys);
  for (A& value : band.values) value = 0;
  for (int64_t j = 0; j < keys; ++j) {
    A* total = band.values + band.origin - j;
    const A* row = ds + j * width;
    for (int64_t c = 0; c < width; c += lanes) {
      store(total + c, load(total + c) + load_part(row + c, larger(0, place.count - c)));
    }
  }
  for (int64_t e = 0; e < keys - 1 + place.count; ++e) sums[band.last - e] += band.values[e];
}

template <class A, int vectors>
[[gnu::noinline]] void add_pair_bias(const Place<A>& place, int64_t first, int64_t keys, A* scores,
                                     A* scratch) {
  constexpr int64_t lanes = kLanes<A>;
  const auto& bias = place.args.pair_bias;
  read_transposed<vectors>(bias.at(place.sequence, place.head, place.query, place.length) + first,
                           bias.stride(place.length), place.count, keys, A(kLog2E), scratch);
  for (int64_t i = 0; i < keys * vectors * lanes; i += lanes) {
    store(scores + i, load(scores + i) + load(scratch + i));
  }
}

// keep[j][i] <- what dropout multiplies p_ij by. One run of the generator serves four keys; its
// rounds go over all queries of the tile together, so that they become vector instructions.
template <class A, int vectors>
[[gnu::noinline]] void draw_dropout(const Place<A>& place, int64_t first, int64_t keys, A* keep) {
  constexpr int64_t width = vectors * kLanes<A>;
  const Dropout<A>& dropout = place.args.dropout;
  const uint64_t seed = uint64_t(dropout.seeds[place.sequence]);
  for (int64_t four = first / 4; 4 * four < first + keys; ++four) {
    uint32_t words[4][width];
    for (int64_t i = 0; i < width; ++i) {
      words[0][i] = uint32_t(place.position + i);
      words[1][i] = uint32_t(four);
      words[2][i] = uint32_t(place.head);
      words[3][i] = 0;
    }
    PhiloxKey key(seed);
    for (int round = 0; round < kPhiloxRounds; ++round, key.advance()) {
      for (int64_t i = 0; i < width; ++i) {
        const Philox4 next =
            philox_round({{words[0][i], words[1][i], words[2][i], words[3][i]}}, key);
        for (int w = 0; w < 4; ++w) words[w][i] = next.word[w];
      }
    }
    for (int64_t j = larger(first, 4 * four); j < smaller(first + keys, 4 * four + 4); ++j) {
      for (int64_t i = 0; i < width; ++i) {
        keep[(j - first) * width + i] =
            words[j - 4 * four][i] < dropout.threshold ? A(0) : dropout.factor;
      }
    }
  }
}

// The windows and masks of a tile, for any key.
template <class A, int vectors>
class Mask {
  static constexpr int64_t lanes = kLanes<A>, width = vectors * lanes;
  using V = Vector<A>;
  using Index = decltype(V{} < V{});

 public:
  explicit Mask(const Place<A>& place) : place_(place) {
    const auto& args = place.args;
    prefix_ = args.prefix_len ? args.prefix_len[place.sequence] : 0;
    for (int64_t i = 0; i < width; ++i) {
      // The ids of a query are those of the key at its position.
      const int64_t p = place.position + smaller(i, place.count - 1);
      lane_[i / lanes][i % lanes] = i;
      branch_[i / lanes][i % lanes] = args.branch && p >= 0 ? args.branch[place.first_key + p] : -1;
      block_[i / lanes][i % lanes] =
          args.block_ids && p >= 0 ? args.block_ids[place.first_key + p] : -1;
    }
  }

  [[gnu::noinline]] bool any(int64_t first, int64_t keys) const {
    Index seen{};
    for (int64_t j = 0; j < keys; ++j) {
      for (int c = 0; c < vectors; ++c) seen |= ~hidden(first + j, c);
    }
    bool found = false;
    for (int64_t i = 0; i < lanes; ++i) found |= seen[i] != 0;
    return found;
  }

  [[gnu::noinline]] void apply(int64_t first, int64_t keys, A* scores) const {
    for (int64_t j = 0; j < keys; ++j, scores += width) {
      for (int c = 0; c < vectors; ++c) {
        const V s = load(scores + c * lanes);
        store(scores + c * lanes, hidden(first + j, c) ? broadcast<V>(A(-INFINITY)) : s);
      }
    }
  }

 private:
  Index hidden(int64_t key, int c) const {
    // Relative to the first query, and no farther from it than any lane can tell apart.
    const auto relative = [&](int64_t origin) {
      return Index{} + decltype(Index{}[0])(smaller(larger(key - origin, -width), width));
    };
    const auto& args = place_.args;
    Index out{};
    if (place_.window_right >= 0 && key >= prefix_) {
      out = relative(place_.position + place_.window_right) > lane_[c];
      if (args.block_ids) {
        const int32_t block = args.block_ids[place_.first_key + key];
        if (block >= 0) out &= block_[c] != block;
      }
    }
    if (place_.window_left >= 0) {
      out |= relative(place_.position - place_.window_left) < lane_[c];
    }
    if (args.branch) {
      const int32_t branch = args.branch[place_.first_key + key];
      if (branch != -1) out |= branch_[c] != branch;
    }
    return out;
  }

  const Place<A>& place_;
  int64_t prefix_;
  Index lane_[vectors], branch_[vectors], block_[vectors];
};

}  // namespace
}  // namespace emblas
