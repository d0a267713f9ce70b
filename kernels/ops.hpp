#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

/// The one list of operations that a back end implements. A model is written
/// in terms of these and of nothing else, so a new device is a new
/// implementation of `ops` and no change anywhere above it.
///
/// Every operation is batch-invariant: what it computes for a row does not
/// depend on the other rows of the call, on their number or order, nor on
/// the number of threads (design P2). Sums run in a fixed order.
namespace troupe::kernels {

enum class element_type : std::uint8_t { f32, bf16, f16, f8_e4m3, i8, i4 };

/// Bytes of one element; 1 for i4, of which two share a byte.
std::size_t size_of(element_type type);

/// Bytes of a row of a weight. Rows of i4 begin with a byte of their own.
std::size_t row_bytes(element_type type, std::int32_t num_cols);

/// How the elements of a made-up weight come about (made_weight.hpp).
struct weight_recipe;

/// A weight as the checkpoint stores it: row-major [num_rows (out), num_cols (in)].
/// The element (r, c) stands for `data[r, c] * scales[r / block_rows, c / block_cols]`,
/// or for `data[r, c]` where there are no scales. Weights of type i8 are signed bytes; scaled by
/// channel they have block_rows 1 and block_cols num_cols, scaled by group block_cols of the group.
/// Weights of type i4 are unsigned, the even column in the low half of a byte, and stand for
/// `(data[r, c] - zeros[r / block_rows, c / block_cols]) * scales[...]`; without zeros for 8.
struct weight_matrix {
  const void* data = nullptr;
  element_type type = element_type::f32;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  const float* scales = nullptr; ///< [ceil(num_rows / block_rows), ceil(num_cols / block_cols)]
  std::int32_t block_rows = 128;
  std::int32_t block_cols = 128;
  const std::uint8_t* zeros = nullptr; ///< i4 only: as many as scales
  const void* packed = nullptr;        ///< what `ops::place` made of it, for that object alone
  /// Instead of data and scales, for a `place` that reads it: how to make them. Blocks do not reach
  /// across those of the recipe.
  const weight_recipe* recipe = nullptr;
};

/// How a device rounds activations. `exact` keeps them, and keys and values, in float32 and expands
/// weights to float32. `fast` on the CPU rounds them before a product to bf16 or, where weights are
/// i8, to 8 bit by group, rounds what experts read and give to bf16, and keeps latent keys in bf16;
/// on a GPU everything is bf16 between two operations, and products are computed by its matrix
/// unit. Sums are in float32 (within a group of 8 bit: exact) in any case.
enum class numerics : std::uint8_t { exact, fast };

/// What a weight is for.
enum class weight_use : std::uint8_t {
  product, ///< linear, linear_per_head, experts: may be packed for speed
  /// The same of a model whose weights are i8, where this one is wider: fast numerics may round
  /// it to 8 bit, by row and group of 128.
  narrow_product,
  /// The same, kept in 8 bit: what is wider and has no scales is rounded to it, by row and group of
  /// 128 columns (narrow_weight.hpp).
  int8_product,
  stored, ///< embed, route, vectors: used as it is
};

/// What `ops::place` reads of a weight.
enum class weight_reading : std::uint8_t {
  elements, ///< its elements and scales
  recipes,  ///< the same, or its recipe where it has one
  shapes,   ///< its type and shape alone: a predecessor has placed what is to be placed
};

/// Rows of activations in device memory, elements of `ops::activation_type()`.
struct rows_view {
  void* data = nullptr;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  std::int32_t stride = 0; ///< elements from one row to the next, >= num_cols
};

/// Where each row of a micro-batch stands: its sequence and its position
/// in it. Arrays are in host memory and live as long as the call.
struct batch_view {
  std::span<const std::int32_t> positions;    ///< [rows] absolute position, from 0
  std::span<const std::int32_t> sequences;    ///< [rows] index into block_table_offsets
  std::span<const std::int32_t> block_tables; ///< page indices of all sequences, concatenated
  std::span<const std::int32_t> block_table_offsets; ///< [sequences] first entry in block_tables
};

/// The latent KV pages of one layer: [num_pages, page_tokens, latent_dim + rope_dim],
/// the normalised latent first and the rotated shared key behind it.
struct kv_layer_view {
  void* data = nullptr; ///< elements of `ops::kv_type()`
  std::int32_t num_pages = 0;
  std::int32_t page_tokens = 0;
  std::int32_t latent_dim = 0;
  std::int32_t rope_dim = 0;
};

/// The KV pages of one layer of grouped-query attention: [num_pages, page_tokens, 2, num_kv_heads,
/// head_dim], the rotated keys of all heads first and the values behind them.
struct grouped_kv_view {
  void* data = nullptr; ///< elements of `ops::activation_type()`
  std::int32_t num_pages = 0;
  std::int32_t page_tokens = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
};

/// How a router makes scores of logits.
enum class router_score : std::uint8_t { sigmoid, softmax };

/// What a group of experts is ranked by: the sum of its two best (biased) scores, or its best.
enum class group_rank : std::uint8_t { best_two, best };

/// A router that picks experts of the best groups: DeepSeek-V3's `noaux_tc` as the members
/// stand, DeepSeek-V2's `group_limited_greedy` with softmax and the best score, its `greedy`
/// with a single group. See src/model/stage_model.hpp.
struct router_params {
  std::int32_t num_experts = 0;
  std::int32_t num_groups = 1;
  std::int32_t num_groups_kept = 1;
  std::int32_t top_k = 1;
  float scaling_factor = 1.0F;
  bool normalise = true; ///< weights are divided by their sum, before the scaling factor
  router_score score = router_score::sigmoid;
  group_rank rank = group_rank::best_two;
};

/// One expert of a MoE layer: SwiGLU, down(silu(gate(x)) * up(x)).
struct expert_weights {
  weight_matrix gate, up, down;
};

/// One of several products of the same rows.
struct linear_part {
  weight_matrix w;
  rows_view out;
};

/// A row that one expert has to compute.
struct expert_task {
  std::int32_t row;    ///< row of the input
  std::int32_t expert; ///< index into the span of experts given to `experts`
};

/// A mixture of experts that are all on this device.
struct mixture_weights {
  weight_matrix router;        ///< [experts, hidden], stored
  const float* bias = nullptr; ///< [experts]; null where the router has none
  std::span<const expert_weights> experts;
  const expert_weights* shared = nullptr; ///< which every row has beside its own; null: none
};

/// Room for a mixture of experts, of any contents before and after.
struct mixture_scratch {
  rows_view gate, up;   ///< [rows, shared->gate.num_rows]; unused without shared expert
  rows_view shared_out; ///< [rows, hidden]; likewise
  rows_view expert_out; ///< [rows * top_k, hidden]
};

/// Which step `ops::step` is asked to compute. Steps of one key queue the same operations with the
/// same arguments, the contents of their ids and of their batch aside.
struct step_key {
  std::uint64_t what = 0; ///< a number of its own for everything that decides but the rows
  std::int32_t num_rows = 0;
};

/// How one row of logits becomes a token.
struct sampling_params {
  float temperature = 0.0F; ///< 0 takes the most likely token
  std::int32_t top_k = 0;   ///< 0: no limit
  float top_p = 1.0F;
  float min_p = 0.0F;
  std::uint64_t seed = 0;
  std::uint32_t position = 0;    ///< with the seed, the key of the counter-based generator
  std::int32_t num_logprobs = 0; ///< how many of the best tokens to report, 0 to kMaxLogprobs
  std::int32_t target = -1;      ///< >= 0: draw nothing, report this token's log-probability
  std::span<const std::int32_t> banned; ///< never drawn (end of text under min_tokens)
};

inline constexpr std::int32_t kMaxLogprobs = 20;

/// What came of one row of logits. Log-probabilities are natural logarithms
/// of softmax(logits), before temperature and filters.
struct sampled_token {
  std::int32_t token = 0;
  float logprob = 0.0F;
  std::int32_t num_top = 0;
  std::int32_t top_tokens[kMaxLogprobs];
  float top_logprobs[kMaxLogprobs]; ///< descending; ties by lower token id
};

/// What a drill may do to a device: an access to memory that is not there, one to an address that
/// does not fit its size, an instruction that stops the kernel, an assertion that does not hold.
enum class breakdown : std::uint8_t { illegal_access, misaligned_access, trap, assertion };

/// An object is used by one thread at a time: it keeps scratch memory between calls.
class ops {
public:
  virtual ~ops() = default;

