// Composed tables as torch operators on CUDA tensors: emblas::<op>_cuda, which the router of the
// public operator calls. Ids and offsets stay on the device: the kernels stay in bounds, nobody
// waits.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda/device_call.h"
#include "common/cuda/sort.h"
#include "tables/compose_cuda.h"
#include "tables/plan.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "table must be float32, float64, bfloat16 or float16";

// The arguments that forward and backward have in common, checked.
struct Composition {
  Plan plan;
  cuda::Composed composed = {};
  cuda::ComposedIds ids;
  Combine combine;
  BagMode mode;
  int64_t weights_per_id = 0;

  Composition(const DeviceCall& call, const Tensor& ids, const Tensor& table,
              const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
              const std::vector<int64_t>& parts, int64_t combine, int64_t mode,
              const std::optional<int64_t>& padding_id);

  int64_t segments() const { return composed.num_features * ids.bags; }

  // Do all rows and columns start at multiples of 16 bytes, in these arrays too?
  template <class T>
  bool aligned(const T* table, const T* rows) const {
    constexpr int64_t size = 16 / sizeof(T);
    bool all =
        reinterpret_cast<uintptr_t>(table) % 16 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
    for (const Part& part : plan.parts) {
      all &= (part.base | part.stride | part.width | part.column) % size == 0;
    }
    return all;
  }

  template <class T>
  cuda::ComposeBagArgs<T> args(const DeviceCall& call, const Tensor& table,
                               const std::optional<Tensor>& weights) const {
    return {ids,           combine, mode, call.read<T>(table), call.read<Accumulator<T>>(weights),
            weights_per_id};
  }
};

Composition::Composition(const DeviceCall& call, const Tensor& id_tensor, const Tensor& table,
                         const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                         const std::vector<int64_t>& parts, int64_t combine_number,
                         int64_t mode_number, const std::optional<int64_t>& padding_id) {
  check(0 <= combine_number && combine_number < 3, "unknown way to combine parts");
  check(0 <= mode_number && mode_number < 3, "unknown mode of bags");
  combine = Combine(combine_number);
  mode = BagMode(mode_number);
  check(call.holds(table) && table.dim() == 1 && table.is_contiguous(),
        "table must be a contiguous vector on the device of the first argument");
  call.check_vector<int64_t>(id_tensor, -1,
                             "ids must be a contiguous int64 vector on the device of the table");
  plan = Plan::of(parts, table.numel(), [](const char* message) { check(false, message); });
  check(int64_t(plan.parts.size()) <= cuda::kMostParts, "there can be at most 32 parts");
  check(plan.rows < INT32_MAX, "the tables must have fewer than 2^31 rows together");
  composed.num_parts = int(plan.parts.size());
  composed.num_features = int(plan.features.size());
  composed.most_parts = int(plan.most_parts);
  composed.dim = plan.dim;
  for (int p = 0; p < composed.num_parts; ++p) {
    const Part& part = plan.parts[p];
    const auto in_slot = [&](int other) {
      return plan.parts[other].feature == part.feature && plan.parts[other].column == part.column;
    };
    int first = p, last = p + 1;
    while (first > 0 && in_slot(first - 1)) --first;
    while (last < composed.num_parts && in_slot(last)) ++last;
    const auto region = std::find_if(plan.regions.begin(), plan.regions.end(), [&](auto& r) {
      return r.base == part.base && r.stride == part.stride && r.width == part.width;
    });
    check(part.width <= INT32_MAX && plan.dim <= INT32_MAX, "rows must be shorter than 2^31");
    composed.parts[p] = {uint64_t(part.a),
                         uint64_t(part.b),
                         uint64_t(part.p),
                         Modulo::reciprocal(uint64_t(part.rows)),
                         part.base,
                         int32_t(part.rows),
                         int32_t(part.stride),
                         int32_t(part.width),
                         int32_t(part.column),
                         int32_t(region->first_row),
                         uint8_t(part.kind),
                         uint8_t(part.is_signed),
                         uint8_t(part.feature),
                         uint8_t(first),
                         uint8_t(last - first)};
    composed.first_part[part.feature + 1] = uint8_t(p + 1);
  }

  const int64_t count = id_tensor.size(0), features = composed.num_features;
  check(count < int64_t(1) << 31, "there can be at most 2^31 - 1 ids");
  int64_t bags = count / features;
  if (offsets) {
    call.check_vector<int32_t>(
        *offsets, -1, "offsets must be a contiguous int32 vector on the device of the table");
    check(offsets->size(0) >= 1 && (offsets->size(0) - 1) % features == 0,
          "offsets must hold as many bags for each feature, and one element more");
    bags = (offsets->size(0) - 1) / features;
  } else {
    check(count % features == 0, "ids must hold as many ids for each feature");
    check(mode == BagMode::sum, "mean and max need offsets");
  }
  ids = {call.read<int64_t>(id_tensor),
         count,
         bags,
         call.read<int32_t>(offsets),
         padding_id.has_value(),
         padding_id.value_or(0)};
  if (!weights) return;
  check(mode == BagMode::sum, "weights need the mode sum");
  weights_per_id = weights->dim() == 2 ? weights->size(1) : 1;
  check(call.holds(*weights) && weights->is_contiguous() &&
            (weights->dim() == 1 || weights->dim() == 2) && weights->size(0) == count &&
            weights->scalar_type() ==
                (has_dtype<double>(table) ? ScalarType::Double : ScalarType::Float),
        "weights must be a contiguous tensor (ids) or (ids, parts) on the device of the table, "
        "float64 where the table is float64 and float32 otherwise");
  for (const Feature& feature : plan.features) {
    check(weights->dim() == 1 || (feature.num_parts == weights_per_id && weights_per_id > 0),
          "weights per part must have one column for each part of every feature");
  }
  check(weights_per_id <= 1 || combine != Combine::product,
        "weights per part need parts that are summed");
}

