// Packed attention as torch operators on CPU tensors.
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "common/isa.h"
#include "common/packed.h"
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
  const int64_t bytes = (scratch_size * int64_t(sizeof(A)) + 63) / 64 * 64;
  parallel_for(start[batch], bytes_per_position, [&](int64_t low, int64_t high) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes),
                                                              &std::free);
    if (!scratch) throw std::bad_alloc();
    int64_t b = std::upper_bound(start.begin(), start.end(), low) - start.begin() - 1;
    for (; b < batch && start[b] < high; ++b) {
      const auto first_from = [&](int64_t position) {
        return std::min((std::max<int64_t>(position - start[b], 0) + cost[b] - 1) / cost[b],
                        items[b]);
      };
      body(b, first_from(low), first_from(high), static_cast<A*>(scratch.get()));
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

void check_head_vectors(const Tensor& tensor, const char* message) {
  check(tensor.is_cpu() && tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) <= 1),
        message);
}

template <class T>
HeadVectors<const T> head_vectors(const Tensor& tensor) {
  return {read<T>(tensor), tensor.stride(0), tensor.stride(1)};
}
template <class T>
HeadVectors<T> new_head_vectors(const Tensor& tensor) {
  return {write<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

void check_offsets(const Tensor& offsets, int64_t batch, int64_t total, const char* type_message,
                   const char* value_message) {
  check_vector<int32_t>(offsets, batch + 1, type_message);
  check(valid_cu_seqlens(read<int32_t>(offsets), batch, total), value_message);
}

// What forward and backward are given alike.
struct Inputs {
  const Tensor &q, &k, &v, &cu_seqlens_q, &cu_seqlens_k;
  const std::optional<double>& softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  const std::optional<Tensor>&alibi_slopes, &distance_bias, &prefix_len, &branch, &block_ids;

  int64_t tokens() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t key_heads() const { return k.size(1); }
  int64_t batch() const { return cu_seqlens_q.size(0) - 1; }

  void check_values() const {
    check_head_vectors(q, "q must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
    check_head_vectors(k, "k must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
    check_head_vectors(v, "v must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
    check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
          "q, k and v must have one dtype");
    check(v.size(0) == k.size(0) && v.size(1) == k.size(1),
          "k and v must have the same tokens and heads");
    check(k.size(2) == q.size(2), "k must have the head_dim of q");
    check(key_heads() > 0 ? heads() % key_heads() == 0 : heads() == 0,
          "the heads of q must be a multiple of the heads of k");
    check(q.size(2) >= 1 && q.size(2) <= kMaxHeadDim && v.size(2) >= 1 && v.size(2) <= kMaxHeadDim,
          "head_dim must be from 1 to 256");
    check(cu_seqlens_q.dim() == 1 && batch() >= 0,
          "cu_seqlens_q must be a vector of at least one element");
    check_offsets(
        cu_seqlens_q, batch(), tokens(), "cu_seqlens_q must be a contiguous int32 CPU vector",
        "cu_seqlens_q must start at 0, never decrease and end at the number of tokens of q");
    check_offsets(
        cu_seqlens_k, batch(), k.size(0),
        "cu_seqlens_k must be a contiguous int32 CPU vector as long as cu_seqlens_q",
        "cu_seqlens_k must start at 0, never decrease and end at the number of tokens of k");
    check_ids(prefix_len, batch(), "prefix_len must be a contiguous int32 vector per sequence");
    check_ids(branch, k.size(0), "branch must be a contiguous int32 vector, one per token of k");
    check_ids(block_ids, k.size(0),
              "block_ids must be a contiguous int32 vector, one per token of k");
    const ScalarType accumulator = has_dtype<double>(q) ? ScalarType::Double : ScalarType::Float;
    const auto is_table = [&](const Tensor& tensor) {
      return tensor.is_cpu() && tensor.scalar_type() == accumulator && tensor.dim() == 2 &&
             tensor.is_contiguous();
    };
    check(!alibi_slopes || (is_table(*alibi_slopes) && alibi_slopes->size(1) == heads() &&
                            (alibi_slopes->size(0) == 1 || alibi_slopes->size(0) == batch())),
          "alibi_slopes must be contiguous (1 or batch, heads), of the accumulator's dtype");
    check(!distance_bias || (is_table(*distance_bias) && distance_bias->size(0) == heads() &&
                             distance_bias->size(1) % 2 == 1),
          "distance_bias must be contiguous (heads, 2 radius + 1), of the accumulator's dtype");
  }

  static void check_ids(const std::optional<Tensor>& ids, int64_t size, const char* message) {
    if (ids) check_vector<int32_t>(*ids, size, message);
  }
  template <class E>
  static const E* read_optional(const std::optional<Tensor>& tensor) {
    return tensor ? read<E>(*tensor) : nullptr;
  }

  template <class T>
  VarlenAttentionArgs<T> args(const HeadVectors<T>& out, Accumulator<T>* lse) const {
    constexpr int64_t widest = int64_t(1) << 32;  // sees all keys, and can be added to a position
    return {
        .q = head_vectors<T>(q),
        .k = head_vectors<T>(k),
        .v = head_vectors<T>(v),
        .out = out,
        .lse = lse,
        .lse_stride = tokens(),
        .heads = heads(),
        .heads_per_group = key_heads() ? heads() / key_heads() : 1,
        .head_dim = q.size(2),
        .value_dim = v.size(2),
        .cu_seqlens_q = read<int32_t>(cu_seqlens_q),
        .cu_seqlens_k = read<int32_t>(cu_seqlens_k),
        .scale = Accumulator<T>(softmax_scale ? *softmax_scale : std::pow(double(q.size(2)), -0.5)),
        .window_left = std::min(window_left, widest),
        .window_right = std::min(window_right, widest),
        .scores = {.softcap = Accumulator<T>(softcap),
                   .alibi_slopes = read_optional<Accumulator<T>>(alibi_slopes),
                   .alibi_stride = alibi_slopes && alibi_slopes->size(0) != 1 ? heads() : 0,
                   .distance_bias = read_optional<Accumulator<T>>(distance_bias),
                   .distance_radius = distance_bias ? distance_bias->size(1) / 2 : 0,
                   .prefix_len = read_optional<int32_t>(prefix_len),
                   .branch = read_optional<int32_t>(branch),
                   .block_ids = read_optional<int32_t>(block_ids)}};
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
    const std::optional<Tensor>& block_ids) {
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
                      block_ids};
  inputs.check_values();
  return visit_float(q.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t tokens = inputs.tokens(), heads = inputs.heads();
    Tensor out = empty_cpu<3>(q.scalar_type(), {tokens, heads, v.size(2)});
    Tensor lse = empty_cpu<2>(kScalarType<A>, {return_lse ? heads : 0, tokens});
    const auto args =
        inputs.args<T>(new_head_vectors<T>(out), return_lse ? write<A>(lse) : nullptr);
    const auto& kernel = kernels<AttentionKernels>().of(element);
    for_items<A>(
        inputs.batch(), (args.head_dim + args.value_dim) * int64_t(sizeof(T)), kernel.scratch_size,
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

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t, int64_t, const std::optional<double>& softmax_scale,
    int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& distance_bias,
    const std::optional<Tensor>& prefix_len, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& block_ids, bool need_distance_bias) {
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
                      block_ids};
  inputs.check_values();
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
    const bool need_bias = need_distance_bias && distance_bias;
    const int64_t distances = need_bias ? distance_bias->size(1) : 0;
    Tensor grad_distance_bias = empty_cpu<2>(kScalarType<A>, {need_bias ? heads : 0, distances});
    std::vector<A> sums(need_bias ? heads * (tokens + k.size(0)) : 0);
    // Backward only reads out and lse.
    const HeadVectors<T> given{const_cast<T*>(read<T>(out)), out.stride(0), out.stride(1)};
    const VarlenAttentionBackwardArgs<T> args{
        .forward = inputs.args<T>(given, const_cast<A*>(read<A>(lse))),
        .grad_out = head_vectors<T>(grad_out),
        .grad_lse = grad_lse ? read<A>(*grad_lse) : nullptr,
        .grad_q = new_head_vectors<T>(grad_q),
        .grad_k = new_head_vectors<T>(grad_k),
        .grad_v = new_head_vectors<T>(grad_v),
        .distance_sums = need_bias ? sums.data() : nullptr,
        .distance_sums_stride = tokens + k.size(0)};
    const VarlenAttentionArgs<T>& forward = args.forward;
    const auto& kernel = kernels<AttentionBackwardKernels>().of(element);
    const int64_t tile = kernels<AttentionKernels>().of(element).tile_queries;
    int64_t longest = 0;
    for (int64_t b = 0; b < inputs.batch(); ++b) {
      longest = std::max<int64_t>(longest, forward.cu_seqlens_k[b + 1] - forward.cu_seqlens_k[b]);
    }
    for_items<A>(
        inputs.batch(), 2 * (forward.head_dim + forward.value_dim) * int64_t(sizeof(T)),
        kernel.scratch_size(args, longest),
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
    return std::make_tuple(grad_q, grad_k, grad_v, grad_distance_bias);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, int window_left,"
      " int window_right, bool return_lse, float softcap=0.0, Tensor? alibi_slopes=None,"
      " Tensor? distance_bias=None, Tensor? prefix_len=None, Tensor? branch=None,"
      " Tensor? block_ids=None) -> (Tensor out, Tensor lse)");
  library.def(
      "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
      " Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
      " SymInt max_seqlen_k, float? softmax_scale, int window_left, int window_right,"
      " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? distance_bias=None,"
      " Tensor? prefix_len=None, Tensor? branch=None, Tensor? block_ids=None,"
      " bool need_distance_bias=False)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_distance_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("varlen_attention", TORCH_BOX(&emblas::varlen_attention));
  library.impl("varlen_attention_backward", TORCH_BOX(&emblas::varlen_attention_backward));
}
