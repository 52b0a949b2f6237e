// A test is a function that NATIVE_TEST registers; main.cpp runs it once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace native {

struct Test {
  std::string name;
  void (*run)();
};
std::vector<Test>& tests();
void fail(const char* file, int line, const std::string& message);

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

// Exactly as long as asked for, so that AddressSanitizer sees the first element too many.
template <class T>
std::vector<T> random_values(size_t count, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<T> out(count);
  for (T& value : out) value = T(std::normal_distribution<double>()(engine));
  return out;
}
template <class T>
std::vector<T> random_bits(size_t count, uint32_t seed) {
  std::mt19937_64 engine(seed);
  std::vector<T> out(count);
  for (T& value : out) value = T(engine());
  return out;
}

}  // namespace native

#define NATIVE_TEST(name)                                           \
  static void name();                                               \
  static const native::Registration name##_registered(#name, name); \
  static void name()

#define CHECK(condition) \
  if (!(condition)) native::fail(__FILE__, __LINE__, #condition)

// |actual - expected| <= limit, and no NaN.
#define CHECK_NEAR(actual, expected, limit)                                     \
  if (!(std::fabs(double(actual) - double(expected)) <= double(limit)))         \
  native::fail(__FILE__, __LINE__,                                              \
               #actual " = " + std::to_string(double(actual)) + ", expected " + \
                   std::to_string(double(expected)))
