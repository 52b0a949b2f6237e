// Rotary position embedding as torch operators on CPU tensors.
#include <memory>
#include <optional>

#include "attention/inputs.h"
#include "attention/rotary.h"
#include "common/aligned.h"
#include "common/isa.h"
#include "common/tensor.h"

namespace emblas {
namespace {

// out may be x.
void rotate(const Tensor& x, const Tensor& out, const Tensor& cos, const Tensor& sin,
            const std::optional<Tensor>& position_ids, bool interleaved, bool inverse) {
  check_head_vectors(x, "x must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  visit_float(
      x.scalar_type(), "x must be float32, float64, bfloat16 or float16", [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        const auto is_table = [&](const Tensor& table) {
          return table.is_cpu() && has_dtype<A>(table) && table.dim() == 2 && table.is_contiguous();
        };
        check(is_table(cos) && is_table(sin) && sin.size(0) == cos.size(0) &&
                  sin.size(1) == cos.size(1) && 2 * cos.size(1) <= head_dim,
              "cos and sin must be contiguous (rows, pairs), of the accumulator's dtype, with no "
              "more "
              "than head_dim / 2 pairs");
        if (position_ids) {
          check_vector<int64_t>(*position_ids, tokens,
                                "position_ids must be a contiguous int64 vector, one per token");
          const int64_t* ids = read<int64_t>(*position_ids);
          bool inside = true;
          for (int64_t i = 0; i < tokens; ++i) inside &= ids[i] >= 0 && ids[i] < cos.size(0);
          check(inside, "position_ids must be rows of cos and sin");
        } else {
          check(cos.size(0) == tokens,
                "cos and sin must have a row per token without position_ids");
        }
        const RotaryArgs<T> args{
            .x = head_vectors<T>(x),
            .out = new_head_vectors<T>(out),
            .heads = heads,
            .head_dim = head_dim,
            .pairs = cos.size(1),
            .cos = read<A>(cos),
            .sin = read<A>(sin),
            .position_ids = position_ids ? read<int64_t>(*position_ids) : nullptr,
            .inverse = inverse};
        const auto& kernel = kernels<RotaryKernels>().of(element);
        parallel_for(tokens, 2 * heads * head_dim * int64_t(sizeof(T)),
                     [&](int64_t first, int64_t last) {
                       if (!interleaved) return kernel.halves(args, first, last);
                       const AlignedArray<A> scratch = aligned_array<A>(4 * args.pairs);
                       kernel.interleaved(args, first, last, scratch.get());
                     });
      });
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin,
               const std::optional<Tensor>& position_ids, bool interleaved, bool inverse) {
  check(x.dim() == 3, "x must be (tokens, heads, head_dim)");
  Tensor out = empty_cpu<3>(x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  rotate(x, out, cos, sin, position_ids, interleaved, inverse);
  return out;
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& position_ids, bool interleaved) {
  return rotated(x, cos, sin, position_ids, interleaved, false);
}
Tensor rotary_backward(const Tensor& grad_out, const Tensor& cos, const Tensor& sin,
                       const std::optional<Tensor>& position_ids, bool interleaved) {
  return rotated(grad_out, cos, sin, position_ids, interleaved, true);
}
void rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
             const std::optional<Tensor>& position_ids, bool interleaved) {
  rotate(x, x, cos, sin, position_ids, interleaved, false);
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved) -> Tensor");
  library.def(
      "rotary_backward(Tensor grad_out, Tensor cos, Tensor sin, Tensor? position_ids,"
      " bool interleaved) -> Tensor");
  library.def(
      "rotary_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved)"
      " -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("rotary", TORCH_BOX(&emblas::rotary));
  library.impl("rotary_backward", TORCH_BOX(&emblas::rotary_backward));
  library.impl("rotary_", TORCH_BOX(&emblas::rotary_));
}
