// Launches the kernels of quantized tables; shapes alone decide the grids.
#include "tables/launch_cuda.h"
#include "tables/quantized_bag_cuda.cuh"

namespace emblas::cuda {
namespace {

using namespace tables;

// Rows of codes begin at multiples of what a lane reads, rows of values at those of 16 bytes?
template <class T>
bool aligned_with(const QuantizedArgs<T>& args, const T* rows) {
  return args.dim % kCodes == 0 && reinterpret_cast<uintptr_t>(args.packed) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(rows) % 16 == 0;
}

template <class T, int bits, bool aligned>
void pool(const QuantizedArgs<T>& args, T* out, void* stream) {
  const RowShape shape = code_shape(args.dim, aligned);
  const unsigned tiles = blocks(args.dim, shape.lanes * kCodes);
  const bool bags = args.offsets;
  simt::launch(bags ? pool_codes<T, bits, aligned> : look_up_codes<T, bits, aligned>,
               dim3(blocks(args.bags, kWarps * (bags ? 1 : ids_of_warp(shape))), tiles), kThreads,
               0, stream, QuantizedRows<T, bits>{args}, shape, out);
}

template <class T, int bits, bool aligned>
void dot(const QuantizedArgs<T>& args, const BagNumbers& bags, const T* grad_out,
         Accumulator<T>* grad_weights, void* stream) {
  const RowShape shape = code_shape(args.dim, aligned);
  simt::launch(dot_codes<T, bits, aligned>, blocks(args.count, kWarps * ids_of_warp(shape)),
               kThreads, 0, stream, QuantizedRows<T, bits>{args}, bags, shape, grad_out,
               grad_weights);
}

// run(bits, aligned) with both as types.
template <int value>
using Number = std::integral_constant<int, value>;
template <class Run>
void with_bits(int64_t bits, bool aligned, const Run& run) {
  const auto choose = [&](auto number) {
    aligned ? run(number, std::true_type{}) : run(number, std::false_type{});
  };
  switch (bits) {
    case 2:
      return choose(Number<2>{});
    case 4:
      return choose(Number<4>{});
    case 8:
      return choose(Number<8>{});
    default:
      return choose(Number<16>{});
  }
}

}  // namespace

template <class T>
void quantized_bag(const QuantizedArgs<T>& args, T* out, void* stream) {
  with_bits(args.bits, aligned_with(args, out), [&](auto bits, auto aligned) {
    pool<T, bits.value, aligned.value>(args, out, stream);
  });
}

template <class T>
void quantized_grad_weights(const QuantizedArgs<T>& args, const BagNumbers& bags, const T* grad_out,
                            Accumulator<T>* grad_weights, void* stream) {
  QuantizedArgs<T> plain = args;
  plain.weights = nullptr;
  with_bits(args.bits, aligned_with(args, grad_out), [&](auto bits, auto aligned) {
    dot<T, bits.value, aligned.value>(plain, bags, grad_out, grad_weights, stream);
  });
}

#define EMBLAS_INSTANTIATE(T)                                                                   \
  template void quantized_bag<T>(const QuantizedArgs<T>&, T*, void*);                           \
  template void quantized_grad_weights<T>(const QuantizedArgs<T>&, const BagNumbers&, const T*, \
                                          Accumulator<T>*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