std::tuple<Tensor, Tensor> compose_bag_cuda(const Tensor& ids, const Tensor& table,
                                            const std::optional<Tensor>& offsets,
                                            const std::optional<Tensor>& weights,
                                            std::vector<int64_t> parts, int64_t combine,
                                            int64_t mode, std::optional<int64_t> padding_id) {
  const DeviceCall call(ids);
  const Composition composition(call, ids, table, offsets, weights, parts, combine, mode,
                                padding_id);
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    const int64_t bags = composition.ids.bags, dim = composition.plan.dim;
    const bool has_maximum = composition.mode == BagMode::max;
    const Tensor out = call.empty<2>(table.scalar_type(), {bags, dim});
    const Tensor argmax = call.empty<2>(ScalarType::Int, {has_maximum ? bags : 0, dim});
    const auto args = composition.args<T>(call, table, weights);
    T* to = call.write<T>(out);
    cuda::compose_bag(args, composition.composed, composition.aligned<T>(args.table, to), to,
                      call.write<int32_t>(argmax), call.stream());
    return std::make_tuple(out, argmax);
  });
}

// The arguments that the forms of the backward pass have in common, checked, and what they work on.
template <class T>
struct Backward {
  using A = Accumulator<T>;
  const DeviceCall& call;
  const Composition& composition;
  int64_t lookups;
  Tensor segments, scale, numbers, keys;
  cuda::ComposeGradientArgs<T> args;

  Backward(const DeviceCall& call, const Composition& composition, const Tensor& grad_out,
           const Tensor& table, const std::optional<Tensor>& weights,
           const std::optional<Tensor>& argmax, bool need_table);

  // An error unless every element of the table belongs to one row.
  void check_rows() const {
    check(composition.plan.has_disjoint_regions(), "a gradient needs tables that don't overlap");
    for (const Region& region : composition.plan.regions) {
      check(region.stride == region.width, "a gradient needs rows that don't overlap");
    }
  }

  // Workspace for the pieces of long sums.
  Tensor pieces() const {
    int64_t widest = 0;
    for (const Region& region : composition.plan.regions) widest = std::max(widest, region.width);
    return call.empty<2>(kScalarType<A>, {cuda::piece_rows(lookups), widest});
  }

  bool aligned(const void* rows) const {
    return composition.aligned<T>(args.forward.table, args.grad_out) &&
           reinterpret_cast<uintptr_t>(rows) % 16 == 0;
  }
};

