// Segment pooling as torch operators on CUDA tensors: emblas::<op>_cuda, which the router of the
// public operator calls. Offsets stay on the device: the kernels clamp them, nobody waits.
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "pooling/segment_gradients_door_cuda.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr char kPowerMessage[] =
    "power must be a tensor of one element on the device of x, float64 where x is float64 and "
    "float32 otherwise";

PoolMode mode_of(int64_t mode) {
  check(0 <= mode && mode < kLinearModes, "mode must be the number of a linear pooling mode");
  return PoolMode(mode);
}

template <class T>
ScalarType stored_dtype(bool wide) {
  return wide ? kScalarType<Accumulator<T>> : kScalarType<T>;
}

// `partial` is the workspace, which lives as long as its caller keeps it.
template <class T>
cuda::SegmentSums<T> segment_sums(const DeviceCall& call, const SegmentTensors& tensors,
                                  PoolMode mode, Tensor& partial) {
  using A = Accumulator<T>;
  const bool chunked = !tensors.ends && !takes_one_token(mode);
  cuda::SegmentSums<T> sums{segment_rows<T>(call, tensors), mode, chunked, nullptr, 0, nullptr};
  partial = call.empty<2>(kScalarType<A>, {sums.slots(), dim_of(tensors.x)});
  sums.partial = call.write<A>(partial);
  return sums;
}

std::tuple<Tensor, Tensor> segment_pool_cuda(const Tensor& x, const Tensor& cu_seqlens,
                                             const OptionalTensor& weights, bool normalize,
                                             int64_t mode, const OptionalTensor& ends,
                                             const OptionalTensor& skip,
                                             const OptionalTensor& index, bool wide) {
  const DeviceCall call(x);
  check_tokens(call, x);
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor partial;
    const cuda::SegmentSums<T> sums = segment_sums<T>(call, tensors, mode_of(mode), partial);
    const int64_t batch = tensors.batch();
    const Tensor out = call.empty<2>(stored_dtype<T>(wide), {batch, dim_of(x)});
    const Tensor norm = call.empty<1>(kScalarType<A>, {normalize ? batch : 0});
    void* to = wide ? static_cast<void*>(call.write<A>(out)) : call.write<T>(out);
    cuda::segment_pool<T>({sums, normalize, wide, to, call.write<A>(norm)}, call.stream());
    return std::make_tuple(out, norm);
  });
}

std::tuple<Tensor, Tensor> segment_pool_modes_cuda(const Tensor& x, const Tensor& cu_seqlens,
                                                   const OptionalTensor& weights,
                                                   std::vector<int64_t> modes,
                                                   const OptionalTensor& ends,
                                                   const OptionalTensor& skip,
                                                   const OptionalTensor& index, bool wide) {
  const DeviceCall call(x);
  check_tokens(call, x);
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const PoolModes pool_modes = modes_of(modes);
    const bool max = has_mode(pool_modes, PoolMode::max);
    const int64_t batch = tensors.batch(), dim = dim_of(x);
    std::array<Tensor, 4> kept;
    cuda::SegmentPoolModesArgs<T> args{};
    args.sums = segment_sums<T>(call, tensors, PoolMode::mean, kept[0]);
    args.modes = pool_modes;
    args.wide = wide;
    const auto workspace = [&](ScalarType dtype, Tensor& tensor) -> const Tensor& {
      return tensor = call.empty<2>(dtype, {args.sums.slots(), dim});
    };
    const auto wanted = [&](PoolMode mode) { return has_mode(pool_modes, mode); };
    if (!wanted(PoolMode::mean) && !wanted(PoolMode::sum) && !wanted(PoolMode::mean_sqrt_len)) {
      args.sums.partial = nullptr;
    }
    if (wanted(PoolMode::weighted_mean)) {
      args.stepped = call.write<A>(workspace(kScalarType<A>, kept[1]));
    }
    if (max) {
      args.largest = call.write<A>(workspace(kScalarType<A>, kept[2]));
      args.where = call.write<int32_t>(workspace(ScalarType::Int, kept[3]));
    }
    const Tensor out = call.empty<2>(stored_dtype<T>(wide), {batch, pool_modes.count * dim});
    const Tensor argmax = call.empty<2>(ScalarType::Int, {max ? batch : 0, dim});
    args.out = wide ? static_cast<void*>(call.write<A>(out)) : call.write<T>(out);
    args.argmax = call.write<int32_t>(argmax);
    cuda::segment_pool_modes<T>(args, call.stream());
    return std::make_tuple(out, argmax);
  });
}

