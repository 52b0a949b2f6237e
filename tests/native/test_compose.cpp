#include "common/hash.h"
#include "common/isa.h"
#include "native.h"
#include "tables/compose.h"
#include "tables/plan.h"

namespace {

using emblas::BagMode;
using emblas::Combine;
using emblas::Feature;
using emblas::KeyKind;
using emblas::kNoRow;
using emblas::kSignBit;
using emblas::Lookup;
using emblas::Part;

constexpr int64_t kRows = 37;

// Slots of two and of one part: two signed hashes `width` wide, then a digit of width 3.
emblas::Plan make_plan(int64_t width) {
  const int64_t hash = int64_t(KeyKind::murmur3), radix = int64_t(KeyKind::radix);
  const Part parts[] = {
      {0, hash, 1, 0, 1, kRows, 0, 0, width, width, 0, 1},
      {0, hash, 1, 3, 1, kRows, 0, 0, width, width, 0, 1},
      {0, radix, 7, 0, 1, 5, 0, kRows * width, 3, 3, width, 0},
  };
  std::vector<int64_t> fields(3 * emblas::kPartFields);
  std::memcpy(fields.data(), parts, sizeof parts);
  return emblas::Plan::of(fields, kRows * width + 15,
                          [](const char* message) { native::fail(__FILE__, __LINE__, message); });
}

uint32_t number_of(const Part& part, uint64_t id) {
  if (KeyKind(part.kind) == KeyKind::radix) return uint32_t(id / part.a % part.rows);
  const auto words = emblas::murmur3(id, uint32_t(part.a));
  const uint64_t word = part.b < 2 ? words.low : words.high;
  const uint64_t key = part.b % 2 ? word >> 32 : word & 0xffffffff;
  return uint32_t(key % part.rows) | (part.is_signed ? uint32_t(key) & kSignBit : 0);
}

template <class T>
void check_compose(Combine combine, BagMode mode, double limit) {
  const auto& kernels = emblas::kernels<emblas::ComposeKernels>();
  const auto& kernel = kernels.compose.of(T{});
  const std::vector<int32_t> offsets{0, 0, 5, 6, 150};
  const int64_t bags = 4, count = 150, padding_id = 3;
  auto ids = native::random_bits<int64_t>(count, 1);
  for (int64_t& id : ids) id %= 20;
  for (int64_t width : {1, 3, 16, 37, 70, 131}) {
    emblas::Plan plan = make_plan(width);
    const int64_t dim = plan.dim;
    const bool weighted = mode == BagMode::sum;
    const auto table = native::random_values<T>(kRows * width + 15, 2);
    const auto weights = native::random_values<T>(count, 3);
    const auto grad_out = native::random_values<T>(bags * dim, 4);
    std::vector<T> out(bags * dim), scratch(2 * dim), grad_weights(count);
    std::vector<int32_t> argmax(bags * dim), bag_of(count);
    std::vector<uint32_t> numbers(count * 3);
    std::vector<T> scale(bags, T(1));
    Feature& feature = plan.features[0];
    feature = {plan.parts.data(), 3, ids.data(), 0, 1, count, offsets.data(), numbers.data()};
    kernels.numbers(feature, &padding_id, 0, count);
    const emblas::ComposeArgs<T> args{
        combine,  mode,        table.data(), weighted ? weights.data() : nullptr,
        weighted, &padding_id, bags,         dim};
    kernel.forward(args, feature, 0, 2, scratch.data(), out.data(), argmax.data());
    kernel.forward(args, feature, 2, bags, scratch.data(), out.data(), argmax.data());

    std::vector<double> expected(bags * dim), gradient(table.size()), along(count);
    for (int64_t b = 0; b < bags; ++b) {
      int64_t used = 0;
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
        bag_of[i] = int32_t(b);
        used += ids[i] != padding_id;
      }
      if (mode == BagMode::mean && used) scale[b] = T(1) / T(used);
      bool first = true;
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
        for (int64_t p = 0; p < 3; ++p) {
          const uint32_t n = ids[i] == padding_id ? kNoRow : number_of(plan.parts[p], ids[i]);
          CHECK(numbers[i * 3 + p] == n);
        }
        if (ids[i] == padding_id) continue;
        const double w = weighted ? double(weights[i]) : double(scale[b]);
        for (int64_t k = 0; k < dim; ++k) {
          const int64_t begin = k < width ? 0 : 2, end = k < width ? 2 : 3;
          double value = combine == Combine::product ? 1 : 0;
          const auto element = [&](int64_t p) {
            return plan.parts[p].base + (numbers[i * 3 + p] & ~kSignBit) * plan.parts[p].width + k -
                   plan.parts[p].column;
          };
          const auto row = [&](int64_t p) {
            return double(table[element(p)]) * (numbers[i * 3 + p] & kSignBit ? -1 : 1);
          };
          for (int64_t p = begin; p < end; ++p) {
            value = combine == Combine::product ? value * row(p) : value + row(p);
          }
          const double share = combine == Combine::mean ? 1.0 / double(end - begin) : 1.0;
          value *= share;
          double& to = expected[b * dim + k];
          to = mode != BagMode::max ? to + w * value : first || value > to ? value : to;
          along[i] += value * double(grad_out[b * dim + k]);
          const bool wins = mode != BagMode::max || argmax[b * dim + k] == i;
          for (int64_t p = begin; p < end && wins; ++p) {
            double factor = w * share * (numbers[i * 3 + p] & kSignBit ? -1 : 1);
            for (int64_t q = begin; q < end && combine == Combine::product; ++q) {
              if (q != p) factor *= row(q);
            }
            gradient[element(p)] += factor * double(grad_out[b * dim + k]);
          }
        }
        first = false;
      }
    }
    for (int64_t k = 0; k < bags * dim; ++k) CHECK_NEAR(out[k], expected[k], limit);