template <class T>
Backward<T>::Backward(const DeviceCall& call, const Composition& composition,
                      const Tensor& grad_out, const Tensor& table,
                      const std::optional<Tensor>& weights, const std::optional<Tensor>& argmax,
                      bool need_table)
    : call(call),
      composition(composition),
      lookups(composition.ids.count * composition.composed.most_parts) {
  const int64_t count = composition.ids.count, bags = composition.ids.bags;
  const int64_t dim = composition.plan.dim;
  check(lookups <= INT32_MAX, "a gradient needs fewer than 2^31 lookups");
  check(grad_out.scalar_type() == table.scalar_type() && grad_out.dim() == 2 &&
            grad_out.size(0) == bags && grad_out.size(1) == dim && grad_out.is_contiguous(),
        "grad_out must be a contiguous (bags, dim) tensor of the dtype of the table");
  const bool has_maximum = composition.mode == BagMode::max;
  check(!has_maximum ||
            (argmax && call.holds(*argmax) && has_dtype<int32_t>(*argmax) && argmax->dim() == 2 &&
             argmax->size(0) == bags && argmax->size(1) == dim && argmax->is_contiguous()),
        "argmax must be the forward's second output");
  const int32_t* offsets = composition.ids.offsets;
  const bool has_scale = need_table && composition.mode == BagMode::mean;
  segments = call.empty<1>(ScalarType::Int, {offsets ? count : 0});
  scale = call.empty<1>(kScalarType<A>, {has_scale ? composition.segments() : 0});
  numbers = call.empty<1>(ScalarType::Int, {lookups});
  keys = call.empty<1>(ScalarType::Int, {lookups});
  const auto written = reinterpret_cast<uint32_t*>(call.write<int32_t>(numbers));
  int32_t* segment_of = offsets ? call.write<int32_t>(segments) : nullptr;
  if (offsets) {
    cuda::bag_numbers(offsets, composition.segments(), count, segment_of, call.stream());
  }
  cuda::compose_lookups(composition.ids, composition.composed, segment_of, composition.plan.rows,
                        written, call.write<int32_t>(keys), call.stream());
  if (has_scale) {
    cuda::bag_scales(composition.ids, composition.composed, call.write<A>(scale), call.stream());
  }
  args = {composition.args<T>(call, table, weights),
          segment_of,
          written,
          has_maximum ? call.read<int32_t>(argmax) : nullptr,
          has_scale ? call.write<A>(scale) : nullptr,
          call.read<T>(grad_out)};
}

template <class T>
Tensor table_gradient(const Backward<T>& backward, const Tensor& table) {
  const DeviceCall& call = backward.call;
  const Plan& plan = backward.composition.plan;
  backward.check_rows();
  const int64_t lookups = backward.lookups;
  const auto [sorted, order] = sort_stable(backward.keys);
  const Tensor bounds = call.empty<1>(ScalarType::Int, {plan.rows + 1});
  int32_t* all_bounds = call.write<int32_t>(bounds);
  cuda::row_bounds(call.read<int32_t>(sorted), lookups, plan.rows, all_bounds, call.stream());
  const Tensor gradient = call.empty<1>(table.scalar_type(), {table.numel()});
  int64_t covered = 0;
  for (const Region& region : plan.regions) covered += region.size();
  if (covered < table.numel()) torch::stable::zero_(const_cast<Tensor&>(gradient));
  T* to = call.write<T>(gradient);
  const Tensor pieces = backward.pieces();
  Accumulator<T>* partial = call.write<Accumulator<T>>(pieces);
  for (const Region& region : plan.regions) {
    cuda::compose_table_gradient<T>(backward.args, backward.composition.composed,
                                    {call.read<int64_t>(order), all_bounds + region.first_row,
                                     lookups, region.rows, region.width, to + region.base},
                                    backward.aligned(to), partial, call.stream());
  }
  return gradient;
}

std::tuple<Tensor, Tensor> compose_bag_backward_cuda(
    const Tensor& grad_out, const Tensor& ids, const Tensor& table,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& argmax, std::vector<int64_t> parts, int64_t combine, int64_t mode,
    std::optional<int64_t> padding_id, bool need_table, bool need_weights) {
  const DeviceCall call(grad_out);
  const Composition composition(call, ids, table, offsets, weights, parts, combine, mode,
                                padding_id);
  need_weights = need_weights && weights;
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Backward<T> backward(call, composition, grad_out, table, weights, argmax, need_table);
    const Tensor grad_table =
        need_table ? table_gradient(backward, table) : call.empty<1>(table.scalar_type(), {0});
    const Tensor grad_weights =
        call.empty<1>(kScalarType<A>, {need_weights ? weights->numel() : 0});
    if (need_weights) {
      int64_t widest = 0;
      for (const Part& part : composition.plan.parts) widest = std::max(widest, part.width);
      cuda::compose_weight_gradient(backward.args, composition.composed, widest,
                                    backward.aligned(nullptr), call.write<A>(grad_weights),
                                    call.stream());
    }
    return std::make_tuple(grad_table, grad_weights);
  });
}

