// Composed tables as torch operators on CPU tensors.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/packed.h"
#include "common/tensor.h"
#include "tables/compose.h"
#include "tables/plan.h"
#include "tables/repeats.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "table must be float32, float64, bfloat16 or float16";

// The arguments that forward and backward have in common, checked.
struct Call {
  Plan plan;
  Combine combine;
  BagMode mode;
  std::optional<int64_t> padding_id;
  int64_t count, bags, weights_per_id;
  const int32_t* offsets;  // [features * bags + 1] or null
  std::vector<std::unique_ptr<uint32_t[]>> numbers;

  Call(const Tensor& ids, const Tensor& table, const std::optional<Tensor>& offsets_tensor,
       const std::optional<Tensor>& weights, const std::vector<int64_t>& parts, int64_t combine,
       int64_t mode, std::optional<int64_t> padding);
  Call(const Call&) = delete;

  const int64_t* padding() const { return padding_id ? &*padding_id : nullptr; }
  int64_t num_features() const { return int64_t(plan.features.size()); }
  int64_t bytes_per_id(int64_t element) const { return plan.most_values * element; }

  // body(feature, first, last) over the bags of all features, tasks balanced by ids.
  template <class Body>
  void for_bags(int64_t bytes, const Body& body) const {
    const int64_t total = num_features() * bags;
    const auto split = [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t feature = first / bags, begin = feature * bags;
        const int64_t end = std::min(last, begin + bags);
        body(feature, first - begin, end - begin);
        first = end;
      }
    };
    if (!offsets) return parallel_for(total, bytes, split);
    parallel_for(count + total, bytes, [&](int64_t low, int64_t high) {
      split(first_sequence_from(offsets, total, low), first_sequence_from(offsets, total, high));
    });
  }

  // Fills Feature::numbers, which the backward pass reads.
  void compute_numbers() {
    for (Feature& feature : plan.features) {
      numbers.emplace_back(new uint32_t[feature.count * feature.num_parts]);
      feature.numbers = numbers.back().get();
      parallel_for(feature.count, feature.num_parts * int64_t(sizeof(uint32_t)),
                   [&](int64_t first, int64_t last) {
                     kernels<ComposeKernels>().numbers(feature, padding(), first, last);
                   });
    }
  }
};

