// Packed attention on a CPU: forward.
//
// Keys come in blocks, with the running maximum and sum of the online softmax between them:
// S[j][queries] = sum_c K[j][c] Qt[c][queries], then O[i][c] += P[j][i] V[j][c], where the elements
// c lie across the lanes: results need no transpose.
//
// The multiply-adds limit it: 2 d of them for each vector of scores, beside about 15 other
// instructions for the exponential.
#include "attention/tile_cpu.h"
#include "common/isa.h"

namespace emblas {
namespace {

template <class T, int vectors>
struct Forward : TileOf<T, vectors> {
  using Tile = TileOf<T, vectors>;
  using Tile::args, Tile::lanes, Tile::width, Tile::count;
  using typename Tile::A, typename Tile::V;

  const int64_t value_dim = round_up(args.value_dim, lanes);
  A* const qt;      // [head_dim][width]
  A* const out;     // [width][value_dim]
  A* const scores;  // [kKeyBlock][width]
  A* const extra;   // of biases, then of dropout
  const KeyValues<T>& from;
  V maximum[vectors], total[vectors];

  Forward(const Tile& tile, const KeyValues<T>& from, A* scratch)
      : Tile(tile),
        qt(scratch),
        out(qt + round_up(args.head_dim, lanes) * width),
        scores(out + value_dim * width),
        extra(scores + kKeyBlock * width),
        from(from) {
    for (int c = 0; c < vectors; ++c) {
      maximum[c] = broadcast<V>(A(-INFINITY));
      total[c] = V{};
    }
    for (int64_t i = 0; i < count * value_dim; i += lanes) store(out + i, V{});
  }

  void run() {
    read_transposed<vectors>(args.q.at(Tile::first_query, Tile::head), args.q.token_stride, count,
                             args.head_dim, args.scale * A(kLog2E), qt);
    fetch_rows(args.out, Tile::first_query, Tile::head, count, args.value_dim);
    for (int64_t key = Tile::begin; key < Tile::end; key += kKeyBlock) {
      const int64_t keys = smaller(kKeyBlock, Tile::end - key);
      if (Tile::sees(key, keys)) attend(key, keys);
    }
    for (int64_t i = 0; i < count; ++i) {
      const A sum = total[i / lanes][i % lanes];
      if (sum != 0) {
        scale_row(i, 1 / sum);
      } else {  // no key seen, whatever the values hold
        for (int64_t c = 0; c < value_dim; c += lanes) store(out + i * value_dim + c, V{});
      }
    }
    write_rows<T>({out, value_dim}, args.out, Tile::first_query, Tile::head, count, args.value_dim);
    if (args.lse) write_lse(args.lse + Tile::head * args.lse_stride + Tile::first_query);
  }

  void scale_row(int64_t i, A factor) {
    A* const row = out + i * value_dim;
    for (int64_t c = 0; c < value_dim; c += lanes) store(row + c, factor * load(row + c));
  }

  void write_lse(A* lse) const {
    for (int64_t i = 0; i < count; ++i) {
      const A sum = total[i / lanes][i % lanes], top = maximum[i / lanes][i % lanes];
      lse[i] = sum == 0 ? A(-INFINITY) : top * A(kLn2) + std::log(sum);
    }
  }

  // One block of the online softmax: the keys [first, first + keys).
  void attend(int64_t first, int64_t keys) {
    V top[vectors];
    for (int c = 0; c < vectors; ++c) top[c] = maximum[c];
    Tile::score(from.keys(first), qt, first, keys, scores, top, nullptr, extra);

    V shift[vectors];
    A rescale[width];
    for (int c = 0; c < vectors; ++c) {
      // No key seen yet: any finite number gives exp2(-inf - shift) = 0.
      shift[c] = top[c] == A(-INFINITY) ? V{} : top[c];
      // Sums of nothing may stay as they are.
      const V factor =
          maximum[c] == A(-INFINITY) ? broadcast<V>(A(1)) : exp2(maximum[c] - shift[c]);
      store(rescale + c * lanes, factor);
      maximum[c] = top[c];
      total[c] *= factor;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (rescale[i] != 1) scale_row(i, rescale[i]);
    }
    exponentiate<A>(scores, keys, shift, total);
    if (args.scores.dropout.seeds) {
      draw_dropout<A, vectors>(Tile::place(), first, keys, extra);
      for (int64_t i = 0; i < keys * width; i += lanes) {
        store(scores + i, load(scores + i) * load(extra + i));
      }
    }
    add_outer({out, value_dim}, count, args.value_dim, scores, 1, width, from.values(first), keys);
  }
};

template <class T>
int64_t scratch_size(const VarlenAttentionArgs<T>& args, int64_t batch) {
  const int64_t head_dim = round_up(args.head_dim, kLanes<T>);
  const int64_t value_dim = round_up(args.value_dim, kLanes<T>);
  return KeyValues<T>::scratch_size(args, longest(args.cu_seqlens_k, batch)) +
         bias_scratch(head_dim) + (head_dim + value_dim + kKeyBlock) * kTileQueries<T>;
}

template <class T>
void forward(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t first, int64_t last,
             Accumulator<T>* scratch) {
  const Tiles<T> tiles{args.cu_seqlens_q[sequence + 1] - args.cu_seqlens_q[sequence]};
  while (first < last) {
    // The heads of one group share their keys.
    const int64_t end = smaller(last, round_up(first + 1, args.heads_per_group * tiles.count));
    const int64_t head = first / tiles.count;
    const bool one_head = (end - 1) / tiles.count == head;
    const int64_t query = one_head ? tiles.first(first % tiles.count) : 0;
    const int64_t behind = one_head ? tiles.first((end - 1) % tiles.count + 1) : tiles.queries;
    const KeyValues<T> from(args, sequence, head, query, behind - query, scratch);
    for (; first < end; ++first) {
      tiles.at(first % tiles.count,
               [&]<int vectors>(Constant<vectors>, int64_t query, int64_t count) {
                 const TileOf<T, vectors> tile(args, sequence, first / tiles.count, query, count);
                 Forward<T, vectors>(tile, from, from.free).run();
               });
    }
  }
}

template <class T>
constexpr VarlenAttention<T> kernel{kTileQueries<T>, scratch_size<T>, forward<T>};

}  // namespace

template <>
const AttentionKernels& table_of<AttentionKernels, Isa::EMBLAS_ISA>() {
  static constexpr AttentionKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                          kernel<float16>};
  return table;
}

}  // namespace emblas
