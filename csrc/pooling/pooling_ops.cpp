// Segment pooling as torch operators on CPU tensors.
#include <cstring>
#include <tuple>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "pooling/pooling.h"
#include "pooling/segments_door.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr char kPowerMessage[] =
    "power must be a CPU tensor of one element, float64 where x is float64 and float32 otherwise";

PoolModes mode_of(int64_t mode) {
  check(0 <= mode && mode < kLinearModes, "mode must be the number of a linear pooling mode");
  return {{PoolMode(mode)}, 1};
}

template <class T>
ScalarType stored_dtype(bool wide) {
  return wide ? kScalarType<Accumulator<T>> : kScalarType<T>;
}

// out [batch, modes * dim]; norm [batch] if normalize; argmax [batch, dim], positions, if max is a
// mode.
std::tuple<Tensor, Tensor, Tensor> pool(const SegmentTensors& tensors, const PoolModes& modes,
                                        bool normalize, bool wide) {
  tensors.check_all();
  const Tensor& x = tensors.x;
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch(), dim = dim_of(x);
    Tensor out = empty_cpu<2>(stored_dtype<T>(wide), {batch, modes.count * dim});
    Tensor norm = empty_cpu<1>(kScalarType<A>, {normalize ? batch : 0});
    Tensor argmax =
        empty_cpu<2>(ScalarType::Int, {has_mode(modes, PoolMode::max) ? batch : 0, dim});
    const SegmentPoolArgs<T> args{
        tensors.view<T>(),     modes, normalize, wide, out.mutable_data_ptr(), write<A>(norm),
        write<int32_t>(argmax)};
    const auto& kernel = kernels<PoolingKernels>().of(element);
    for_segments<A>(tensors, modes.count + 1, [&](int64_t first, int64_t last, A* scratch) {
      kernel.forward(args, first, last, scratch);
    });
    return std::make_tuple(out, norm, argmax);
  });
}

std::tuple<Tensor, Tensor> segment_pool(const Tensor& x, const Tensor& cu_seqlens,
                                        const OptionalTensor& weights, bool normalize, int64_t mode,
                                        const OptionalTensor& ends, const OptionalTensor& skip,
                                        const OptionalTensor& index, bool wide) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  const auto [out, norm, argmax] = pool(tensors, mode_of(mode), normalize, wide);
  return {out, norm};
}

std::tuple<Tensor, Tensor> segment_pool_modes(const Tensor& x, const Tensor& cu_seqlens,
                                              const OptionalTensor& weights,
                                              std::vector<int64_t> modes,
                                              const OptionalTensor& ends,
                                              const OptionalTensor& skip,
                                              const OptionalTensor& index, bool wide) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  const auto [out, norm, argmax] = pool(tensors, modes_of(modes), false, wide);
  return {out, argmax};
}

std::tuple<Tensor, Tensor> segment_max(const Tensor& x, const Tensor& cu_seqlens,
                                       const OptionalTensor& weights, const OptionalTensor& ends,
                                       const OptionalTensor& skip, const OptionalTensor& index) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  const auto [out, norm, argmax] = pool(tensors, {{PoolMode::max}, 1}, false, false);
  if (index) {
    const int32_t* row = read<int32_t>(*index);
    int32_t* at = write<int32_t>(argmax);
    parallel_for(argmax.numel(), sizeof(int32_t), [&](int64_t low, int64_t high) {
      for (int64_t i = low; i < high; ++i) at[i] = at[i] < 0 ? -1 : row[at[i]];
    });
  }
  return {out, argmax};
}

// Gradients of weights where segments share tokens; slope(number, x) is what a segment in a mode
// gives those of a token but for its steps.
template <class T, class Slope>
void shared_weights(const SegmentTensors& tensors, const PoolModes& modes,
                    const Accumulator<T>* shared, Accumulator<T>* grad_weights,
                    const Slope& slope) {
  using A = Accumulator<T>;
  const Segments<T> segments = tensors.view<T>();
  const int64_t count = modes.count;
  if (tensors.index) {  // a position of an index is in one segment only
    std::fill_n(grad_weights, tensors.positions(), A(0));
    for_segments<A>(tensors, 0, [&](int64_t first, int64_t last, A*) {
      for (int64_t b = first; b < last; ++b) {
        const Range range = range_of(segments, b, PoolMode::mean);
        for (int64_t p = range.begin; p < range.end; ++p) {
          for (int64_t m = 0; m < count; ++m) {
            if (!weighs(modes.at[m])) continue;
            grad_weights[p] +=
                steps_at<A>(range, p, modes.at[m]) * slope(b * count + m, row_at(segments, p));
          }
        }
      }
    });
    return;
  }
  // The slope at weight 0 counts too: the sums run with all weights 1.
  const std::optional<Tensor> none;
  const SegmentTensors all{tensors.x, tensors.starts, none, tensors.ends, tensors.skip, none};
  SharedRows<T>(all, modes, shared, nullptr).for_rows([&] {
    return [&](int64_t row, const RowShare<A>* shares, int64_t shares_count) {
      A total = 0;
      for (const RowShare<A>* share = shares; share < shares + shares_count; ++share) {
        if (weighs(modes.at[share->number % count])) {
          total += share->factor * slope(share->number, row_at(segments, row));
        }
      }
      grad_weights[row] = total;
    };
  });
}

