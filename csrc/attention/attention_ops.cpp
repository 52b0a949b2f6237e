// Packed attention as torch operators on CPU tensors.
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "attention/inputs.h"
#include "attention/position_runs.h"
#include "common/aligned.h"
#include "common/isa.h"
#include "common/tensor.h"

namespace emblas {
namespace {

// The work of one sequence: so many items, each at so many positions of a common line, which the
// tasks divide evenly. A task owns the items whose first position lies in it.
struct Work {
  int64_t items, cost;
};

// body(sequence, first, last, scratch) over the items of all sequences; work(sequence) measures.
template <class A, class Work, class Body>
void for_items(int64_t batch, int64_t bytes_per_position, int64_t scratch_size, const Work& work,
               const Body& body) {
  std::vector<int64_t> start(batch + 1), cost(batch), items(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const auto measured = work(b);
    items[b] = measured.items;
    cost[b] = measured.cost;
    start[b + 1] = start[b] + items[b] * cost[b];
  }
  parallel_for(start[batch], bytes_per_position, [&](int64_t low, int64_t high) {
    const AlignedArray<A> scratch = aligned_array<A>(scratch_size);
    int64_t b = std::upper_bound(start.begin(), start.end(), low) - start.begin() - 1;
    for (; b < batch && start[b] < high; ++b) {
      const auto first_from = [&](int64_t position) {
        return std::min((std::max<int64_t>(position - start[b], 0) + cost[b] - 1) / cost[b],
                        items[b]);
      };
      body(b, first_from(low), first_from(high), scratch.get());
    }
  });
}

// Keys that a tile of queries reads, with the cost of its own reading and writing counted in keys.
template <class T>
int64_t keys_read(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t tile) {
  constexpr int64_t fixed_cost = 16;
  const int64_t keys = args.cu_seqlens_k[sequence + 1] - args.cu_seqlens_k[sequence];
  const bool windowed = args.window_left >= 0 && args.window_right >= 0 && !args.scores.masked();
  return fixed_cost +
         (windowed ? std::min(keys, args.window_left + args.window_right + tile) : keys);
}

template <class T>
int64_t tiles_of(const VarlenAttentionArgs<T>& args, int64_t sequence, int64_t tile) {
  return (args.cu_seqlens_q[sequence + 1] - args.cu_seqlens_q[sequence] + tile - 1) / tile;
}

Tensor gradient_like(ScalarType dtype, const std::optional<Tensor>& table, bool wanted) {
  if (!wanted) return empty_cpu<3>(dtype, {0, 0, 0});
  return empty_cpu<3>(dtype, {table->size(0), table->size(1), table->size(2)});
}

// The gradient of pair_bias: contiguous, zero where no block of pairs is seen.
template <class A>
struct PairGradient {
  const bool padded, wanted;
  Tensor grad;
  std::vector<int64_t> starts;

  PairGradient(const std::optional<Tensor>& bias, bool wanted,
               const std::vector<int64_t>& ragged_starts)
      : padded(wanted && bias->dim() == 4), wanted(wanted), grad(make(bias, wanted)) {
    if (!wanted) return;
    starts = ragged_starts;
    if (padded) {
      for (size_t b = 0; b < starts.size(); ++b) starts[b] = int64_t(b) * grad.stride(0);
    }
    std::fill(write<A>(grad), write<A>(grad) + grad.numel(), A(0));
  }

  static Tensor make(const std::optional<Tensor>& bias, bool wanted) {
    if (!wanted) return empty_cpu<2>(kScalarType<A>, {0, 0});
    if (bias->dim() == 2) return empty_cpu<2>(kScalarType<A>, {bias->size(0), bias->size(1)});
    return empty_cpu<4>(kScalarType<A>,
                        {bias->size(0), bias->size(1), bias->size(2), bias->size(3)});
  }