// The rows in use and their gradients; rising, without repetition. How many they are stands on the
// device: the first `count` of as many as there are lookups.
std::tuple<Tensor, Tensor, Tensor> compose_bag_backward_rows_cuda(
    const Tensor& grad_out, const Tensor& ids, const Tensor& table,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& argmax, std::vector<int64_t> parts, int64_t combine, int64_t mode,
    std::optional<int64_t> padding_id) {
  const DeviceCall call(grad_out);
  const Composition composition(call, ids, table, offsets, weights, parts, combine, mode,
                                padding_id);
  check(composition.plan.regions.size() == 1, "gradients by rows need parts of one table");
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    const Backward<T> backward(call, composition, grad_out, table, weights, argmax, true);
    backward.check_rows();
    const int64_t lookups = backward.lookups, features = composition.composed.num_features;
    const Region& region = composition.plan.regions[0];
    // How offsets share out the ids among several features stands on the device.
    const int64_t most = offsets && features > 1
                             ? lookups
                             : composition.ids.count / features * composition.composed.num_parts;
    const Tensor rows = call.empty<1>(ScalarType::Long, {most});
    const Tensor values = call.empty<2>(table.scalar_type(), {most, region.width});
    const Tensor count = call.empty<1>(ScalarType::Long, {1});
    if (lookups == 0) {
      torch::stable::zero_(const_cast<Tensor&>(count));
      return std::make_tuple(rows, values, count);
    }
    const auto [keys, order] = sort_stable(backward.keys);
    const cuda::SortedLookups sorted{
        call.read<int64_t>(order), call.read<int32_t>(keys), lookups, 0, region.rows, region.width};
    const Tensor marks = call.empty<1>(ScalarType::Int, {lookups});
    cuda::mark_used_rows(sorted, call.write<int32_t>(marks), call.stream());
    const Tensor ranks = cumulative_sum(marks);
    cuda::list_used_rows(sorted, call.read<int64_t>(ranks), call.write<int64_t>(rows),
                         call.write<int64_t>(count), call.stream());
    T* to = call.write<T>(values);
    const Tensor pieces = backward.pieces();
    cuda::compose_used_gradient<T, T>(backward.args, composition.composed, sorted,
                                      backward.aligned(to), call.write<Accumulator<T>>(pieces),
                                      call.read<int64_t>(ranks), to, region.width, call.stream());
    return std::make_tuple(rows, values, count);
  });
}