// Gradients where segments share tokens: first what each segment contributes, then the sums.
template <class T>
void shared_backward(const SegmentPoolBackwardArgs<T>& args, const SegmentTensors& tensors) {
  using A = Accumulator<T>;
  const auto& kernel = kernels<PoolingKernels>().of(T{});
  const PoolModes& modes = args.modes;
  const int64_t batch = tensors.batch(), dim = dim_of(tensors.x), count = modes.count;
  const std::unique_ptr<A[]> shared(new A[batch * count * dim]), along(new A[batch * count]);
  for_segments<A>(tensors, 0, [&](int64_t first, int64_t last, A*) {
    for (int64_t i = first * count; i < last * count; ++i) {
      along[i] = kernel.share(args, i / count, i % count, &shared[i * dim]);
    }
  });
  if (args.grad_x) {
    SharedRows<T>(tensors, modes, shared.get(), args.argmax).for_rows([&] {
      return [&, scratch = aligned_array<A>(dim)](int64_t row, const RowShare<A>* shares,
                                                  int64_t shares_count) {
        kernel.combine(shared.get(), dim, shares, shares_count, args.grad_x + row * dim,
                       scratch.get());
      };
    });
  }
  if (!args.grad_weights) return;
  shared_weights<T>(tensors, modes, shared.get(), args.grad_weights,
                    [&](int64_t number, const T* x) {
                      return kernel.dot(x, &shared[number * dim], dim) - along[number];
                    });
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad_out, const Tensor& out,
                                         const Tensor& norm, const Tensor& argmax,
                                         const SegmentTensors& tensors, const PoolModes& modes,
                                         bool normalize, bool need_x, bool need_weights,
                                         bool wide) {
  tensors.check_all();
  const Tensor& x = tensors.x;
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch(), positions = tensors.positions();
    const auto is_output = [&](const Tensor& tensor) {
      return tensor.is_cpu() && tensor.scalar_type() == stored_dtype<T>(wide) &&
             tensor.dim() == 2 && tensor.size(0) == batch &&
             tensor.size(1) == modes.count * dim_of(x) && tensor.is_contiguous();
    };
    check(is_output(grad_out) && is_output(out),
          "grad_out and out must be contiguous (batch, modes * dim) CPU tensors of the forward's "
          "dtype");
    check_vector<A>(norm, normalize ? batch : 0, "norm must be the forward's second output");
    check(argmax.is_cpu() && has_dtype<int32_t>(argmax) && argmax.is_contiguous() &&
              argmax.numel() == (has_mode(modes, PoolMode::max) ? batch * dim_of(x) : 0),
          "argmax must be the forward's second output");
    Tensor grad_x = empty_like_tokens(x, need_x);
    Tensor grad_weights = empty_cpu<1>(kScalarType<A>, {need_weights ? positions : 0});
    const SegmentPoolBackwardArgs<T> args{tensors.view<T>(),
                                          modes,
                                          normalize,
                                          wide,
                                          grad_out.const_data_ptr(),
                                          out.const_data_ptr(),
                                          read<A>(norm),
                                          read<int32_t>(argmax),
                                          batch,
                                          positions,
                                          need_x ? write<T>(grad_x) : nullptr,
                                          need_weights ? write<A>(grad_weights) : nullptr};
    if (batch > 0 && tensors.disjoint()) {
      const auto& kernel = kernels<PoolingKernels>().of(element);
      for_segments<A>(tensors, modes.count + 1, [&](int64_t first, int64_t last, A* scratch) {
        kernel.backward(args, first, last, scratch);
      });
    } else {
      shared_backward<T>(args, tensors);
    }
    return std::make_tuple(grad_x, grad_weights);
  });
}

std::tuple<Tensor, Tensor> segment_pool_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& norm,
    const Tensor& cu_seqlens, const OptionalTensor& weights, bool normalize, bool need_x,
    bool need_weights, int64_t mode, const OptionalTensor& ends, const OptionalTensor& skip,
    const OptionalTensor& index, bool wide) {
  return pool_backward(grad_out, out, norm, empty_cpu<1>(ScalarType::Int, {0}),
                       {x, cu_seqlens, weights, ends, skip, index}, mode_of(mode), normalize,
                       need_x, need_weights, wide);
}