  /// "cpu (avx512, 2 threads)" and the like.
  virtual const char* description() const = 0;

  /// The calling thread will be the one that uses this object. Where it and its helpers are as many
  /// as the cores that they may use, each is kept on one of its own from now on: the caller on core
  /// `place`, counted around, its helpers on those that follow. For processes that take turns on
  /// the same cores.
  virtual void keep_on_cores(std::int32_t /*place*/) {}

  virtual element_type activation_type() const = 0;

  /// Of the keys and values in pages.
  virtual element_type kv_type() const { return activation_type(); }

  /// Device memory, zeroed, 64-byte aligned; released with the back end's deleter. Null if
  /// there is not that much.
  virtual std::shared_ptr<void> allocate(std::size_t bytes) = 0;

  /// Makes a weight usable on the device: the CPU returns it as it is, a GPU
  /// returns a view of its own copy, which lives as long as this object. What is rounded to 8 bit
  /// (weight_use::int8_product) has a copy everywhere. The CPU with fast numerics
  /// returns it with a packed copy beside it, of the same size (f32: half), which lives as
  /// long as this object; `packed` stays null where there is not that much memory.
  virtual weight_matrix place(const weight_matrix& weight,
                              weight_use use = weight_use::product) = 0;

  /// What `place` reads of a weight. Who has trouble with the rest may leave it out.
  virtual weight_reading reads_of_weights() const { return weight_reading::elements; }

