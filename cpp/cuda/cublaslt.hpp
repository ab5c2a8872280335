// SPDX-License-Identifier: MIT
// L1: what we use of cuBLASLt, found at run time: a build needs neither its header nor the library, and without it the engine's
// own products serve. Values and structures are those of cublasLt.h and cublas_api.h, which do not change between versions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chainrule {
namespace cuda {
namespace lt {

constexpr int kReal32 = 0, kReal64 = 1, kBfloat16 = 14;                           // cudaDataType
constexpr int kCompute32 = 68, kComputeTf32 = 77, kCompute64 = 70;                // cublasComputeType_t
constexpr int kNotSupported = 15;                                                 // cublasStatus_t
constexpr std::int32_t kPlain = 0, kTransposed = 1;                               // cublasOperation_t
constexpr int kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8;  // cublasLtMatmulDescAttributes_t
constexpr std::uint32_t kNoEpilogue = 1, kBias = 4;                               // cublasLtEpilogue_t
constexpr int kWorkspaceBytes = 1, kReductionSchemes = 3,
              kAlignments[] = {5, 6, 7, 8};  // cublasLtMatmulPreferenceAttributes_t

struct Algorithm {
    std::uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    std::size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

struct Functions {
    int (*Create)(void** handle);
    int (*Destroy)(void* handle);
    int (*Matmul)(void* handle, void* product, const void* alpha, const void* a, void* a_layout, const void* b,
                  void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                  const Algorithm* algorithm, void* workspace, std::size_t bytes, void* stream);
    int (*MatmulDescCreate)(void** product, int compute, int scale);
    int (*MatmulDescDestroy)(void* product);
    int (*MatmulDescSetAttribute)(void* product, int attribute, const void* value, std::size_t size);
    int (*MatrixLayoutCreate)(void** layout, int type, std::uint64_t rows, std::uint64_t cols, std::int64_t ld);
    int (*MatrixLayoutDestroy)(void* layout);
    int (*MatmulPreferenceCreate)(void** preference);
    int (*MatmulPreferenceDestroy)(void* preference);
    int (*MatmulPreferenceSetAttribute)(void* preference, int attribute, const void* value, std::size_t size);
    int (*MatmulAlgoGetHeuristic)(void* handle, void* product, void* a, void* b, void* c, void* d, void* preference,
                                  int wanted, Heuristic* found, int* count);
};

// All of them, or null where the library is not there.
const Functions* functions();

}  // namespace lt
}  // namespace cuda
}  // namespace chainrule
