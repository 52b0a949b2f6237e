// Codes of ids as a torch operator on CPU tensors.
#include <string>

#include "common/isa.h"
#include "common/tensor.h"
#include "tables/codes.h"

namespace emblas {
namespace {

// In the order of the floating-point types that Python names (emblas._op.FLOATS).
constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                  ScalarType::Half};

Tensor random_codes(const Tensor& ids, const Tensor& sequence, int64_t dim, int64_t kind,
                    int64_t seed, int64_t sparsity, int64_t dtype) {
  check_vector<int64_t>(ids, -1, "ids must be a contiguous int64 CPU vector");
  const int64_t count = ids.size(0);
  check_vector<int64_t>(sequence, -1, "sequence must be a contiguous int64 CPU vector");
  check(sequence.size(0) == 1 || sequence.size(0) == count, "sequence must hold one or all");
  check(1 <= dim && dim < int64_t(1) << 34, "dim must be 1 to 2^34 - 1");
  check(0 <= kind && kind < kCodeKinds, "unknown kind of codes");
  check(1 <= sparsity && sparsity <= int64_t(1) << 31, "sparsity must be 1 to 2^31");
  check(0 <= dtype && dtype < 4, "unknown dtype");
  const int64_t* sequences = read<int64_t>(sequence);
  for (int64_t i = 0; i < sequence.size(0); ++i) {
    if (0 <= sequences[i] && sequences[i] <= UINT32_MAX) continue;
    check(false, ("sequence must be 0 to " + std::to_string(UINT32_MAX) + ", got " +
                  std::to_string(sequences[i]))
                     .c_str());
  }
  const CodeArgs args{CodeKind(kind),
                      uint64_t(seed),
                      sparsity,
                      dim,
                      read<int64_t>(ids),
                      sequences,
                      sequence.size(0) == 1 ? 0 : 1};
  return visit_float(kDtypes[dtype], "unknown dtype", [&](auto element) {
    using T = decltype(element);
    Tensor out = empty_cpu<2>(kDtypes[dtype], {count, dim});
    T* to = write<T>(out);
    const auto kernel = kernels<CodesKernels>().codes.of(element).fill;
    constexpr int64_t work = 8;  // making a number takes as long as moving so many
    parallel_for(count, work * dim * int64_t(sizeof(T)),
                 [&](int64_t first, int64_t last) { kernel(args, first, last, to); });
    return out;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "random_codes(Tensor ids, Tensor sequence, int dim, int kind, int seed, int sparsity,"
      " int dtype) -> Tensor out");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("random_codes", TORCH_BOX(&emblas::random_codes));
}
