// Packed attention on a CPU: backward, the five products of a pair in one pass.
//
// A task is one sequence and key head. Tiles of queries meet blocks of keys: scores P and then dS,
// [keys][queries], are made from S = K Qt and dP = V Gt as in forward. The other three products
// have the elements c across the lanes: dQ[i][c] += dS[j][i] K[j][c] stays with the tile, and
// dK[j][c] += dS[j][i] Q[i][c] and dV[j][c] += P[j][i] G[i][c] are added to the rows of the keys,
// tile after tile and head after head in a fixed order: nothing is atomic, and the bits depend on
// the sequence alone.
//
// The multiply-adds limit it, 5 d for each vector of scores.
#include "attention/tile_cpu.h"
#include "common/isa.h"

namespace emblas {
namespace {

// Rows of several arrays that are used next, fetched a few at a time while products keep the
// arithmetic busy.
class NextRows {
 public:
  template <class T>
  void add(const HeadVectors<T>& x, int64_t token, int64_t head, int64_t count, int64_t dim) {
    const int64_t size = sizeof(T);
    arrays_[arrays_used_++] = {reinterpret_cast<const char*>(x.at(token, head)),
                               x.token_stride * size, dim * size, count};
    rows_ = larger(rows_, count);
    bytes_ += count * dim * size;
  }

  // Spreads them over so many calls of fetch(). Where they would fill the second level of caches,
  // none is fetched: computing takes so long then that waiting for them doesn't count.
  void spread(int64_t calls) {
    constexpr int64_t most = int64_t(1) << 19;
    rows_per_call_ = bytes_ > most ? 0 : double(rows_) / double(calls);
  }

  void fetch() {
    progress_ += rows_per_call_;
    for (; double(row_) < progress_; ++row_) {
      for (int i = 0; i < arrays_used_; ++i) {
        const Array& x = arrays_[i];
        if (row_ >= x.count) continue;
        const char* const from = x.data + row_ * x.stride;
        for (int64_t c = 0; c < x.bytes; c += 64) __builtin_prefetch(from + c, 0, 2);
      }
    }
  }

 private:
  struct Array {
    const char* data;
    int64_t stride, bytes, count;  // of the rows
  };
  Array arrays_[8];
  int arrays_used_ = 0;
  int64_t rows_ = 0, row_ = 0, bytes_ = 0;
  double rows_per_call_ = 0, progress_ = 0;
};

template <class T, int vectors>
struct Backward : TileOf<T, vectors> {
  using Tile = TileOf<T, vectors>;
  using Tile::args, Tile::lanes, Tile::width, Tile::count, Tile::head, Tile::first_query;
  using typename Tile::A, typename Tile::V;

  const VarlenAttentionBackwardArgs<T>& all;
  const int64_t head_dim = round_up(args.head_dim, lanes);
  const int64_t value_dim = round_up(args.value_dim, lanes);
  // Of grad_out: the scale, except where sums of dS itself are wanted.
  const A factor = all.unscaled() ? A(1) : args.scale;
  A* const qt;            // [head_dim][width]
  A* const gt;            // [value_dim][width]
  A *const q, *const dq;  // [width][head_dim]
  A* const g;             // [width][value_dim]
  A *const p, *const ds;  // [kKeyBlock][width]
  A* const slope;         // of the softcap, [kKeyBlock][width]
  A* const keep;          // of dropout, [kKeyBlock][width]
  A* const extra;         // of biases
  const KeyValues<T>& from;
  NextRows& next;
  V lse[vectors], d[vectors];

  static constexpr int64_t scratch_size(int64_t head_dim, int64_t value_dim) {
    return 3 * (head_dim + value_dim) * width + 4 * kKeyBlock * width + bias_scratch(head_dim);
  }

  Backward(const Tile& tile, const VarlenAttentionBackwardArgs<T>& all, const KeyValues<T>& from,
           NextRows& next, A* scratch)
      : Tile(tile),
        all(all),
        qt(scratch),
        gt(qt + head_dim * width),
        q(gt + value_dim * width),
        dq(q + head_dim * width),
        g(dq + head_dim * width),
        p(g + value_dim * width),
        ds(p + kKeyBlock * width),
        slope(ds + kKeyBlock * width),
        keep(slope + kKeyBlock * width),
        extra(keep + kKeyBlock * width),
        from(from),
        next(next) {}