  /// What the device failed of, for good: from then on results mean nothing, and the process has to
  /// be replaced. Empty while it works.
  virtual const std::string& failure() const = 0;

  /// For drills: makes the device fail in this way. A CPU says that it has failed.
  virtual void break_down(breakdown how) = 0;

  /// Copies rows between host memory (dense, activation_type) and the device.
  virtual void copy_to_host(const rows_view& from, void* to) = 0;
  virtual void copy_from_host(const void* from, const rows_view& to) = 0;

  /// The type in which rows travel to experts in other processes and back. `experts` rounds what it
  /// reads and what it gives to it, so that nothing depends on which experts are elsewhere.
  virtual element_type exchange_type() const { return activation_type(); }

  /// Copies rows between host memory (dense, exchange_type) and the device.
  virtual void export_rows(const rows_view& from, void* to) { copy_to_host(from, to); }
  virtual void import_rows(const void* from, const rows_view& to) { copy_from_host(from, to); }

  /// out[i] = table[ids[i]]. Ids must be in range.
  virtual void embed(const weight_matrix& table, std::span<const std::int32_t> ids,
                     const rows_view& out) = 0;

  /// out = x * rsqrt(mean(x^2) + epsilon) * weight, [rows, cols]; out may be x.
  virtual void rms_norm(const rows_view& x, const float* weight, float epsilon,
                        const rows_view& out) = 0;

  /// out[m, n] = sum_k x[m, k] * w[n, k].
  virtual void linear(const rows_view& x, const weight_matrix& w, const rows_view& out) = 0;

  /// The same with `out` in float32 whatever activation_type is: the logits that `sample` takes.
  virtual void logits(const rows_view& x, const weight_matrix& w, const rows_view& out) {
    linear(x, w, out);
  }

  /// `linear` with each of the parts, whose outputs do not overlap.
  virtual void linears(const rows_view& x, std::span<const linear_part> parts) {
    for (const linear_part& part : parts) {
      linear(x, part.w, part.out);
    }
  }

  /// out = down(silu(gate(x)) * up(x)). `gate` and `up` are room for [rows, w.gate.num_rows], of
  /// any contents before and after.
  virtual void mlp(const rows_view& x, const expert_weights& w, const rows_view& gate,
                   const rows_view& up, const rows_view& out) {
    linear(x, w.gate, gate);
    linear(x, w.up, up);
    swiglu(gate, up, gate);
    linear(gate, w.down, out);
  }