Call::Call(const Tensor& ids, const Tensor& table, const std::optional<Tensor>& offsets_tensor,
           const std::optional<Tensor>& weights, const std::vector<int64_t>& parts,
           int64_t combine_number, int64_t mode_number, std::optional<int64_t> padding)
    : padding_id(padding), offsets(nullptr) {
  check(0 <= combine_number && combine_number < 3, "unknown way to combine parts");
  check(0 <= mode_number && mode_number < 3, "unknown mode of bags");
  combine = Combine(combine_number);
  mode = BagMode(mode_number);
  check(table.is_cpu() && table.dim() == 1 && table.is_contiguous(),
        "table must be a contiguous CPU vector");
  check(ids.is_cpu() && has_dtype<int64_t>(ids) && ids.dim() == 1 && ids.is_contiguous(),
        "ids must be a contiguous int64 CPU vector");
  plan = Plan::of(parts, table.numel(), [](const char* message) { check(false, message); });
  count = ids.size(0);
  check(count < int64_t(1) << 31, "there can be at most 2^31 - 1 ids");
  const int64_t features = num_features();
  if (offsets_tensor) {
    check_vector<int32_t>(*offsets_tensor, -1, "offsets must be a contiguous int32 CPU vector");
    check(offsets_tensor->size(0) >= 1 && (offsets_tensor->size(0) - 1) % features == 0,
          "offsets must hold as many bags for each feature, and one element more");
    bags = (offsets_tensor->size(0) - 1) / features;
    offsets = read<int32_t>(*offsets_tensor);
    check(valid_cu_seqlens(offsets, features * bags, count),
          "offsets must start at 0, never decrease and end at the number of ids");
  } else {
    check(count % features == 0, "ids must hold as many ids for each feature");
    check(mode == BagMode::sum, "mean and max need offsets");
    bags = count / features;
  }
  for (int64_t f = 0; f < features; ++f) {
    Feature& feature = plan.features[f];
    feature.first = offsets ? offsets[f * bags] : f;
    feature.step = offsets ? 1 : features;
    feature.count = offsets ? offsets[(f + 1) * bags] - offsets[f * bags] : bags;
    feature.offsets = offsets ? offsets + f * bags : nullptr;
    feature.ids = read<int64_t>(ids) + feature.first;
    int64_t limit;
    if (const int64_t* id = find_id_past_limit(feature, this->padding(), &limit)) {
      check(false, ("ids of feature " + std::to_string(f) + " must be 0 to " +
                    std::to_string(limit - 1) + ", got " + std::to_string(*id))
                       .c_str());
    }
  }
  weights_per_id = 0;
  if (weights) {
    check(mode == BagMode::sum, "weights need the mode sum");
    weights_per_id = weights->dim() == 2 ? weights->size(1) : 1;
    const char* message =
        "weights must be a contiguous CPU tensor (ids) or (ids, parts), float64 where the table is "
        "float64 and float32 otherwise";
    check(weights->is_cpu() && weights->is_contiguous() && weights->size(0) == count &&
              (weights->dim() == 1 || weights->dim() == 2) &&
              weights->scalar_type() ==
                  (has_dtype<double>(table) ? ScalarType::Double : ScalarType::Float),
          message);
    for (const Feature& feature : plan.features) {
      check(weights->dim() == 1 || (feature.num_parts == weights_per_id && weights_per_id > 0),
            "weights per part must have one column for each part of every feature");
    }
    // One weight per part is one weight per id where there is one part; a product has no sum that
    // weights per part could stand in.
    check(weights_per_id <= 1 || combine != Combine::product,
          "weights per part need parts that are summed");
  }
}

template <class T>
ComposeArgs<T> kernel_args(const Call& call, const Tensor& table,
                           const std::optional<Tensor>& weights) {
  return {call.combine,        call.mode,
          read<T>(table),      weights ? read<Accumulator<T>>(*weights) : nullptr,
          call.weights_per_id, call.padding(),
          call.bags,           call.plan.dim};
}

std::tuple<Tensor, Tensor> compose_bag(const Tensor& ids, const Tensor& table,
                                       const std::optional<Tensor>& offsets,
                                       const std::optional<Tensor>& weights,
                                       std::vector<int64_t> parts, int64_t combine, int64_t mode,
                                       std::optional<int64_t> padding_id) {
  const Call call(ids, table, offsets, weights, parts, combine, mode, padding_id);
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t dim = call.plan.dim;
    Tensor out = empty_cpu<2>(table.scalar_type(), {call.bags, dim});
    Tensor argmax = empty_cpu<2>(ScalarType::Int, {call.mode == BagMode::max ? call.bags : 0, dim});
    const ComposeArgs<T> args = kernel_args<T>(call, table, weights);
    const auto& kernel = kernels<ComposeKernels>().compose.of(element);
    T* to = write<T>(out);
    int32_t* winners = write<int32_t>(argmax);
    call.for_bags(call.bytes_per_id(sizeof(T)), [&](int64_t f, int64_t first, int64_t last) {
      const AlignedArray<A> scratch = aligned_array<A>(2 * dim);
      kernel.forward(args, call.plan.features[f], first, last, scratch.get(), to, winners);
    });
    return std::make_tuple(out, argmax);
  });
}

// What the three forms of the backward pass need besides the arguments.
template <class T>
struct Backward {
  using A = Accumulator<T>;
  std::unique_ptr<int32_t[]> bag_of;
  std::unique_ptr<A[]> scale;
  std::optional<Repeats> repeats;
  std::unique_ptr<T[]> sums;  // of the gradients of each id
  ComposeGradient<T> gradient;
  const Compose<T>& kernel;

