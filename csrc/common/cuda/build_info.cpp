// Facts about the library _cuda, for Python through ctypes: it has no Python symbols of its own.

#define EXPORT extern "C" __attribute__((visibility("default")))

// Version of the CUDA toolkit that compiled the kernels, as in "13.0.88".
EXPORT const char* emblas_cuda_toolkit() { return EMBLAS_CUDA_TOOLKIT; }
// Architectures in CMake's notation, as in "80-real;90-real;120".
EXPORT const char* emblas_cuda_architectures() { return EMBLAS_CUDA_ARCHITECTURES; }
