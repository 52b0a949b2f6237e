// Quantized tables as torch operators on CPU tensors.
#include <memory>
#include <optional>
#include <string>

#include "common/aligned.h"
#include "common/isa.h"
#include "tables/bags.h"
#include "tables/quantized.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "scale must be float32, float64, bfloat16 or float16";

// The arguments that forward and backward have in common, checked.
struct Call {
  const Tensor &ids, &packed, &scale;
  std::optional<Tensor> offsets, weights, zero_point;
  int64_t bits, dim, bags;
  BagMode mode;
  std::optional<int64_t> padding_id;

  Call(const Tensor& ids, const Tensor& packed, const Tensor& scale,
       const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights, int64_t bits,
       int64_t dim, int64_t mode_number, std::optional<int64_t> padding,
       const std::optional<Tensor>& zero_point)
      : ids(ids),
        packed(packed),
        scale(scale),
        offsets(offsets),
        weights(weights),
        zero_point(zero_point),
        bits(bits),
        dim(dim),
        mode(BagMode(mode_number)),
        padding_id(padding) {
    check(bits == 2 || bits == 4 || bits == 8 || bits == 16, "bits must be 2, 4, 8 or 16");
    check(1 <= dim && dim < int64_t(1) << 40, "dim must be 1 to 2^40");
    check(0 <= mode_number && mode_number < 3, "unknown mode of bags");
    check(mode == BagMode::sum || offsets, "mean and max need offsets");
    check(mode == BagMode::sum || !weights, "weights need the mode sum");
    check_vector<int64_t>(ids, -1, "ids must be a contiguous int64 CPU vector");
    check(packed.is_cpu() && has_dtype<uint8_t>(packed) && packed.dim() == 2 &&
              packed.is_contiguous() && packed.size(1) == packed_bytes(dim, bits),
          "packed must be a contiguous uint8 CPU tensor (rows, dim * bits / 8 bytes)");
    check(scale.is_cpu() && scale.dim() == 1 && scale.is_contiguous() &&
              scale.size(0) == packed.size(0),
          "scale must be a contiguous CPU vector of one scale per row");
    const char* zero_message =
        "zero_point must be a contiguous CPU vector of one number per row, float64 where scale is "
        "float64 and float32 otherwise";
    const bool is_double = has_dtype<double>(scale);
    if (zero_point && is_double) check_vector<double>(*zero_point, packed.size(0), zero_message);
    if (zero_point && !is_double) check_vector<float>(*zero_point, packed.size(0), zero_message);
    check_id_weights(weights, ids.size(0), is_double);
    bags = check_offsets(offsets, ids.size(0));
    const int64_t* padding_value = padding_id ? &*padding_id : nullptr;
    if (const int64_t* id =
            find_id_outside(read<int64_t>(ids), ids.size(0), packed.size(0), padding_value)) {
      check(false, ("ids must be 0 to " + std::to_string(packed.size(0) - 1) + ", got " +
                    std::to_string(*id))
                       .c_str());
    }
  }

  template <class T>
  QuantizedArgs<T> args() const {
    return {read<uint8_t>(packed),
            read<T>(scale),
            packed.size(0),
            dim,
            bits,
            mode,
            read<int64_t>(ids),
            read_optional<int32_t>(offsets),
            read_optional<Accumulator<T>>(weights),
            padding_id ? &*padding_id : nullptr,
            read_optional<Accumulator<T>>(zero_point)};
  }

  // body(first, last, scratch) over the bags.
  template <class T, class Body>
  void for_each(const Body& body) const {
    for_bags(read_optional<int32_t>(offsets), bags, dim * int64_t(sizeof(T)),
             [&](int64_t first, int64_t last) {
               const int64_t size = 2 * padded_dim(dim);
               const AlignedArray<Accumulator<T>> scratch = aligned_array<Accumulator<T>>(size);
               body(first, last, scratch.get());
             });
  }
};

Tensor quantized_bag(const Tensor& ids, const Tensor& packed, const Tensor& scale,
                     const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                     int64_t bits, int64_t dim, int64_t mode, std::optional<int64_t> padding_id,
                     const std::optional<Tensor>& zero_point) {
  const Call call(ids, packed, scale, offsets, weights, bits, dim, mode, padding_id, zero_point);
  return visit_float(scale.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    Tensor out = empty_cpu<2>(scale.scalar_type(), {call.bags, dim});
    T* to = write<T>(out);
    const QuantizedArgs<T> args = call.args<T>();
    const auto kernel = kernels<QuantizedKernels>().quantized.of(element).forward;
    call.for_each<T>([&](int64_t first, int64_t last, Accumulator<T>* scratch) {
      kernel(args, first, last, scratch, to);
    });
    return out;
  });
}

Tensor quantized_bag_backward(const Tensor& grad_out, const Tensor& ids, const Tensor& packed,
                              const Tensor& scale, const std::optional<Tensor>& offsets,
                              int64_t bits, int64_t dim, std::optional<int64_t> padding_id,
                              const std::optional<Tensor>& zero_point) {
  const Call call(ids, packed, scale, offsets, std::nullopt, bits, dim, 0, padding_id, zero_point);
  check(grad_out.is_cpu() && grad_out.scalar_type() == scale.scalar_type() && grad_out.dim() == 2 &&
            grad_out.size(0) == call.bags && grad_out.size(1) == dim && grad_out.is_contiguous(),
        "grad_out must be a contiguous (bags, dim) CPU tensor of the dtype of scale");
  return visit_float(scale.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor grad_weights = empty_cpu<1>(kScalarType<A>, {ids.size(0)});
    A* to = write<A>(grad_weights);
    const QuantizedArgs<T> args = call.args<T>();
    const auto kernel = kernels<QuantizedKernels>().quantized.of(element).grad_weights;
    call.for_each<T>([&](int64_t first, int64_t last, A* scratch) {
      kernel(args, first, last, read<T>(grad_out), scratch, to);
    });
    return grad_weights;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "quantized_bag(Tensor ids, Tensor packed, Tensor scale, Tensor? offsets, Tensor? weights,"
      " int bits, int dim, int mode, int? padding_id, Tensor? zero_point=None) -> Tensor out");
  library.def(
      "quantized_bag_backward(Tensor grad_out, Tensor ids, Tensor packed, Tensor scale,"
      " Tensor? offsets, int bits, int dim, int? padding_id, Tensor? zero_point=None)"
      " -> Tensor grad_weights");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("quantized_bag", TORCH_BOX(&emblas::quantized_bag));
  library.impl("quantized_bag_backward", TORCH_BOX(&emblas::quantized_bag_backward));
}
