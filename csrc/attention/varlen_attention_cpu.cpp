// Packed attention on a CPU, with the queries across the lanes of the vectors.
//
// A tile of up to three vectors of queries is transposed once. Scores are then computed key by key,
// S[j][queries] = sum_c K[j][c] Qt[c][queries], and so is the result, Ot[c][queries] +=
// V[j][c] P[j][queries]: both are outer products of one broadcast element of K or V with vectors of
// queries, accumulated in registers. So K and V are read where they lie, without packing; maximum
// and sum of the softmax run down the lanes without any shuffle; and the number of keys needs no
// rounding up. Each lane does the same arithmetic whatever its neighbours hold, which is why the
// bits of a query don't depend on the batch.
//
// Keys come in blocks, with the running maximum and sum of the online softmax between them. Scores
// are kept in base 2: log2(e) is folded into the scale of the queries.
//
// The multiply-adds limit it: 2 d of them for each vector of scores, beside about 15 other
// instructions for the exponential.
#include <utility>

#include "attention/attention.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

constexpr int kTileVectors = 3;
// Elements broadcast at a time: kRows x kTileVectors accumulators fill the registers.
#if defined(EMBLAS_HAS_AVX512) || defined(EMBLAS_HAS_NEON)
constexpr int kRows = 8;  // of 32 registers
#else
constexpr int kRows = 4;  // of 16
#endif
constexpr int kKeyBlock = 64;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// x <- its transpose: blocks of 1, 2, 4, ... lanes are exchanged across the diagonal.
template <int width, class V, int... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane & width ? lanes + lane - width : lane)...);
  const V high = __builtin_shufflevector(a, b, (lane & width ? lanes + lane : lane + width)...);
  a = low;
  b = high;
}
template <int width = 1, class V, size_t lanes>
inline void transpose(V (&x)[lanes]) {
  if constexpr (width < int(lanes)) {
    for (int i = 0; i < int(lanes); ++i) {
      if (!(i & width)) {
        exchange<width>(x[i], x[i + width], std::make_integer_sequence<int, lanes>{});
      }
    }
    transpose<2 * width>(x);
  }
}

// total[r][c] += sum_i a[r a_row + i a_step] b[i][c] over i < depth; b is [depth][vectors], packed.
template <int rows, int vectors, class V, class A>
inline void multiply_add(V (&total)[rows][vectors], const A* a, int64_t a_row, int64_t a_step,
                         const A* b, int64_t depth) {
  constexpr int lanes = kLanes<A>;
  for (int64_t i = 0; i < depth; ++i) {
    V right[vectors];
    for (int c = 0; c < vectors; ++c) right[c] = load(b + (i * vectors + c) * lanes);
    for (int r = 0; r < rows; ++r) {
      const V left = broadcast<V>(a[r * a_row + i * a_step]);
      for (int c = 0; c < vectors; ++c) total[r][c] += left * right[c];
    }
  }
}

