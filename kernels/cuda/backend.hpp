#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "troupe/kernels/cuda/context.hpp"
#include "troupe/kernels/cuda/cuda_ops.hpp"
#include "troupe/kernels/cuda/kernels.hpp"
#include "troupe/kernels/cuda/linear_exact.hpp"
#include "troupe/kernels/cuda/recording.hpp"
#include "troupe/kernels/cuda/summing_group.hpp"

namespace troupe::kernels::cuda {

/// What `place` leaves on the device of a weight. `weight_matrix::packed` points to it.
struct placed_weight {
  packed_matrix packed;
  exact_weight exact; ///< instead, with exact numerics
  std::shared_ptr<void> data;
  std::shared_ptr<void> scales;
  std::shared_ptr<void> zeros;
};

/// See gpu_ops. Lives in the process that computes; weights and pages are in memory of its own.
class cuda_ops final : public gpu_ops {
public:
  cuda_ops(std::int32_t device, std::atomic<std::uint64_t>* progress,
           std::shared_ptr<weight_memory> weights, std::shared_ptr<summing_group> group,
           std::int32_t rank, numerics mode);
  ~cuda_ops() override;

  const char* description() const override { return description_.c_str(); }
  element_type activation_type() const override {
    return is_exact() ? element_type::f32 : element_type::bf16;
  }
  std::shared_ptr<void> allocate(std::size_t bytes) override;
  weight_matrix place(const weight_matrix& weight, weight_use use) override;
  weight_reading reads_of_weights() const override {
    return weights_are_there_ ? weight_reading::shapes : weight_reading::recipes;
  }
  void copy_to_host(const rows_view& from, void* to) override;
  void copy_from_host(const void* from, const rows_view& to) override;
  void embed(const weight_matrix& table, std::span<const std::int32_t> ids,
             const rows_view& out) override;
  void rms_norm(const rows_view& x, const float* weight, float epsilon,
                const rows_view& out) override;
  void linear(const rows_view& x, const weight_matrix& w, const rows_view& out) override;
  void logits(const rows_view& x, const weight_matrix& w, const rows_view& out) override;
  void linears(const rows_view& x, std::span<const linear_part> parts) override;
  void mlp(const rows_view& x, const expert_weights& w, const rows_view& gate, const rows_view& up,
           const rows_view& out) override;
  void linear_per_head(const rows_view& x, std::int32_t x_head_stride, const weight_matrix& w,
                       std::int32_t num_heads, const rows_view& out,
                       std::int32_t out_head_stride) override;
  void rope(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
            std::int32_t offset, std::int32_t rope_dim, std::span<const std::int32_t> positions,
            const float* inv_freq, float magnitude) override;
  void append_kv(const rows_view& latent, const rows_view& rope_key, const batch_view& batch,
                 const kv_layer_view& kv) override;
  void latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                        std::int32_t q_rope_head_stride, std::int32_t num_heads, float scale,
                        const batch_view& batch, const kv_layer_view& kv,
                        const rows_view& out) override;
  void rope_halves(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                   std::int32_t offset, std::int32_t rope_dim,
                   std::span<const std::int32_t> positions, const float* inv_freq,
                   float magnitude) override;
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
  void add_rms_norm(const rows_view& x, const rows_view& delta, const float* weight, float epsilon,
                    const rows_view& out) override;
  void add_bias(const rows_view& x, const float* bias) override;
  void route(const rows_view& x, const weight_matrix& w, const float* bias,
             const router_params& params, std::span<std::int32_t> experts,
             std::span<float> weights) override;
  void experts(const rows_view& x, std::span<const expert_task> tasks,
               std::span<const expert_weights> experts, const rows_view& out) override;
  void combine(const rows_view& expert_out, std::span<const std::int32_t> expert_rows,
               std::span<const float> weights, std::int32_t top_k, const rows_view& shared,
               const rows_view& out) override;
  bool mixture(const rows_view& x, const mixture_weights& w, const router_params& params,
               const mixture_scratch& scratch, const rows_view& out) override;
  void know_experts(std::span<const expert_weights> experts) override;
  void step(const step_key& key, std::span<const std::int32_t> ids, const batch_view& batch,
            const std::function<void()>& work) override;
  bool record_only(bool on) override {
    records_only_ = on && records_steps_;
    return records_steps_;
  }
  void sample(const rows_view& logits, std::span<const sampling_params> params,
              std::span<sampled_token> out) override;
  bool all_finite(const rows_view& x) override;