// norm, argmax: empty where the forward made none.
std::tuple<Tensor, Tensor> pool_backward(const DeviceCall& call, const Tensor& grad_out,
                                         const Tensor& out, const Tensor& norm,
                                         const Tensor& argmax, const SegmentTensors& tensors,
                                         const PoolModes& modes, bool normalize, bool need_x,
                                         bool need_weights, bool wide) {
  const Tensor& x = tensors.x;
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    SegmentGradients<T> gradients(call, tensors, modes);
    const int64_t batch = tensors.batch(), dim = dim_of(x);
    for (const Tensor& pooled : {grad_out, out}) {
      check(call.holds(pooled) && pooled.scalar_type() == stored_dtype<T>(wide) &&
                pooled.dim() == 2 && pooled.size(0) == batch &&
                pooled.size(1) == modes.count * dim && pooled.is_contiguous(),
            "grad_out and out must be contiguous (batch, modes * dim) tensors of the forward's "
            "dtype on the device of x");
    }
    call.check_vector<A>(norm, normalize ? batch : 0, "norm must be the forward's second output");
    const bool max = has_mode(modes, PoolMode::max);
    check(call.holds(argmax) && has_dtype<int32_t>(argmax) && argmax.is_contiguous() &&
              argmax.numel() == (max ? batch * dim : 0),
          "argmax must be the forward's second output");
    const Tensor grad_x = gradients.empty_like_x(need_x);
    const Tensor grad_weights =
        call.empty<1>(kScalarType<A>, {need_weights ? tensors.positions() : 0});
    const auto pooled = [&](const Tensor& tensor) {
      return wide ? static_cast<const void*>(call.read<A>(tensor)) : call.read<T>(tensor);
    };
    if (!need_x && !need_weights) return std::make_tuple(grad_x, grad_weights);
    gradients.parts.argmax = call.read<int32_t>(argmax);
    cuda::segment_pool_contributions<T>(
        {gradients.parts, normalize, wide, pooled(grad_out), pooled(out), call.read<A>(norm)},
        call.stream());
    const cuda::Order order = gradients.order();
    if (need_x) gradients.rows(order, nullptr, 0, grad_x);
    if (need_weights) {
      cuda::weight_gradients<T>(gradients.parts, order, nullptr, 0, call.write<A>(grad_weights),
                                call.stream());
    }
    return std::make_tuple(grad_x, grad_weights);
  });
}

std::tuple<Tensor, Tensor> segment_pool_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& norm,
    const Tensor& cu_seqlens, const OptionalTensor& weights, bool normalize, bool need_x,
    bool need_weights, int64_t mode, const OptionalTensor& ends, const OptionalTensor& skip,
    const OptionalTensor& index, bool wide) {
  const DeviceCall call(x);
  check_tokens(call, x);
  return pool_backward(call, grad_out, out, norm, call.empty<1>(ScalarType::Int, {0}),
                       {x, cu_seqlens, weights, ends, skip, index}, {{mode_of(mode)}, 1}, normalize,
                       need_x, need_weights, wide);
}

std::tuple<Tensor, Tensor> segment_pool_modes_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& argmax,
    const Tensor& cu_seqlens, const OptionalTensor& weights, std::vector<int64_t> modes,
    bool need_x, bool need_weights, const OptionalTensor& ends, const OptionalTensor& skip,
    const OptionalTensor& index, bool wide) {
  const DeviceCall call(x);
  check_tokens(call, x);
  const ScalarType accumulator = has_dtype<double>(x) ? ScalarType::Double : ScalarType::Float;
  return pool_backward(call, grad_out, out, call.empty<1>(accumulator, {0}), argmax,
                       {x, cu_seqlens, weights, ends, skip, index}, modes_of(modes), false, need_x,
                       need_weights, wide);
}