    const emblas::ComposeGradient<T> back{
        args,           &feature,      plan.parts.data(),
        bag_of.data(),  argmax.data(), mode == BagMode::mean ? scale.data() : nullptr,
        grad_out.data()};
    if (weighted) {
      kernel.grad_weights(back, feature, 0, count, grad_weights.data());
      for (int64_t i = 0; i < count; ++i) CHECK_NEAR(grad_weights[i], along[i], limit);
    }
    for (const emblas::Region& region : plan.regions) {
      const emblas::SortedLookups sorted = emblas::sort_by_row(plan, region);
      const Lookup* lookups = sorted.lookups.get();
      std::vector<T> totals(region.rows * region.width), spare(region.width);
      for (int64_t u = 0; u < sorted.rows(); ++u) {
        kernel.add_lookups(back, lookups + sorted.starts[u], lookups + sorted.starts[u + 1],
                           lookups + sorted.starts.back(),
                           totals.data() + sorted.row(u) * region.width, spare.data());
      }
      for (size_t k = 0; k < totals.size(); ++k) {
        CHECK_NEAR(totals[k], gradient[region.base + k], limit);
      }
      if (combine == Combine::product || mode == BagMode::max) continue;
      std::vector<T> again(totals.size());
      std::vector<uint8_t> used(region.rows);
      for (int64_t first = 0; first < region.rows; first += 10) {
        kernel.add_in_order(back, region.parts.data(), int64_t(region.parts.size()), first,
                            std::min(first + 10, region.rows), again.data() + first * region.width,
                            used.data() + first);
      }
      for (size_t k = 0; k < totals.size(); ++k) CHECK_NEAR(again[k], totals[k], limit);
      for (int64_t u = 0; u < sorted.rows(); ++u) CHECK(used[sorted.row(u)]);
    }
  }
}

template <class T>
void check_modes(double unit) {
  for (Combine combine : {Combine::sum, Combine::mean, Combine::product}) {
    for (BagMode mode : {BagMode::sum, BagMode::mean, BagMode::max}) {
      check_compose<T>(combine, mode, 1e4 * unit);
    }
  }
}

// One step of each optimizer on one row, where the result is known in closed form.
template <class T>
void check_optimizers(double unit) {
  using emblas::OptimizerKind;
  const auto& kernel = emblas::kernels<emblas::ComposeKernels>().compose.of(T{});
  for (int64_t width : {1, 5, 16, 33}) {
    const std::vector<T> gradient(width, T(2));
    for (int64_t kind = 0; kind < emblas::kOptimizers; ++kind) {
      std::vector<T> row(width, T(1)), first(width), second(width);
      int64_t last_step = 0;
      const emblas::OptimizerStep step{OptimizerKind(kind), 0.5, 0, 0.9, 0.99, 0, 1};
      kernel.update_row(step, row.data(), gradient.data(), width, first.data(), second.data(),
                        &last_step);
      // SGD moves by lr g; the others' first step is lr g / |g|.
      for (T x : row) CHECK_NEAR(x, kind == 0 ? 0.0 : 0.5, 10 * unit);
      CHECK(last_step == (OptimizerKind(kind) == OptimizerKind::adam));
    }
  }
}

}  // namespace

NATIVE_TEST(compose_float32) { check_modes<float>(1e-7); }
NATIVE_TEST(compose_float64) { check_modes<double>(1e-15); }
NATIVE_TEST(compose_optimizers) {
  check_optimizers<float>(1e-7);
  check_optimizers<double>(1e-15);
}
NATIVE_TEST(compose_linear_keys) {
  // (a id + b) mod p with products beyond 64 bits; ROBE's constants and rows of its first ids.
  const int64_t a = 634329019, b = 871205356, p = 2038074743;
  const Part part{0, int64_t(KeyKind::linear), a, b, p, 999, 0, 0, 1, 2, 0, 0};
  const auto ids = native::random_bits<int64_t>(70, 9);
  std::vector<uint32_t> numbers(70);
  const Feature feature{&part, 1, ids.data(), 0, 1, 70, nullptr, numbers.data()};
  emblas::kernels<emblas::ComposeKernels>().numbers(feature, nullptr, 0, 70);
  for (int64_t i = 0; i < 70; ++i) {
    const uint64_t q = uint64_t(ids[i]) % p;  // a q fits 64 bits
    CHECK(numbers[i] == (a * q + b) % p % 999);
  }
}
