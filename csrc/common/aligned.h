// Scratch memory that begins at a cache line: a vector that crosses into the next one takes two
// accesses, and rows that are added up are read and written again for each token.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace emblas {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using AlignedArray = std::unique_ptr<T[], Free>;

// `count` values, uninitialized.
template <class T>
AlignedArray<T> aligned_array(int64_t count) {
  constexpr size_t kLine = 64;
  const size_t bytes = (size_t(count) * sizeof(T) / kLine + 1) * kLine;
  void* memory = std::aligned_alloc(kLine, bytes);
  if (!memory) throw std::bad_alloc();
  return AlignedArray<T>(static_cast<T*>(memory));
}

}  // namespace emblas
