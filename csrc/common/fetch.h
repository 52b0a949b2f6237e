// Asking early for memory that is read from one end to the other.
#pragma once

#include <cstdint>

namespace emblas {
namespace {

// CPUs fetch such streams by themselves, but only to the end of a page, so that each page begins
// with a wait for memory. Called for each piece that is read, this asks for as much, a page ahead.
// Nothing is read: the end of the stream may be passed.
inline void fetch_page_ahead(const void* from, int64_t bytes) {
  constexpr int64_t kPage = 4096, kLine = 64;
  const char* ahead = static_cast<const char*>(from) + kPage;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(ahead + i);
}

}  // namespace
}  // namespace emblas
