#include "timing.hpp"

#include <dlfcn.h>

#include <cublasLt.h>

/// cuBLASLt as a ruler. It is opened when it is asked for, so that nothing of ours needs it.
namespace gpu_bench {

namespace {

struct cublas {
  void* handle = nullptr;

  template <class Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle, name));
  }
};

} // namespace

double library_rate(gpu_ops& ops, std::int64_t m, std::int64_t n, std::int64_t k) {
  cublas library;
  for (const char* name : {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13"}) {
    if (library.handle == nullptr) {
      library.handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
  }
  if (library.handle == nullptr) {
    return 0.0;
  }
  const auto create = library.find<decltype(cublasLtCreate)>("cublasLtCreate");
  const auto describe =
    library.find<decltype(cublasLtMatmulDescCreate)>("cublasLtMatmulDescCreate");
  const auto set =
    library.find<decltype(cublasLtMatmulDescSetAttribute)>("cublasLtMatmulDescSetAttribute");
  const auto lay_out =
    library.find<decltype(cublasLtMatrixLayoutCreate)>("cublasLtMatrixLayoutCreate");
  const auto prefer =
    library.find<decltype(cublasLtMatmulPreferenceCreate)>("cublasLtMatmulPreferenceCreate");
  const auto set_preference = library.find<decltype(cublasLtMatmulPreferenceSetAttribute)>(
    "cublasLtMatmulPreferenceSetAttribute");
  const auto search =
    library.find<decltype(cublasLtMatmulAlgoGetHeuristic)>("cublasLtMatmulAlgoGetHeuristic");
  const auto multiply = library.find<decltype(cublasLtMatmul)>("cublasLtMatmul");
  if (create == nullptr || describe == nullptr || set == nullptr || lay_out == nullptr
      || prefer == nullptr || set_preference == nullptr || search == nullptr
      || multiply == nullptr) {
    return 0.0;
  }

  // Column-major: out^T [n, m] = w [n, k] . x^T [k, m].
  static cublasLtHandle_t handle = nullptr;
  if (handle == nullptr && create(&handle) != CUBLAS_STATUS_SUCCESS) {
    return 0.0;
  }
  constexpr std::size_t kWorkspace = std::size_t{64} << 20;
  const auto w = random_rows(ops, static_cast<std::size_t>(n) * k);
  const auto x = random_rows(ops, static_cast<std::size_t>(m) * k);
  const auto out = ops.allocate(static_cast<std::size_t>(m) * n * 2);
  const auto workspace = ops.allocate(kWorkspace);
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t w_layout = nullptr;
  cublasLtMatrixLayout_t x_layout = nullptr;
  cublasLtMatrixLayout_t out_layout = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  describe(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  set(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed));
  lay_out(&w_layout, CUDA_R_16BF, k, n, k);
  lay_out(&x_layout, CUDA_R_16BF, k, m, k);
  lay_out(&out_layout, CUDA_R_16BF, n, m, n);
  prefer(&preference);
  set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace,
                 sizeof(kWorkspace));
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  search(handle, product, w_layout, x_layout, out_layout, out_layout, preference, 1, &best, &found);
  if (found == 0) {
    return 0.0;
  }
  const float one = 1.0F;
  const float zero = 0.0F;
  const double time = time_graph(ops, 4, [&](int) {
    multiply(handle, product, &one, w.get(), w_layout, x.get(), x_layout, &zero, out.get(),
             out_layout, out.get(), out_layout, &best.algo, workspace.get(), kWorkspace,
             static_cast<cudaStream_t>(ops.stream()));
  });
  return 2.0 * m * n * k / time * 1e6;
}

} // namespace gpu_bench