// scores[j][c] <- p = 2^(scores[j][c] - shift[c]), total[c] += p. Not inlined, so that the
// constants of exp2 find registers.
template <class T, int vectors, class V>
[[gnu::noinline]] void exponentiate(T* scores, int64_t keys, const V (&shift)[vectors],
                                    V (&total)[vectors]) {
  constexpr int lanes = kLanes<T>;
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

// The queries of one tile: `count` of them, in `vectors` vectors.
template <class T, int vectors>
struct Tile {
  static constexpr int lanes = kLanes<T>;
  static constexpr int width = vectors * lanes;
  using V = Vector<T>;
  using Index = decltype(V{} < V{});

  const VarlenAttentionArgs<T>& args;
  const int64_t count;
  const int64_t position;  // p_i of the first query
  T* const qt;             // [head_dim][width]
  T* const ot;             // [head_dim][width]
  T* const scores;         // [kKeyBlock][width]
  V maximum[vectors], total[vectors];

  Tile(const VarlenAttentionArgs<T>& args, int64_t count, int64_t position, T* scratch)
      : args(args),
        count(count),
        position(position),
        qt(scratch),
        ot(qt + args.head_dim * width),
        scores(ot + args.head_dim * width) {
    for (int c = 0; c < vectors; ++c) {
      maximum[c] = broadcast<V>(T(-INFINITY));
      total[c] = V{};
    }
    for (int64_t i = 0; i < args.head_dim * width; i += lanes) store(ot + i, V{});
  }

  // qt[c][i] = factor q[i][c]. Lanes beyond the last query repeat it.
  void read_queries(const T* q, T factor) {
    const int64_t head_dim = args.head_dim;
    for (int64_t column = 0; column < head_dim; column += lanes) {
      const int64_t c = smaller(column, head_dim - lanes);  // the last two blocks may overlap
      for (int i = 0; i < width; i += lanes) {
        V x[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
          x[lane] = factor * load(q + smaller(i + lane, count - 1) * args.q.token_stride + c);
        }
        transpose(x);
        for (int lane = 0; lane < lanes; ++lane) store(qt + (c + lane) * width + i, x[lane]);
      }
    }
  }

  void write_output(T* out) {
    const int64_t head_dim = args.head_dim;
    for (int i = 0; i < vectors; ++i) {
      const V factor = 1 / total[i];
      const int64_t rows = smaller(lanes, count - i * lanes);
      for (int64_t column = 0; column < head_dim; column += lanes) {
        const int64_t c = smaller(column, head_dim - lanes);
        V x[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
          const V o = factor * load(ot + (c + lane) * width + i * lanes);
          x[lane] = total[i] == 0 ? V{} : o;
        }
        transpose(x);
        for (int lane = 0; lane < rows; ++lane) {
          store(out + (i * lanes + lane) * args.out.token_stride + c, x[lane]);
        }
      }
    }
  }

  void write_lse(T* lse) {
    for (int64_t i = 0; i < count; ++i) {
      const T sum = total[i / lanes][i % lanes], top = maximum[i / lanes][i % lanes];
      lse[i] = sum == 0 ? T(-INFINITY) : top * T(kLn2) + std::log(sum);
    }
  }

  // Scores of the keys [j, j + rows) of a block that starts at key `first`.
  template <int rows>
  void score(const T* k, int64_t j, int64_t first, bool edge, V (&block_maximum)[vectors]) {
    const int64_t stride = args.k.token_stride;
    V s[rows][vectors] = {};
    multiply_add(s, k + j * stride, stride, 1, qt, args.head_dim);
    if (edge) hide(s, first + j);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < vectors; ++c) {
        block_maximum[c] = larger(block_maximum[c], s[r][c]);
        store(scores + (j + r) * width + c * lanes, s[r][c]);
      }
    }
  }

  // s = -inf where the window of the query doesn't hold the key.
  template <int rows>
  void hide(V (&s)[rows][vectors], int64_t key) {
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
        s[r][c] = hidden ? broadcast<V>(T(-INFINITY)) : s[r][c];
      }
    }
  }

  // One block of the online softmax: the keys [first, first + keys), k and v point at the first.
  void attend(const T* k, const T* v, int64_t first, int64_t keys) {
    const int64_t left = args.window_left, right = args.window_right;
    const bool edge = (right >= 0 && first + keys - 1 > position + right) ||
                      (left >= 0 && first < position + count - 1 - left);
    V top[vectors];
    for (int c = 0; c < vectors; ++c) top[c] = maximum[c];
    int64_t j = 0;
    for (; j + kRows <= keys; j += kRows) score<kRows>(k, j, first, edge, top);
    if constexpr (kRows == 8) {
      if (keys - j >= 4) score<4>(k, j, first, edge, top), j += 4;
    }
    if (keys - j >= 2) score<2>(k, j, first, edge, top), j += 2;
    if (keys - j >= 1) score<1>(k, j, first, edge, top);

    V rescale[vectors], shift[vectors];
    for (int c = 0; c < vectors; ++c) {
      // No key seen yet: any finite number gives exp2(-inf - shift) = 0.
      shift[c] = top[c] == T(-INFINITY) ? V{} : top[c];
      rescale[c] = exp2(maximum[c] - shift[c]);
      maximum[c] = top[c];
      total[c] *= rescale[c];
    }
    exponentiate<T>(scores, keys, shift, total);

    for (int64_t c = 0; c < args.head_dim; c += kRows) {
      V o[kRows][vectors];
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < vectors; ++i) {
          o[r][i] = rescale[i] * load(ot + (c + r) * width + i * lanes);
        }
      }
      multiply_add(o, v + c, 1, args.v.token_stride, scores, keys);
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < vectors; ++i) store(ot + (c + r) * width + i * lanes, o[r][i]);
      }
    }
  }
};

template <class T, int vectors>
void attend(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t head, int64_t query,
            int64_t count, T* scratch) {
  const int64_t first_query = args.cu_seqlens_q[sequence], first_key = args.cu_seqlens_k[sequence];
  const int64_t queries = args.cu_seqlens_q[sequence + 1] - first_query;
  const int64_t keys = args.cu_seqlens_k[sequence + 1] - first_key;
  Tile<T, vectors> tile(args, count, query + keys - queries, scratch);
  tile.read_queries(args.q.at(first_query + query, head), args.scale * T(kLog2E));

  const int64_t group = head / args.heads_per_group;
  const int64_t begin = args.window_left < 0 ? 0 : larger(0, tile.position - args.window_left);
  const int64_t end =
      args.window_right < 0 ? keys : smaller(keys, tile.position + count + args.window_right);
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    tile.attend(args.k.at(first_key + key, group), args.v.at(first_key + key, group), key,
                smaller(kKeyBlock, end - key));
  }
  tile.write_output(args.out.at(first_query + query, head));
  if (args.lse) tile.write_lse(args.lse + head * args.lse_stride + first_query + query);
}

template <class T>
constexpr int64_t kTileQueries = kTileVectors * kLanes<T>;

template <class T>
void forward(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t first, int64_t last,
             T* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t queries = args.cu_seqlens_q[sequence + 1] - args.cu_seqlens_q[sequence];
  const int64_t vectors = (queries + lanes - 1) / lanes;
  const int64_t tiles = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t item = first; item < last; ++item) {
    // Vectors are dealt out evenly: four make two tiles of two.
    const int64_t head = item / tiles, tile = item % tiles;
    const int64_t begin = vectors * tile / tiles, end = vectors * (tile + 1) / tiles;
    const int64_t query = begin * lanes, count = smaller(end * lanes, queries) - query;
    switch (end - begin) {
      case 1:
        attend<T, 1>(args, sequence, head, query, count, scratch);
        break;
      case 2:
        attend<T, 2>(args, sequence, head, query, count, scratch);
        break;
      default:
        attend<T, 3>(args, sequence, head, query, count, scratch);
    }
  }
}

template <class T>
constexpr VarlenAttention<T> kernel{kTileQueries<T>,
                                    (2 * kMaxHeadDim + kKeyBlock) * kTileQueries<T>, forward<T>};

}  // namespace

template <>
const AttentionKernels& table_of<AttentionKernels, Isa::EMBLAS_ISA>() {
  static constexpr AttentionKernels table{kernel<float>, kernel<double>};
  return table;
}

}  // namespace emblas