  /// Per head h: out[m, h, :] = w[h] * x[m, h, :]. Rows hold their heads at
  /// multiples of `x_head_stride` and `out_head_stride` elements; w, without scales,
  /// holds num_heads blocks of [num_rows / num_heads, num_cols], one behind the other.
  virtual void linear_per_head(const rows_view& x, std::int32_t x_head_stride,
                               const weight_matrix& w, std::int32_t num_heads, const rows_view& out,
                               std::int32_t out_head_stride) = 0;

  /// Rotates interleaved pairs in place: for every row and head the `rope_dim`
  /// elements that start at head * head_stride + offset. inv_freq holds rope_dim / 2
  /// values; cos and sin are multiplied by `magnitude`.
  virtual void rope(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                    std::int32_t offset, std::int32_t rope_dim,
                    std::span<const std::int32_t> positions, const float* inv_freq,
                    float magnitude) = 0;

  /// Writes the latent [rows, latent_dim] and the rotated key [rows, rope_dim] of each row to
  /// its page, by position.
  virtual void append_kv(const rows_view& latent, const rows_view& rope_key,
                         const batch_view& batch, const kv_layer_view& kv) = 0;

  /// Absorbed multi-head latent attention of each row over positions 0..own of its sequence:
  /// score = scale * (q_latent . latent + q_rope . rope_key), out = softmax(score) . latent.
  /// q_latent and out: [rows, num_heads * latent_dim]. q_rope: rope_dim elements at
  /// head * q_rope_head_stride.
  virtual void latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                                std::int32_t q_rope_head_stride, std::int32_t num_heads,
                                float scale, const batch_view& batch, const kv_layer_view& kv,
                                const rows_view& out) = 0;

  /// Rotates the pairs (i, i + rope_dim / 2) in place: as `rope`, with pairs that lie half the
  /// rotated width apart (NeoX style).
  virtual void rope_halves(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                           std::int32_t offset, std::int32_t rope_dim,
                           std::span<const std::int32_t> positions, const float* inv_freq,
                           float magnitude) = 0;

  /// Writes keys and values [rows, num_kv_heads * head_dim] of each row to its page, by position.
  virtual void append_grouped_kv(const rows_view& keys, const rows_view& values,
                                 const batch_view& batch, const grouped_kv_view& kv) = 0;

  /// Attention of each row over positions 0..own of its sequence, out = softmax(scale * q . k) . v;
  /// num_heads / num_kv_heads neighbouring heads share a key and a value (GQA, arXiv
  /// 2305.13245). q and out: [rows, num_heads * head_dim].
  virtual void grouped_attention(const rows_view& q, std::int32_t num_heads, float scale,
                                 const batch_view& batch, const grouped_kv_view& kv,
                                 const rows_view& out) = 0;

  /// x = 0.
  virtual void clear(const rows_view& x) = 0;

  /// Of a device that computes together with others, each with its part of every weight (tensor
  /// parallelism as in Megatron-LM, arXiv 1909.08053): x = the sum of the x of all of them, added
  /// in order of ranks, so that all of them have the same bits. All call it, with as many rows. A
  /// member that does not come within the deadline of its group is a failure of the device. Of a
  /// device that computes alone: nothing.
  virtual void all_reduce(const rows_view& x) = 0;

  /// From a call with true to one with false, a device that computes together with others computes
  /// alone: `all_reduce` does nothing. For finding out whether it has all the memory that it needs.
  virtual void rehearse(bool /*alone*/) {}

  /// out = silu(gate) * up, element by element; out may be gate or up.
  virtual void swiglu(const rows_view& gate, const rows_view& up, const rows_view& out) = 0;

  /// x += delta.
  virtual void add(const rows_view& x, const rows_view& delta) = 0;

  /// x += delta; out = rms_norm(x): the same bits as `add` and `rms_norm`. Out may not be x.
  virtual void add_rms_norm(const rows_view& x, const rows_view& delta, const float* weight,
                            float epsilon, const rows_view& out) {
    add(x, delta);
    rms_norm(x, weight, epsilon, out);
  }

  /// x[m, n] += bias[n].
  virtual void add_bias(const rows_view& x, const float* bias) = 0;

