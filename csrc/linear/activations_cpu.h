// Activations of vectors, for CPU kernels. NaN stays NaN.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/simd.h"

namespace emblas {
namespace {

// x <- min(x, most), NaN stays.
template <class V, class T>
inline V at_most(V x, T most) {
  return x > most ? broadcast<V>(most) : x;
}

// 1 / (1 + e^-x), where e^-x may be infinite.
inline vfloat sigmoid(vfloat x) {
  return 1.0f / (1.0f + exp2(at_most(x * -0x1.715476p+0f, 128.0f)));
}
inline vdouble sigmoid(vdouble x) {
  return 1.0 / (1.0 + exp2(at_most(x * -0x1.71547652b82fep+0, 1024.0)));
}

struct Identity {
  template <class V>
  static V of(V x) {
    return x;
  }
};

struct Relu {
  template <class V>
  static V of(V x) {
    return x < 0 ? V{} : x;
  }
};

struct Silu {
  template <class V>
  static V of(V x) {
    return x * sigmoid(x);
  }
};

// The approximation by tanh: 1/2 (1 + tanh u) is the sigmoid of 2 u.
struct GeluTanh {
  template <class V>
  static V of(V x) {
    using T = std::remove_reference_t<decltype(x[0])>;
    const V square = x * x;
    return x * sigmoid(x * (square * T(0.0713548162726009) + T(1.5957691216057308)));
  }
};

// x Phi(x) with the normal distribution's Phi. For floats, Phi(-|x|) = 2^p(|x|), whose error is
// below 3e-8: p is the minimax fit in the error of Phi up to |x| = 6, and falls beyond.
struct Gelu {
  static vfloat of(vfloat x) {
    const vfloat t = at_most(x < 0 ? -x : x, 16.0f);
    vfloat p = t * -0x1.9216c6p-20f + 0x1.9f72e2p-16f;
    p = p * t + -0x1.061138p-13f;
    p = p * t + -0x1.12ebfcp-12f;
    p = p * t + 0x1.d78766p-8f;
    p = p * t + -0x1.ae9b0ap-5f;
    p = p * t + -0x1.d636b8p-2f;
    p = p * t + -0x1.26aee4p+0f;
    const vfloat tail = exp2(p * t - 1.0f);
    return x * (x < 0 ? tail : 1.0f - tail);
  }
  static vdouble of(vdouble x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] *= 0.5 * std::erfc(x[i] * -0.7071067811865476);
    return x;
  }
};

}  // namespace
}  // namespace emblas
