#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "troupe/kernels/cpu/cpu_ops.hpp"
#include "troupe/kernels/cpu/fast_table.hpp"
#include "troupe/kernels/cpu/weight_arena.hpp"

namespace troupe::kernels::cpu {

/// The operation list with rounded activations. Weights that `place` has packed are multiplied by
/// the loops of a `fast_table`; all others, and all of them on machines without one, by those of
/// the exact list with activations that were rounded before.
class fast_ops final : public cpu_ops {
public:
  /// `fast` may be null.
  fast_ops(const kernel_table& kernels, const fast_table* fast, std::int32_t num_threads,
           std::atomic<std::uint64_t>* progress);

  element_type kv_type() const override { return element_type::bf16; }
  element_type exchange_type() const override { return element_type::bf16; }
  void export_rows(const rows_view& from, void* to) override;
  void import_rows(const void* from, const rows_view& to) override;
  weight_matrix place(const weight_matrix& weight, weight_use use) override;
  void linear(const rows_view& x, const weight_matrix& w, const rows_view& out) override;
  void linears(const rows_view& x, std::span<const linear_part> parts) override;
  void mlp(const rows_view& x, const expert_weights& w, const rows_view& gate, const rows_view& up,
           const rows_view& out) override;
  void linear_per_head(const rows_view& x, std::int32_t x_head_stride, const weight_matrix& w,
                       std::int32_t num_heads, const rows_view& out,
                       std::int32_t out_head_stride) override;
  void experts(const rows_view& x, std::span<const expert_task> tasks,
               std::span<const expert_weights> experts, const rows_view& out) override;
  void append_kv(const rows_view& latent, const rows_view& rope_key, const batch_view& batch,
                 const kv_layer_view& kv) override;
  void latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                        std::int32_t q_rope_head_stride, std::int32_t num_heads, float scale,
                        const batch_view& batch, const kv_layer_view& kv,
                        const rows_view& out) override;

private:
  /// All that `latent_attention` was called with.
  struct attention_call {
    const rows_view& q_latent;
    const rows_view& q_rope;
    std::int32_t q_rope_head_stride;
    std::int32_t num_heads;
    float scale;
    const batch_view& batch;
    const kv_layer_view& kv;
    const rows_view& out;
  };

  /// Neighbouring rows of one sequence.
  struct attention_tile {
    std::int32_t first;
    std::int32_t count;
    std::int32_t length; ///< positions that the last of them to end sees
  };

  /// How the product of one weight is cut into items.
  struct product_cut {
    fast_args args;
    std::int32_t unit;       ///< panels that stay together
    std::int32_t cuts;       ///< of the panels
    std::int32_t row_blocks; ///< of the rows
  };

  /// Rows of one expert times some of its panels.
  struct expert_item {
    std::int32_t expert;
    std::int32_t first_task;
    std::int32_t num_tasks;
    std::int32_t first_panel;
    std::int32_t last_panel;
  };

  /// Memory for rounded rows.
  struct row_memory {
    scratch<std::uint16_t> halves;
    scratch<std::int8_t> bytes;
    scratch<float> scales;
    scratch<std::int32_t> offsets;
  };

  struct thread_memory {
    scratch<unsigned char> multiply;
    scratch<float> tile;
    scratch<std::uint16_t> queries;
    scratch<float> parts;
    scratch<unsigned char> attention;
  };

  /// False if the weight has no packed form, or there is not that much memory.
  bool pack(const weight_matrix& weight, packed_weight& packed);
  /// Room for rounded rows.
  fast_rows take_rows(std::int32_t num_rows, const packed_weight& w, row_memory& memory);
  /// Rounds rows for products with `w`; row(m) says where each lies.
  template <class Row>
  fast_rows round_rows(std::int32_t num_rows, const packed_weight& w, row_memory& memory,
                       const Row& row);
  /// The values of x rounded for products with `w`, as float32: of every row, num_segments times
  /// w.num_cols elements that lie segment_stride apart.
  rows_view rounded(const rows_view& x, const weight_matrix& w, std::int32_t num_segments,
                    std::int32_t segment_stride);
  void multiply(std::span<const fast_args> products);
  void multiply(const product_cut& cut, std::int32_t item, std::int32_t thread);
  /// To bf16, as everywhere in this object.
  void round_halves(const float* x, std::int32_t count, std::uint16_t* out) const;
  void widen_halves(const std::uint16_t* x, std::int32_t count, float* out) const;
  /// Rounded so, as float32; out may be x.
  void round_floats(const float* x, std::int32_t count, float* out) const;
  /// `experts` without its rounding to exchange_type of what comes and goes.
  void run_experts(const rows_view& x, std::span<const expert_task> tasks,
                   std::span<const expert_weights> experts, const rows_view& out);
  void experts_one_by_one(const rows_view& x, std::span<const expert_task> tasks,
                          std::span<const expert_weights> experts, const rows_view& out);
  template <class Weight>
  void list_items(std::span<const expert_task> tasks, const Weight& weight);
  template <class Work>
  void run_items(Work&& work);
  unsigned char* multiply_scratch(std::int32_t thread);
  fast_attention_args attention_of(const attention_call& call, std::int32_t row,
                                   std::int32_t first_head);
  void pack_row(const attention_call& call, std::int32_t row, std::int32_t first_head,
                std::uint16_t* out);
  void attend_by_tile(const attention_call& call);
  void attend_together(const attention_call& call);
  void attend_emulated(const attention_call& call);

  const fast_table* fast_;
  weight_arena arena_;
  std::deque<packed_weight> packed_; // addresses stay
  std::vector<thread_memory> memory_;
  std::vector<expert_item> items_;
  std::vector<attention_tile> tiles_;
  std::vector<product_cut> cuts_;
  std::vector<expert_task> own_tasks_; // of `mlp`
  scratch<std::int32_t> head_rows_;
  scratch<std::uint16_t> queries_;
  scratch<float> scores_;
  scratch<float> parts_;
  row_memory input_;
  row_memory inner_;
  scratch<float> rounded_;
  scratch<float> gathered_;
  scratch<float> exchanged_;
  scratch<float> gates_;
  scratch<float> ups_;
  scratch<std::int32_t> task_rows_;
};

} // namespace troupe::kernels::cpu
