// Rotary position embedding as torch operators on CUDA tensors.
#include <optional>

#include "attention/rotary_cuda.h"
#include "common/cuda/device_call.h"

namespace emblas {
namespace {

// out may be x.
void rotate(const DeviceCall& call, const Tensor& x, const Tensor& out, const Tensor& cos,
            const Tensor& sin, const std::optional<Tensor>& position_ids, bool interleaved,
            bool inverse) {
  check(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1),
        "x must be a tensor (tokens, heads, head_dim) of contiguous vectors");
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  const char* dtypes = "x must be float32, float64, bfloat16 or float16";
  visit_float(x.scalar_type(), dtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto is_table = [&](const Tensor& table) {
      return call.holds(table) && has_dtype<A>(table) && table.dim() == 2 && table.is_contiguous();
    };
    check(is_table(cos) && is_table(sin) && sin.size(0) == cos.size(0) &&
              sin.size(1) == cos.size(1) && 2 * cos.size(1) <= head_dim,
          "cos and sin must be contiguous (rows, pairs), of the accumulator's dtype, with no more "
          "than head_dim / 2 pairs");
    if (position_ids) {
      call.check_vector<int64_t>(*position_ids, tokens,
                                 "position_ids must be a contiguous int64 vector, one per token");
      check(tokens == 0 || cos.size(0) > 0, "cos and sin must have a row");
    } else {
      check(cos.size(0) == tokens, "cos and sin must have a row per token without position_ids");
    }
    const RotaryArgs<T> args{.x = {call.read<T>(x), x.stride(0), x.stride(1)},
                             .out = {call.write<T>(out), out.stride(0), out.stride(1)},
                             .heads = heads,
                             .head_dim = head_dim,
                             .pairs = cos.size(1),
                             .cos = call.read<A>(cos),
                             .sin = call.read<A>(sin),
                             .position_ids = call.read<int64_t>(position_ids),
                             .inverse = inverse};
    cuda::rotary<T>(args, interleaved, tokens, cos.size(0), call.stream());
  });
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin,
               const std::optional<Tensor>& position_ids, bool interleaved, bool inverse) {
  const DeviceCall call(x);
  check(x.dim() == 3, "x must be (tokens, heads, head_dim)");
  const Tensor out = call.empty<3>(x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  rotate(call, x, out, cos, sin, position_ids, interleaved, inverse);
  return out;
}

Tensor rotary_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin,
                   const std::optional<Tensor>& position_ids, bool interleaved) {
  return rotated(x, cos, sin, position_ids, interleaved, false);
}
Tensor rotary_backward_cuda(const Tensor& grad_out, const Tensor& cos, const Tensor& sin,
                            const std::optional<Tensor>& position_ids, bool interleaved) {
  return rotated(grad_out, cos, sin, position_ids, interleaved, true);
}
void rotary__cuda(const Tensor& x, const Tensor& cos, const Tensor& sin,
                  const std::optional<Tensor>& position_ids, bool interleaved) {
  rotate(DeviceCall(x), x, x, cos, sin, position_ids, interleaved, false);
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "rotary_cuda(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved)"
      " -> Tensor");
  library.def(
      "rotary_backward_cuda(Tensor grad_out, Tensor cos, Tensor sin, Tensor? position_ids,"
      " bool interleaved) -> Tensor");
  library.def(
      "rotary__cuda(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved)"
      " -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("rotary_cuda", TORCH_BOX(&emblas::rotary_cuda));
  library.impl("rotary_backward_cuda", TORCH_BOX(&emblas::rotary_backward_cuda));
  library.impl("rotary__cuda", TORCH_BOX(&emblas::rotary__cuda));
}
