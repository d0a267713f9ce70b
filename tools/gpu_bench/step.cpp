#include "step.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <unordered_map>

#include "timing.hpp"
#include "troupe/model/stage_group.hpp"
#include "troupe/model/tensor_shard.hpp"

namespace gpu_bench {

const char* const kLayersOfR1 = R"({
 "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": false,
 "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
 "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
 "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
 "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
 "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 3,
 "num_key_value_heads": 128, "num_nextn_predict_layers": 0, "q_lora_rank": 1536,
 "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
 "rope_theta": 10000,
 "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                  "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
 "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
 "topk_method": "noaux_tc", "tie_word_embeddings": false, "torch_dtype": "bfloat16",
 "vocab_size": 129280,
 "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                         "weight_block_size": [128, 128]}})";

namespace {

using namespace troupe;

/// Weights made of one block of random bytes: tensors begin at different places of it, so that
/// experts and layers differ. Enough for measuring, and there in seconds.
class shared_noise final : public model::tensor_source {
public:
  explicit shared_noise(const model::model_config& config) {
    std::int64_t largest = 0;
    for (const auto& spec : model::list_tensors(config, model::whole_model(config))) {
      const bool is_vector = spec.num_rows == 0;
      const bool is_fp8 = !is_vector && spec.name.find("embed_tokens") == std::string::npos
                          && spec.name.find("lm_head") == std::string::npos
                          && spec.name.find("mlp.gate.weight") == std::string::npos;
      auto shape = is_vector ? std::vector<std::int64_t>{spec.num_cols}
                             : std::vector<std::int64_t>{spec.num_rows, spec.num_cols};
      largest = std::max<std::int64_t>(largest, std::int64_t{std::max(spec.num_rows, 1)}
                                                  * spec.num_cols * (is_fp8 ? 1 : 2));
      add(spec.name, is_vector ? kind::ones : is_fp8 ? kind::fp8 : kind::bf16, shape);
      if (is_fp8) {
        add(spec.name + "_scale_inv", kind::scale,
            {(spec.num_rows + 127) / 128, (spec.num_cols + 127) / 128});
      }
    }
    noise_.resize(static_cast<std::size_t>(largest) + (std::size_t{1} << 26));
    std::uint64_t state = 99;
    for (std::size_t i = 0; i < noise_.size(); i += 8) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      // As bf16 magnitudes near 2^-6; as e4m3 no NaN.
      const std::uint64_t bits = (state >> 8 & 0x80BF80BF80BF80BFULL) ^ 0x3C003C003C003C00ULL;
      std::memcpy(&noise_[i], &bits, 8);
    }
    ones_.assign(1 << 16, 0x3F80);
    scales_.assign(1 << 18, 0.01F);
  }

  bool contains(const std::string& tensor) const override { return entries_.count(tensor) > 0; }

  expected<model::tensor_view> tensor(const std::string& name) override {
    const auto& entry = entries_.at(name);
    std::int64_t count = 1;
    for (const auto dim : entry.shape) {
      count *= dim;
    }
    const auto number = static_cast<std::uint64_t>(count);
    const auto* noise = reinterpret_cast<const std::byte*>(noise_.data() + entry.offset);
    switch (entry.what) {
    case kind::fp8:
      return model::tensor_view{"F8_E4M3", kernels::element_type::f8_e4m3, entry.shape, noise,
                                number};
    case kind::bf16:
      return model::tensor_view{"BF16", kernels::element_type::bf16, entry.shape, noise,
                                number * 2};
    case kind::scale:
      return model::tensor_view{"F32", kernels::element_type::f32, entry.shape,
                                reinterpret_cast<const std::byte*>(scales_.data()), number * 4};
    case kind::ones: break;
    }
    return model::tensor_view{"BF16", kernels::element_type::bf16, entry.shape,
                              reinterpret_cast<const std::byte*>(ones_.data()), number * 2};
  }

  std::string file_of(const std::string&) const override { return "noise"; }

private:
  enum class kind { fp8, bf16, scale, ones };
  struct entry {
    kind what;
    std::vector<std::int64_t> shape;
    std::size_t offset;
  };

  void add(const std::string& name, kind what, std::vector<std::int64_t> shape) {
    const auto offset = entries_.size() * 7919 % 1000003 * 64;
    entries_.emplace(name, entry{what, std::move(shape), offset});
  }

  std::unordered_map<std::string, entry> entries_;
  std::vector<unsigned char> noise_;
  std::vector<std::uint16_t> ones_;
  std::vector<float> scales_;
};

struct batch {
  std::vector<std::int32_t> tokens, positions, sequences, tables, offsets;
};

/// Operations of so many GPUs that compute together; empty where there are not that many.
std::vector<std::unique_ptr<kernels::cuda::gpu_ops>> make_ranks(std::int32_t num_ranks,
                                                                kernels::numerics mode) {
  std::vector<std::int32_t> devices(num_ranks);
  std::iota(devices.begin(), devices.end(), 0);
  std::string error;
  const auto group =
    num_ranks > 1
      ? kernels::cuda::make_gpu_rank_group(devices, 2048, 7168, error, std::chrono::seconds(2),
                                           kernels::cuda::sum_transport::automatic, mode)
      : nullptr;
  std::vector<std::unique_ptr<kernels::cuda::gpu_ops>> result;
  for (const auto device : devices) {
    result.push_back(kernels::cuda::make_cuda_ops(device, error, nullptr, nullptr, group,
                                                  group == nullptr ? 0 : device, mode));
    if (result.back() == nullptr) {
      std::printf("steps on %d GPUs: %s\n", num_ranks, error.c_str());
      return {};
    }
  }
  return result;
}

} // namespace

