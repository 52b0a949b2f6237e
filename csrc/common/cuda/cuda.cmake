# The library _cuda: CUDA C++ kernels and their torch adapters, without Python symbols. It carries
# its CUDA runtime, so only the driver of the machine where it runs matters.

# Machine code for T4, A100 (and 86, 89), H100 and B200; machine code and PTX, for what comes, for
# RTX 50. What newer instructions are for is compiled for the architectures that have them only.
# Known before the language is enabled, which would choose an architecture by itself.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# aoti_torch_get_current_cuda_stream is torch's, in a library that only CUDA builds of torch have.
# An empty library of that name stands in while linking, so any torch will do to build beside.
file(WRITE ${CMAKE_BINARY_DIR}/empty.cpp "")
add_library(torch_cuda SHARED ${CMAKE_BINARY_DIR}/empty.cpp)

add_library(
  _cuda MODULE
  # One line per kernel family.
  csrc/attention/rotary_cuda.cu
  csrc/attention/rotary_ops_cuda.cpp
  csrc/attention/varlen_attention_backward_cuda.cu
  csrc/attention/varlen_attention_cuda.cu
  csrc/attention/varlen_attention_ops_cuda.cpp
  csrc/binary/asymmetric_cuda.cu
  csrc/binary/binary_ops_cuda.cpp
  csrc/binary/dense_cuda.cu
  csrc/binary/hadamard_rotate_cuda.cu
  csrc/binary/hamming_cuda.cu
  csrc/binary/maxsim_cuda.cu
  csrc/binary/maxsim_ops_cuda.cpp
  csrc/binary/merge_cuda.cu
  csrc/binary/pack_sign_cuda.cu
  csrc/binary/unpack_planes_cuda.cu
  csrc/pooling/attention_pool_cuda.cu
  csrc/pooling/attention_pool_ops_cuda.cpp
  csrc/pooling/finish_cuda.cu
  csrc/pooling/finish_ops_cuda.cpp
  csrc/pooling/lexical_cuda.cu
  csrc/pooling/pooling_ops_cuda.cpp
  csrc/pooling/segment_gem_cuda.cu
  csrc/pooling/segment_gradients_cuda.cu
  csrc/pooling/segment_max_cuda.cu
  csrc/pooling/segment_max_ops_cuda.cpp
  csrc/pooling/segment_modes_cuda.cu
  csrc/pooling/segment_pool_cuda.cu
  csrc/pooling/vocab_pool_cuda.cu
  csrc/pooling/vocab_pool_ops_cuda.cpp
  csrc/pooling/vocab_sum_cuda.cu
  csrc/pooling/vocab_sum_ops_cuda.cpp
  csrc/tables/quantized_bag_cuda.cu
  csrc/tables/quantized_ops_cuda.cpp
  csrc/tables/tables_ops_cuda.cpp
  csrc/tables/hash_bag_cuda.cu
  csrc/tables/codes_cuda.cu
  csrc/tables/codes_ops_cuda.cpp
  csrc/tables/compose_ops_cuda.cpp
  csrc/tables/compose_cuda.cu
  csrc/tables/compose_update_cuda.cu)
set(host_options -Xcompiler=-Wall,-Wextra,-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
target_compile_options(
  _cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;${host_options}>"
                $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
target_compile_definitions(_cuda PRIVATE USE_CUDA)
target_link_libraries(_cuda PRIVATE torch_stable -Wl,--no-as-needed torch_cuda)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(_cuda PROPERTIES PREFIX "" SKIP_BUILD_RPATH ON CUDA_VISIBILITY_PRESET hidden)
install(TARGETS _cuda LIBRARY DESTINATION emblas)