  Backward(Call& call, const Tensor& grad_out, const Tensor& table,
           const std::optional<Tensor>& weights, const std::optional<Tensor>& argmax)
      : kernel(kernels<ComposeKernels>().compose.of(T{})) {
    const T* gradients = read<T>(grad_out);
    if (adds_repeats(call)) {
      Feature& feature = call.plan.features[0];
      repeats = find_repeats(feature.ids, feature.step, feature.count);
      if (repeats) {
        sums = sum_repeats(*repeats, gradients, feature.count, call.plan.dim);
        gradients = sums.get();
        feature.ids = repeats->ids.get();
        feature.count = call.count = call.bags = repeats->distinct();
      }
    }
    call.compute_numbers();
    const int64_t bags = call.bags;
    if (call.offsets) {
      bag_of.reset(new int32_t[call.count]);
      call.for_bags(sizeof(int32_t), [&](int64_t f, int64_t first, int64_t last) {
        const int32_t* offsets = call.plan.features[f].offsets;
        for (int64_t b = first; b < last; ++b) {
          std::fill(bag_of.get() + offsets[b], bag_of.get() + offsets[b + 1], int32_t(b));
        }
      });
    }
    if (call.mode == BagMode::mean) {
      scale.reset(new A[call.num_features() * bags]);
      call.for_bags(sizeof(int64_t), [&](int64_t f, int64_t first, int64_t last) {
        const Feature& feature = call.plan.features[f];
        for (int64_t b = first; b < last; ++b) {
          int64_t used = 0;
          for (int64_t i = feature.offsets[b]; i < feature.offsets[b + 1]; ++i) {
            used += feature.numbers[(i - feature.first) * feature.num_parts] != kNoRow;
          }
          scale[f * bags + b] = A(1) / A(std::max<int64_t>(used, 1));
        }
      });
    }
    gradient = {kernel_args<T>(call, table, weights),
                call.plan.features.data(),
                call.plan.parts.data(),
                bag_of.get(),
                argmax ? read<int32_t>(*argmax) : nullptr,
                scale.get(),
                gradients};
  }

  // Where ids are bags of their own and an id has several rows, to add up its gradients takes less
  // than to add each of them to all of its rows. 16-bit sums would lose bits.
  static bool adds_repeats(const Call& call) {
    return sizeof(T) == sizeof(A) && !call.offsets && call.weights_per_id == 0 &&
           call.num_features() == 1 && call.plan.parts.size() > 1;
  }

  // The way that the gradient of a table is added up (compose.h).
  bool in_order(const Call& call, const Region& region) const {
    constexpr int64_t most_bytes = 8 << 20;
    int64_t lookups = 0;
    for (int64_t part : region.parts) {
      lookups += call.plan.features[call.plan.parts[part].feature].count;
    }
    return call.combine != Combine::product && call.mode != BagMode::max &&
           region.stride == region.width && lookups >= region.rows &&
           region.size() * int64_t(sizeof(A)) <= most_bytes;
  }

