// What the adapters of vocabulary pooling have in common: torch's matrix product, and guards.
#pragma once

#include "pooling/segments_door_cuda.h"

namespace emblas {

// out = a b
inline void matmul_out(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  check_torch(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

inline void check_projection(const DeviceCall& call, const Tensor& x, const Tensor& weight) {
  check(call.holds(x) && x.dim() == 2 && x.is_contiguous(), "x must be contiguous (tokens, dim)");
  check(call.holds(weight) && weight.scalar_type() == x.scalar_type() && weight.dim() == 2 &&
            weight.size(1) == x.size(1) && weight.is_contiguous(),
        "weight must be a contiguous tensor (vocabulary, dim) of the dtype and device of x");
}

}  // namespace emblas
