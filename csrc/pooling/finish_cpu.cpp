// Finishing pooled vectors on a CPU: a row is scaled into scratch and stored from there.
#include "common/isa.h"
#include "common/philox.h"
#include "pooling/finish.h"
#include "pooling/pooling.h"
#include "pooling/rows.h"

namespace emblas {
namespace {

template <class A>
A prefix_length(const A* x, int64_t k) {
  const A length = std::sqrt(dot(x, x, k));
  return length > A(kNormalizeEpsilon) ? length : A(kNormalizeEpsilon);
}

// visit(z, k, before): the finished k values in scratch, and the sum of the dims before.
template <class A, class Visit>
void finish_row(const FinishSettings& settings, const A* x, int64_t row, A* scratch,
                const Visit& visit) {
  int64_t before = 0;
  for (int64_t d = 0; d < settings.count; ++d) {
    const int64_t k = settings.dims[d];
    scale_row(scratch, x, settings.normalize ? 1 / prefix_length(x, k) : A(1), k);
    for (int64_t i = 0; i < k && settings.noise != 0; i += 4) {
      double normal[4];
      philox_normal({{uint32_t(i / 4), uint32_t(d), uint32_t(row), uint32_t(row >> 32)}},
                    settings.seed, normal);
      for (int64_t j = i; j < k && j < i + 4; ++j) scratch[j] += A(settings.noise * normal[j - i]);
    }
    visit(scratch, k, before);
    before += k;
  }
}

int64_t width_of(const FinishSettings& settings) {
  int64_t width = 0;
  for (int64_t d = 0; d < settings.count; ++d) width += settings.dims[d];
  return width;
}

template <class T>
void floating(const FinishSettings& settings, const Accumulator<T>* x, int64_t first, int64_t last,
              T* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t width = width_of(settings);
  for (int64_t row = first; row < last; ++row) {
    finish_row(settings, x + row * settings.dim, row, scratch,
               [&](const A* z, int64_t k, int64_t before) {
                 scale_row(out + row * width + before, z, A(1), k);
               });
  }
}

template <class T>
void int8(const FinishSettings& settings, const Accumulator<T>* x, const Accumulator<T>* ranges,
          int64_t first, int64_t last, int8_t* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t width = width_of(settings);
  for (int64_t row = first; row < last; ++row) {
    finish_row(settings, x + row * settings.dim, row, scratch,
               [&](const A* z, int64_t k, int64_t before) {
                 const A *low = ranges + before, *high = low + width;
                 int8_t* codes = out + row * width + before;
                 for (int64_t i = 0; i < k; ++i) {
                   const A span = high[i] - low[i];
                   const A level = std::rint((z[i] - low[i]) * (span > 0 ? 255 / span : A(0)));
                   // Written so that NaN gives the lowest code, not an undefined conversion.
                   codes[i] = int8_t((level > 0 ? level < 255 ? int(level) : 255 : 0) - 128);
                 }
               });
  }
}

template <class T>
void bits(const FinishSettings& settings, const Accumulator<T>* x, int64_t first, int64_t last,
          uint8_t* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  int64_t width = 0;
  for (int64_t d = 0; d < settings.count; ++d) width += (settings.dims[d] + 7) / 8;
  for (int64_t row = first; row < last; ++row) {
    uint8_t* codes = out + row * width;
    finish_row(settings, x + row * settings.dim, row, scratch, [&](const A* z, int64_t k, int64_t) {
      for (int64_t i = 0; i < k; i += 8) {
        unsigned byte = 0;
        for (int64_t j = i; j < k && j < i + 8; ++j) {
          byte |= unsigned(z[j] > 0) << (7 - (j - i));
        }
        *codes++ = uint8_t(byte);
      }
    });
  }
}

template <class T>
void backward(const FinishSettings& settings, const Accumulator<T>* grad_out,
              const Accumulator<T>* x, int64_t first, int64_t last, Accumulator<T>* grad_x) {
  using A = Accumulator<T>;
  const int64_t dim = settings.dim;
  for (int64_t row = first; row < last; ++row) {
    const A* values = x + row * dim;
    const A* grad = grad_out + row * width_of(settings);
    A* to = grad_x + row * dim;
    std::memset(to, 0, dim * sizeof(A));
    for (int64_t d = 0; d < settings.count; grad += settings.dims[d++]) {
      const int64_t k = settings.dims[d];
      if (!settings.normalize) {
        add_row(to, grad, A(1), k);
        continue;
      }
      const A length = prefix_length(values, k);
      add_row(to, grad, 1 / length, k);
      if (length > A(kNormalizeEpsilon)) {
        add_row(to, values, -dot(values, grad, k) / (length * length * length), k);
      }
    }
  }
}

template <class T>
constexpr Finish<T> kernel{floating<T>, int8<T>, bits<T>, backward<T>};

}  // namespace

template <>
const FinishKernels& table_of<FinishKernels, Isa::EMBLAS_ISA>() {
  static constexpr FinishKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                       kernel<float16>};
  return table;
}

}  // namespace emblas