Tensor segment_gem_cuda(const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& weights,
                        const Tensor& power, double epsilon, const OptionalTensor& ends,
                        const OptionalTensor& skip, const OptionalTensor& index) {
  const DeviceCall call(x);
  check_tokens(call, x);
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    call.check_vector<A>(power, 1, kPowerMessage);
    Tensor partial;
    cuda::SegmentSums<T> sums = segment_sums<T>(call, tensors, PoolMode::mean, partial);
    sums.power = call.read<A>(power);
    sums.epsilon = A(epsilon);
    const Tensor out = call.empty<2>(kScalarType<A>, {tensors.batch(), dim_of(x)});
    cuda::segment_gem<T>(sums, call.write<A>(out), call.stream());
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> segment_gem_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& cu_seqlens,
    const OptionalTensor& weights, const Tensor& power, double epsilon, const OptionalTensor& ends,
    const OptionalTensor& skip, const OptionalTensor& index, bool need_weights) {
  const DeviceCall call(x);
  check_tokens(call, x);
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    call.check_vector<A>(power, 1, kPowerMessage);
    const SegmentGradients<T> gradients(call, tensors, {{PoolMode::mean}, 1});
    const int64_t batch = tensors.batch();
    for (const Tensor& pooled : {grad_out, out}) {
      check(call.holds(pooled) && has_dtype<A>(pooled) && pooled.dim() == 2 &&
                pooled.size(0) == batch && pooled.size(1) == dim_of(x) && pooled.is_contiguous(),
            "grad_out and out must be contiguous (batch, dim) tensors of the forward's dtype on "
            "the device of x");
    }
    const Tensor grad_x = gradients.empty_like_x(true);
    const Tensor grad_power = call.empty<1>(kScalarType<A>, {batch});
    const Tensor grad_weights =
        call.empty<1>(kScalarType<A>, {need_weights ? tensors.positions() : 0});
    cuda::segment_gem_contributions<T>(gradients.parts, call.read<A>(power), A(epsilon),
                                       call.read<A>(grad_out), call.read<A>(out),
                                       call.write<A>(grad_power), call.stream());
    const cuda::Order order = gradients.order();
    gradients.rows(order, call.read<A>(power), A(epsilon), grad_x);
    if (need_weights) {
      cuda::weight_gradients<T>(gradients.parts, order, call.read<A>(power), A(epsilon),
                                call.write<A>(grad_weights), call.stream());
    }
    return std::make_tuple(grad_x, grad_power, grad_weights);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "segment_pool_cuda(Tensor x, Tensor cu_seqlens, Tensor? weights, bool normalize, int mode=0,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor out, Tensor norm)");
  library.def(
      "segment_pool_backward_cuda(Tensor grad_out, Tensor x, Tensor out, Tensor norm,"
      " Tensor cu_seqlens, Tensor? weights, bool normalize, bool need_x, bool need_weights,"
      " int mode=0, Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor grad_x, Tensor grad_weights)");
  library.def(
      "segment_pool_modes_cuda(Tensor x, Tensor cu_seqlens, Tensor? weights, int[] modes,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor out, Tensor argmax)");
  library.def(
      "segment_pool_modes_backward_cuda(Tensor grad_out, Tensor x, Tensor out, Tensor argmax,"
      " Tensor cu_seqlens, Tensor? weights, int[] modes, bool need_x, bool need_weights,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor grad_x, Tensor grad_weights)");
  library.def(
      "segment_gem_cuda(Tensor x, Tensor cu_seqlens, Tensor? weights, Tensor power, float epsilon,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None) -> Tensor");
  library.def(
      "segment_gem_backward_cuda(Tensor grad_out, Tensor x, Tensor out, Tensor cu_seqlens,"
      " Tensor? weights, Tensor power, float epsilon, Tensor? ends=None, Tensor? skip=None,"
      " Tensor? index=None, bool need_weights=False)"
      " -> (Tensor grad_x, Tensor grad_power, Tensor grad_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("segment_pool_cuda", TORCH_BOX(&emblas::segment_pool_cuda));
  library.impl("segment_pool_backward_cuda", TORCH_BOX(&emblas::segment_pool_backward_cuda));
  library.impl("segment_pool_modes_cuda", TORCH_BOX(&emblas::segment_pool_modes_cuda));
  library.impl("segment_pool_modes_backward_cuda",
               TORCH_BOX(&emblas::segment_pool_modes_backward_cuda));
  library.impl("segment_gem_cuda", TORCH_BOX(&emblas::segment_gem_cuda));
  library.impl("segment_gem_backward_cuda", TORCH_BOX(&emblas::segment_gem_backward_cuda));
}
