#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "troupe/kernels/cpu/kernel_table.hpp"
#include "troupe/kernels/cpu/sampler.hpp"
#include "troupe/kernels/cpu/scratch.hpp"
#include "troupe/kernels/cpu/thread_pool.hpp"
#include "troupe/kernels/ops.hpp"

namespace troupe::kernels::cpu {

/// The operation list on the CPU: splits each operation into chunks of rows or columns
/// for the threads and leaves the arithmetic to a `kernel_table`. Used by one
/// thread at a time; memory is kept between calls.
class cpu_ops : public ops {
public:
  cpu_ops(const kernel_table& kernels, std::int32_t num_threads,
          std::atomic<std::uint64_t>* progress = nullptr);

  /// Makes it one of several that compute the same rows; before its first operation.
  void join(std::shared_ptr<cpu_rank_group> group, std::int32_t rank);

  const char* description() const override { return description_.c_str(); }
  const std::string& failure() const override { return failure_; }
  void break_down(breakdown) override { failure_ = "a drill broke the device"; }
  void keep_on_cores(std::int32_t place) override { pool_.keep_on_cores(place); }
  element_type activation_type() const override { return element_type::f32; }
  std::shared_ptr<void> allocate(std::size_t bytes) override;
  weight_matrix place(const weight_matrix& weight, weight_use use) override;
  void copy_to_host(const rows_view& from, void* to) override;
  void copy_from_host(const void* from, const rows_view& to) override;

  void embed(const weight_matrix& table, std::span<const std::int32_t> ids,
             const rows_view& out) override;
  void rms_norm(const rows_view& x, const float* weight, float epsilon,
                const rows_view& out) override;
  void linear(const rows_view& x, const weight_matrix& w, const rows_view& out) override;
  void linear_per_head(const rows_view& x, std::int32_t x_head_stride, const weight_matrix& w,
                       std::int32_t num_heads, const rows_view& out,
                       std::int32_t out_head_stride) override;
  void rope(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
            std::int32_t offset, std::int32_t rope_dim, std::span<const std::int32_t> positions,
            const float* inv_freq, float magnitude) override;
  void rope_halves(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                   std::int32_t offset, std::int32_t rope_dim,
                   std::span<const std::int32_t> positions, const float* inv_freq,
                   float magnitude) override;
  void append_kv(const rows_view& latent, const rows_view& rope_key, const batch_view& batch,
                 const kv_layer_view& kv) override;
  void latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                        std::int32_t q_rope_head_stride, std::int32_t num_heads, float scale,
                        const batch_view& batch, const kv_layer_view& kv,
                        const rows_view& out) override;
  void append_grouped_kv(const rows_view& keys, const rows_view& values, const batch_view& batch,
                         const grouped_kv_view& kv) override;
  void grouped_attention(const rows_view& q, std::int32_t num_heads, float scale,
                         const batch_view& batch, const grouped_kv_view& kv,
                         const rows_view& out) override;
  void clear(const rows_view& x) override;
  void all_reduce(const rows_view& x) override;
  void rehearse(bool alone) override { is_alone_ = alone; }
  void swiglu(const rows_view& gate, const rows_view& up, const rows_view& out) override;
  void add(const rows_view& x, const rows_view& delta) override;
  void add_bias(const rows_view& x, const float* bias) override;
  void route(const rows_view& x, const weight_matrix& w, const float* bias,
             const router_params& params, std::span<std::int32_t> experts,
             std::span<float> weights) override;
  void experts(const rows_view& x, std::span<const expert_task> tasks,
               std::span<const expert_weights> experts, const rows_view& out) override;
  void combine(const rows_view& expert_out, std::span<const std::int32_t> expert_rows,
               std::span<const float> weights, std::int32_t top_k, const rows_view& shared,
               const rows_view& out) override;
  void sample(const rows_view& logits, std::span<const sampling_params> params,
              std::span<sampled_token> out) override;
  bool all_finite(const rows_view& x) override;

protected:
  template <class Work>
  void for_rows(std::int32_t num_rows, std::int64_t work_a_row, Work&& work);
  std::int32_t num_chunks(std::int64_t work, std::int32_t most) const;
  void tick() { progress_->fetch_add(1, std::memory_order_relaxed); }
  thread_pool& pool() { return pool_; }
  const kernel_table& kernels() const { return kernels_; }
  std::atomic<std::uint64_t>* progress() { return progress_; }
  void add_to_description(const char* text) { description_ += text; }

