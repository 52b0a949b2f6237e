// Steps of the fused optimizers on one row, for the CPU kernels of composed tables.
#pragma once

#include "tables/compose.h"
#include "tables/lookup.h"

namespace emblas {
namespace {

template <class A>
A square_root(A x) {
  if constexpr (sizeof(A) == 4)
    return __builtin_sqrtf(x);
  else
    return __builtin_sqrt(x);
}

double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

template <class T>
void update_row(const OptimizerStep& step, T* row, const Accumulator<T>* gradient, int64_t width,
                Accumulator<T>* first, Accumulator<T>* second, int64_t* last_step) {
  using A = Accumulator<T>;
  const A rate = A(step.learning_rate), epsilon = A(step.epsilon), decay = A(step.weight_decay);
  switch (step.kind) {
    case OptimizerKind::sgd:
      for (int64_t i = 0; i < width; ++i) {
        const A w = to_accumulator(row[i]);
        from_accumulator(w - rate * (gradient[i] + decay * w), row + i);
      }
      break;
    case OptimizerKind::row_wise_adagrad: {
      const auto slope = [&](int64_t i, auto lane) {
        return value(gradient + i, lane) + decay * value(row + i, lane);
      };
      Vector<T> squares{};
      A rest = 0;
      for_each_lane<T>(width, [&](int64_t i, auto lane) {
        const auto g = slope(i, lane);
        if constexpr (sizeof lane == sizeof(A)) {
          rest += g * g;
        } else {
          squares += g * g;
        }
      });
      *first += (sum(squares) + rest) / A(width);
      const A factor = rate / (square_root(*first) + epsilon);
      map_lanes<T>(
          width,
          [&](int64_t i, auto lane) { return value(row + i, lane) - factor * slope(i, lane); },
          [&](int64_t i, auto w) { put(row + i, w); });
      break;
    }
    case OptimizerKind::adagrad:
      for (int64_t i = 0; i < width; ++i) {
        const A w = to_accumulator(row[i]), g = gradient[i] + decay * w;
        first[i] += g * g;
        from_accumulator(w - rate * g / (square_root(first[i]) + epsilon), row + i);
      }
      break;
    case OptimizerKind::adam: {
      const int64_t elapsed = step.step - *last_step;
      *last_step = step.step;
      const A keep1 = A(power(step.beta1, elapsed)), keep2 = A(power(step.beta2, elapsed));
      const A shrink = A(power(1 - step.learning_rate * step.weight_decay, elapsed));
      const A rate1 = A(step.learning_rate / (1 - power(step.beta1, step.step)));
      const A correction2 = A(1 / (1 - power(step.beta2, step.step)));
      const A fresh1 = A(1 - step.beta1), fresh2 = A(1 - step.beta2);
      for (int64_t i = 0; i < width; ++i) {
        const A g = gradient[i];
        first[i] = keep1 * first[i] + fresh1 * g;
        second[i] = keep2 * second[i] + fresh2 * g * g;
        const A denominator = square_root(second[i] * correction2) + epsilon;
        from_accumulator(shrink * to_accumulator(row[i]) - rate1 * first[i] / denominator, row + i);
      }
    }
  }
}

}  // namespace
}  // namespace emblas