  void synchronise() override;
  const std::atomic<std::uint64_t>& current_wait() const override { return gpu_.current_wait(); }
  std::chrono::nanoseconds take_longest_wait() override { return gpu_.take_longest_wait(); }
  const std::string& failure() const override { return gpu_.failure(); }
  void break_down(breakdown how) override;
  device_memory memory() const override;
  bool has_run_out() const override { return gpu_.has_run_out(); }
  void* stream() const override { return stream_; }
  std::uint64_t num_repeated_steps() const override { return steps_.num_repeated(); }
  void leave_rows(const rows_view& from, std::uint64_t oldest, void* block,
                  std::size_t offset) override;
  fetched_rows fetch_rows(const void* block, std::size_t offset, std::uint64_t ticket,
                          const rows_view& to) override;

private:
  struct readable_rows {
    const bf16* data;
    std::int64_t stride;
    std::int64_t group_stride;
  };

  bool is_exact() const { return mode_ == numerics::exact; }

  /// Calls use.template operator()<T>() with the type of the elements of activations.
  template <class Use>
  void with_elements(const Use& use) {
    if (is_exact()) {
      use.template operator()<float>();
    } else {
      use.template operator()<bf16>();
    }
  }

  /// Counts, makes the device current and says whether there is anything to do.
  bool begin(std::int32_t num_rows = 1);
  /// The same for what waits for the device, which a recorded step cannot.
  bool begin_waiting(std::int32_t num_rows = 1);
  void launched(const char* what);
  /// Takes over that the group has failed, or tells it that this GPU has.
  void check_group();
  void tick() { progress_->fetch_add(1, std::memory_order_relaxed); }

  std::shared_ptr<void> take_weight(std::size_t bytes);
  std::shared_ptr<void> upload_weight(const void* from, std::size_t bytes);
  std::shared_ptr<void> place_scales(const weight_matrix& weight);
  void stage(const weight_matrix& weight, const weight_matrix& on_device,
             const std::function<void(weight_matrix rows, std::int32_t first)>& use);
  std::int32_t* next_note();
  std::int32_t known_note(const std::int32_t* note) const;
  bool pack(const weight_matrix& weight, const weight_matrix& on_device, const packed_matrix& to,
            std::int32_t* note);
  void choose_packing(const weight_matrix& weight, packed_matrix& to) const;
  weight_matrix place_rows(const weight_matrix& weight, const weight_matrix& on_device);
  weight_matrix place_exact(const weight_matrix& weight, const weight_matrix& on_device,
                            weight_use use, std::unique_ptr<placed_weight> placed);
  const packed_matrix& packed(const weight_matrix& w) const;
  const exact_weight& exact(const weight_matrix& w) const;
  device_batch upload_batch(const batch_view& batch);
  /// Rows as product kernels read them: whole chunks, on borders of 16 bytes.
  readable_rows make_readable(const rows_view& x, std::int32_t num_groups,
                              std::int32_t group_stride, const packed_matrix& w);
  bool pack_rows(const rows_of_bf16& x, std::span<const std::int32_t> slots, std::int32_t num_jobs,
                 std::int64_t x_step, std::int32_t num_cols, linear_args& args);
  void multiply(const linear_args& args);
  void multiply_rows(const rows_view& x, std::int32_t x_step, const weight_matrix& w,
                     std::int32_t num_jobs, const rows_view& out, std::int32_t out_step,
                     bool float_out);
  /// Neighbouring tasks of one expert.
  struct expert_run {
    std::int32_t expert = 0;
    std::int32_t first_task = 0;
    std::int32_t num_tasks = 0;
    std::int32_t first_group = -1; ///< of packed rows; -1: not packed
  };
  struct queued_job {
    linear_job job;
    const packed_matrix* w;
  };
  void find_runs(std::span<const expert_task> tasks);
  void queue_runs(std::span<const expert_weights> experts, weight_matrix expert_weights::*part,
                  const readable_rows& x, const std::int32_t* task_rows, bf16* out,
                  std::int64_t out_stride);
  void multiply_runs(linear_args args);