  /// Chooses top_k experts of each row by score(x . w^T) + bias within the best groups; bias may
  /// be null.
  /// `experts` and `weights` are host arrays [rows, top_k]; experts ascend
  /// within a row; ties go to the lower index. Weights come from the unbiased scores.
  virtual void route(const rows_view& x, const weight_matrix& w, const float* bias,
                     const router_params& params, std::span<std::int32_t> experts,
                     std::span<float> weights) = 0;

  /// out[i] = experts[tasks[i].expert](x[tasks[i].row]). Tasks are sorted by expert.
  virtual void experts(const rows_view& x, std::span<const expert_task> tasks,
                       std::span<const expert_weights> experts, const rows_view& out) = 0;

  /// out[m] += (sum of weights[m, j] * expert_out[expert_rows[m, j]], in order of j)
  /// + shared[m]. `shared.data` may be null.
  virtual void combine(const rows_view& expert_out, std::span<const std::int32_t> expert_rows,
                       std::span<const float> weights, std::int32_t top_k, const rows_view& shared,
                       const rows_view& out) = 0;

  /// A whole mixture of experts, whose choice the host does not see: out += what `route`,
  /// `experts` (tasks by expert, then by row), `mlp` of the shared expert and `combine` make of x,
  /// the same bits. False: nothing was done, since the device knows no such way for so many rows
  /// or for these weights, and those operations have to do it.
  virtual bool mixture(const rows_view& /*x*/, const mixture_weights& /*w*/,
                       const router_params& /*params*/, const mixture_scratch& /*scratch*/,
                       const rows_view& /*out*/) {
    return false;
  }

  /// Makes ready what `mixture` needs of these experts, which is otherwise done when they are met
  /// for the first time: too late for a step that is only recorded (`record_only`).
  virtual void know_experts(std::span<const expert_weights> /*experts*/) {}

  /// Computes a step that comes again and again: calls `work`, or repeats what an earlier call
  /// with this key has queued. So `work` does nothing but queue operations, none of which writes to
  /// the host; those that take ids or a batch take the arrays given here, or parts of them.
  virtual void step(const step_key& /*key*/, std::span<const std::int32_t> /*ids*/,
                    const batch_view& /*batch*/, const std::function<void()>& work) {
    work();
  }

  /// From a call with true to one with false, `step` computes nothing: it makes ready what a later
  /// call with the same key repeats. Scratch memory has to have its size by then, as after
  /// `rehearse`. False, and nothing has changed: the device does not repeat steps.
  virtual bool record_only(bool /*on*/) { return false; }

  /// One token a row of logits [rows, vocabulary], always float32. Temperature, then
  /// min_p (relative to the best token), then top_k, then top_p narrow the distribution,
  /// as in vLLM; one uniform number a token, counted from the most likely one, ties by id.
  /// The token is -1 with log-probability -infinity where every token is banned or -infinity.
  virtual void sample(const rows_view& logits, std::span<const sampling_params> params,
                      std::span<sampled_token> out) = 0;

  /// True if every element is finite. Used at boundaries, where a NaN of one process
  /// would otherwise show up as garbage text in another.
  virtual bool all_finite(const rows_view& x) = 0;
};

/// What the ranks of a tensor-parallel group on CPUs share.
class cpu_rank_group;

/// The CPU back end: float32 activations and accumulation, weights expanded in registers.
/// With fast numerics, activations are rounded before products (see `numerics`).
/// `num_threads` >= 1 includes the calling thread. Chooses AVX-512, AVX2 or
/// portable code at run time; TROUPE_CPU=avx2|portable in the environment asks for less.
/// `progress`, which outlives the object, is counted up in steps that never take long, whatever
/// the size of an operation: who watches it can tell a long computation from one that hangs.
/// With a group it computes together with the group's other members, as the one of this rank.
std::unique_ptr<ops> make_cpu_ops(std::int32_t num_threads,
                                  std::atomic<std::uint64_t>* progress = nullptr,
                                  numerics mode = numerics::exact,
                                  std::shared_ptr<cpu_rank_group> group = nullptr,
                                  std::int32_t rank = 0);

/// Where operations of `size` ranks of this process, each on a thread of its own, meet.
std::shared_ptr<cpu_rank_group> make_cpu_rank_group(std::int32_t size);

} // namespace troupe::kernels