  /// Rounds a weight to narrowed_shape: codes [rows, cols], scales [rows, groups].
  void narrow(const weight_matrix& weight, std::int8_t* codes, float* scales);

  /// Products between two ticks: a millisecond of fast code, some ten of slow, and so few
  /// bytes of weights that they come from a disk in time.
  static constexpr std::int64_t kWorkOfTick = 1 << 23;

private:
  /// Memory that belongs to one thread of the pool.
  struct thread_memory {
    scratch<float> linear;
    scratch<float> attention;
    scratch<float> router;
    sampler tokens;
  };

  /// Neighbouring tasks of one expert.
  struct expert_run {
    std::int32_t expert;
    std::int32_t first;
    std::int32_t count;
  };

  /// Rows whose ends can be read up to a whole vector: x itself where its width allows.
  struct readable_rows {
    const float* data;
    std::int64_t stride;
  };

  /// Fills `rotations_` for these angles, unless it holds them already.
  void find_rotations(std::span<const std::int32_t> positions, const float* inv_freq,
                      std::int32_t num_pairs, float magnitude);
  readable_rows make_readable(const rows_view& x, std::int32_t num_cols);
  void multiply(const linear_args& args);
  /// The columns first..last-1 of all rows, on one thread.
  void multiply(linear_args args, std::int32_t first, std::int32_t last, std::int32_t thread);
  float* linear_scratch(std::int32_t thread);
  void tick_at_row(std::int32_t row);

  const kernel_table& kernels_;
  std::string description_;
  std::string failure_;
  std::atomic<std::uint64_t> unwatched_{0};
  std::atomic<std::uint64_t>* progress_;
  std::shared_ptr<cpu_rank_group> group_; ///< null: alone
  std::int32_t rank_ = 0;
  bool is_alone_ = false; ///< it rehearses
  thread_pool pool_;
  std::vector<thread_memory> memory_;           // [threads]
  std::vector<std::shared_ptr<void>> narrowed_; ///< weights, and scales behind them
  scratch<float> padded_input_;
  scratch<float> logits_;
  scratch<float> gates_;
  scratch<float> ups_;
  scratch<std::int32_t> task_rows_;
  scratch<expert_run> runs_;

  // Cosines and sines of the last positions: all layers of a micro-batch have the same.
  scratch<float> rotations_; // [rows][2][2 * pairs]
  std::vector<std::int32_t> rotated_positions_;
  std::vector<float> rotated_frequencies_;
  float rotated_magnitude_ = 0.0F;
};

/// Calls work(row, thread) for all rows.
template <class Work>
void cpu_ops::for_rows(std::int32_t num_rows, std::int64_t work_a_row, Work&& work) {
  const std::int64_t chunks = num_chunks(num_rows * work_a_row, num_rows);
  pool_.run(static_cast<std::int32_t>(chunks), [&](std::int32_t chunk, std::int32_t thread) {
    const auto last = static_cast<std::int32_t>(num_rows * (chunk + 1) / chunks);
    std::int64_t done = 0;
    for (auto m = static_cast<std::int32_t>(num_rows * chunk / chunks); m < last; ++m) {
      work(m, thread);
      if ((done += work_a_row) >= kWorkOfTick) {
        tick();
        done = 0;
      }
    }
    tick();
  });
}

} // namespace troupe::kernels::cpu