  void run(Rows<A> dk, Rows<A> dv) {
    // dS is wanted times the scale, in both its products: gradients times the scale give it.
    read_transposed<vectors>(args.q.at(first_query, head), args.q.token_stride, count,
                             args.head_dim, args.scale * A(kLog2E), qt);
    read_transposed<vectors>(all.grad_out.at(first_query, head), all.grad_out.token_stride, count,
                             args.value_dim, factor, gt);
    read_rows();
    const auto q_rows = near(args.q, first_query, head, count, args.head_dim, q);
    const auto g_rows = near(all.grad_out, first_query, head, count, args.value_dim, g);
    for (int64_t i = 0; i < count * head_dim; i += lanes) store(dq + i, V{});
    fetch_rows(all.grad_q, first_query, head, count, args.head_dim);
    for (int64_t key = Tile::begin; key < Tile::end; key += kKeyBlock) {
      const int64_t keys = smaller(kKeyBlock, Tile::end - key);
      if (!Tile::sees(key, keys)) continue;
      const Rows<A> dk_rows = dk.from(key);
      weigh(key, keys, q_rows, dk_rows);
      add_outer(dv.from(key), keys, args.value_dim, p, width, 1, g_rows, count);
      add_outer(dk_rows, keys, args.head_dim, ds, width, 1, q_rows, count);
    }
    write_rows<T>({dq, head_dim}, all.grad_q, first_query, head, count, args.head_dim);
  }

  // lse in base 2, and d = factor D.
  void read_rows() {
    for (int c = 0; c < vectors; ++c) d[c] = V{};
    for_transposed<vectors>(args.out.at(first_query, head), args.out.token_stride, count,
                            args.value_dim, [&](auto& x, int64_t c, int64_t i) {
                              for (int64_t lane = 0; lane < lanes; ++lane) {
                                d[i / lanes] += x[lane] * load(gt + (c + lane) * width + i);
                              }
                            });
    const int64_t row = head * args.lse_stride + first_query;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t query = row + smaller(i, count - 1);
      // A query that saw no key: exp2(s - inf) = 0 for all of them.
      const A sum = args.lse[query];
      lse[i / lanes][i % lanes] = sum == A(-INFINITY) ? A(INFINITY) : sum * A(kLog2E);
      if (all.grad_lse) d[i / lanes][i % lanes] -= factor * all.grad_lse[query];
    }
  }

  // p, ds and the share of dq of the keys [first, first + keys), with what their biases add to it
  // and to the rows of dk.
  void weigh(int64_t first, int64_t keys, Rows<const A> q_rows, Rows<A> dk) {
    const bool dropped = args.scores.dropout.seeds;
    V unused[vectors] = {};
    const auto k = from.keys(first), v = from.values(first);
    for_rows(keys, [&]<int rows>(Constant<rows>, int64_t j) {
      V s[rows][vectors] = {};
      next.fetch();
      multiply_add(s, v.data + j * v.stride, v.stride, 1, gt, width, args.value_dim);
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < vectors; ++c) {
          store(ds + (j + r) * width + c * lanes, dropped ? s[r][c] : s[r][c] - d[c]);
        }
      }
    });
    if (dropped) {
      draw_dropout<A, vectors>(Tile::place(), first, keys, keep);
      for (int64_t i = 0; i < keys * width; i += lanes) {
        store(ds + i, load(keep + i) * load(ds + i) - d[i / lanes % vectors]);
      }
    }
    Tile::score(k, qt, first, keys, p, unused, slope, extra);
    exponentiate<A>(p, keys, lse, unused);
    for (int64_t i = 0; i < keys * width; i += lanes) store(ds + i, load(p + i) * load(ds + i));
    if (dropped) {
      for (int64_t i = 0; i < keys * width; i += lanes) store(p + i, load(p + i) * load(keep + i));
    }
    bias_gradients(first, keys, q_rows, dk);
    if (args.scores.softcap != 0) {
      for (int64_t i = 0; i < keys * width; i += lanes) {
        store(ds + i, load(slope + i) * load(ds + i));
      }
    }
    add_outer({dq, head_dim}, count, args.head_dim, ds, 1, width, k, keys);
  }

  // The gradients of the biases from ds; after it, ds is times the scale.
  [[gnu::noinline]] void bias_gradients(int64_t first, int64_t keys, Rows<const A> q_rows,
                                        Rows<A> dk) {
    const Place<A> place = Tile::place();
    const int64_t row = args.cu_seqlens_q[Tile::sequence] + args.cu_seqlens_k[Tile::sequence];
    if (all.distance_sums) {
      A* const sums = all.distance_sums + head * all.distance_sums_stride + row;
      add_by_distance<A, vectors>(place, first, keys, ds, sums + place.length - 1);
    }
    if (all.grad_pair_bias.data) {
      const auto& grad = all.grad_pair_bias;
      write_transposed<vectors>(ds, count, keys,
                                grad.at(place.sequence, head, place.query, place.length) + first,
                                grad.stride(place.length));
    }
    if (all.unscaled()) {
      for (int64_t i = 0; i < keys * width; i += lanes) store(ds + i, args.scale * load(ds + i));
    }
    if (args.scores.positions.any()) {
      const auto& positions = args.scores.positions;
      const auto sums = [&](A* from, int64_t h) -> A* {
        return from ? from + h * all.position_sums_stride + row * positions.stride : nullptr;
      };
      Positions<A, vectors>(place, first, keys, args.head_dim, extra)
          .add_gradients(ds, q_rows, from.keys(first), {dq, head_dim}, dk,
                         sums(all.position_key_sums, Tile::group),
                         sums(all.position_query_sums, head));
    }
  }
};

