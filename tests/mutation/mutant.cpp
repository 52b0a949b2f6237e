// Which mutant is alive, and whose places were reached: set and asked for from Python.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kMost = 1 << 14;
int mutant = 0;
uint8_t reached[kMost];

}  // namespace

namespace mutation {

int alive(int id) {
  reached[id] = 1;
  return id == mutant;
}

}  // namespace mutation

#define EMBLAS_EXPORT extern "C" __attribute__((visibility("default")))

EMBLAS_EXPORT void emblas_set_mutant(int id) { mutant = id; }

// Copies the flags of ids 0 to count - 1, and clears them.
EMBLAS_EXPORT void emblas_take_reached(uint8_t* out, int count) {
  std::copy(reached, reached + std::min(count, kMost), out);
  std::memset(reached, 0, sizeof(reached));
}
