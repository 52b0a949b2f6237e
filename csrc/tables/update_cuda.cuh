// Gradients of the rows in use, and what is done with them on a GPU: they are stored, or an
// optimizer takes its step (compose.h).
//
// The lookups are sorted by row, as for a dense gradient. A segment is known by its first place in
// the sorted list, and a warp comes to every place: where a row begins, it adds up the row's
// gradients; elsewhere it ends at once. So memory and time follow the batch, not the table.
//
// An optimizer's step is taken where the sum is, in registers, if one warp holds the row and its
// gradient is a plain sum. Rows of several tiles of columns, of products (whose gradients read each
// other's rows) and of maxima have their gradients written to a workspace first, and `update_rows`
// takes the step.
//
// Bytes of a step: the rows in use and the optimizer's state, each read and written once, beside
// what the sums read; for a workspace a row of accumulators twice.
#pragma once

#include "tables/compose_cuda.h"
#include "tables/segment_sum_cuda.cuh"

namespace emblas::cuda::tables {

// --- segments ------------------------------------------------------------------------------------

// The places of sorted keys; of each row of one table, `first` to `last`, its first place is a
// segment with all of its lookups. The other places are empty.
struct UsedRows {
  static constexpr bool kEmptyIsZero = false;
  const int32_t* keys;
  int64_t count;  // of places
  int64_t first, last;

  __device__ int64_t row(int64_t place) const { return keys[place] - first; }
  __device__ bool begins(int64_t place) const {
    const int64_t key = keys[place];
    return first <= key && key <= last && (place == 0 || keys[place - 1] != key);
  }
  // Most rows have few lookups: steps that double come by the end soon.
  __device__ int64_t end(int64_t place) const {
    const int64_t key = keys[place];
    int64_t low = place + 1, reach = 1;
    while (place + reach < count && keys[place + reach] == key) {
      low = place + reach + 1;
      reach *= 2;
    }
    return low + count_up_to(keys + low, min(place + reach, count) - low, key);
  }
  __device__ Range range(int64_t place) const {
    return {place, begins(place) ? end(place) : place};
  }
  __device__ int64_t holding(int64_t place) const {
    return count_up_to(keys, count, int64_t(keys[min(place, count - 1)]) - 1);
  }
};

// --- sinks ---------------------------------------------------------------------------------------

// The sum of a segment is row number `rank`, counted from 1, or its first place where that is null.
template <class E>
struct StoreUsed {
  E* rows;
  int64_t stride;
  const int64_t* rank;

  template <class C>
  __device__ void put(int64_t place, const RowShape& shape, const C& columns,
                      const typename C::A (&sum)[C::size]) const {
    if (lane_of_warp() >= shape.lanes) return;
    columns.store(rows + (rank ? rank[place] - 1 : place) * stride, sum);
  }
};

// base^exponent; a row may have stood still for long, so in double.
__device__ inline double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// The step of an optimizer on rows of one table.
template <class T>
struct RowStep {
  using A = Accumulator<T>;
  OptimizerStep step;
  OptimizerArgs<T> state;
  UsedRows used;
  int64_t width;

  // What the columns of a row have in common.
  struct Factors {
    A rate, keep_first, keep_second, shrink;
  };

  __device__ A slope(A gradient, A weight) const {
    return gradient + A(step.weight_decay) * weight;
  }

  // This lane's share of the squares that a step by rows adds up.
  template <class C>
  __device__ A squares(int64_t row, const C& columns, const A (&gradient)[C::size]) const {
    A w[C::size] = {}, total = 0;
    if (step.kind != OptimizerKind::row_wise_adagrad) return total;
    columns.load(state.table + row * width, w);
    for (int k = 0; k < C::size; ++k) {
      const A g = slope(gradient[k], w[k]);
      total += g * g;
    }
    return total;
  }

  // Moves on the state of a row as a whole. Called by all lanes; `squares` are those of as many
  // lanes as share a row.
  __device__ Factors begin(int64_t row, A squares, int lanes) const {
    Factors factors{A(step.learning_rate), A(1), A(1), A(1)};
    if (step.kind == OptimizerKind::row_wise_adagrad) {
      for (int flip = 1; flip < lanes; flip *= 2) {
        squares += __shfl_xor_sync(simt::kAllLanes, squares, flip);
      }
      const A total = state.first[row] + squares / A(width);
      __syncwarp();  // all lanes have read it, and the row
      if (lane_of_warp() == 0) state.first[row] = total;
      factors.rate /= sqrt(total) + A(step.epsilon);
    }
    if (step.kind == OptimizerKind::adam) {
      const int64_t elapsed = *state.steps - state.last_step[row];
      __syncwarp();
      if (lane_of_warp() == 0) state.last_step[row] = *state.steps;
      factors.rate = state.corrections[0];
      factors.keep_first = A(power(step.beta1, elapsed));
      factors.keep_second = A(power(step.beta2, elapsed));
      factors.shrink = A(power(1 - step.learning_rate * step.weight_decay, elapsed));
    }
    return factors;
  }

