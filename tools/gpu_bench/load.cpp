#include "step.hpp"
#include "timing.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "troupe/model/device_size.hpp"
#include "troupe/model/random_weights.hpp"
#include "troupe/model/stage_model.hpp"

namespace gpu_bench {

namespace {

using namespace troupe;

constexpr std::int32_t kRows = 2048;
constexpr std::int32_t kPage = 64;
constexpr std::int32_t kPages = 1024;

double seconds_of(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Made-up weights, and how long the host has made some of them.
class timed_weights final : public model::tensor_source {
public:
  explicit timed_weights(const model::model_config& config) : weights_(config, "r1") {}

  bool contains(const std::string& name) const override { return weights_.contains(name); }
  std::string file_of(const std::string& name) const override { return weights_.file_of(name); }

  std::optional<model::made_tensor> recipe(const std::string& name) const override {
    return weights_.recipe(name);
  }

  expected<model::tensor_view> tensor(const std::string& name) override {
    expected<model::tensor_view> result;
    seconds += seconds_of([&] { result = weights_.tensor(name); });
    if (result) {
      bytes += result->num_bytes;
    }
    return result;
  }

  double seconds = 0.0;
  std::uint64_t bytes = 0;

private:
  model::random_weights weights_;
};

/// Weight memory that outlives those who use it, as a keeper's does.
class kept_memory final : public kernels::cuda::weight_memory {
public:
  std::shared_ptr<void> piece(std::size_t index, std::size_t bytes) override {
    if (index == pieces_.size()) {
      std::string error;
      pieces_.push_back(kernels::cuda::export_memory(0, bytes, error).memory);
    }
    return pieces_.at(index);
  }

  bool is_filled() const override { return is_filled_; }
  void fill() { is_filled_ = true; }

private:
  std::vector<std::shared_ptr<void>> pieces_;
  bool is_filled_ = false;
};

/// The memory in use beyond that of an earlier moment.
class memory_log {
public:
  explicit memory_log(const gpu_ops& ops) : ops_(ops), before_(ops.memory()), last_(before_) {
    std::printf("%-44s %8.0f MB of %.0f MB\n", "in use at first",
                megabytes(before_.total_bytes - before_.free_bytes),
                megabytes(before_.total_bytes));
  }

  void say(const char* what) {
    const auto now = ops_.memory();
    std::printf("%-44s %+8.0f MB\n", what, megabytes(last_.free_bytes) - megabytes(now.free_bytes));
    std::fflush(stdout);
    last_ = now;
  }

private:
  static double megabytes(std::size_t bytes) { return static_cast<double>(bytes) / 1e6; }

  const gpu_ops& ops_;
  kernels::cuda::device_memory before_, last_;
};

/// A micro-batch of sequences of so many tokens each, drawn at random.
struct drawn_batch {
  drawn_batch(std::int32_t num_sequences, std::int32_t length, std::int32_t vocab, unsigned seed) {
    std::mt19937 random(seed);
    for (std::int32_t s = 0; s < num_sequences; ++s) {
      offsets.push_back(static_cast<std::int32_t>(tables.size()));
      for (std::int32_t i = 0; i < length; ++i) {
        tokens.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab)));
        positions.push_back(i);
        sequences.push_back(s);
        if (i % kPage == 0) {
          tables.push_back(static_cast<std::int32_t>(random() % kPages));
        }
      }
    }
  }

  std::vector<std::int32_t> tokens, positions, sequences, tables, offsets;
};

bool compute(model::stage_model& stage, const drawn_batch& batch) {
  model::stage_input input;
  input.tokens = batch.tokens;
  input.batch = {batch.positions, batch.sequences, batch.tables, batch.offsets};
  const auto count = std::min<std::size_t>(batch.tokens.size(), 64);
  std::vector<std::int32_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<kernels::sampled_token> out(count);
  return stage.forward(input)
         && stage.sample(rows, std::vector<kernels::sampling_params>(count), out);
}

bool compute_all(model::stage_model& stage, std::int32_t vocab) {
  bool ok = true;
  for (std::int32_t rows = 1; rows <= 64; ++rows) {
    for (unsigned round = 0; round < 3; ++round) {
      ok = ok && compute(stage, {rows, 1, vocab, round});
    }
  }
  return ok;
}

} // namespace

void bench_load(model::head_format head) {
  auto config = model::parse_model_config(kLayersOfR1, "config.json");
  if (!config) {
    std::printf("load: %s\n", config.error().cause.c_str());
    return;
  }
  config->head = head;
  model::stage_options options;
  options.end_layer = config->num_layers;
  options.max_rows = kRows;
  std::printf("estimates: weights %.0f MB, scratch %.0f MB\n",
              static_cast<double>(model::device_weight_bytes(*config, model::whole_model(*config)))
                / 1e6,
              static_cast<double>(model::device_scratch_bytes(*config, options)) / 1e6);
  const auto kept = std::make_shared<kept_memory>();
  for (const bool first : {true, false}) {
    std::string error;
    const auto ops = kernels::cuda::make_cuda_ops(0, error, nullptr, kept);
    if (ops == nullptr) {
      std::printf("load: %s\n", error.c_str());
      return;
    }
    memory_log memory(*ops);
    const auto source = std::make_shared<timed_weights>(*config);
    std::unique_ptr<model::stage_model> stage;
    const double loading = seconds_of([&] {
      auto loaded = model::stage_model::load(source, *config, options, *ops);
      if (loaded) {
        stage = std::move(*loaded);
      } else {
        error = loaded.error().cause;
      }
      ops->synchronise();
    });
    if (stage == nullptr || !ops->failure().empty()) {
      std::printf("load: %s %s\n", error.c_str(), ops->failure().c_str());
      return;
    }
    std::printf(
      "3 layers of R1 and the head%s, %s: %.2f s, of which the host made %.0f MB in %.2f s\n",
      head == model::head_format::int8 ? " in 8 bit" : "", first ? "made" : "found", loading,
      static_cast<double>(source->bytes) / 1e6, source->seconds);
    memory.say("weights and activations");
    kept->fill();
    const double rehearsing = seconds_of([&] {
      if (auto ok = stage->rehearse(kPages, kPage); !ok) {
        std::printf("rehearsal: %s\n", ok.error().cause.c_str());
      }
      ops->synchronise();
    });
    std::printf("a rehearsal: %.3f s\n", rehearsing);
    memory.say("what the rehearsal took");
    const auto kv = ops->allocate(stage->kv_bytes(kPages, kPage));
    stage->attach_kv(kv.get(), kPages, kPage);
    memory.say("KV pages");
    bool ok = compute_all(*stage, config->vocab_size);
    memory.say("steps of 1 to 64 rows, recorded");
    for (unsigned round = 0; round < 4; ++round) {
      ok = ok && compute(*stage, {1, kRows, config->vocab_size, round})
           && compute(*stage, {8, kRows / 8, config->vocab_size, round})
           && compute(*stage, {100, 3, config->vocab_size, round});
    }
    memory.say("large micro-batches");
    ok = ok && compute_all(*stage, config->vocab_size);
    memory.say("steps of 1 to 64 rows, again");
    std::printf("%s; %llu steps were repeated\n", ok ? "all were computed" : "a step failed",
                static_cast<unsigned long long>(ops->num_repeated_steps()));
  }
}

} // namespace gpu_bench