std::tuple<Tensor, Tensor> segment_pool_modes_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& argmax,
    const Tensor& cu_seqlens, const OptionalTensor& weights, std::vector<int64_t> modes,
    bool need_x, bool need_weights, const OptionalTensor& ends, const OptionalTensor& skip,
    const OptionalTensor& index, bool wide) {
  const ScalarType accumulator = has_dtype<double>(x) ? ScalarType::Double : ScalarType::Float;
  return pool_backward(grad_out, out, empty_cpu<1>(accumulator, {0}), argmax,
                       {x, cu_seqlens, weights, ends, skip, index}, modes_of(modes), false, need_x,
                       need_weights, wide);
}

// grad_x[argmax[b, i], i] = sum of grad_out[b, i] over b. Segments may share a maximum: a column's
// gradients are sorted by row and then by bits, so their sum has the same bits in any order.
Tensor segment_max_backward(const Tensor& grad_out, const Tensor& argmax, int64_t rows) {
  check(grad_out.is_cpu() && grad_out.dim() == 2 && grad_out.is_contiguous(),
        "grad_out must be a contiguous CPU tensor (batch, dim)");
  check(argmax.is_cpu() && has_dtype<int32_t>(argmax) && argmax.dim() == 2 &&
            argmax.is_contiguous() && argmax.size(0) == grad_out.size(0) &&
            argmax.size(1) == grad_out.size(1),
        "argmax must be the forward's second output");
  check(0 <= rows && rows <= INT32_MAX, "rows must be the number of tokens");
  const int64_t batch = grad_out.size(0), dim = grad_out.size(1);
  const int32_t* at = read<int32_t>(argmax);
  check(std::all_of(at, at + batch * dim, [&](int32_t row) { return -1 <= row && row < rows; }),
        "argmax must hold rows of x");
  return visit_float(grad_out.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor grad_x = empty_cpu<2>(grad_out.scalar_type(), {rows, dim});
    T* to = write<T>(grad_x);
    parallel_for(rows, dim * int64_t(sizeof(T)), [&](int64_t low, int64_t high) {
      std::memset(static_cast<void*>(to + low * dim), 0, (high - low) * dim * sizeof(T));
    });
    const T* from = read<T>(grad_out);
    const auto& kernel = kernels<SegmentMaxKernels>().of(element);
    parallel_for(dim, batch * int64_t(sizeof(T)), [&](int64_t low, int64_t high) {
      std::vector<MaxGradient<T>> column;
      for (int64_t i = low; i < high; ++i) {
        column.clear();
        bool sorted = true;
        for (int64_t b = 0; b < batch; ++b) {
          const int32_t row = at[b * dim + i];
          if (row < 0) continue;
          sorted = sorted && (column.empty() || column.back().row < row);
          column.push_back({row, from[b * dim + i]});
        }
        if (!sorted) {
          std::sort(column.begin(), column.end(), [](const auto& a, const auto& b) {
            return a.row != b.row ? a.row < b.row : std::memcmp(&a.value, &b.value, sizeof(T)) < 0;
          });
        }
        kernel.scatter(column.data(), int64_t(column.size()), to + i, dim);
      }
    });
    return grad_x;
  });
}

