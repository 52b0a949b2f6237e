// Attention pooling as torch operators on CPU tensors.
#include <tuple>

#include "common/isa.h"
#include "pooling/attention_pool.h"
#include "pooling/segments_door.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <class T>
AttentionPoolArgs<T> arguments(const SegmentTensors& tensors, const Tensor& queries, double scale) {
  using A = Accumulator<T>;
  tensors.check_all();
  check(tensors.batch() == 0 || tensors.disjoint(), "segments must be in order and disjoint");
  check(queries.is_cpu() && has_dtype<A>(queries) && queries.dim() == 2 &&
            queries.size(1) == dim_of(tensors.x) && queries.is_contiguous() &&
            queries.size(0) <= kMaxPoolQueries,
        "queries must be a contiguous CPU tensor of at most 256 rows (queries, dim), float64 where "
        "x is float64 and float32 otherwise");
  AttentionPoolArgs<T> args{};
  args.segments = tensors.view<T>();
  args.queries = read<A>(queries);
  args.heads = queries.size(0);
  args.scale = A(scale);
  args.batch = tensors.batch();
  args.tokens = rows_of(tensors.x);
  return args;
}

std::tuple<Tensor, Tensor> attention_pool(const Tensor& x, const Tensor& queries,
                                          const Tensor& cu_seqlens, double scale,
                                          const OptionalTensor& weights,
                                          const OptionalTensor& ends) {
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto args = arguments<T>(tensors, queries, scale);
    Tensor out = empty_cpu<3>(kScalarType<A>, {args.batch, args.heads, dim_of(x)});
    Tensor lse = empty_cpu<2>(kScalarType<A>, {args.batch, args.heads});
    args.out = write<A>(out);
    args.lse = write<A>(lse);
    for_segments<A>(tensors, kAttentionBlock, [&](int64_t first, int64_t last, A* scratch) {
      kernels<AttentionPoolKernels>().of(element).forward(args, first, last, scratch);
    });
    return std::make_tuple(out, lse);
  });
}

std::tuple<Tensor, Tensor> attention_pool_backward(const Tensor& grad_out, const Tensor& x,
                                                   const Tensor& queries, const Tensor& out,
                                                   const Tensor& lse, const Tensor& cu_seqlens,
                                                   double scale, const OptionalTensor& weights,
                                                   const OptionalTensor& ends) {
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto args = arguments<T>(tensors, queries, scale);
    const auto is_output = [&](const Tensor& tensor, int64_t dims) {
      return tensor.is_cpu() && has_dtype<A>(tensor) && tensor.dim() == dims &&
             tensor.size(0) == args.batch && tensor.size(1) == args.heads &&
             (dims == 2 || tensor.size(2) == dim_of(x)) && tensor.is_contiguous();
    };
    check(is_output(grad_out, 3) && is_output(out, 3) && is_output(lse, 2),
          "grad_out, out and lse must be contiguous CPU tensors of the forward's shape and dtype");
    args.out = const_cast<A*>(read<A>(out));
    args.lse = const_cast<A*>(read<A>(lse));
    Tensor grad_x = empty_like_tokens(x, true);
    Tensor grad_queries = empty_cpu<3>(kScalarType<A>, {args.batch, args.heads, dim_of(x)});
    if (args.batch == 0) std::memset(grad_x.mutable_data_ptr(), 0, x.numel() * sizeof(T));
    const AttentionPoolBackwardArgs<T> back{args, read<A>(grad_out), write<T>(grad_x),
                                            write<A>(grad_queries)};
    for_segments<A>(tensors, 2, [&](int64_t first, int64_t last, A* scratch) {
      kernels<AttentionPoolKernels>().of(element).backward(back, first, last, scratch);
    });
    return std::make_tuple(grad_x, grad_queries);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "attention_pool(Tensor x, Tensor queries, Tensor cu_seqlens, float scale,"
      " Tensor? weights=None, Tensor? ends=None) -> (Tensor out, Tensor lse)");
  library.def(
      "attention_pool_backward(Tensor grad_out, Tensor x, Tensor queries, Tensor out, Tensor lse,"
      " Tensor cu_seqlens, float scale, Tensor? weights=None, Tensor? ends=None)"
      " -> (Tensor grad_x, Tensor grad_queries)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("attention_pool", TORCH_BOX(&emblas::attention_pool));
  library.impl("attention_pool_backward", TORCH_BOX(&emblas::attention_pool_backward));
}
