// The Python module emblas._C: instruction sets, build facts and the numpy doors. The torch
// operators in the same binary register themselves when it is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "attention/attention_numpy.h"
#include "binary/binary_numpy.h"
#include "common/isa.h"
#include "pooling/pooling_numpy.h"
#include "tables/quantized_numpy.h"
#include "tables/tables_numpy.h"
#include "tables/text_numpy.h"

namespace py = pybind11;

namespace {

std::vector<std::string> names(const std::vector<emblas::Isa>& isas) {
  std::vector<std::string> out;
  for (emblas::Isa isa : isas) out.emplace_back(emblas::isa_name(isa));
  return out;
}

bool cpu_is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native part of emblas.";
  module.def(
      "isa", [] { return std::string(emblas::isa_name(emblas::current_isa())); },
      "Return the instruction set that the CPU kernels use.");
  module.def("set_isa", &emblas::set_isa, py::arg("name"),
             "Use the kernels of one instruction set; ValueError where this CPU can't run it.");
  module.def(
      "compiled_isas", [] { return names(emblas::compiled_isas()); },
      "Return the instruction sets in this binary, slowest first.");
  module.def(
      "supported_isas", [] { return names(emblas::supported_isas()); },
      "Return those of compiled_isas() that this CPU can run.");
  module.def("cpu_is_amd", &cpu_is_amd, "Tell whether AMD has made this CPU.");
  module.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"torch", EMBLAS_BUILD_TORCH_VERSION},
            {"compiler", EMBLAS_COMPILER},
            {"cuda", EMBLAS_CUDA_TOOLKIT},
            {"cuda_architectures", EMBLAS_CUDA_ARCHITECTURES}};
      },
      "Return what this binary was built with: torch, compiler, CUDA toolkit (or empty).");
  emblas::bind_attention(module);
  emblas::bind_binary(module);
  emblas::bind_pooling(module);
  emblas::bind_quantized(module);
  emblas::bind_tables(module);
  emblas::bind_text(module);
}
