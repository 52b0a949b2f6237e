// Finishing pooled vectors, as torch operators on CPU tensors.
#include <memory>
#include <optional>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/tensor.h"
#include "pooling/finish.h"

namespace emblas {
namespace {

void check_rows_and_dims(const Tensor& x, const std::vector<int64_t>& dims) {
  check(x.is_cpu() && x.dim() == 2 && x.is_contiguous() &&
            (has_dtype<float>(x) || has_dtype<double>(x)),
        "x must be a contiguous CPU tensor (rows, dim), float32 or float64");
  check(!dims.empty(), "dims must hold at least one dimension");
  for (int64_t k : dims) {
    check(1 <= k && k <= x.size(1), "dims must be between 1 and the dimension of x");
  }
}

template <class A, class Body>
void for_rows(const Tensor& x, const Body& body) {
  parallel_for(x.size(0), x.size(1) * int64_t(sizeof(A)), [&](int64_t first, int64_t last) {
    const AlignedArray<A> scratch = aligned_array<A>(x.size(1));
    body(first, last, scratch.get());
  });
}

Tensor finish(const Tensor& x, std::vector<int64_t> dims, bool normalize, double noise,
              int64_t seed, int64_t kind, ScalarType dtype, const std::optional<Tensor>& ranges) {
  check_rows_and_dims(x, dims);
  const FinishSettings settings{dims.data(), int64_t(dims.size()), x.size(1), normalize,
                                noise,       uint64_t(seed)};
  int64_t width = 0, bytes = 0;
  for (int64_t k : dims) width += k, bytes += (k + 7) / 8;
  const int64_t rows = x.size(0);
  if (FinishKind(kind) == FinishKind::floating) {
    return visit_float(dtype, "dtype must be a floating-point dtype", [&](auto element) {
      using T = decltype(element);
      using A = Accumulator<T>;
      check(has_dtype<A>(x), "dtype must be float64 where x is float64, and only there");
      Tensor out = empty_cpu<2>(dtype, {rows, width});
      for_rows<A>(x, [&](int64_t first, int64_t last, A* scratch) {
        kernels<FinishKernels>().of(element).floating(settings, read<A>(x), first, last,
                                                      write<T>(out), scratch);
      });
      return out;
    });
  }
  return visit_float(x.scalar_type(), "x must be float32 or float64", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto& kernel = kernels<FinishKernels>().of(element);
    if (FinishKind(kind) == FinishKind::int8) {
      check(ranges && ranges->is_cpu() && has_dtype<A>(*ranges) && ranges->dim() == 2 &&
                ranges->size(0) == 2 && ranges->size(1) == width && ranges->is_contiguous(),
            "ranges must be a contiguous CPU tensor (2, sum of dims) of the dtype of x");
      Tensor out = empty_cpu<2>(ScalarType::Char, {rows, width});
      for_rows<A>(x, [&](int64_t first, int64_t last, A* scratch) {
        kernel.int8(settings, read<A>(x), read<A>(*ranges), first, last, write<int8_t>(out),
                    scratch);
      });
      return out;
    }
    check(FinishKind(kind) == FinishKind::bits, "kind must be 0 (float), 1 (int8) or 2 (bits)");
    Tensor out = empty_cpu<2>(ScalarType::Byte, {rows, bytes});
    for_rows<A>(x, [&](int64_t first, int64_t last, A* scratch) {
      kernel.bits(settings, read<A>(x), first, last, write<uint8_t>(out), scratch);
    });
    return out;
  });
}

Tensor finish_backward(const Tensor& grad_out, const Tensor& x, std::vector<int64_t> dims,
                       bool normalize) {
  check_rows_and_dims(x, dims);
  int64_t width = 0;
  for (int64_t k : dims) width += k;
  check(grad_out.is_cpu() && grad_out.scalar_type() == x.scalar_type() && grad_out.dim() == 2 &&
            grad_out.size(0) == x.size(0) && grad_out.size(1) == width && grad_out.is_contiguous(),
        "grad_out must be a contiguous CPU tensor (rows, sum of dims) of the dtype of x");
  const FinishSettings settings{dims.data(), int64_t(dims.size()), x.size(1), normalize, 0, 0};
  return visit_float(x.scalar_type(), "x must be float32 or float64", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor grad_x = empty_cpu<2>(x.scalar_type(), {x.size(0), x.size(1)});
    for_rows<A>(x, [&](int64_t first, int64_t last, A*) {
      kernels<FinishKernels>().of(element).backward(settings, read<A>(grad_out), read<A>(x), first,
                                                    last, write<A>(grad_x));
    });
    return grad_x;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  // kind: FinishKind; dtype: of the result where kind is floating.
  library.def(
      "finish(Tensor x, int[] dims, bool normalize, float noise, int seed, int kind,"
      " ScalarType dtype, Tensor? ranges) -> Tensor");
  library.def("finish_backward(Tensor grad_out, Tensor x, int[] dims, bool normalize) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("finish", TORCH_BOX(&emblas::finish));
  library.impl("finish_backward", TORCH_BOX(&emblas::finish_backward));
}
