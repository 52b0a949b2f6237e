// Attention pooling as torch operators on CUDA tensors.
#include <optional>
#include <tuple>

#include "pooling/attention_pool_cuda.h"
#include "pooling/segments_door_cuda.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <class T>
cuda::AttentionArgs<T> arguments(const DeviceCall& call, const SegmentTensors& tensors,
                                 const Tensor& queries, double scale) {
  using A = Accumulator<T>;
  check_tokens(call, tensors.x);
  check(call.holds(queries) && has_dtype<A>(queries) && queries.dim() == 2 &&
            queries.size(1) == dim_of(tensors.x) && queries.is_contiguous(),
        "queries must be a contiguous tensor (queries, dim) on the device of x, float64 where x is "
        "float64 and float32 otherwise");
  cuda::AttentionArgs<T> args{};
  args.rows = segment_rows<T>(call, tensors);
  args.queries = call.read<A>(queries);
  args.heads = queries.size(0);
  args.scale = A(scale);
  return args;
}

std::tuple<Tensor, Tensor> attention_pool_cuda(const Tensor& x, const Tensor& queries,
                                               const Tensor& cu_seqlens, double scale,
                                               const OptionalTensor& weights,
                                               const OptionalTensor& ends) {
  const DeviceCall call(x);
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto args = arguments<T>(call, tensors, queries, scale);
    const int64_t slots = cuda::chunk_slots(args.rows.batch, args.rows.positions);
    const Tensor sums = call.empty<3>(kScalarType<A>, {slots, args.heads, dim_of(x)});
    const Tensor largest = call.empty<2>(kScalarType<A>, {slots, args.heads});
    const Tensor total = call.empty<2>(kScalarType<A>, {slots, args.heads});
    const Tensor out = call.empty<3>(kScalarType<A>, {args.rows.batch, args.heads, dim_of(x)});
    const Tensor lse = call.empty<2>(kScalarType<A>, {args.rows.batch, args.heads});
    cuda::attention_pool<T>(args,
                            {call.write<A>(sums), call.write<A>(largest), call.write<A>(total)},
                            call.write<A>(out), call.write<A>(lse), call.stream());
    return std::make_tuple(out, lse);
  });
}

std::tuple<Tensor, Tensor> attention_pool_backward_cuda(const Tensor& grad_out, const Tensor& x,
                                                        const Tensor& queries, const Tensor& out,
                                                        const Tensor& lse, const Tensor& cu_seqlens,
                                                        double scale, const OptionalTensor& weights,
                                                        const OptionalTensor& ends) {
  const DeviceCall call(x);
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto args = arguments<T>(call, tensors, queries, scale);
    const auto is_output = [&](const Tensor& tensor, int64_t dims) {
      return call.holds(tensor) && has_dtype<A>(tensor) && tensor.dim() == dims &&
             tensor.size(0) == args.rows.batch && tensor.size(1) == args.heads &&
             (dims == 2 || tensor.size(2) == dim_of(x)) && tensor.is_contiguous();
    };
    check(is_output(grad_out, 3) && is_output(out, 3) && is_output(lse, 2),
          "grad_out, out and lse must be contiguous tensors of the forward's shape, dtype and "
          "device");
    const int64_t positions = args.rows.positions;
    const int64_t slots = cuda::chunk_slots(args.rows.batch, positions);
    const Tensor sums = call.empty<3>(kScalarType<A>, {slots, args.heads, dim_of(x)});
    const Tensor share = call.empty<2>(kScalarType<A>, {positions, args.heads});
    const Tensor slope = call.empty<2>(kScalarType<A>, {positions, args.heads});
    const Tensor grad_queries =
        call.empty<3>(kScalarType<A>, {args.rows.batch, args.heads, dim_of(x)});
    Tensor grad_x = x.dim() == 2
                        ? call.empty<2>(x.scalar_type(), {x.size(0), x.size(1)})
                        : call.empty<3>(x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
    // Offsets leave no row out.
    if (ends || args.rows.batch == 0) torch::stable::zero_(grad_x);
    const cuda::AttentionGradients<T> gradients{
        call.read<A>(grad_out), call.read<A>(out),          call.read<A>(lse),
        call.write<A>(sums),    call.write<A>(share),       call.write<A>(slope),
        call.write<T>(grad_x),  call.write<A>(grad_queries)};
    cuda::attention_pool_backward<T>(args, gradients, call.stream());
    return std::make_tuple(grad_x, grad_queries);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "attention_pool_cuda(Tensor x, Tensor queries, Tensor cu_seqlens, float scale,"
      " Tensor? weights=None, Tensor? ends=None) -> (Tensor out, Tensor lse)");
  library.def(
      "attention_pool_backward_cuda(Tensor grad_out, Tensor x, Tensor queries, Tensor out,"
      " Tensor lse, Tensor cu_seqlens, float scale, Tensor? weights=None, Tensor? ends=None)"
      " -> (Tensor grad_x, Tensor grad_queries)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("attention_pool_cuda", TORCH_BOX(&emblas::attention_pool_cuda));
  library.impl("attention_pool_backward_cuda", TORCH_BOX(&emblas::attention_pool_backward_cuda));
}
