// Which instruction sets this binary holds, and which one its kernels use.
//
// Every `*_cpu.cpp` is compiled once per instruction set of the architecture (isa.cmake). Each copy
// specializes `table_of<Table, isa>()` with its function pointers; `kernels<Table>()` returns the
// table of the instruction set in use. Nothing else about a kernel is visible outside its file.
#pragma once

#include <string>
#include <vector>

namespace emblas {

enum class Isa { baseline, avx2, avx512, avx512_vpopcntdq, neon };

const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();       // slowest first
std::vector<Isa> supported_isas();      // those of compiled_isas() that this CPU can run
Isa current_isa();                      // the fastest supported one, unless set_isa() chose another
void set_isa(const std::string& name);  // std::invalid_argument where this CPU can't run it

template <class Table, Isa isa>
const Table& table_of();

template <class Table>
const Table& kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512_vpopcntdq:
      return table_of<Table, Isa::avx512_vpopcntdq>();
    case Isa::avx512:
      return table_of<Table, Isa::avx512>();
    case Isa::avx2:
      return table_of<Table, Isa::avx2>();
    default:
      return table_of<Table, Isa::baseline>();
  }
#elif defined(__aarch64__)
  return table_of<Table, Isa::neon>();
#else
  return table_of<Table, Isa::baseline>();
#endif
}

}  // namespace emblas