  PairMatrices<A> matrices() {
    if (!wanted) return {};
    return {.data = write<A>(grad),
            .starts = starts.data(),
            .head_stride = grad.stride(padded ? 1 : 0),
            .query_stride = padded ? grad.stride(2) : -1};
  }
};

// grad[head][distance] = the sums by distance of all sequences, one after the other; distances
// beyond the radius count at its ends.
template <class T, class A>
void add_sequences(const VarlenAttentionArgs<T>& args, int64_t batch, const A* sums, int64_t stride,
                   A* grad) {
  const int64_t radius = args.scores.distance_radius, width = 2 * radius + 1;
  parallel_for(args.heads, stride * int64_t(sizeof(A)), [&](int64_t low, int64_t high) {
    for (int64_t head = low; head < high; ++head) {
      A* const total = grad + head * width;
      std::fill(total, total + width, A(0));
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t queries = args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b];
        const int64_t keys = args.cu_seqlens_k[b + 1] - args.cu_seqlens_k[b];
        const A* from = sums + head * stride + args.cu_seqlens_q[b] + args.cu_seqlens_k[b];
        for (int64_t distance = 1 - keys; distance < queries; ++distance) {
          total[std::clamp(distance, -radius, radius) + radius] += from[distance + keys - 1];
        }
      }
    }
  });
}

constexpr char kDtypes[] = "q must be float32, float64, bfloat16 or float16";

std::tuple<Tensor, Tensor> varlen_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t, int64_t, const std::optional<double>& softmax_scale,
    int64_t window_left, int64_t window_right, bool return_lse, double softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& distance_bias,
    const std::optional<Tensor>& prefix_len, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& block_ids, const std::optional<Tensor>& position_keys,
    const std::optional<Tensor>& position_queries, const std::optional<Tensor>& position_lookup,
    const std::optional<Tensor>& pair_bias, double dropout_p,
    const std::optional<Tensor>& dropout_seeds) {
  const Inputs inputs{q,
                      k,
                      v,
                      cu_seqlens_q,
                      cu_seqlens_k,
                      softmax_scale,
                      window_left,
                      window_right,
                      softcap,
                      alibi_slopes,
                      distance_bias,
                      prefix_len,
                      branch,
                      block_ids,
                      position_keys,
                      position_queries,
                      position_lookup,
                      pair_bias,
                      dropout_p,
                      dropout_seeds};
  inputs.check_values();
  return visit_float(q.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t tokens = inputs.tokens(), heads = inputs.heads();
    Tensor out = empty_cpu<3>(q.scalar_type(), {tokens, heads, v.size(2)});
    Tensor lse = empty_cpu<2>(kScalarType<A>, {return_lse ? heads : 0, tokens});
    const auto prepared = inputs.prepare<A>();
    const auto args =
        inputs.args<T>(new_head_vectors<T>(out), return_lse ? write<A>(lse) : nullptr, prepared);
    const auto& kernel = kernels<AttentionKernels>().of(element);
    for_items<A>(
        inputs.batch(), (args.head_dim + args.value_dim) * int64_t(sizeof(T)),
        kernel.scratch_size(args, inputs.batch()),
        [&](int64_t b) {
          return Work{heads * tiles_of(args, b, kernel.tile_queries),
                      keys_read(args, b, kernel.tile_queries)};
        },
        [&](int64_t sequence, int64_t first, int64_t last, A* scratch) {
          kernel.forward(args, sequence, first, last, scratch);
        });
    return std::make_tuple(out, lse);
  });
}

// Gradients of q, k, v, distance_bias, position_keys, position_queries and pair_bias; without
// elements where they aren't wanted.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Wanted {
  bool distance_bias, positions, pair_bias;
};

