// Segment pooling as torch operators on CPU tensors.
#include <cstring>
#include <tuple>

#include "common/isa.h"
#include "pooling/pooling.h"
#include "pooling/segments_door.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr char kPowerMessage[] =
    "power must be a CPU tensor of one element, float64 where x is float64 and float32 otherwise";

PoolMode mode_of(int64_t mode) {
  check(0 <= mode && mode < kPoolModes, "mode must be the number of a linear pooling mode");
  return PoolMode(mode);
}

template <class T>
ScalarType stored_dtype(bool wide) {
  return wide ? kScalarType<Accumulator<T>> : kScalarType<T>;
}

std::tuple<Tensor, Tensor> segment_pool(const Tensor& x, const Tensor& cu_seqlens,
                                        const OptionalTensor& weights, bool normalize, int64_t mode,
                                        const OptionalTensor& ends, const OptionalTensor& skip,
                                        const OptionalTensor& index, bool wide) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  tensors.check_all();
  const PoolMode pool_mode = mode_of(mode);
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch();
    Tensor out = empty_cpu<2>(stored_dtype<T>(wide), {batch, dim_of(x)});
    Tensor norm = empty_cpu<1>(kScalarType<A>, {normalize ? batch : 0});
    const SegmentPoolArgs<T> args{tensors.view<T>(),      pool_mode,     normalize, wide,
                                  out.mutable_data_ptr(), write<A>(norm)};
    const auto& kernel = kernels<PoolingKernels>().of(element);
    for_segments<A>(tensors, 1, [&](int64_t first, int64_t last, A* scratch) {
      kernel.forward(args, first, last, scratch);
    });
    return std::make_tuple(out, norm);
  });
}

// Gradients where segments share tokens: first what each segment contributes, then the sums.
template <class T>
void shared_backward(const SegmentPoolBackwardArgs<T>& args, const SegmentTensors& tensors) {
  using A = Accumulator<T>;
  const auto& kernel = kernels<PoolingKernels>().of(T{});
  const int64_t batch = tensors.batch(), dim = dim_of(tensors.x);
  const std::unique_ptr<A[]> shared(new A[batch * dim]), along(new A[batch]);
  for_segments<A>(tensors, 0, [&](int64_t first, int64_t last, A*) {
    for (int64_t b = first; b < last; ++b) along[b] = kernel.share(args, b, &shared[b * dim]);
  });
  if (args.grad_weights && tensors.index) {  // a position of an index is in one segment only
    std::fill_n(args.grad_weights, args.positions, A(0));
    for_segments<A>(tensors, 0, [&](int64_t first, int64_t last, A*) {
      for (int64_t b = first; b < last; ++b) {
        const Range range = range_of(args.segments, b, args.mode);
        for (int64_t p = range.begin; p < range.end && !takes_one_token(args.mode); ++p) {
          const A steps = args.mode == PoolMode::weighted_mean ? A(p - range.origin + 1) : A(1);
          const A slope = kernel.dot(row_at(args.segments, p), &shared[b * dim], dim) - along[b];
          args.grad_weights[p] = steps * slope;
        }
      }
    });
  }
  if (args.grad_x) {
    SharedRows<T>(tensors, args.mode, shared.get()).for_rows([&] {
      return [&, scratch = std::unique_ptr<A[]>(new A[dim])](int64_t row, const int32_t* segments,
                                                             const A* factors, int64_t count) {
        kernel.combine(shared.get(), dim, segments, factors, count, args.grad_x + row * dim,
                       scratch.get());
      };
    });
  }
  if (args.grad_weights && !tensors.index) {
    // The slope at weight 0 counts too: the sums run with all weights 1.
    const std::optional<Tensor> none;
    const SegmentTensors all{tensors.x, tensors.starts, none, tensors.ends, tensors.skip, none};
    const bool constant = takes_one_token(args.mode);
    SharedRows<T>(all, args.mode, shared.get()).for_rows([&] {
      return [&](int64_t row, const int32_t* segments, const A* factors, int64_t count) {
        A total = 0;
        for (int64_t i = 0; i < count && !constant; ++i) {
          const A* of_segment = &shared[segments[i] * dim];
          total += factors[i] *
                   (kernel.dot(row_at(args.segments, row), of_segment, dim) - along[segments[i]]);
        }
        args.grad_weights[row] = total;
      };
    });
  }
}

