// Sorting and adding up on the device, by torch.
#pragma once

#include <array>
#include <optional>

#include "common/tensor.h"

namespace emblas {
namespace {

// The values of a vector in rising order, equal ones in theirs, and where each one was (int64).
inline std::array<Tensor, 2> sort_stable(const Tensor& vector) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::optional<bool> stable = true;
  std::array<StableIValue, 4> stack{from(vector), from(stable), from(int64_t(0)), from(false)};
  check_torch(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// The sums of a vector up to each element; of integers int64.
inline Tensor cumulative_sum(const Tensor& vector) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::optional<ScalarType> same;
  std::array<StableIValue, 3> stack{from(vector), from(int64_t(0)), from(same)};
  check_torch(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace emblas
