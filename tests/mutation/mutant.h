// What the mutated copies of the CUDA C++ kernels are rewritten to: every mutant of every kernel
// stands in one library, and `emblas_mutant` says at run time which one is alive (0: none).
//
// An operator is mutated where it stands, without knowing where its operands begin and end:
// `a < b` becomes `a < mutation::Less<7>{} < b`. Same precedence, left to right, so the first `<`
// takes `a` and the second one decides.
#pragma once

#include <type_traits>

#include "simt/emulator.h"

namespace mutation {

int alive(int id);  // 1 or 0; in mutant.cpp, as its memory is none of a kernel's

#define EMBLAS_MUTABLE(Name, original, mutated)                                           \
  template <int id>                                                                       \
  struct Name {};                                                                         \
  template <int id, class A>                                                              \
  struct Name##Of {                                                                       \
    A a;                                                                                  \
  };                                                                                      \
  template <class A, int id>                                                              \
  inline Name##Of<id, A> operator original(A a, Name<id>) {                               \
    return {a};                                                                           \
  }                                                                                       \
  template <int id, class A, class B>                                                     \
  inline auto operator original(Name##Of<id, A> left, B b)->decltype(left.a original b) { \
    using Result = decltype(left.a original b);                                           \
    if constexpr (requires { Result(left.a mutated b); }) {                               \
      if (alive(id)) return Result(left.a mutated b);                                     \
    } else { /* a difference of pointers has no sum */                                    \
      if (alive(id)) return (left.a original b) + 1;                                      \
    }                                                                                     \
    return left.a original b;                                                             \
  }
EMBLAS_MUTABLE(Less, <, <=)
EMBLAS_MUTABLE(LessEqual, <=, <)
EMBLAS_MUTABLE(Greater, >, >=)
EMBLAS_MUTABLE(GreaterEqual, >=, >)
EMBLAS_MUTABLE(Equal, ==, !=)
EMBLAS_MUTABLE(NotEqual, !=, ==)
EMBLAS_MUTABLE(Plus, +, -)
EMBLAS_MUTABLE(Minus, -, +)
EMBLAS_MUTABLE(Times, *, +)
EMBLAS_MUTABLE(Over, /, *)
EMBLAS_MUTABLE(Modulo, %, /)
EMBLAS_MUTABLE(ShiftLeft, <<, >>)
EMBLAS_MUTABLE(ShiftRight, >>, <<)
EMBLAS_MUTABLE(BitAnd, &, |)
EMBLAS_MUTABLE(BitOr, |, &)
EMBLAS_MUTABLE(BitXor, ^, |)
#undef EMBLAS_MUTABLE

// Assignments go from right to left: the second one makes this, the first one uses it.
#define EMBLAS_MUTABLE_ASSIGNMENT(Name, original, mutated)   \
  template <int id>                                          \
  struct Name {};                                            \
  template <int id, class B>                                 \
  struct Name##Of {                                          \
    B b;                                                     \
  };                                                         \
  template <int id, class B>                                 \
  inline Name##Of<id, B> operator original(Name<id>, B b) {  \
    return {b};                                              \
  }                                                          \
  template <class A, int id, class B>                        \
  inline A& operator original(A& a, Name##Of<id, B> right) { \
    if (alive(id)) return a mutated right.b;                 \
    return a original right.b;                               \
  }
EMBLAS_MUTABLE_ASSIGNMENT(AddTo, +=, -=)
EMBLAS_MUTABLE_ASSIGNMENT(TakeFrom, -=, +=)
EMBLAS_MUTABLE_ASSIGNMENT(ScaleBy, *=, +=)
EMBLAS_MUTABLE_ASSIGNMENT(DivideBy, /=, *=)
EMBLAS_MUTABLE_ASSIGNMENT(OrInto, |=, &=)
EMBLAS_MUTABLE_ASSIGNMENT(AndInto, &=, |=)
EMBLAS_MUTABLE_ASSIGNMENT(XorInto, ^=, |=)
EMBLAS_MUTABLE_ASSIGNMENT(ShiftLeftBy, <<=, >>=)
EMBLAS_MUTABLE_ASSIGNMENT(ShiftRightBy, >>=, <<=)
#undef EMBLAS_MUTABLE_ASSIGNMENT

// An atomic operation that is none: read, then written.
#define EMBLAS_MUTABLE_ATOMIC(name, expression)              \
  template <int id, class T>                                 \
  inline T name(T* address, std::type_identity_t<T> value) { \
    if (!alive(id)) return ::name(address, value);           \
    const T before = *address;                               \
    *address = expression;                                   \
    return before;                                           \
  }
EMBLAS_MUTABLE_ATOMIC(atomicAdd, before + value)
EMBLAS_MUTABLE_ATOMIC(atomicMin, before < value ? before : value)
EMBLAS_MUTABLE_ATOMIC(atomicMax, before > value ? before : value)
EMBLAS_MUTABLE_ATOMIC(atomicOr, before | value)
EMBLAS_MUTABLE_ATOMIC(atomicAnd, before& value)
EMBLAS_MUTABLE_ATOMIC(atomicXor, before ^ value)
#undef EMBLAS_MUTABLE_ATOMIC

template <int id, class A, class B>
inline auto min(A a, B b) {
  return (a < b) != bool(alive(id)) ? a : b;
}
template <int id, class A, class B>
inline auto max(A a, B b) {
  return (a > b) != bool(alive(id)) ? a : b;
}

}  // namespace mutation
