// Max pooling as torch operators on CUDA tensors.
#include <optional>
#include <tuple>

#include "pooling/segments_door_cuda.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> segment_max_cuda(const Tensor& x, const Tensor& cu_seqlens,
                                            const OptionalTensor& weights,
                                            const OptionalTensor& ends, const OptionalTensor& skip,
                                            const OptionalTensor& index) {
  const DeviceCall call(x);
  check_tokens(call, x);
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    const cuda::SegmentRows<T> rows = segment_rows<T>(call, tensors);
    const int64_t batch = tensors.batch();
    const Tensor out = call.empty<2>(x.scalar_type(), {batch, dim_of(x)});
    const Tensor argmax = call.empty<2>(ScalarType::Int, {batch, dim_of(x)});
    cuda::segment_max<T>(rows, call.write<T>(out), call.write<int32_t>(argmax), call.stream());
    return std::make_tuple(out, argmax);
  });
}

Tensor segment_max_backward_cuda(const Tensor& grad_out, const Tensor& argmax, int64_t rows) {
  const DeviceCall call(grad_out);
  check(grad_out.dim() == 2 && grad_out.is_contiguous() && call.holds(argmax) &&
            has_dtype<int32_t>(argmax) && argmax.dim() == 2 && argmax.is_contiguous() &&
            argmax.size(0) == grad_out.size(0) && argmax.size(1) == grad_out.size(1),
        "grad_out and argmax must be contiguous (batch, dim) tensors on one device, argmax int32");
  check(rows >= 0 && rows <= INT32_MAX, "rows must be the number of tokens");
  return visit_float(grad_out.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    const int64_t batch = grad_out.size(0), dim = grad_out.size(1);
    Tensor grad_x = call.empty<2>(grad_out.scalar_type(), {rows, dim});
    torch::stable::zero_(grad_x);
    cuda::segment_max_backward<T>(call.read<T>(grad_out), call.read<int32_t>(argmax), batch, rows,
                                  dim, call.write<T>(grad_x), call.stream());
    return grad_x;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "segment_max_cuda(Tensor x, Tensor cu_seqlens, Tensor? weights, Tensor? ends=None,"
      " Tensor? skip=None, Tensor? index=None) -> (Tensor out, Tensor argmax)");
  library.def("segment_max_backward_cuda(Tensor grad_out, Tensor argmax, int rows) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("segment_max_cuda", TORCH_BOX(&emblas::segment_max_cuda));
  library.impl("segment_max_backward_cuda", TORCH_BOX(&emblas::segment_max_backward_cuda));
}
