// Element types shared by kernels and doors. No dependency, so that every layer may include it.
#pragma once

#include <cstdint>

// Before functions that CPU and GPU kernels share.
#if defined(__CUDACC__)
#define EMBLAS_HOST_DEVICE __host__ __device__
#else
#define EMBLAS_HOST_DEVICE
#endif

namespace emblas {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// 16-bit values are accumulated in float, double stays double.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// One kernel per floating-point element type.
template <template <class> class Kernel>
struct ByDtype {
  Kernel<float> float32;
  Kernel<double> float64;
  Kernel<bfloat16> bf16;
  Kernel<float16> fp16;

  const Kernel<float>& of(float) const { return float32; }
  const Kernel<double>& of(double) const { return float64; }
  const Kernel<bfloat16>& of(bfloat16) const { return bf16; }
  const Kernel<float16>& of(float16) const { return fp16; }
};

}  // namespace emblas
