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

// body(sequence, first, last, scratch) over the items of all sequences, tasks balanced by the
// pairs (query, key) in them: an item costs as many positions as it reads keys.
template <class T, class Body>
void for_items(const VarlenAttentionArgs<T>& args, int64_t batch, const VarlenAttention<T>& kernel,
               const Body& body) {
  constexpr int64_t fixed_cost = 16;  // reading the queries and writing the result, in keys
  const int64_t tile = kernel.tile_queries;
  const bool windowed = args.window_left >= 0 && args.window_right >= 0;
  std::vector<int64_t> start(batch + 1), cost(batch), items(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t queries = args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b];
    int64_t keys = args.cu_seqlens_k[b + 1] - args.cu_seqlens_k[b];
    if (windowed) keys = std::min(keys, args.window_left + args.window_right + tile);
    items[b] = args.heads * ((queries + tile - 1) / tile);
    cost[b] = keys + fixed_cost;
    start[b + 1] = start[b] + items[b] * cost[b];
  }
  const int64_t bytes_per_key = 2 * args.head_dim * int64_t(sizeof(T));
  parallel_for(start[batch], bytes_per_key, [&](int64_t low, int64_t high) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, kernel.scratch_size * sizeof(Accumulator<T>)), &std::free);
    if (!scratch) throw std::bad_alloc();
    int64_t b = std::upper_bound(start.begin(), start.end(), low) - start.begin() - 1;
    for (; b < batch && start[b] < high; ++b) {
      // A task owns the items whose first position lies in it.
      const auto first_from = [&](int64_t position) {
        return std::min((std::max<int64_t>(position - start[b], 0) + cost[b] - 1) / cost[b],
                        items[b]);
      };
      body(b, first_from(low), first_from(high), static_cast<Accumulator<T>*>(scratch.get()));
    }
  });
}

void check_head_vectors(const Tensor& tensor, const char* message) {
  check(tensor.is_cpu() && tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) <= 1),
        message);
}

template <class T>
HeadVectors<const T> head_vectors(const Tensor& tensor) {
  return {read<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

void check_offsets(const Tensor& offsets, int64_t batch, int64_t total, const char* type_message,
                   const char* value_message) {
  check_vector<int32_t>(offsets, batch + 1, type_message);
  check(valid_cu_seqlens(read<int32_t>(offsets), batch, total), value_message);
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            int64_t, int64_t,
                                            const std::optional<double>& softmax_scale,
                                            int64_t window_left, int64_t window_right,
                                            bool return_lse) {
  check_head_vectors(q, "q must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
  check_head_vectors(k, "k must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
  check_head_vectors(v, "v must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2);
  const int64_t key_heads = k.size(1);
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
        "q, k and v must have one dtype");
  check(v.size(0) == k.size(0) && v.size(1) == key_heads && k.size(2) == head_dim &&
            v.size(2) == head_dim,
        "k and v must have one shape and the head_dim of q");
  check(key_heads > 0 ? heads % key_heads == 0 : heads == 0,
        "the heads of q must be a multiple of the heads of k");
  check(head_dim % 8 == 0 && head_dim >= kMinHeadDim && head_dim <= kMaxHeadDim,
        "head_dim must be a multiple of 8, from 16 to 256");
  const int64_t batch = cu_seqlens_q.dim() == 1 ? cu_seqlens_q.size(0) - 1 : -1;
  check(batch >= 0, "cu_seqlens_q must be a vector of at least one element");
  check_offsets(
      cu_seqlens_q, batch, tokens, "cu_seqlens_q must be a contiguous int32 CPU vector",
      "cu_seqlens_q must start at 0, never decrease and end at the number of tokens of q");
  check_offsets(
      cu_seqlens_k, batch, k.size(0),
      "cu_seqlens_k must be a contiguous int32 CPU vector as long as cu_seqlens_q",
      "cu_seqlens_k must start at 0, never decrease and end at the number of tokens of k");

  const auto run = [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor out = empty_cpu<3>(q.scalar_type(), {tokens, heads, head_dim});
    Tensor lse = empty_cpu<2>(kScalarType<A>, {return_lse ? heads : 0, tokens});
    constexpr int64_t widest = int64_t(1) << 32;  // sees all keys, and can be added to a position
    const VarlenAttentionArgs<T> args{
        head_vectors<T>(q),
        head_vectors<T>(k),
        head_vectors<T>(v),
        {write<T>(out), heads * head_dim, head_dim},
        return_lse ? write<A>(lse) : nullptr,
        tokens,
        heads,
        key_heads ? heads / key_heads : 1,
        head_dim,
        read<int32_t>(cu_seqlens_q),
        read<int32_t>(cu_seqlens_k),
        A(softmax_scale ? *softmax_scale : std::pow(double(head_dim), -0.5)),
        std::min(window_left, widest),
        std::min(window_right, widest)};
    const auto& kernel = kernels<AttentionKernels>().of(element);
    for_items(args, batch, kernel, [&](int64_t sequence, int64_t first, int64_t last, A* scratch) {
      kernel.forward(args, sequence, first, last, scratch);
    });
    return std::make_tuple(out, lse);
  };
  if (has_dtype<double>(q)) return run(double{});
  check(has_dtype<float>(q), "q must be float32 or float64");
  return run(float{});
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, int window_left,"
      " int window_right, bool return_lse) -> (Tensor out, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("varlen_attention", TORCH_BOX(&emblas::varlen_attention));
}