void bench_steps(std::int32_t num_ranks, model::head_format head, kernels::numerics mode) {
  constexpr std::int32_t kPage = 64, kPagesEach = 32, kMostSequences = 128, kMostRows = 2048;
  auto config = model::parse_model_config(kLayersOfR1, "config.json");
  const auto owned = make_ranks(num_ranks, mode);
  if (!config || owned.empty()) {
    std::printf("steps: %s\n", config ? "there are no ranks" : config.error().cause.c_str());
    return;
  }
  config->head = head;
  std::vector<kernels::cuda::gpu_ops*> ranks;
  for (const auto& one : owned) {
    ranks.push_back(one.get());
  }
  const auto begin = std::chrono::steady_clock::now();
  model::stage_options options;
  options.end_layer = config->num_layers;
  options.max_rows = kMostRows;
  options.checks_finite = false;
  const auto num_pages = kPagesEach * kMostSequences;
  const auto weights = std::make_shared<shared_noise>(*config);
  std::vector<std::unique_ptr<model::stage_model>> models;
  std::vector<std::shared_ptr<void>> kv;
  std::vector<void*> pages;
  for (std::int32_t rank = 0; rank < num_ranks; ++rank) {
    const auto part = model::rank_config(*config, rank, num_ranks);
    if (!part) {
      std::printf("steps: %s\n", part.error().cause.c_str());
      return;
    }
    auto stage = model::stage_model::load(weights, *part, options, *ranks[rank]);
    if (!stage) {
      std::printf("steps: %s\n", stage.error().cause.c_str());
      return;
    }
    kv.push_back(ranks[rank]->allocate((*stage)->kv_bytes(num_pages, kPage)));
    pages.push_back(kv.back().get());
    models.push_back(std::move(*stage));
    ranks[rank]->synchronise();
  }
  model::stage_group group(std::move(models), std::chrono::milliseconds(2));
  group.attach_kv(pages, num_pages, kPage);
  auto& ops = *ranks.front();
  std::printf("3 layers of R1 and the head%s, on %d GPU(s)%s: placed in %.1f s\n",
              head == model::head_format::int8 ? " in 8 bit" : "", num_ranks,
              mode == kernels::numerics::exact ? ", exact numerics" : "",
              std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());

  const auto run = [&](const batch& b, std::int32_t num_samples) {
    model::stage_input input;
    input.tokens = b.tokens;
    input.batch = {b.positions, b.sequences, b.tables, b.offsets};
    std::vector<std::int32_t> rows(num_samples);
    std::iota(rows.begin(), rows.end(), static_cast<std::int32_t>(b.tokens.size()) - num_samples);
    std::vector<kernels::sampled_token> out(num_samples);
    const bool ok = group.forward(input).has_value()
                    && group.leader()
                         .sample(rows, std::vector<kernels::sampling_params>(num_samples), out)
                         .has_value();
    if (!ok) {
      std::printf("a step failed. %s\n", ops.failure().c_str());
    }
  };
  for (const std::int32_t size : {1, 8, 32, 128}) {
    batch b;
    for (std::int32_t s = 0; s < size; ++s) {
      b.tokens.push_back(s * 977 % config->vocab_size);
      b.positions.push_back(512);
      b.sequences.push_back(s);
      b.offsets.push_back(s * kPagesEach);
      for (std::int32_t p = 0; p < kPagesEach; ++p) {
        b.tables.push_back(s * kPagesEach + p);
      }
    }
    const double time = time_calls(ops, 15, [&] { run(b, size); });
    std::printf("decode step, %3d sequences at 512: %9.1f us  %8.0f tokens/s\n", size, time,
                size / time * 1e6);
  }
  std::printf("%llu of these steps were repeated as they had been recorded\n",
              static_cast<unsigned long long>(ops.num_repeated_steps()));
  batch b;
  for (std::int32_t i = 0; i < kMostRows; ++i) {
    b.tokens.push_back(i * 977 % config->vocab_size);
    b.positions.push_back(i);
    b.sequences.push_back(0);
  }
  b.offsets.push_back(0);
  for (std::int32_t p = 0; p < kPagesEach; ++p) {
    b.tables.push_back(p);
  }
  const double time = time_calls(ops, 5, [&] { run(b, 1); });
  std::printf("prefill of %d tokens: %31.1f us  %8.0f tokens/s\n", kMostRows, time,
              kMostRows / time * 1e6);
}

void bench_steps_of_ranks() {
  for (std::int32_t num_ranks = 1; num_ranks <= std::min(8, kernels::cuda::num_devices());
       num_ranks *= 2) {
    bench_steps(num_ranks, model::head_format::stored);
  }
}

} // namespace gpu_bench
