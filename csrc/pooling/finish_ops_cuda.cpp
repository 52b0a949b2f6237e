// Finishing pooled vectors as torch operators on CUDA tensors.
#include <optional>
#include <vector>

#include "common/cuda/device_call.h"
#include "pooling/finish_cuda.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kRows = "x must be a contiguous tensor (rows, dim), float32 or float64";

int64_t sum(const std::vector<int64_t>& dims) {
  int64_t total = 0;
  for (int64_t k : dims) total += k;
  return total;
}

bool is_matrix(const DeviceCall& call, const Tensor& tensor, ScalarType dtype, int64_t rows,
               int64_t columns) {
  return call.holds(tensor) && tensor.scalar_type() == dtype && tensor.dim() == 2 &&
         tensor.is_contiguous() && tensor.size(0) == rows && tensor.size(1) == columns;
}

// A is the dtype of x.
template <class A>
cuda::FinishArgs<A> arguments(const DeviceCall& call, const Tensor& x,
                              const std::vector<int64_t>& dims, bool normalize, double noise,
                              int64_t seed) {
  check(x.dim() == 2 && x.is_contiguous() && has_dtype<A>(x), kRows);
  check(!dims.empty() && dims.size() <= cuda::kMaxFinishDims, "dims must be 1 to 32 dimensions");
  check(x.size(1) <= INT32_MAX, "x must have less than 2^31 columns");
  cuda::FinishArgs<A> args{};
  args.x = call.read<A>(x);
  args.rows = x.size(0);
  args.dim = x.size(1);
  for (int64_t k : dims) {
    check(1 <= k && k <= args.dim, "dims must be between 1 and the dimension of x");
    args.dims[args.count++] = int32_t(k);
  }
  args.normalize = normalize;
  args.noise = noise;
  args.seed = uint64_t(seed);
  return args;
}

Tensor finish_cuda(const Tensor& x, std::vector<int64_t> dims, bool normalize, double noise,
                   int64_t seed, int64_t kind, ScalarType dtype, const OptionalTensor& ranges) {
  const DeviceCall call(x);
  const int64_t width = sum(dims);
  if (FinishKind(kind) == FinishKind::floating) {
    return visit_float(dtype, "dtype must be a floating-point dtype", [&](auto element) {
      using T = decltype(element);
      const auto args = arguments<Accumulator<T>>(call, x, dims, normalize, noise, seed);
      const Tensor out = call.empty<2>(dtype, {args.rows, width});
      cuda::finish<T>(args, call.write<T>(out), call.stream());
      return out;
    });
  }
  return visit_float(x.scalar_type(), kRows, [&](auto element) {
    using A = Accumulator<decltype(element)>;
    const auto args = arguments<A>(call, x, dims, normalize, noise, seed);
    if (FinishKind(kind) == FinishKind::int8) {
      check(ranges && is_matrix(call, *ranges, x.scalar_type(), 2, width),
            "ranges must be a contiguous tensor (2, sum of dims) of the dtype and device of x");
      const Tensor out = call.empty<2>(ScalarType::Char, {args.rows, width});
      cuda::finish_int8<A>(args, call.read<A>(*ranges), call.write<int8_t>(out), call.stream());
      return out;
    }
    check(FinishKind(kind) == FinishKind::bits, "kind must be 0 (float), 1 (int8) or 2 (bits)");
    int64_t bytes = 0;
    for (int64_t k : dims) bytes += (k + 7) / 8;
    const Tensor out = call.empty<2>(ScalarType::Byte, {args.rows, bytes});
    cuda::finish_bits<A>(args, call.write<uint8_t>(out), call.stream());
    return out;
  });
}

Tensor finish_backward_cuda(const Tensor& grad_out, const Tensor& x, std::vector<int64_t> dims,
                            bool normalize) {
  const DeviceCall call(x);
  return visit_float(x.scalar_type(), kRows, [&](auto element) {
    using A = Accumulator<decltype(element)>;
    const auto args = arguments<A>(call, x, dims, normalize, 0, 0);
    check(is_matrix(call, grad_out, x.scalar_type(), args.rows, sum(dims)),
          "grad_out must be a contiguous tensor (rows, sum of dims) of the dtype and device of x");
    const Tensor grad_x = call.empty<2>(x.scalar_type(), {args.rows, args.dim});
    cuda::finish_backward<A>(args, call.read<A>(grad_out), call.write<A>(grad_x), call.stream());
    return grad_x;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "finish_cuda(Tensor x, int[] dims, bool normalize, float noise, int seed, int kind,"
      " ScalarType dtype, Tensor? ranges) -> Tensor");
  library.def(
      "finish_backward_cuda(Tensor grad_out, Tensor x, int[] dims, bool normalize) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("finish_cuda", TORCH_BOX(&emblas::finish_cuda));
  library.impl("finish_backward_cuda", TORCH_BOX(&emblas::finish_backward_cuda));
}
