// Quantized tables as torch operators on CUDA tensors: emblas::<op>_cuda, which the router of the
// public operator calls. Ids and offsets stay on the device: the kernels stay in bounds, nobody
// waits.
#include <optional>

#include "common/cuda/device_call.h"
#include "tables/quantized.h"
#include "tables/quantized_cuda.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "scale must be float32, float64, bfloat16 or float16";

// The arguments that forward and backward have in common, checked.
template <class T>
cuda::QuantizedArgs<T> quantized_args(const DeviceCall& call, const Tensor& ids,
                                      const Tensor& packed, const Tensor& scale,
                                      const std::optional<Tensor>& offsets,
                                      const std::optional<Tensor>& weights, int64_t bits,
                                      int64_t dim, int64_t mode,
                                      const std::optional<int64_t>& padding_id,
                                      const std::optional<Tensor>& zero_point) {
  using A = Accumulator<T>;
  check(bits == 2 || bits == 4 || bits == 8 || bits == 16, "bits must be 2, 4, 8 or 16");
  check(1 <= dim && dim < int64_t(1) << 40, "dim must be 1 to 2^40");
  check(0 <= mode && mode < 3, "unknown mode of bags");
  check(BagMode(mode) == BagMode::sum || offsets, "mean and max need offsets");
  check(BagMode(mode) == BagMode::sum || !weights, "weights need the mode sum");
  call.check_vector<int64_t>(
      ids, -1, "ids must be a contiguous int64 vector on the device of the first argument");
  check(call.holds(packed) && has_dtype<uint8_t>(packed) && packed.dim() == 2 &&
            packed.is_contiguous() && packed.size(1) == packed_bytes(dim, bits),
        "packed must be a contiguous uint8 tensor (rows, dim * bits / 8 bytes) on the device of "
        "ids");
  const int64_t rows = packed.size(0), count = ids.size(0);
  call.check_vector<T>(scale, rows,
                       "scale must be a contiguous vector of one scale per row on the device of "
                       "ids");
  const char* message =
      "weights and zero_point must be contiguous vectors of one number per id and per row on the "
      "device of ids, float64 where scale is float64 and float32 otherwise";
  if (weights) call.check_vector<A>(*weights, count, message);
  if (zero_point) call.check_vector<A>(*zero_point, rows, message);
  if (offsets) {
    call.check_vector<int32_t>(*offsets, -1,
                               "offsets must be a contiguous int32 vector on the device of ids");
    check(offsets->size(0) >= 1, "offsets must have at least one element");
  }
  return {call.read<uint8_t>(packed),
          rows,
          packed.size(1),
          dim,
          bits,
          BagMode(mode),
          call.read<int64_t>(ids),
          count,
          call.read<int32_t>(offsets),
          offsets ? offsets->size(0) - 1 : count,
          call.read<T>(scale),
          call.read<A>(weights),
          call.read<A>(zero_point),
          padding_id.has_value(),
          padding_id.value_or(0)};
}

Tensor quantized_bag_cuda(const Tensor& ids, const Tensor& packed, const Tensor& scale,
                          const std::optional<Tensor>& offsets,
                          const std::optional<Tensor>& weights, int64_t bits, int64_t dim,
                          int64_t mode, std::optional<int64_t> padding_id,
                          const std::optional<Tensor>& zero_point) {
  const DeviceCall call(ids);
  return visit_float(scale.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    const auto args = quantized_args<T>(call, ids, packed, scale, offsets, weights, bits, dim, mode,
                                        padding_id, zero_point);
    const Tensor out = call.empty<2>(scale.scalar_type(), {args.bags, dim});
    cuda::quantized_bag(args, call.write<T>(out), call.stream());
    return out;
  });
}

Tensor quantized_bag_backward_cuda(const Tensor& grad_out, const Tensor& ids, const Tensor& packed,
                                   const Tensor& scale, const std::optional<Tensor>& offsets,
                                   int64_t bits, int64_t dim, std::optional<int64_t> padding_id,
                                   const std::optional<Tensor>& zero_point) {
  const DeviceCall call(grad_out);
  return visit_float(scale.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto args = quantized_args<T>(call, ids, packed, scale, offsets, std::nullopt, bits, dim,
                                        0, padding_id, zero_point);
    check(has_dtype<T>(grad_out) && grad_out.dim() == 2 && grad_out.size(0) == args.bags &&
              grad_out.size(1) == dim && grad_out.is_contiguous(),
          "grad_out must be a contiguous (bags, dim) tensor of the dtype of scale");
    const Tensor numbers = call.empty<1>(ScalarType::Int, {offsets ? args.count : 0});
    int32_t* bag_of = offsets ? call.write<int32_t>(numbers) : nullptr;
    if (offsets) {
      cuda::bag_numbers(args.offsets, args.bags, args.count, bag_of, call.stream());
    }
    const Tensor grad_weights = call.empty<1>(kScalarType<A>, {args.count});
    cuda::quantized_grad_weights(args, {bag_of, args.bags}, call.read<T>(grad_out),
                                 call.write<A>(grad_weights), call.stream());
    return grad_weights;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "quantized_bag_cuda(Tensor ids, Tensor packed, Tensor scale, Tensor? offsets,"
      " Tensor? weights, int bits, int dim, int mode, int? padding_id, Tensor? zero_point=None)"
      " -> Tensor out");
  library.def(
      "quantized_bag_backward_cuda(Tensor grad_out, Tensor ids, Tensor packed, Tensor scale,"
      " Tensor? offsets, int bits, int dim, int? padding_id, Tensor? zero_point=None)"
      " -> Tensor grad_weights");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("quantized_bag_cuda", TORCH_BOX(&emblas::quantized_bag_cuda));
  library.impl("quantized_bag_backward_cuda", TORCH_BOX(&emblas::quantized_bag_backward_cuda));
}