  // Moves the lane's columns of a row, and their state.
  template <class C>
  __device__ void move(int64_t row, const C& columns, const A (&gradient)[C::size],
                       const Factors& factors) const {
    const int64_t at = row * width;
    A w[C::size] = {}, s[C::size] = {};
    columns.load(state.table + at, w);
    if (step.kind == OptimizerKind::adam) {
      A m[C::size] = {};
      columns.load(state.first + at, m);
      columns.load(state.second + at, s);
      for (int k = 0; k < C::size; ++k) {
        const A g = gradient[k];
        m[k] = factors.keep_first * m[k] + A(1 - step.beta1) * g;
        s[k] = factors.keep_second * s[k] + A(1 - step.beta2) * g * g;
        const A root = sqrt(s[k] * state.corrections[1]) + A(step.epsilon);
        w[k] = factors.shrink * w[k] - factors.rate * m[k] / root;
      }
      columns.store(state.first + at, m);
      columns.store(state.second + at, s);
    } else if (step.kind == OptimizerKind::adagrad) {
      columns.load(state.first + at, s);
      for (int k = 0; k < C::size; ++k) {
        const A g = slope(gradient[k], w[k]);
        s[k] += g * g;
        w[k] -= factors.rate * g / (sqrt(s[k]) + A(step.epsilon));
      }
      columns.store(state.first + at, s);
    } else {
      for (int k = 0; k < C::size; ++k) w[k] -= factors.rate * slope(gradient[k], w[k]);
    }
    columns.store(state.table + at, w);
  }

  // As a sink: where one tile of columns is the row.
  template <class C>
  __device__ void put(int64_t place, const RowShape& shape, const C& columns,
                      const A (&sum)[C::size]) const {
    const int64_t row = used.row(place);
    const Factors factors = begin(row, squares(row, columns, sum), shape.lanes);
    if (lane_of_warp() < shape.lanes) move(row, columns, sum, factors);
  }
};

// --- kernels -------------------------------------------------------------------------------------

// Grid (places / kThreads): 1 where a row of the table begins.
__global__ void __launch_bounds__(kThreads) mark_rows(UsedRows used, int32_t* marks) {
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place < used.count) marks[place] = used.begins(place);
}

// Grid (places / kThreads): numbers of the rows in use, rising, and of these `count`.
__global__ void __launch_bounds__(kThreads)
    list_rows(UsedRows used, const int64_t* rank, int64_t* rows, int64_t* count) {
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= used.count) return;
  if (used.begins(place)) rows[rank[place] - 1] = used.row(place);
  if (place == used.count - 1) *count = rank[place];
}

// One warp: counts the step; the rate of Adam, and what its second moments are multiplied by.
template <class A>
__global__ void __launch_bounds__(32)
    count_step(OptimizerStep step, int64_t* steps, A* corrections) {
  if (threadIdx.x > 0) return;
  const int64_t now = *steps + 1;
  *steps = now;
  corrections[0] = A(step.learning_rate / (1 - power(step.beta1, now)));
  corrections[1] = A(1 / (1 - power(step.beta2, now)));
}

// Grid (places / kWarps): a step by gradients, rows of each first place `stride` apart.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    update_rows(RowStep<T> step, RowShape shape, const Accumulator<T>* gradients, int64_t stride) {
  using A = Accumulator<T>;
  using C = Columns<T, aligned>;
  const int64_t place = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (place >= step.used.count || !step.used.begins(place)) return;
  const int64_t row = step.used.row(place);
  const auto gradient_of = [&](const C& columns, A(&gradient)[C::size]) {
    for (int k = 0; k < C::size; ++k) gradient[k] = 0;
    columns.load(gradients + place * stride, gradient);
  };
  const int64_t columns_of_tile = shape.tile<T>();
  A gradient[C::size], squares = 0;
  if (step.step.kind == OptimizerKind::row_wise_adagrad) {
    for (int64_t tile = 0; tile * columns_of_tile < shape.dim; ++tile) {
      const C columns(shape, tile);
      gradient_of(columns, gradient);
      squares += step.squares(row, columns, gradient);
    }
  }
  const auto factors = step.begin(row, squares, shape.lanes);
  if (lane_of_warp() >= shape.lanes) return;
  for (int64_t tile = 0; tile * columns_of_tile < shape.dim; ++tile) {
    const C columns(shape, tile);
    gradient_of(columns, gradient);
    step.move(row, columns, gradient, factors);
  }
}

}  // namespace emblas::cuda::tables