  // use(first, last, total) with the gradients of ranges of rows, each written in place where `to`
  // is an array of accumulators.
  template <class Use>
  void in_order_ranges(const Call& call, const Region& region, A* to, uint8_t* used,
                       const Use& use) const {
    const int64_t width = region.width;
    const int64_t work = call.count * int64_t(region.parts.size()) / region.rows + 1;
    parallel_for(region.rows, work * width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      const AlignedArray<A> scratch = to ? nullptr : aligned_array<A>((last - first) * width);
      A* total = to ? to + first * width : scratch.get();
      std::fill(total, total + (last - first) * width, A(0));
      kernel.add_in_order(gradient, region.parts.data(), int64_t(region.parts.size()), first, last,
                          total, used ? used + first : nullptr);
      use(first, last, total);
    });
  }

  // use(u, total) with the gradient of each row in use, on torch's threads.
  template <class Use>
  void for_rows(const Region& region, const SortedLookups& sorted, const Use& use) const {
    const int64_t rows = sorted.rows();
    const int32_t* starts = sorted.starts.data();
    parallel_for(
        starts[rows] + rows, region.width * int64_t(sizeof(T)), [&](int64_t low, int64_t high) {
          const AlignedArray<A> total = aligned_array<A>(2 * region.width);
          const Lookup* lookups = sorted.lookups.get();
          const int64_t last = first_sequence_from(starts, rows, high);
          for (int64_t u = first_sequence_from(starts, rows, low); u < last; ++u) {
            kernel.add_lookups(gradient, lookups + starts[u], lookups + starts[u + 1],
                               lookups + starts[rows], total.get(), total.get() + region.width);
            use(u, total.get());
          }
        });
  }

  // Every row of a dense gradient is written once: those not in use, as zeros, by the task of the
  // next one in use.
  void dense(const Call& call, const Region& region, T* to) const {
    const int64_t width = region.width;
    if (in_order(call, region)) {
      A* place = nullptr;
      if constexpr (sizeof(T) == sizeof(A)) place = to;
      return in_order_ranges(
          call, region, place, nullptr, [&](int64_t first, int64_t last, const A* total) {
            if (!place) kernel.store_row(to + first * width, total, (last - first) * width);
          });
    }
    const SortedLookups sorted = sort_by_row(call.plan, region);
    if (region.stride < width) return dense_overlapping(region, sorted, to);
    const int64_t rows = sorted.rows();
    const auto zero = [&](int64_t first, int64_t last) {
      std::memset(to + first * width, 0, (last - first) * width * sizeof(T));
    };
    for_rows(region, sorted, [&](int64_t u, A* total) {
      zero(u > 0 ? sorted.row(u - 1) + 1 : 0, sorted.row(u));
      kernel.store_row(to + sorted.row(u) * width, total, width);
    });
    zero(rows > 0 ? sorted.row(rows - 1) + 1 : 0, region.rows);
  }

  // Where rows overlap, a task owns a stretch of elements and clips the rows that reach into it.
  void dense_overlapping(const Region& region, const SortedLookups& sorted, T* to) const {
    constexpr int64_t stretch = 4096;
    const int64_t size = region.size(), width = region.width, stride = region.stride;
    const int64_t rows = sorted.rows();
    const int64_t per_task = stretch * (1 + sorted.starts[rows] * width / size);
    parallel_for((size + stretch - 1) / stretch, per_task * int64_t(sizeof(A)),
                 [&](int64_t first, int64_t last) {
                   const AlignedArray<A> scratch = aligned_array<A>(stretch + 2 * width);
                   A* row_total = scratch.get() + stretch;
                   const Lookup* lookups = sorted.lookups.get();
                   for (int64_t s = first; s < last; ++s) {
                     const int64_t begin = s * stretch, end = std::min(begin + stretch, size);
                     std::fill(scratch.get(), scratch.get() + stretch, A(0));
                     int64_t low = 0,
                             high = rows;  // the first row in use that reaches past `begin`
                     while (low < high) {
                       const int64_t middle = (low + high) / 2;
                       if (sorted.row(middle) * stride + width <= begin)
                         low = middle + 1;
                       else
                         high = middle;
                     }
                     for (int64_t u = low; u < rows && sorted.row(u) * stride < end; ++u) {
                       kernel.add_lookups(
                           gradient, lookups + sorted.starts[u], lookups + sorted.starts[u + 1],
                           lookups + sorted.starts[rows], row_total, row_total + width);
                       const int64_t at = sorted.row(u) * stride;
                       for (int64_t i = std::max(at, begin); i < std::min(at + width, end); ++i) {
                         scratch[i - begin] += row_total[i - at];
                       }
                     }
                     kernel.store_row(to + begin, scratch.get(), end - begin);
                   }
                 });
  }
};