Gradients gradients(const Inputs& inputs, const Tensor& grad_out,
                    const std::optional<Tensor>& grad_lse, const Tensor& out, const Tensor& lse,
                    Wanted wanted) {
  inputs.check_values();
  const Tensor &q = inputs.q, &k = inputs.k, &v = inputs.v;
  const int64_t tokens = inputs.tokens(), heads = inputs.heads();
  const char* message = "grad_out and out must have the shape of the result and the dtype of q";
  for (const Tensor* tensor : {&grad_out, &out}) {
    check_head_vectors(*tensor, message);
    check(tensor->scalar_type() == q.scalar_type() && tensor->size(0) == tokens &&
              tensor->size(1) == heads && tensor->size(2) == v.size(2),
          message);
  }
  return visit_float(q.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto is_lse = [&](const Tensor& tensor) {
      return tensor.is_cpu() && has_dtype<A>(tensor) && tensor.dim() == 2 &&
             tensor.size(0) == heads && tensor.size(1) == tokens && tensor.is_contiguous();
    };
    check(is_lse(lse) && (!grad_lse || is_lse(*grad_lse)),
          "lse and grad_lse must be contiguous (heads, tokens) CPU tensors of the forward's dtype");
    const auto like = [&](const Tensor& x) {
      return empty_cpu<3>(x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
    };
    Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
    const int64_t all_tokens = tokens + k.size(0), key_heads = inputs.key_heads();
    const bool need_bias = wanted.distance_bias && inputs.distance_bias;
    const int64_t distances = need_bias ? inputs.distance_bias->size(1) : 0;
    Tensor grad_distance_bias = empty_cpu<2>(kScalarType<A>, {need_bias ? heads : 0, distances});
    std::vector<A> sums(need_bias ? heads * all_tokens : 0);

    const auto prepared = inputs.prepare<A>();
    const bool need_keys = wanted.positions && inputs.position_keys;
    const bool need_queries = wanted.positions && inputs.position_queries;
    const int64_t position_sums = all_tokens * padded_dim(q.size(2));  // of a head
    Tensor grad_position_keys = gradient_like(kScalarType<A>, inputs.position_keys, need_keys);
    Tensor grad_position_queries =
        gradient_like(kScalarType<A>, inputs.position_queries, need_queries);
    const std::unique_ptr<A[]> key_sums(need_keys ? new A[key_heads * position_sums] : nullptr);
    const std::unique_ptr<A[]> query_sums(need_queries ? new A[heads * position_sums] : nullptr);

    const bool need_pairs = wanted.pair_bias && inputs.pair_bias;
    PairGradient<A> pairs(inputs.pair_bias, need_pairs, prepared.pair_starts);
    // Backward only reads out and lse.
    const HeadVectors<T> given{const_cast<T*>(read<T>(out)), out.stride(0), out.stride(1)};
    const VarlenAttentionBackwardArgs<T> args{
        .forward = inputs.args<T>(given, const_cast<A*>(read<A>(lse)), prepared),
        .grad_out = head_vectors<T>(grad_out),
        .grad_lse = grad_lse ? read<A>(*grad_lse) : nullptr,
        .grad_q = new_head_vectors<T>(grad_q),
        .grad_k = new_head_vectors<T>(grad_k),
        .grad_v = new_head_vectors<T>(grad_v),
        .distance_sums = need_bias ? sums.data() : nullptr,
        .distance_sums_stride = all_tokens,
        .position_key_sums = key_sums.get(),
        .position_query_sums = query_sums.get(),
        .position_sums_stride = position_sums,
        .grad_pair_bias = pairs.matrices()};
    const VarlenAttentionArgs<T>& forward = args.forward;
    const auto& kernel = kernels<AttentionBackwardKernels>().of(element);
    const int64_t tile = kernels<AttentionKernels>().of(element).tile_queries;
    for_items<A>(
        inputs.batch(), 2 * (forward.head_dim + forward.value_dim) * int64_t(sizeof(T)),
        kernel.scratch_size(args, inputs.batch()),
        [&](int64_t b) {
          return Work{inputs.key_heads(), std::max<int64_t>(1, tiles_of(forward, b, tile)) *
                                              forward.heads_per_group *
                                              keys_read(forward, b, tile)};
        },
        [&](int64_t sequence, int64_t first, int64_t last, A* scratch) {
          kernel.backward(args, sequence, first, last, scratch);
        });
    if (need_bias) {
      add_sequences(forward, inputs.batch(), sums.data(), args.distance_sums_stride,
                    write<A>(grad_distance_bias));
    }
    if (need_keys) {
      add_sequences<T>(forward, inputs.batch(), key_sums.get(), position_sums, prepared.runs,
                       grad_position_keys);
    }
    if (need_queries) {
      add_sequences<T>(forward, inputs.batch(), query_sums.get(), position_sums, prepared.runs,
                       grad_position_queries);
    }
    return std::make_tuple(grad_q, grad_k, grad_v, grad_distance_bias, grad_position_keys,
                           grad_position_queries, pairs.grad);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t, int64_t, const std::optional<double>& softmax_scale,
    int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& distance_bias,
    const std::optional<Tensor>& prefix_len, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& block_ids, bool need_distance_bias) {
  const std::optional<Tensor> none;
  const Inputs inputs{q,
                      k,
                      v,
                      cu_seqlens_q,
                      cu_seqlens_k,
                      softmax_scale,
                      window_left,
                      window_right,
                      softcap,
                      alibi_slopes,
                      distance_bias,
                      prefix_len,
                      branch,
                      block_ids,
                      none,
                      none,
                      none,
                      none,
                      0.0,
                      none};
  const auto all =
      gradients(inputs, grad_out, grad_lse, out, lse, {need_distance_bias, false, false});
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all), std::get<3>(all)};
}

