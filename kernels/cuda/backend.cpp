#include "troupe/kernels/cuda/backend.hpp"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "troupe/kernels/cpu/philox.hpp"
#include "troupe/kernels/cuda/mixture.hpp"
#include "troupe/kernels/cuda/trace.hpp"

namespace troupe::kernels::cuda {

namespace {

/// Small buffers share slabs of this size; weights share larger ones.
constexpr std::size_t kSlabBytes = std::size_t{16} << 20;
constexpr std::size_t kWeightSlabBytes = std::size_t{256} << 20;

template <class T>
rows_of<T> slice_rows(const rows_view& x, std::int32_t first, std::int32_t count) {
  auto result = as_rows<T>(x);
  result.data += first * result.stride;
  result.num_rows = count;
  return result;
}

} // namespace

std::int32_t num_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string pci_bus_id(std::int32_t device) {
  std::array<char, 32> text{};
  if (cudaDeviceGetPCIBusId(text.data(), static_cast<int>(text.size()), device) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  return text.data();
}

std::unique_ptr<gpu_ops> make_cuda_ops(std::int32_t device, std::string& error,
                                       std::atomic<std::uint64_t>* progress,
                                       std::shared_ptr<weight_memory> weights,
                                       std::shared_ptr<gpu_rank_group> group, std::int32_t rank,
                                       numerics mode) {
  auto ranks = std::static_pointer_cast<summing_group>(std::move(group));
  if (ranks != nullptr && (rank < 0 || rank >= ranks->size() || ranks->device(rank) != device)) {
    error = "cuda:" + std::to_string(device) + " is not that of rank " + std::to_string(rank);
    return nullptr;
  }
  auto result =
    std::make_unique<cuda_ops>(device, progress, std::move(weights), std::move(ranks), rank, mode);
  if (!result->failure().empty()) {
    error = result->failure();
    return nullptr;
  }
  return result;
}

cuda_ops::cuda_ops(std::int32_t device, std::atomic<std::uint64_t>* progress,
                   std::shared_ptr<weight_memory> weights, std::shared_ptr<summing_group> group,
                   std::int32_t rank, numerics mode)
  : mode_(mode),
    group_(std::move(group)),
    rank_(rank),
    gpu_(device),
    stream_(gpu_.stream()),
    progress_(progress == nullptr ? &unwatched_ : progress),
    pool_(gpu_, kSlabBytes),
    weight_pool_(gpu_, kWeightSlabBytes, weights),
    ring_(gpu_),
    download_(gpu_),
    ids_(gpu_, pool_, ring_),
    positions_(gpu_, pool_, ring_),
    sequences_(gpu_, pool_, ring_),
    tables_(gpu_, pool_, ring_),
    offsets_(gpu_, pool_, ring_),
    staging_(gpu_, pool_),
    padded_(gpu_, pool_),
    packed_rows_(gpu_, pool_),
    router_logits_(gpu_, pool_),
    results_(gpu_, pool_),
    gates_(gpu_, pool_),
    ups_(gpu_, pool_),
    allowed_(gpu_, pool_),
    mixture_lists_(gpu_, pool_),
    mixed_gates_(gpu_, pool_),
    mixed_ups_(gpu_, pool_),
    weights_are_there_(weights != nullptr && weights->is_filled()),
    steps_(gpu_) {
  const char* graphs = std::getenv("TROUPE_CUDA_GRAPHS");
  records_steps_ = graphs == nullptr || std::strcmp(graphs, "off") != 0;
  description_ = "cuda:" + std::to_string(device) + " (" + gpu_.name()
                 + (is_exact() ? ", exact numerics)" : ")");
  flag_ = allocate(sizeof(std::int32_t));
  counters_ = allocate((kMixedRows + 1) * sizeof(std::int32_t));
}

cuda_ops::~cuda_ops() {
  if (group_ != nullptr) {
    gpu_.synchronise(); // what is queued uses the memory of the group
  }
}

bool cuda_ops::begin(std::int32_t num_rows) {
  tick();
  gpu_.stream();
  check_group();
  return gpu_.ok() && num_rows > 0;
}

bool cuda_ops::begin_waiting(std::int32_t num_rows) {
  if (gpu_.is_recording()) {
    gpu_.spoil_recording("it waits for the device");
    return false;
  }
  return begin(num_rows);
}

void cuda_ops::launched(const char* what) {
  gpu_.check(cudaGetLastError(), what);
}

void cuda_ops::check_group() {
  if (group_ == nullptr) {
    return;
  }
  if (!gpu_.ok()) {
    group_->give_up(rank_, gpu_.failure());
  } else if (group_->has_failed(rank_)) {
    gpu_.fail(group_->failure(rank_));
  }
}

void cuda_ops::synchronise() {
  gpu_.synchronise();
  check_group();
  tick();
}

void cuda_ops::break_down(breakdown how) {
  if (begin()) {
    launch_break_down(stream_, how, flag_.get());
    launched("breaking down");
    synchronise();
  }
}

device_memory memory_of(std::int32_t device) {
  device_memory result;
  if (cudaSetDevice(device) != cudaSuccess
      || cudaMemGetInfo(&result.free_bytes, &result.total_bytes) != cudaSuccess) {
    cudaGetLastError();
  }
  return result;
}

device_memory cuda_ops::memory() const {
  return memory_of(gpu_.device());
}

std::shared_ptr<void> cuda_ops::allocate(std::size_t bytes) {
  if (!begin()) {
    return nullptr;
  }
  auto memory = pool_.take(bytes);
  if (memory != nullptr) {
    gpu_.check(cudaMemsetAsync(memory.get(), 0, bytes, stream_), "clearing memory");
  }
  return memory;
}

void cuda_ops::copy_to_host(const rows_view& from, void* to) {
  if (!begin_waiting(from.num_rows)) {
    return;
  }
  const auto element = size_of(activation_type());
  const auto bytes = static_cast<std::size_t>(from.num_cols) * element;
  gpu_.check(cudaMemcpy2DAsync(to, bytes, from.data,
                               static_cast<std::size_t>(from.stride) * element, bytes,
                               from.num_rows, cudaMemcpyDeviceToHost, stream_),
             "copy to the host");
  synchronise();
}

void cuda_ops::copy_from_host(const void* from, const rows_view& to) {
  if (!begin_waiting(to.num_rows)) {
    return;
  }
  const auto element = size_of(activation_type());
  const auto bytes = static_cast<std::size_t>(to.num_cols) * element;
  gpu_.check(cudaMemcpy2DAsync(to.data, static_cast<std::size_t>(to.stride) * element, from, bytes,
                               bytes, to.num_rows, cudaMemcpyHostToDevice, stream_),
             "copy from the host");
  synchronise(); // the caller may change its memory
}

device_batch cuda_ops::upload_batch(const batch_view& batch) {
  return {positions_.find(batch.positions), sequences_.find(batch.sequences),
          tables_.find(batch.block_tables), offsets_.find(batch.block_table_offsets)};
}

void cuda_ops::embed(const weight_matrix& table, std::span<const std::int32_t> ids,
                     const rows_view& out) {
  const auto num_ids = static_cast<std::int32_t>(ids.size());
  if (!begin(num_ids)) {
    return;
  }
  const auto* device_ids = ids_.find(ids);
  if (gpu_.ok()) {
    with_elements(
      [&]<class T>() { launch_embed(stream_, table, device_ids, num_ids, as_rows<T>(out)); });
    launched("embed");
  }
}

void cuda_ops::clear(const rows_view& x) {
  if (begin(x.num_rows)) {
    const auto element = size_of(activation_type());
    gpu_.check(cudaMemset2DAsync(x.data, static_cast<std::size_t>(x.stride) * element, 0,
                                 static_cast<std::size_t>(x.num_cols) * element, x.num_rows,
                                 stream_),
               "clearing rows");
  }
}

void cuda_ops::all_reduce(const rows_view& x) {
  if (group_ == nullptr || is_alone_ || !begin(x.num_rows)) {
    return;
  }
  const trace range("all-reduce");
  with_elements([&]<class T>() {
    if (!group_->add_up(stream_, rank_, as_rows<T>(x))) {
      gpu_.fail("rows of " + std::to_string(x.num_cols) + " columns are too wide for the group");
    }
  });
  launched("all_reduce");
}

void cuda_ops::rms_norm(const rows_view& x, const float* weight, float epsilon,
                        const rows_view& out) {
  if (begin(x.num_rows)) {
    with_elements([&]<class T>() {
      launch_rms_norm(stream_, as_rows<T>(x), weight, epsilon, as_rows<T>(out));
    });
    launched("rms_norm");
  }
}

void cuda_ops::rope(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                    std::int32_t offset, std::int32_t rope_dim,
                    std::span<const std::int32_t> positions, const float* inv_freq,
                    float magnitude) {
  if (begin(x.num_rows)) {
    with_elements([&]<class T>() {
      launch_rope(stream_, as_rows<T>(x), num_heads, head_stride, offset, rope_dim,
                  positions_.find(positions), inv_freq, magnitude, false);
    });
    launched("rope");
  }
}

void cuda_ops::rope_halves(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                           std::int32_t offset, std::int32_t rope_dim,
                           std::span<const std::int32_t> positions, const float* inv_freq,
                           float magnitude) {
  if (begin(x.num_rows)) {
    with_elements([&]<class T>() {
      launch_rope(stream_, as_rows<T>(x), num_heads, head_stride, offset, rope_dim,
                  positions_.find(positions), inv_freq, magnitude, true);
    });
    launched("rope_halves");
  }
}

void cuda_ops::append_kv(const rows_view& latent, const rows_view& rope_key,
                         const batch_view& batch, const kv_layer_view& kv) {
  if (begin(latent.num_rows)) {
    with_elements([&]<class T>() {
      launch_append(
        stream_, as_rows<T>(latent), as_rows<T>(rope_key), upload_batch(batch),
        pages_of<T>{static_cast<T*>(kv.data), kv.page_tokens, kv.latent_dim, kv.rope_dim});
    });
    launched("append_kv");
  }
}

void cuda_ops::append_grouped_kv(const rows_view& keys, const rows_view& values,
                                 const batch_view& batch, const grouped_kv_view& kv) {
  // One place of a page is laid out as two parts in either kind of attention.
  const std::int32_t width = kv.num_kv_heads * kv.head_dim;
  if (begin(keys.num_rows)) {
    with_elements([&]<class T>() {
      launch_append(stream_, as_rows<T>(keys), as_rows<T>(values), upload_batch(batch),
                    pages_of<T>{static_cast<T*>(kv.data), kv.page_tokens, width, width});
    });
    launched("append_grouped_kv");
  }
}

void cuda_ops::latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                                std::int32_t q_rope_head_stride, std::int32_t num_heads,
                                float scale, const batch_view& batch, const kv_layer_view& kv,
                                const rows_view& out) {
  if (begin(q_latent.num_rows)) {
    const trace range("attention");
    with_elements([&]<class T>() {
      launch_latent_attention(
        stream_, as_rows<T>(q_latent), as_rows<T>(q_rope), q_rope_head_stride, num_heads, scale,
        upload_batch(batch),
        pages_of<T>{static_cast<T*>(kv.data), kv.page_tokens, kv.latent_dim, kv.rope_dim},
        as_rows<T>(out), gpu_.is_hopper());
    });
    launched("latent_attention");
  }
}

void cuda_ops::grouped_attention(const rows_view& q, std::int32_t num_heads, float scale,
                                 const batch_view& batch, const grouped_kv_view& kv,
                                 const rows_view& out) {
  const std::int32_t width = kv.num_kv_heads * kv.head_dim;
  if (begin(q.num_rows)) {
    const trace range("attention");
    with_elements([&]<class T>() {
      launch_grouped_attention(
        stream_, as_rows<T>(q), num_heads, kv.num_kv_heads, scale, upload_batch(batch),
        pages_of<T>{static_cast<T*>(kv.data), kv.page_tokens, width, width}, as_rows<T>(out));
    });
    launched("grouped_attention");
  }
}

void cuda_ops::swiglu(const rows_view& gate, const rows_view& up, const rows_view& out) {
  if (begin(gate.num_rows)) {
    with_elements([&]<class T>() {
      launch_swiglu(stream_, as_rows<T>(gate), as_rows<T>(up), as_rows<T>(out));
    });
    launched("swiglu");
  }
}

void cuda_ops::add(const rows_view& x, const rows_view& delta) {
  if (begin(x.num_rows)) {
    with_elements([&]<class T>() { launch_add(stream_, as_rows<T>(x), as_rows<T>(delta)); });
    launched("add");
  }
}

void cuda_ops::add_rms_norm(const rows_view& x, const rows_view& delta, const float* weight,
                            float epsilon, const rows_view& out) {
  if (begin(x.num_rows)) {
    with_elements([&]<class T>() {
      launch_add_rms_norm(stream_, as_rows<T>(x), as_rows<T>(delta), weight, epsilon,
                          as_rows<T>(out));
    });
    launched("add_rms_norm");
  }
}

void cuda_ops::add_bias(const rows_view& x, const float* bias) {
  if (begin(x.num_rows)) {
    with_elements([&]<class T>() { launch_add_bias(stream_, as_rows<T>(x), bias); });
    launched("add_bias");
  }
}

void cuda_ops::route(const rows_view& x, const weight_matrix& w, const float* bias,
                     const router_params& params, std::span<std::int32_t> experts,
                     std::span<float> weights) {
  if (!begin_waiting(x.num_rows)) {
    return;
  }
  constexpr std::int32_t kMostRows = 4096;
  for (std::int32_t first = 0; first < x.num_rows; first += kMostRows) {
    const auto count = std::min(kMostRows, x.num_rows - first);
    const auto num_choices = static_cast<std::size_t>(count) * params.top_k;
    auto* logits = router_logits_.take<float>(static_cast<std::size_t>(count) * w.num_rows);
    auto* chosen = results_.take<std::int32_t>(num_choices * 2);
    auto* host = static_cast<std::int32_t*>(download_.take(num_choices * 2 * sizeof(std::int32_t)));
    if (!gpu_.ok()) {
      return;
    }
    auto* device_weights = reinterpret_cast<float*>(chosen + num_choices);
    with_elements(
      [&]<class T>() { launch_router_logits(stream_, slice_rows<T>(x, first, count), w, logits); });
    launch_choose_experts(stream_, logits, count, bias, params, chosen, device_weights);
    launched("route");
    gpu_.check(cudaMemcpyAsync(host, chosen, num_choices * 2 * sizeof(std::int32_t),
                               cudaMemcpyDeviceToHost, stream_),
               "copy of the routes");
    synchronise();
    const auto at = static_cast<std::size_t>(first) * params.top_k;
    std::memcpy(experts.data() + at, host, num_choices * sizeof(std::int32_t));
    std::memcpy(weights.data() + at, host + num_choices, num_choices * sizeof(float));
  }
}

void cuda_ops::combine(const rows_view& expert_out, std::span<const std::int32_t> expert_rows,
                       std::span<const float> weights, std::int32_t top_k, const rows_view& shared,
                       const rows_view& out) {
  if (!begin(out.num_rows)) {
    return;
  }
  const auto count = static_cast<std::size_t>(out.num_rows) * top_k;
  const auto* rows = ring_.put(expert_rows.first(count));
  const auto* factors = ring_.put(weights.first(count));
  if (gpu_.ok()) {
    with_elements([&]<class T>() {
      launch_combine(stream_, as_rows<T>(expert_out), rows, factors, top_k, as_rows<T>(shared),
                     as_rows<T>(out));
    });
    launched("combine");
  }
}

void cuda_ops::step(const step_key& key, std::span<const std::int32_t> ids, const batch_view& batch,
                    const std::function<void()>& work) {
  const trace range("step");
  if (!records_steps_ || key.num_rows > kMixedRows || gpu_.is_recording() || !begin(key.num_rows)) {
    if (!records_only_) {
      work();
    }
    return;
  }
  if (!ids.empty()) {
    ids_.place(ids);
  }
  positions_.place(batch.positions);
  sequences_.place(batch.sequences);
  tables_.place(batch.block_tables);
  offsets_.place(batch.block_table_offsets);
  if (gpu_.ok() && records_only_) {
    steps_.prepare(key, work);
  } else if (gpu_.ok()) {
    steps_.compute(key, work);
  }
}

void cuda_ops::sample(const rows_view& logits, std::span<const sampling_params> params,
                      std::span<sampled_token> out) {
  const auto num_rows = logits.num_rows;
  std::fill_n(out.begin(), num_rows,
              sampled_token{-1, -std::numeric_limits<float>::infinity(), 0, {}, {}});
  if (!begin_waiting(num_rows)) {
    return;
  }
  const trace range("sampling");
  sampling_.clear();
  banned_.clear();
  bool any_drawn = false;
  for (std::int32_t m = 0; m < num_rows; ++m) {
    const auto& from = params[m];
    assert(from.target < logits.num_cols);
    device_sampling to;
    to.temperature = from.temperature;
    to.top_k = from.top_k;
    to.top_p = from.top_p;
    to.min_p = from.min_p;
    to.uniform = uniform(from.seed, from.position);
    to.num_logprobs = from.num_logprobs;
    to.target = from.target;
    to.first_banned = static_cast<std::int32_t>(banned_.size());
    to.num_banned = static_cast<std::int32_t>(from.banned.size());
    banned_.insert(banned_.end(), from.banned.begin(), from.banned.end());
    any_drawn = any_drawn || (from.target < 0 && from.temperature > 0.0F);
    sampling_.push_back(to);
  }
  const auto bytes = static_cast<std::size_t>(num_rows) * sizeof(sampled_token);
  const auto* device_params = ring_.put(std::span<const device_sampling>(sampling_));
  const auto* banned =
    banned_.empty() ? nullptr : ring_.put(std::span<const std::int32_t>(banned_));
  auto* allowed = banned_.empty()
                    ? nullptr
                    : allowed_.take<float>(static_cast<std::size_t>(num_rows) * logits.num_cols);
  const auto num_surveys = static_cast<std::size_t>(num_rows) * kSurveys;
  auto* surveys = reinterpret_cast<logit_survey*>(
    results_.take<std::byte>(num_surveys * sizeof(logit_survey) + bytes));
  auto* drawn = reinterpret_cast<sampled_token*>(surveys + num_surveys);
  auto* host = download_.take(bytes);
  if (!gpu_.ok()) {
    return;
  }
  launch_sample(stream_,
                {static_cast<const float*>(logits.data), logits.stride, num_rows, logits.num_cols},
                device_params, any_drawn, banned, surveys, allowed, drawn);
  launched("sample");
  gpu_.check(cudaMemcpyAsync(host, drawn, bytes, cudaMemcpyDeviceToHost, stream_),
             "copy of the tokens");
  synchronise();
  if (gpu_.ok()) {
    std::memcpy(out.data(), host, bytes);
  }
}

bool cuda_ops::all_finite(const rows_view& x) {
  if (!begin_waiting(x.num_rows)) {
    return gpu_.ok();
  }
  auto* host = static_cast<std::int32_t*>(download_.take(sizeof(std::int32_t)));
  if (!gpu_.ok()) {
    return false;
  }
  auto* found = static_cast<std::int32_t*>(flag_.get());
  gpu_.check(cudaMemsetAsync(found, 0, sizeof(std::int32_t), stream_), "clearing a flag");
  with_elements([&]<class T>() { launch_find_not_finite(stream_, as_rows<T>(x), found); });
  launched("all_finite");
  gpu_.check(cudaMemcpyAsync(host, found, sizeof(std::int32_t), cudaMemcpyDeviceToHost, stream_),
             "copy of a flag");
  synchronise();
  return gpu_.ok() && *host == 0;
}

} // namespace troupe::kernels::cuda