Tensor segment_gem(const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& weights,
                   const Tensor& power, double epsilon, const OptionalTensor& ends,
                   const OptionalTensor& skip, const OptionalTensor& index) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  tensors.check_all();
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    check_vector<A>(power, 1, kPowerMessage);
    Tensor out = empty_cpu<2>(kScalarType<A>, {tensors.batch(), dim_of(x)});
    const Segments<T> segments = tensors.view<T>();
    const auto& kernel = kernels<SegmentGemKernels>().of(element);
    for_segments<A>(tensors, 2, [&](int64_t first, int64_t last, A* scratch) {
      kernel.forward(segments, *read<A>(power), A(epsilon), first, last, write<A>(out), scratch);
    });
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> segment_gem_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& cu_seqlens,
    const OptionalTensor& weights, const Tensor& power, double epsilon, const OptionalTensor& ends,
    const OptionalTensor& skip, const OptionalTensor& index, bool need_weights) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  tensors.check_all();
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch(), dim = dim_of(x);
    check_vector<A>(power, 1, kPowerMessage);
    const auto is_output = [&](const Tensor& tensor) {
      return tensor.is_cpu() && has_dtype<A>(tensor) && tensor.dim() == 2 &&
             tensor.size(0) == batch && tensor.size(1) == dim && tensor.is_contiguous();
    };
    check(is_output(grad_out) && is_output(out),
          "grad_out and out must be contiguous (batch, dim) CPU tensors of the forward's dtype");
    const Segments<T> segments = tensors.view<T>();
    const A p = *read<A>(power);
    const auto& kernel = kernels<SegmentGemKernels>().of(element);
    Tensor grad_x = empty_like_tokens(x, true);
    Tensor grad_power = empty_cpu<1>(kScalarType<A>, {batch});
    Tensor grad_weights = empty_cpu<1>(kScalarType<A>, {need_weights ? tensors.positions() : 0});
    const std::unique_ptr<A[]> shared(new A[batch * dim]), along(new A[batch]);
    for_segments<A>(tensors, 1, [&](int64_t first, int64_t last, A* scratch) {
      for (int64_t b = first; b < last; ++b) {
        write<A>(grad_power)[b] =
            kernel.share(segments, p, A(epsilon), b, read<A>(grad_out) + b * dim,
                         read<A>(out) + b * dim, &shared[b * dim], &along[b], scratch);
      }
    });
    const PoolModes mean{{PoolMode::mean}, 1};
    SharedRows<T>(tensors, mean, shared.get(), nullptr).for_rows([&] {
      Segments<T> rows = segments;
      rows.index = nullptr;
      return [&, rows, scratch = aligned_array<A>(2 * dim)](int64_t row, const RowShare<A>* shares,
                                                            int64_t count) {
        kernel.combine(shared.get(), dim, shares, count, row_at(rows, row), p, A(epsilon),
                       write<T>(grad_x) + row * dim, scratch.get());
      };
    });
    if (need_weights) {
      shared_weights<T>(
          tensors, mean, shared.get(), write<A>(grad_weights), [&](int64_t b, const T* of_token) {
            return kernel.dot(of_token, &shared[b * dim], dim, p, A(epsilon)) - along[b];
          });
    }
    return std::make_tuple(grad_x, grad_power, grad_weights);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  // mode, modes: PoolMode. With `ends`, cu_seqlens holds the starts. With `index`, positions are
  // entries of it. `wide`: store the accumulator's dtype.
  library.def(
      "segment_pool(Tensor x, Tensor cu_seqlens, Tensor? weights, bool normalize, int mode=0,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor out, Tensor norm)");
  library.def(
      "segment_pool_backward(Tensor grad_out, Tensor x, Tensor out, Tensor norm, Tensor cu_seqlens,"
      " Tensor? weights, bool normalize, bool need_x, bool need_weights, int mode=0,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor grad_x, Tensor grad_weights)");
  // Results side by side; argmax: positions, where max is a mode.
  library.def(
      "segment_pool_modes(Tensor x, Tensor cu_seqlens, Tensor? weights, int[] modes,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor out, Tensor argmax)");
  library.def(
      "segment_pool_modes_backward(Tensor grad_out, Tensor x, Tensor out, Tensor argmax,"
      " Tensor cu_seqlens, Tensor? weights, int[] modes, bool need_x, bool need_weights,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor grad_x, Tensor grad_weights)");
  library.def(
      "segment_max(Tensor x, Tensor cu_seqlens, Tensor? weights, Tensor? ends=None,"
      " Tensor? skip=None, Tensor? index=None) -> (Tensor out, Tensor argmax)");
  library.def("segment_max_backward(Tensor grad_out, Tensor argmax, SymInt rows) -> Tensor");
  library.def(
      "segment_gem(Tensor x, Tensor cu_seqlens, Tensor? weights, Tensor power, float epsilon,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None) -> Tensor");
  library.def(
      "segment_gem_backward(Tensor grad_out, Tensor x, Tensor out, Tensor cu_seqlens,"
      " Tensor? weights, Tensor power, float epsilon, Tensor? ends=None, Tensor? skip=None,"
      " Tensor? index=None, bool need_weights=False)"
      " -> (Tensor grad_x, Tensor grad_power, Tensor grad_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("segment_pool", TORCH_BOX(&emblas::segment_pool));
  library.impl("segment_pool_backward", TORCH_BOX(&emblas::segment_pool_backward));
  library.impl("segment_pool_modes", TORCH_BOX(&emblas::segment_pool_modes));
  library.impl("segment_pool_modes_backward", TORCH_BOX(&emblas::segment_pool_modes_backward));
  library.impl("segment_max", TORCH_BOX(&emblas::segment_max));
  library.impl("segment_max_backward", TORCH_BOX(&emblas::segment_max_backward));
  library.impl("segment_gem", TORCH_BOX(&emblas::segment_gem));
  library.impl("segment_gem_backward", TORCH_BOX(&emblas::segment_gem_backward));
}
