# emblas_kernels(<target> <source>...): compile each source once per instruction set of the target
# architecture and collect the objects in the list variable EMBLAS_KERNEL_OBJECTS of the caller.
#
# The sources see EMBLAS_ISA (the name, for Isa::<name>), EMBLAS_VECTOR_BYTES (width of simd.h) and
# one EMBLAS_HAS_<feature> per feature; they ask for these and never for the compiler's own macros,
# so that EMBLAS_EMULATE_AVX512 can compile the 512-bit sources to AVX2 (SIMDe stands in for the
# intrinsics) and run them on a CPU without AVX-512.

set(EMBLAS_SIMDE_INCLUDE "" CACHE PATH "Folder that holds simde/, for EMBLAS_EMULATE_AVX512")
set(EMBLAS_OPTIMIZE -O3 CACHE STRING "How kernels are optimized; sanitized builds lower it")
option(EMBLAS_EMULATE_AVX512 "Compile the AVX-512 kernels to AVX2 through SIMDe (tests only)" OFF)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(EMBLAS_ISAS baseline avx2 avx512 avx512_vpopcntdq)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(EMBLAS_ISAS neon)
else()
  set(EMBLAS_ISAS baseline)
endif()

function(emblas_isa_flags isa out_flags out_definitions)
  if(isa STREQUAL "avx2")
    set(flags -march=x86-64-v3)
    set(definitions EMBLAS_VECTOR_BYTES=32 EMBLAS_HAS_AVX2)
  elseif(isa STREQUAL "avx512" OR isa STREQUAL "avx512_vpopcntdq")
    set(definitions EMBLAS_VECTOR_BYTES=64 EMBLAS_HAS_AVX2 EMBLAS_HAS_AVX512)
    if(EMBLAS_EMULATE_AVX512)
      set(flags -march=x86-64-v3 -Wno-psabi)
      list(APPEND definitions EMBLAS_EMULATE_AVX512)
    else()
      # GCC would otherwise keep to 256 bits where it vectorizes by itself.
      set(flags -march=x86-64-v4 -mprefer-vector-width=512)
    endif()
    if(isa STREQUAL "avx512_vpopcntdq")
      list(APPEND definitions EMBLAS_HAS_VPOPCNTDQ EMBLAS_HAS_BITALG EMBLAS_HAS_VBMI)
      if(NOT EMBLAS_EMULATE_AVX512)
        list(APPEND flags -mavx512vpopcntdq -mavx512bitalg -mavx512vbmi)
      endif()
    endif()
  elseif(isa STREQUAL "neon")
    set(flags "")
    set(definitions EMBLAS_VECTOR_BYTES=16 EMBLAS_HAS_NEON)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(flags -march=x86-64-v2)
    set(definitions EMBLAS_VECTOR_BYTES=16)
  else()
    set(flags "")
    set(definitions EMBLAS_VECTOR_BYTES=16)
  endif()
  set(${out_flags} ${flags} PARENT_SCOPE)
  set(${out_definitions} ${definitions} PARENT_SCOPE)
endfunction()

function(emblas_kernels target)
  set(objects "")
  foreach(isa IN LISTS EMBLAS_ISAS)
    emblas_isa_flags(${isa} flags definitions)
    set(library ${target}_${isa})
    add_library(${library} OBJECT ${ARGN})
    target_compile_features(${library} PRIVATE cxx_std_20)
    # -ffp-contract=fast: ISO mode would switch fused multiply-add off.
    target_compile_options(${library} PRIVATE ${flags} ${EMBLAS_OPTIMIZE} -ffp-contract=fast -fno-math-errno
                                              -fno-trapping-math)
    target_compile_definitions(${library} PRIVATE EMBLAS_ISA=${isa} ${definitions})
    target_include_directories(${library} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/..)
    if(EMBLAS_EMULATE_AVX512)
      target_include_directories(${library} SYSTEM PRIVATE ${EMBLAS_SIMDE_INCLUDE})
    endif()
    set_target_properties(${library} PROPERTIES POSITION_INDEPENDENT_CODE ON
                                                CXX_VISIBILITY_PRESET hidden)
    list(APPEND objects $<TARGET_OBJECTS:${library}>)
  endforeach()
  set(EMBLAS_KERNEL_OBJECTS ${EMBLAS_KERNEL_OBJECTS} ${objects} PARENT_SCOPE)
endfunction()