void check_gradient(const Call& call, const Tensor& grad_out, const Tensor& table,
                    const std::optional<Tensor>& argmax) {
  check(grad_out.is_cpu() && grad_out.scalar_type() == table.scalar_type() && grad_out.dim() == 2 &&
            grad_out.size(0) == call.bags && grad_out.size(1) == call.plan.dim &&
            grad_out.is_contiguous(),
        "grad_out must be a contiguous (bags, dim) CPU tensor of the dtype of the table");
  check(call.mode != BagMode::max || (argmax && argmax->is_cpu() && has_dtype<int32_t>(*argmax) &&
                                      argmax->dim() == 2 && argmax->size(0) == call.bags &&
                                      argmax->size(1) == call.plan.dim && argmax->is_contiguous()),
        "argmax must be that of the forward pass");
  check(call.plan.has_disjoint_regions(), "the tables of parts must not share elements");
  check(call.count * call.plan.most_parts < int64_t(1) << 31,
        "there can be at most 2^31 - 1 lookups");
}

std::tuple<Tensor, Tensor> compose_bag_backward(
    const Tensor& grad_out, const Tensor& ids, const Tensor& table,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& argmax, std::vector<int64_t> parts, int64_t combine, int64_t mode,
    std::optional<int64_t> padding_id, bool need_table, bool need_weights) {
  Call call(ids, table, offsets, weights, parts, combine, mode, padding_id);
  check_gradient(call, grad_out, table, argmax);
  check(weights || !need_weights, "there are no weights");
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Backward<T> backward(call, grad_out, table, weights, argmax);
    Tensor table_gradient = empty_cpu<1>(table.scalar_type(), {need_table ? table.numel() : 0});
    Tensor weights_gradient =
        empty_cpu<1>(kScalarType<A>, {need_weights ? call.count * call.weights_per_id : 0});
    if (need_table) {
      T* to = write<T>(table_gradient);
      int64_t written = 0;
      for (const Region& region : call.plan.regions) {
        std::memset(to + written, 0, (region.base - written) * sizeof(T));
        written = region.base + region.size();
        backward.dense(call, region, to + region.base);
      }
      std::memset(to + written, 0, (table.numel() - written) * sizeof(T));
    }
    if (need_weights) {
      for (const Feature& feature : call.plan.features) {
        parallel_for(feature.count, call.bytes_per_id(sizeof(T)), [&](int64_t first, int64_t last) {
          backward.kernel.grad_weights(backward.gradient, feature, first, last,
                                       write<A>(weights_gradient));
        });
      }
    }
    return std::make_tuple(table_gradient, weights_gradient);
  });
}

