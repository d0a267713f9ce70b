#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/context.hpp"
#include "troupe/kernels/ops.hpp"

namespace troupe::kernels::cuda {

/// Steps as CUDA graphs (CUDA programming guide, "Creating a graph using stream capture"). A step
/// is computed as it stands when it is met first, so that scratch memory gets its size; recorded
/// when it is met again; repeated from then on, with one call of the driver. Addresses are
/// recorded with it: when scratch memory has moved since, it is recorded anew. A step that
/// cannot be recorded is computed as it stands for good, with a warning.
class recorded_steps {
public:
  explicit recorded_steps(context& gpu) : gpu_(gpu) {}
  ~recorded_steps();
  recorded_steps(const recorded_steps&) = delete;
  recorded_steps& operator=(const recorded_steps&) = delete;

  /// What ids and batch hold has to be in device memory already.
  void compute(const step_key& key, const std::function<void()>& work);

  /// Records a step that was not recorded yet, and computes nothing.
  void prepare(const step_key& key, const std::function<void()>& work);

  /// How many steps were repeated without calling `work`.
  std::uint64_t num_repeated() const { return num_repeated_; }

private:
  struct entry {
    step_key key;
    cudaGraphExec_t graph = nullptr; ///< null: not recorded
    std::uint64_t generation = 0;    ///< in which it was recorded
    std::uint64_t last_use = 0;
    bool cannot_be_recorded = false;
  };

  entry* find(const step_key& key);
  entry& add(const step_key& key);
  void drop_graph(entry& one);
  bool record(entry& one, const std::function<void()>& work);

  context& gpu_;
  std::vector<entry> entries_;
  std::uint64_t num_uses_ = 0;
  std::uint64_t num_repeated_ = 0;
  bool has_warned_ = false;
};

} // namespace troupe::kernels::cuda
