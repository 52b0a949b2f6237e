// Bit codes as torch operators on CPU tensors.
#include <optional>
#include <tuple>
#include <vector>

#include "binary/binary.h"
#include "binary/search.h"
#include "common/isa.h"
#include "common/tensor.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "x must be float32, float64, bfloat16 or float16";

Tensor pack_sign(const Tensor& x, const std::optional<Tensor>& threshold) {
  check_rows(x, "x must be a CPU tensor (rows, dim) with a contiguous last dimension");
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t rows = x.size(0), dim = x.size(1), bytes = (dim + 7) / 8;
    if (threshold) {
      check_vector<A>(*threshold, dim,
                      "threshold must be a contiguous vector of dim values, float64 if x is, "
                      "float32 otherwise");
    }
    const A* limits = threshold ? read<A>(*threshold) : nullptr;
    Tensor codes = empty_cpu<2>(ScalarType::Byte, {rows, bytes});
    const auto& kernel = kernels<PackSignKernels>().of(element);
    parallel_for(rows, dim * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      kernel.pack(read<T>(x), x.stride(0), limits, dim, first, last, write<uint8_t>(codes));
    });
    return codes;
  });
}

Tensor rotate(const Tensor& x, const Tensor& signs, bool inverse) {
  check_rows(x, "x must be a CPU tensor (rows, dim) with a contiguous last dimension");
  check(signs.is_cpu() && has_dtype<int8_t>(signs) && signs.dim() == 2 && signs.is_contiguous() &&
            signs.size(1) == x.size(1),
        "signs must be a contiguous int8 CPU tensor (rounds, dim)");
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = x.size(0), dim = x.size(1);
    Tensor out = empty_cpu<2>(x.scalar_type(), {rows, dim});
    const HadamardRotateArgs<T> args{read<T>(x),    x.stride(0), dim,          read<int8_t>(signs),
                                     signs.size(0), inverse,     write<T>(out)};
    const auto& kernel = kernels<HadamardRotateKernels>().of(element);
    if (dim == 0) return out;
    parallel_for(rows, dim * int64_t(sizeof(T)) * 8, [&](int64_t first, int64_t last) {
      std::vector<Accumulator<T>> buffer(dim);
      kernel.rotate(args, first, last, buffer.data());
    });
    return out;
  });
}
Tensor hadamard_rotate(const Tensor& x, const Tensor& signs) { return rotate(x, signs, false); }
Tensor hadamard_unrotate(const Tensor& x, const Tensor& signs) { return rotate(x, signs, true); }

std::tuple<Tensor, Tensor> hamming_topk_op(const Tensor& queries, const Tensor& codes, int64_t k) {
  check_rows(queries, "queries must be a CPU tensor (queries, bytes) with contiguous codes");
  check_rows(codes, "codes must be a CPU tensor (rows, bytes) with contiguous codes");
  check(has_dtype<uint8_t>(queries) && has_dtype<uint8_t>(codes),
        "queries and codes must be uint8");
  check(queries.size(1) == codes.size(1), "queries and codes must have the same width in bytes");
  check(k >= 0, "k must not be negative");
  check(codes.size(0) < int64_t(1) << kRowBits, "codes must have less than 2^40 rows");
  check(codes.size(1) < int64_t(1) << 20, "codes must be shorter than 2^20 bytes");
  const int64_t query_count = queries.size(0);
  Tensor distances = empty_cpu<2>(ScalarType::Int, {query_count, k});
  Tensor ids = empty_cpu<2>(ScalarType::Long, {query_count, k});
  const HammingTopk args{
      read<uint8_t>(queries),    queries.stride(0),  query_count,   read<uint8_t>(codes),
      codes.stride(0),           codes.size(0),      codes.size(1), k,
      write<int32_t>(distances), write<int64_t>(ids)};
  hamming_topk(args, [](int64_t count, int64_t bytes, const auto& body) {
    parallel_for(count, bytes, body);
  });
  return {distances, ids};
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def("pack_sign(Tensor x, Tensor? threshold=None) -> Tensor");
  library.def("hadamard_rotate(Tensor x, Tensor signs) -> Tensor");
  library.def("hadamard_unrotate(Tensor x, Tensor signs) -> Tensor");
  library.def(
      "hamming_topk(Tensor queries, Tensor codes, int k) -> (Tensor distances, Tensor ids)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("pack_sign", TORCH_BOX(&emblas::pack_sign));
  library.impl("hadamard_rotate", TORCH_BOX(&emblas::hadamard_rotate));
  library.impl("hadamard_unrotate", TORCH_BOX(&emblas::hadamard_unrotate));
  library.impl("hamming_topk", TORCH_BOX(&emblas::hamming_topk_op));
}