  // The same with exact numerics.
  void multiply_exact(const rows_view& x, std::int32_t x_step, const weight_matrix& w,
                      std::int32_t num_jobs, const rows_view& out, std::int32_t out_step);
  void queue_exact_runs(std::span<const expert_weights> experts,
                        weight_matrix expert_weights::*part, const rows_view& x,
                        const std::int32_t* task_rows, const rows_view& out);
  void multiply_exact_runs(exact_args args);
  void compute_experts_exactly(const rows_view& x, std::span<const expert_task> tasks,
                               std::span<const expert_weights> experts, const rows_view& out);
  bool mix_exactly(const rows_view& x, const mixture_weights& w, const router_params& params,
                   const mixture_scratch& scratch, const rows_view& out);

  /// The experts of a layer for launch_plan_mixture or, with exact numerics, for exact_args.
  struct expert_table {
    std::vector<std::array<const void*, 3>> experts; ///< gate, up, down as `place` returned them
    std::shared_ptr<void> memory;      ///< expert_parts, or exact_weights; null: shapes differ
    packed_matrix gate, down;          ///< shapes
    exact_weight exact_in, exact_down; ///< likewise; gate and up are alike
  };
  const expert_table* find_experts(std::span<const expert_weights> experts);
  bool make_table(std::span<const expert_weights> experts, expert_table& table);
  bool make_exact_table(std::span<const expert_weights> experts, expert_table& table);
  bool upload_table(const void* parts, std::size_t bytes, expert_table& table);

  numerics mode_;
  std::shared_ptr<summing_group> group_; ///< null: computes alone
  std::int32_t rank_;
  context gpu_;
  cudaStream_t stream_;
  std::atomic<std::uint64_t> unwatched_{0};
  std::atomic<std::uint64_t>* progress_;
  std::string description_;
  device_pool pool_;
  device_pool weight_pool_;
  upload_ring ring_;
  download_buffer download_;
  mirrored_array ids_, positions_, sequences_, tables_, offsets_;
  scratch staging_, padded_, packed_rows_, router_logits_, results_, gates_, ups_, allowed_;
  scratch mixture_lists_, mixed_gates_, mixed_ups_;
  std::vector<std::unique_ptr<expert_table>> expert_tables_;
  std::shared_ptr<void> flag_;     ///< one number
  std::shared_ptr<void> counters_; ///< of mixture_router
  std::vector<std::unique_ptr<placed_weight>> weights_;
  bool is_alone_ = false;  ///< it rehearses
  bool weights_are_there_; ///< a predecessor has placed them
  std::shared_ptr<void>
    notes_; ///< of the device: for each product weight, what a successor has to know of it
  std::vector<std::int32_t> known_notes_; ///< those of a predecessor
  std::size_t num_products_ = 0;
  std::vector<expert_run> runs_;
  std::vector<queued_job> queue_;
  std::vector<linear_job> jobs_;
  std::vector<exact_job> exact_queue_;
  std::vector<std::int32_t> task_rows_, slots_, task_slots_;
  std::vector<device_sampling> sampling_;
  std::vector<std::int32_t> banned_;
  recorded_steps steps_;
  bool records_steps_;
  bool records_only_ = false;
};

} // namespace troupe::kernels::cuda
