#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace emblas {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vpopcntdq:
      return "avx512_vpopcntdq";
    case Isa::neon:
      return "neon";
  }
  return "unknown";
}

std::vector<Isa> compiled_isas() {
#if defined(__x86_64__)
  return {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq};
#elif defined(__aarch64__)
  return {Isa::neon};
#else
  return {Isa::baseline};
#endif
}

#if defined(__x86_64__)
// The feature bits behind the -march levels of isa.cmake. __builtin_cpu_supports also asks the
// operating system whether it saves the wide registers.
static bool cpu_has(Isa isa) {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
#if defined(EMBLAS_EMULATE_AVX512)
  const bool v4 = v3;  // the 512-bit sources were compiled to AVX2 instructions
  const bool vpopcntdq = v3;
#else
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool vpopcntdq = v4 && __builtin_cpu_supports("avx512vpopcntdq") &&
                         __builtin_cpu_supports("avx512bitalg") &&
                         __builtin_cpu_supports("avx512vbmi");
#endif
  switch (isa) {
    case Isa::avx2:
      return v3;
    case Isa::avx512:
      return v4;
    case Isa::avx512_vpopcntdq:
      return vpopcntdq;
    default:
      return true;
  }
}
#else
static bool cpu_has(Isa) { return true; }
#endif

std::vector<Isa> supported_isas() {
  std::vector<Isa> supported;
  for (Isa isa : compiled_isas()) {
    if (cpu_has(isa)) supported.push_back(isa);
  }
  return supported;
}

static std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{supported_isas().back()};
  return isa;
}

Isa current_isa() { return chosen_isa().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
  std::string supported;
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) {
      chosen_isa().store(isa, std::memory_order_relaxed);
      return;
    }
    supported += (supported.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("isa must be one that this CPU runs (" + supported + "), got '" +
                              name + "'");
}

}  // namespace emblas