// One step of an optimizer on the rows in use. A product's gradient reads rows of other tables, so
// all gradients are taken before the first row moves.
void compose_bag_update_cuda_(const Tensor& grad_out, const Tensor& ids, const Tensor& table,
                              const std::optional<Tensor>& offsets,
                              const std::optional<Tensor>& weights,
                              const std::optional<Tensor>& argmax, std::vector<int64_t> parts,
                              int64_t combine, int64_t mode, std::optional<int64_t> padding_id,
                              const Tensor& first, const Tensor& second, const Tensor& last_step,
                              const Tensor& steps, int64_t optimizer, double learning_rate,
                              double epsilon, double beta1, double beta2, double weight_decay) {
  const DeviceCall call(grad_out);
  const Composition composition(call, ids, table, offsets, weights, parts, combine, mode,
                                padding_id);
  const Plan& plan = composition.plan;
  check(0 <= optimizer && optimizer < kOptimizers, "unknown optimizer");
  const auto kind = OptimizerKind(optimizer);
  const bool adam = kind == OptimizerKind::adam;
  call.check_vector<int64_t>(steps, 1, "step must be one int64 on the device of the table");
  call.check_vector<int64_t>(last_step, adam ? plan.rows : 0,
                             "last_step must be a contiguous int64 vector on the device of the "
                             "table, for adam of all rows");
  visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t sizes[kOptimizers] = {0, plan.rows, table.numel(), table.numel()};
    const char* message =
        "optimizer state must be contiguous vectors of the accumulator's dtype on the device of "
        "the table, one element for each row or for each element";
    call.check_vector<A>(first, sizes[optimizer], message);
    call.check_vector<A>(second, adam ? table.numel() : 0, message);
    const Backward<T> backward(call, composition, grad_out, table, weights, argmax, true);
    backward.check_rows();
    const OptimizerStep step{kind, learning_rate, epsilon, beta1, beta2, weight_decay, 0};
    const Tensor factors = call.empty<1>(kScalarType<A>, {2});
    int64_t* now = call.change<int64_t>(steps);
    A* corrections = call.write<A>(factors);
    cuda::count_optimizer_step<A>(step, now, corrections, call.stream());
    if (backward.lookups == 0) return 0;
    const auto [keys, order] = sort_stable(backward.keys);
    const auto lookups_of = [&](const Region& region) {
      return cuda::SortedLookups{call.read<int64_t>(order),
                                 call.read<int32_t>(keys),
                                 backward.lookups,
                                 region.first_row,
                                 region.rows,
                                 region.width};
    };
    T* rows = call.change<T>(table);
    A *first_state = call.change<A>(first), *second_state = call.change<A>(second);
    int64_t* last_steps = call.change<int64_t>(last_step);
    const auto state_of = [&](const Region& region) {
      const int64_t at = kind == OptimizerKind::row_wise_adagrad ? region.first_row : region.base;
      return cuda::OptimizerArgs<T>{rows + region.base,
                                    kind == OptimizerKind::sgd ? nullptr : first_state + at,
                                    adam ? second_state + region.base : nullptr,
                                    adam ? last_steps + region.first_row : nullptr,
                                    now,
                                    corrections};
    };
    const bool aligned = backward.aligned(first_state) && backward.aligned(second_state);
    const Tensor pieces = backward.pieces();
    A* partial = call.write<A>(pieces);
    const auto in_sums = [&](const Region& region) {
      return cuda::updates_in_sums<T>(composition.combine, composition.mode, region.width);
    };
    int64_t widest = 0;
    for (const Region& region : plan.regions) {
      if (!in_sums(region)) widest = std::max(widest, region.width);
    }
    const Tensor gradients =
        call.empty<2>(kScalarType<A>, {widest > 0 ? backward.lookups : 0, widest});
    A* workspace = call.write<A>(gradients);
    for (const Region& region : plan.regions) {
      if (in_sums(region)) {
        cuda::compose_update<T>(backward.args, composition.composed, lookups_of(region), aligned,
                                partial, step, state_of(region), call.stream());
      } else {
        cuda::compose_used_gradient<T, A>(backward.args, composition.composed, lookups_of(region),
                                          aligned, partial, nullptr, workspace, widest,
                                          call.stream());
      }
    }
    for (const Region& region : plan.regions) {
      if (in_sums(region)) continue;
      cuda::update_used_rows<T>(lookups_of(region), aligned, workspace, widest, step,
                                state_of(region), call.stream());
    }
    return 0;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "compose_bag_cuda(Tensor ids, Tensor table, Tensor? offsets, Tensor? weights, int[] parts,"
      " int combine, int bag_mode, int? padding_id) -> (Tensor out, Tensor argmax)");
  library.def(
      "compose_bag_backward_cuda(Tensor grad_out, Tensor ids, Tensor table, Tensor? offsets,"
      " Tensor? weights, Tensor? argmax, int[] parts, int combine, int bag_mode, int? padding_id,"
      " bool need_table, bool need_weights) -> (Tensor grad_table, Tensor grad_weights)");
  library.def(
      "compose_bag_backward_rows_cuda(Tensor grad_out, Tensor ids, Tensor table, Tensor? offsets,"
      " Tensor? weights, Tensor? argmax, int[] parts, int combine, int bag_mode, int? padding_id)"
      " -> (Tensor rows, Tensor values, Tensor count)");
  library.def(
      "compose_bag_update__cuda(Tensor grad_out, Tensor ids, Tensor(a!) table, Tensor? offsets,"
      " Tensor? weights, Tensor? argmax, int[] parts, int combine, int bag_mode, int? padding_id,"
      " Tensor(b!) first, Tensor(c!) second, Tensor(d!) last_step, Tensor(e!) step, int optimizer,"
      " float learning_rate, float epsilon, float beta1, float beta2, float weight_decay) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("compose_bag_cuda", TORCH_BOX(&emblas::compose_bag_cuda));
  library.impl("compose_bag_backward_cuda", TORCH_BOX(&emblas::compose_bag_backward_cuda));
  library.impl("compose_bag_backward_rows_cuda",
               TORCH_BOX(&emblas::compose_bag_backward_rows_cuda));
  library.impl("compose_bag_update__cuda", TORCH_BOX(&emblas::compose_bag_update_cuda_));
}
