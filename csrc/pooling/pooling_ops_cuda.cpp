// Segment pooling as torch operators on CUDA tensors: emblas::<op>_cuda, which the router of the
// public operator calls. Offsets stay on the device: the kernels clamp them, nobody waits.
#include <optional>
#include <tuple>

#include "common/cuda/device_call.h"
#include "pooling/pooling_cuda.h"

namespace emblas {
namespace {

void check_batch(const DeviceCall& call, const Tensor& x, const Tensor& cu_seqlens,
                 const std::optional<Tensor>& weights) {
  call.check_rows(x, "x must be a tensor (tokens, dim) with a contiguous last dimension");
  call.check_vector<int32_t>(cu_seqlens, -1,
                             "cu_seqlens must be a contiguous int32 vector on the device of x");
  check(cu_seqlens.size(0) >= 1, "cu_seqlens must have at least one element");
  const char* message =
      "weights must be a contiguous vector of one weight per token on the device of x, float64 "
      "where x is float64 and float32 otherwise";
  if (!weights) return;
  if (has_dtype<double>(x)) {
    call.check_vector<double>(*weights, x.size(0), message);
  } else {
    call.check_vector<float>(*weights, x.size(0), message);
  }
}

constexpr char kDtypes[] = "x must be float32, float64, bfloat16 or float16";

std::tuple<Tensor, Tensor> segment_pool_cuda(const Tensor& x, const Tensor& cu_seqlens,
                                             const std::optional<Tensor>& weights, bool normalize) {
  const DeviceCall call(x);
  check_batch(call, x, cu_seqlens, weights);
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = cu_seqlens.size(0) - 1, tokens = x.size(0), dim = x.size(1);
    const Tensor out = call.empty<2>(x.scalar_type(), {batch, dim});
    const Tensor norm = call.empty<1>(kScalarType<A>, {normalize ? batch : 0});
    const Tensor partial =
        call.empty<2>(kScalarType<A>, {cuda::segment_pool_slots(batch, tokens), dim});
    const cuda::SegmentPoolArgs<T> args{call.read<T>(x),
                                        x.stride(0),
                                        dim,
                                        call.read<int32_t>(cu_seqlens),
                                        call.read<A>(weights),
                                        normalize,
                                        call.write<T>(out),
                                        call.write<A>(norm)};
    cuda::segment_pool(args, batch, tokens, call.write<A>(partial), call.stream());
    return std::make_tuple(out, norm);
  });
}

std::tuple<Tensor, Tensor> segment_pool_backward_cuda(const Tensor& grad_out, const Tensor& x,
                                                      const Tensor& out, const Tensor& norm,
                                                      const Tensor& cu_seqlens,
                                                      const std::optional<Tensor>& weights,
                                                      bool normalize, bool need_x,
                                                      bool need_weights) {
  const DeviceCall call(x);
  check_batch(call, x, cu_seqlens, weights);
  const int64_t batch = cu_seqlens.size(0) - 1, tokens = x.size(0), dim = x.size(1);
  const auto is_output = [&](const Tensor& tensor) {
    return call.holds(tensor) && tensor.scalar_type() == x.scalar_type() && tensor.dim() == 2 &&
           tensor.size(0) == batch && tensor.size(1) == dim && tensor.is_contiguous();
  };
  check(is_output(grad_out) && is_output(out),
        "grad_out and out must be contiguous (batch, dim) tensors of the dtype and device of x");
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    call.check_vector<A>(norm, normalize ? batch : 0, "norm must be the forward's second output");
    const Tensor grad_x = need_x ? call.empty<2>(x.scalar_type(), {tokens, dim})
                                 : call.empty<1>(x.scalar_type(), {0});
    const Tensor grad_weights = call.empty<1>(kScalarType<A>, {need_weights ? tokens : 0});
    const Tensor scratch = call.empty<2>(kScalarType<A>, {batch, dim + 2});
    const cuda::SegmentPoolBackwardArgs<T> args{
        call.read<T>(grad_out),
        call.read<T>(x),
        x.stride(0),
        call.read<T>(out),
        call.read<A>(norm),
        dim,
        call.read<int32_t>(cu_seqlens),
        call.read<A>(weights),
        normalize,
        need_x ? call.write<T>(grad_x) : nullptr,
        need_weights ? call.write<A>(grad_weights) : nullptr};
    if (need_x || need_weights) {
      cuda::segment_pool_backward(args, batch, tokens, call.write<A>(scratch), call.stream());
    }
    return std::make_tuple(grad_x, grad_weights);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "segment_pool_cuda(Tensor x, Tensor cu_seqlens, Tensor? weights, bool normalize)"
      " -> (Tensor out, Tensor norm)");
  library.def(
      "segment_pool_backward_cuda(Tensor grad_out, Tensor x, Tensor out, Tensor norm,"
      " Tensor cu_seqlens, Tensor? weights, bool normalize, bool need_x, bool need_weights)"
      " -> (Tensor grad_x, Tensor grad_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("segment_pool_cuda", TORCH_BOX(&emblas::segment_pool_cuda));
  library.impl("segment_pool_backward_cuda", TORCH_BOX(&emblas::segment_pool_backward_cuda));
}