Gradients varlen_attention_biases_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t, int64_t, const std::optional<double>& softmax_scale,
    int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& distance_bias,
    const std::optional<Tensor>& prefix_len, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& block_ids, const std::optional<Tensor>& position_keys,
    const std::optional<Tensor>& position_queries, const std::optional<Tensor>& position_lookup,
    const std::optional<Tensor>& pair_bias, double dropout_p,
    const std::optional<Tensor>& dropout_seeds, bool need_distance_bias, bool need_positions,
    bool need_pair_bias) {
  const Inputs inputs{q,
                      k,
                      v,
                      cu_seqlens_q,
                      cu_seqlens_k,
                      softmax_scale,
                      window_left,
                      window_right,
                      softcap,
                      alibi_slopes,
                      distance_bias,
                      prefix_len,
                      branch,
                      block_ids,
                      position_keys,
                      position_queries,
                      position_lookup,
                      pair_bias,
                      dropout_p,
                      dropout_seeds};
  return gradients(inputs, grad_out, grad_lse, out, lse,
                   {need_distance_bias, need_positions, need_pair_bias});
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, int window_left,"
      " int window_right, bool return_lse, float softcap=0.0, Tensor? alibi_slopes=None,"
      " Tensor? distance_bias=None, Tensor? prefix_len=None, Tensor? branch=None,"
      " Tensor? block_ids=None, Tensor? position_keys=None, Tensor? position_queries=None,"
      " Tensor? position_lookup=None, Tensor? pair_bias=None, float dropout_p=0.0,"
      " Tensor? dropout_seeds=None) -> (Tensor out, Tensor lse)");
  library.def(
      "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
      " Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
      " SymInt max_seqlen_k, float? softmax_scale, int window_left, int window_right,"
      " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? distance_bias=None,"
      " Tensor? prefix_len=None, Tensor? branch=None, Tensor? block_ids=None,"
      " bool need_distance_bias=False)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_distance_bias)");
  library.def(
      "varlen_attention_biases_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k,"
      " Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, int window_left,"
      " int window_right, float softcap, Tensor? alibi_slopes, Tensor? distance_bias,"
      " Tensor? prefix_len, Tensor? branch, Tensor? block_ids, Tensor? position_keys,"
      " Tensor? position_queries, Tensor? position_lookup, Tensor? pair_bias, float dropout_p,"
      " Tensor? dropout_seeds, bool need_distance_bias, bool need_positions, bool need_pair_bias)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_distance_bias,"
      " Tensor grad_position_keys, Tensor grad_position_queries, Tensor grad_pair_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("varlen_attention", TORCH_BOX(&emblas::varlen_attention));
  library.impl("varlen_attention_backward", TORCH_BOX(&emblas::varlen_attention_backward));
  library.impl("varlen_attention_biases_backward",
               TORCH_BOX(&emblas::varlen_attention_biases_backward));
}