// The rows in use and their gradients; rising, without repetition. Their number depends on the ids:
// the first `count` of as many as there are lookups.
std::tuple<Tensor, Tensor, Tensor> compose_bag_backward_rows(
    const Tensor& grad_out, const Tensor& ids, const Tensor& table,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& argmax, std::vector<int64_t> parts, int64_t combine, int64_t mode,
    std::optional<int64_t> padding_id) {
  Call call(ids, table, offsets, weights, parts, combine, mode, padding_id);
  check_gradient(call, grad_out, table, argmax);
  check(call.plan.regions.size() == 1 && call.plan.regions[0].stride == call.plan.regions[0].width,
        "gradients by rows need parts of one table");
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    int64_t most = 0;
    for (const Feature& feature : call.plan.features) most += feature.count * feature.num_parts;
    const Backward<T> backward(call, grad_out, table, weights, argmax);
    const Region& region = call.plan.regions[0];
    Tensor rows = empty_cpu<1>(ScalarType::Long, {most});
    Tensor values = empty_cpu<2>(table.scalar_type(), {most, region.width});
    Tensor count = empty_cpu<1>(ScalarType::Long, {1});
    using A = Accumulator<T>;
    const int64_t width = region.width;
    int64_t* numbers = write<int64_t>(rows);
    T* to = write<T>(values);
    int64_t in_use = 0;
    if (backward.in_order(call, region)) {
      const AlignedArray<A> totals = aligned_array<A>(region.size());
      const std::unique_ptr<uint8_t[]> used(new uint8_t[region.rows]());
      backward.in_order_ranges(call, region, totals.get(), used.get(), [](auto...) {});
      for (int64_t row = 0; row < region.rows; ++row) {
        if (used[row]) numbers[in_use++] = row;
      }
      parallel_for(in_use, width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
        for (int64_t u = first; u < last; ++u) {
          backward.kernel.store_row(to + u * width, totals.get() + numbers[u] * width, width);
        }
      });
    } else {
      const SortedLookups sorted = sort_by_row(call.plan, region);
      in_use = sorted.rows();
      backward.for_rows(region, sorted, [&](int64_t u, const A* total) {
        numbers[u] = sorted.row(u);
        backward.kernel.store_row(to + u * width, total, width);
      });
    }
    *write<int64_t>(count) = in_use;
    return std::make_tuple(rows, values, count);
  });
}