std::tuple<Tensor, Tensor> segment_pool_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& norm,
    const Tensor& cu_seqlens, const OptionalTensor& weights, bool normalize, bool need_x,
    bool need_weights, int64_t mode, const OptionalTensor& ends, const OptionalTensor& skip,
    const OptionalTensor& index, bool wide) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  tensors.check_all();
  const PoolMode pool_mode = mode_of(mode);
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch(), positions = tensors.positions();
    const auto is_output = [&](const Tensor& tensor) {
      return tensor.is_cpu() && tensor.scalar_type() == stored_dtype<T>(wide) &&
             tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == dim_of(x) &&
             tensor.is_contiguous();
    };
    check(is_output(grad_out) && is_output(out),
          "grad_out and out must be contiguous (batch, dim) CPU tensors of the forward's dtype");
    check_vector<A>(norm, normalize ? batch : 0, "norm must be the forward's second output");
    Tensor grad_x = empty_like_tokens(x, need_x);
    Tensor grad_weights = empty_cpu<1>(kScalarType<A>, {need_weights ? positions : 0});
    const SegmentPoolBackwardArgs<T> args{tensors.view<T>(),
                                          pool_mode,
                                          normalize,
                                          wide,
                                          grad_out.const_data_ptr(),
                                          out.const_data_ptr(),
                                          read<A>(norm),
                                          batch,
                                          positions,
                                          need_x ? write<T>(grad_x) : nullptr,
                                          need_weights ? write<A>(grad_weights) : nullptr};
    if (batch > 0 && tensors.disjoint()) {
      const auto& kernel = kernels<PoolingKernels>().of(element);
      for_segments<A>(tensors, 1, [&](int64_t first, int64_t last, A* scratch) {
        kernel.backward(args, first, last, scratch);
      });
    } else {
      shared_backward<T>(args, tensors);
    }
    return std::make_tuple(grad_x, grad_weights);
  });
}

std::tuple<Tensor, Tensor> segment_max(const Tensor& x, const Tensor& cu_seqlens,
                                       const OptionalTensor& weights, const OptionalTensor& ends,
                                       const OptionalTensor& skip, const OptionalTensor& index) {
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, skip, index};
  tensors.check_all();
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor out = empty_cpu<2>(x.scalar_type(), {tensors.batch(), dim_of(x)});
    Tensor argmax = empty_cpu<2>(ScalarType::Int, {tensors.batch(), dim_of(x)});
    const Segments<T> segments = tensors.view<T>();
    const auto& kernel = kernels<SegmentMaxKernels>().of(element);
    for_segments<A>(tensors, 2, [&](int64_t first, int64_t last, A* scratch) {
      kernel.forward(segments, first, last, write<T>(out), write<int32_t>(argmax), scratch);
    });
    return std::make_tuple(out, argmax);
  });
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

std::tuple<Tensor, Tensor> segment_gem_backward(const Tensor& grad_out, const Tensor& x,
                                                const Tensor& out, const Tensor& cu_seqlens,
                                                const OptionalTensor& weights, const Tensor& power,
                                                double epsilon, const OptionalTensor& ends,
                                                const OptionalTensor& skip,
                                                const OptionalTensor& index) {
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
    const std::unique_ptr<A[]> shared(new A[batch * dim]);
    for_segments<A>(tensors, 1, [&](int64_t first, int64_t last, A* scratch) {
      for (int64_t b = first; b < last; ++b) {
        write<A>(grad_power)[b] =
            kernel.share(segments, p, A(epsilon), b, read<A>(grad_out) + b * dim,
                         read<A>(out) + b * dim, &shared[b * dim], scratch);
      }
    });
    SharedRows<T>(tensors, PoolMode::mean, shared.get()).for_rows([&] {
      Segments<T> rows = segments;
      rows.index = nullptr;
      return [&, rows, scratch = std::unique_ptr<A[]>(new A[2 * dim])](
                 int64_t row, const int32_t* of, const A* factors, int64_t count) {
        kernel.combine(shared.get(), dim, of, factors, count, row_at(rows, row), p, A(epsilon),
                       write<T>(grad_x) + row * dim, scratch.get());
      };
    });
    return std::make_tuple(grad_x, grad_power);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  // mode: PoolMode. With `ends`, cu_seqlens holds the starts. With `index`, positions are entries
  // of it. `wide`: store the accumulator's dtype.
  library.def(
      "segment_pool(Tensor x, Tensor cu_seqlens, Tensor? weights, bool normalize, int mode=0,"
      " Tensor? ends=None, Tensor? skip=None, Tensor? index=None, bool wide=False)"
      " -> (Tensor out, Tensor norm)");
  library.def(
      "segment_pool_backward(Tensor grad_out, Tensor x, Tensor out, Tensor norm, Tensor cu_seqlens,"
      " Tensor? weights, bool normalize, bool need_x, bool need_weights, int mode=0,"
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
      " Tensor? weights, Tensor power, float epsilon, Tensor? ends=None, Tensor? skip=None, "
      "Tensor? index=None)"
      " -> (Tensor grad_x, Tensor grad_power)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("segment_pool", TORCH_BOX(&emblas::segment_pool));
  library.impl("segment_pool_backward", TORCH_BOX(&emblas::segment_pool_backward));
  library.impl("segment_max", TORCH_BOX(&emblas::segment_max));
  library.impl("segment_max_backward", TORCH_BOX(&emblas::segment_max_backward));
  library.impl("segment_gem", TORCH_BOX(&emblas::segment_gem));
  library.impl("segment_gem_backward", TORCH_BOX(&emblas::segment_gem_backward));
}