template <class T>
int64_t scratch_size(const VarlenAttentionBackwardArgs<T>& all, int64_t batch) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t head_dim = round_up(all.forward.head_dim, lanes);
  const int64_t value_dim = round_up(all.forward.value_dim, lanes);
  const int64_t keys = longest(all.forward.cu_seqlens_k, batch);
  return Backward<T, kTileVectors>::scratch_size(head_dim, value_dim) +
         KeyValues<T>::scratch_size(all.forward, keys) + keys * (head_dim + value_dim);
}

template <class T>
void backward(const VarlenAttentionBackwardArgs<T>& all, int64_t sequence, int64_t first,
              int64_t last, Accumulator<T>* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  const VarlenAttentionArgs<T>& args = all.forward;
  const Tiles<T> tiles{args.cu_seqlens_q[sequence + 1] - args.cu_seqlens_q[sequence]};
  const int64_t first_key = args.cu_seqlens_k[sequence];
  const int64_t keys = args.cu_seqlens_k[sequence + 1] - first_key;
  const auto& positions = args.scores.positions;
  // Sums of this sequence for a head: so many numbers.
  const auto clear_position_sums = [&](Accumulator<T>* from, int64_t head) {
    if (!from || tiles.queries == 0 || keys == 0) return;
    from += head * all.position_sums_stride +
            (args.cu_seqlens_q[sequence] + first_key) * positions.stride;
    const int64_t runs = positions.run_of(tiles.queries - 1) - positions.run_of(1 - keys) + 1;
    for (int64_t i = 0; i < runs * positions.stride; ++i) from[i] = 0;
  };
  const auto rows_after = [&](int64_t head) {
    NextRows next;
    const int64_t query = args.cu_seqlens_q[sequence];
    if (++head == last * args.heads_per_group) return next;
    next.add(args.q, query, head, tiles.queries, args.head_dim);
    next.add(args.out, query, head, tiles.queries, args.value_dim);
    next.add(all.grad_out, query, head, tiles.queries, args.value_dim);
    next.add(all.grad_q, query, head, tiles.queries, args.head_dim);
    if (head % args.heads_per_group == 0) {
      const int64_t group = head / args.heads_per_group;
      next.add(args.k, first_key, group, keys, args.head_dim);
      next.add(args.v, first_key, group, keys, args.value_dim);
      next.add(all.grad_k, first_key, group, keys, args.head_dim);
      next.add(all.grad_v, first_key, group, keys, args.value_dim);
    }
    next.spread(tiles.count * ((keys + kRows - 1) / kRows));
    return next;
  };
  for (int64_t group = first; group < last; ++group) {
    const KeyValues<T> from(args, sequence, group * args.heads_per_group, 0, tiles.queries,
                            scratch);
    const Rows<Accumulator<T>> dk{from.free, round_up(args.head_dim, lanes)};
    const Rows<Accumulator<T>> dv{dk.from(keys).data, round_up(args.value_dim, lanes)};
    Accumulator<T>* const free = dv.from(keys).data;
    for (Accumulator<T>* x = dk.data; x < free; x += lanes) store(x, Vector<T>{});
    clear_position_sums(all.position_key_sums, group);
    fetch_rows(all.grad_k, first_key, group, keys, args.head_dim);
    fetch_rows(all.grad_v, first_key, group, keys, args.value_dim);
    for (int64_t h = 0; h < args.heads_per_group; ++h) {
      const int64_t head = group * args.heads_per_group + h;
      NextRows next = rows_after(head);
      clear_position_sums(all.position_query_sums, head);
      if (all.distance_sums) {
        Accumulator<T>* sums = all.distance_sums + head * all.distance_sums_stride +
                               args.cu_seqlens_q[sequence] + first_key;
        for (int64_t i = 0; i < tiles.queries + keys; ++i) sums[i] = 0;
      }
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        tiles.at(tile, [&]<int vectors>(Constant<vectors>, int64_t query, int64_t count) {
          const TileOf<T, vectors> tile(args, sequence, head, query, count);
          Backward<T, vectors>(tile, all, from, next, free).run(dk, dv);
        });
      }
    }
    write_rows<T>({dk.data, dk.stride}, all.grad_k, first_key, group, keys, args.head_dim);
    write_rows<T>({dv.data, dv.stride}, all.grad_v, first_key, group, keys, args.value_dim);
  }
}

template <class T>
constexpr VarlenAttentionBackward<T> kernel{scratch_size<T>, backward<T>};

}  // namespace

template <>
const AttentionBackwardKernels& table_of<AttentionBackwardKernels, Isa::EMBLAS_ISA>() {
  static constexpr AttentionBackwardKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                                  kernel<float16>};
  return table;
}

}  // namespace emblas