// One step of an optimizer on the rows in use. A product's gradient reads rows of other tables, so
// all gradients are taken before the first row moves.
void compose_bag_update_(const Tensor& grad_out, const Tensor& ids, const Tensor& table,
                         const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                         const std::optional<Tensor>& argmax, std::vector<int64_t> parts,
                         int64_t combine, int64_t mode, std::optional<int64_t> padding_id,
                         const Tensor& first, const Tensor& second, const Tensor& last_step,
                         const Tensor& step, int64_t optimizer, double learning_rate,
                         double epsilon, double beta1, double beta2, double weight_decay) {
  Call call(ids, table, offsets, weights, parts, combine, mode, padding_id);
  check_gradient(call, grad_out, table, argmax);
  check(0 <= optimizer && optimizer < kOptimizers, "unknown optimizer");
  const auto kind = OptimizerKind(optimizer);
  const bool adam = kind == OptimizerKind::adam;
  check_vector<int64_t>(step, 1, "step must be one int64 on the CPU");
  check_vector<int64_t>(last_step, adam ? call.plan.rows : 0,
                        "last_step must be a contiguous int64 CPU vector, for adam of all rows");
  for (const Region& region : call.plan.regions) {
    check(region.stride == region.width, "an optimizer needs rows that don't overlap");
  }
  visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t sizes[kOptimizers] = {0, call.plan.rows, table.numel(), table.numel()};
    const char* message =
        "optimizer state must be contiguous CPU vectors of the accumulator's dtype, one element "
        "for each row or for each element";
    check_vector<A>(first, sizes[optimizer], message);
    check_vector<A>(second, adam ? table.numel() : 0, message);
    const Backward<T> backward(call, grad_out, table, weights, argmax);
    const OptimizerStep now{kind,         learning_rate,          epsilon, beta1, beta2,
                            weight_decay, ++*write<int64_t>(step)};
    T* rows = write<T>(table);
    A* first_state = kind == OptimizerKind::sgd ? nullptr : write<A>(first);
    A* second_state = write<A>(second);
    int64_t* steps = write<int64_t>(last_step);
    const auto update = [&](const Region& region, int64_t row, const A* gradient) {
      const int64_t at = region.base + row * region.width, number = region.first_row + row;
      const int64_t state = kind == OptimizerKind::row_wise_adagrad ? number : at;
      backward.kernel.update_row(
          now, rows + at, gradient, region.width, first_state ? first_state + state : nullptr,
          adam ? second_state + at : nullptr, adam ? steps + number : nullptr);
    };
    // What the step of a later row reads: it comes from anywhere in memory.
    constexpr int64_t rows_ahead = 16;
    const auto request = [&](const Region& region, int64_t row) {
      const auto lines = [](const void* data, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) {
          __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
        }
      };
      const int64_t at = region.base + row * region.width, number = region.first_row + row;
      lines(rows + at, region.width * int64_t(sizeof(T)));
      if (kind == OptimizerKind::row_wise_adagrad) lines(first_state + number, sizeof(A));
      asm volatile("");  // see prefetch() in lookup.h
    };
    std::vector<SortedLookups> sorted;
    std::vector<std::unique_ptr<A[]>> gradients;
    for (const Region& region : call.plan.regions) {
      if (backward.in_order(call, region)) {
        const std::unique_ptr<uint8_t[]> used(new uint8_t[region.rows]());
        backward.in_order_ranges(call, region, nullptr, used.get(),
                                 [&](int64_t begin, int64_t end, const A* total) {
                                   for (int64_t row = begin; row < end; ++row) {
                                     if (used[row])
                                       update(region, row, total + (row - begin) * region.width);
                                   }
                                 });
        continue;
      }
      sorted.push_back(sort_by_row(call.plan, region));
      if (call.combine != Combine::product) {
        const SortedLookups& lookups = sorted.back();
        backward.for_rows(region, lookups, [&](int64_t u, const A* gradient) {
          if (u + rows_ahead < lookups.rows()) request(region, lookups.row(u + rows_ahead));
          update(region, lookups.row(u), gradient);
        });
        continue;
      }
      gradients.emplace_back(new A[sorted.back().rows() * region.width]);
      backward.for_rows(region, sorted.back(), [&](int64_t u, const A* gradient) {
        std::copy(gradient, gradient + region.width, gradients.back().get() + u * region.width);
      });
    }
    for (size_t r = 0; r < gradients.size(); ++r) {
      const Region& region = call.plan.regions[r];
      parallel_for(sorted[r].rows(), region.width * int64_t(sizeof(T)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t u = begin; u < end; ++u) {
                       update(region, sorted[r].row(u), gradients[r].get() + u * region.width);
                     }
                   });
    }
    return 0;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "compose_bag(Tensor ids, Tensor table, Tensor? offsets, Tensor? weights, int[] parts,"
      " int combine, int bag_mode, int? padding_id) -> (Tensor out, Tensor argmax)");
  library.def(
      "compose_bag_backward(Tensor grad_out, Tensor ids, Tensor table, Tensor? offsets,"
      " Tensor? weights, Tensor? argmax, int[] parts, int combine, int bag_mode, int? padding_id,"
      " bool need_table, bool need_weights) -> (Tensor grad_table, Tensor grad_weights)");
  library.def(
      "compose_bag_backward_rows(Tensor grad_out, Tensor ids, Tensor table, Tensor? offsets,"
      " Tensor? weights, Tensor? argmax, int[] parts, int combine, int bag_mode, int? padding_id)"
      " -> (Tensor rows, Tensor values, Tensor count)");
  library.def(
      "compose_bag_update_(Tensor grad_out, Tensor ids, Tensor(a!) table, Tensor? offsets,"
      " Tensor? weights, Tensor? argmax, int[] parts, int combine, int bag_mode, int? padding_id,"
      " Tensor(b!) first, Tensor(c!) second, Tensor(d!) last_step, Tensor(e!) step, int optimizer,"
      " float learning_rate, float epsilon, float beta1, float beta2, float weight_decay) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("compose_bag", TORCH_BOX(&emblas::compose_bag));
  library.impl("compose_bag_backward", TORCH_BOX(&emblas::compose_bag_backward));
  library.impl("compose_bag_backward_rows", TORCH_BOX(&emblas::compose_bag_backward_rows));
  library.impl("compose_bag_update_", TORCH_BOX(&emblas::compose_bag_update_));
}
