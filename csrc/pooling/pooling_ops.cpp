// Segment pooling as torch operators on CPU tensors.
#include <memory>
#include <optional>
#include <tuple>

#include "common/isa.h"
#include "common/packed.h"
#include "common/tensor.h"
#include "pooling/pooling.h"

namespace emblas {
namespace {

// body(first, last, scratch) over the sequences, tasks balanced by tokens.
template <class A, class Body>
void for_sequences(const int32_t* cu_seqlens, int64_t batch, int64_t dim, const Body& body) {
  const int64_t positions = cu_seqlens[batch] + batch;
  parallel_for(positions, dim * int64_t(sizeof(A)), [&](int64_t low, int64_t high) {
    const std::unique_ptr<A[]> scratch(new A[dim]);
    body(first_sequence_from(cu_seqlens, batch, low), first_sequence_from(cu_seqlens, batch, high),
         scratch.get());
  });
}

void check_batch(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& weights) {
  check_rows(x, "x must be a CPU tensor (tokens, dim) with a contiguous last dimension");
  check_vector<int32_t>(cu_seqlens, -1, "cu_seqlens must be a contiguous int32 CPU vector");
  check(cu_seqlens.size(0) >= 1, "cu_seqlens must have at least one element");
  check(valid_cu_seqlens(read<int32_t>(cu_seqlens), cu_seqlens.size(0) - 1, x.size(0)),
        "cu_seqlens must start at 0, never decrease and end at the number of tokens");
  const char* message =
      "weights must be a contiguous CPU vector of one weight per token, float64 "
      "where x is float64 and float32 otherwise";
  if (!weights) return;
  if (has_dtype<double>(x)) {
    check_vector<double>(*weights, x.size(0), message);
  } else {
    check_vector<float>(*weights, x.size(0), message);
  }
}

template <class T>
const T* read_optional(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

constexpr char kDtypes[] = "x must be float32, float64, bfloat16 or float16";

std::tuple<Tensor, Tensor> segment_pool(const Tensor& x, const Tensor& cu_seqlens,
                                        const std::optional<Tensor>& weights, bool normalize) {
  check_batch(x, cu_seqlens, weights);
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = cu_seqlens.size(0) - 1, dim = x.size(1);
    Tensor out = empty_cpu<2>(x.scalar_type(), {batch, dim});
    Tensor norm = empty_cpu<1>(kScalarType<A>, {normalize ? batch : 0});
    const SegmentPoolArgs<T> args{read<T>(x),
                                  x.stride(0),
                                  dim,
                                  read<int32_t>(cu_seqlens),
                                  read_optional<A>(weights),
                                  normalize,
                                  write<T>(out),
                                  write<A>(norm)};
    const auto& kernel = kernels<PoolingKernels>().of(element);
    for_sequences<A>(args.cu_seqlens, batch, dim, [&](int64_t first, int64_t last, A* scratch) {
      kernel.forward(args, first, last, scratch);
    });
    return std::make_tuple(out, norm);
  });
}

std::tuple<Tensor, Tensor> segment_pool_backward(const Tensor& grad_out, const Tensor& x,
                                                 const Tensor& out, const Tensor& norm,
                                                 const Tensor& cu_seqlens,
                                                 const std::optional<Tensor>& weights,
                                                 bool normalize, bool need_x, bool need_weights) {
  check_batch(x, cu_seqlens, weights);
  const int64_t batch = cu_seqlens.size(0) - 1, tokens = x.size(0), dim = x.size(1);
  const auto is_output = [&](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == x.scalar_type() && tensor.dim() == 2 &&
           tensor.size(0) == batch && tensor.size(1) == dim && tensor.is_contiguous();
  };
  check(is_output(grad_out) && is_output(out),
        "grad_out and out must be contiguous (batch, dim) CPU tensors of the dtype of x");
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    check_vector<A>(norm, normalize ? batch : 0, "norm must be the forward's second output");
    Tensor grad_x = empty_cpu<2>(x.scalar_type(), {need_x ? tokens : 0, dim});
    Tensor grad_weights = empty_cpu<1>(kScalarType<A>, {need_weights ? tokens : 0});
    const SegmentPoolBackwardArgs<T> args{read<T>(grad_out),
                                          read<T>(x),
                                          x.stride(0),
                                          read<T>(out),
                                          read<A>(norm),
                                          dim,
                                          read<int32_t>(cu_seqlens),
                                          read_optional<A>(weights),
                                          normalize,
                                          need_x ? write<T>(grad_x) : nullptr,
                                          need_weights ? write<A>(grad_weights) : nullptr};
    const auto& kernel = kernels<PoolingKernels>().of(element);
    for_sequences<A>(args.cu_seqlens, batch, dim, [&](int64_t first, int64_t last, A* scratch) {
      kernel.backward(args, first, last, scratch);
    });
    return std::make_tuple(grad_x, grad_weights);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "segment_pool(Tensor x, Tensor cu_seqlens, Tensor? weights, bool normalize)"
      " -> (Tensor out, Tensor norm)");
  library.def(
      "segment_pool_backward(Tensor grad_out, Tensor x, Tensor out, Tensor norm, Tensor cu_seqlens,"
      " Tensor? weights, bool normalize, bool need_x, bool need_weights)"
      " -> (Tensor grad_x, Tensor grad_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("segment_pool", TORCH_BOX(&emblas::segment_pool));
  library.impl("segment_pool_backward", TORCH_BOX(&emblas::segment_pool_backward));
}
