#include "gpu.hpp"

#include <algorithm>
#include <functional>
#include <random>

namespace kernel_tests {

using troupe::kernels::batch_view;
using troupe::kernels::expert_weights;
using troupe::kernels::kv_layer_view;
using troupe::kernels::mixture_weights;
using troupe::kernels::router_params;
using troupe::kernels::weight_use;

namespace {

constexpr int kHeads = 4, kLatent = 32, kRope = 16;
constexpr int kHidden = kHeads * (kLatent + kRope);
constexpr int kMostRows = 64, kPages = 40, kPageTokens = 4, kVocabulary = 50;

/// What a step is given: sequences at any places, in pages of their own.
struct toy_batch {
  std::vector<std::int32_t> ids, positions, sequences, tables, offsets;

  batch_view view() const { return {positions, sequences, tables, offsets}; }
};

toy_batch random_batch(int rows, std::mt19937& random, int spare_tables = 0) {
  toy_batch b;
  const auto pages = shuffled(kPages, random);
  for (int row = 0; row < rows; ++row) {
    b.ids.push_back(static_cast<std::int32_t>(random() % kVocabulary));
    b.sequences.push_back(row % 4);
    b.positions.push_back(static_cast<std::int32_t>(row / 4 * 2 + random() % 2)); // each its own
  }
  for (int sequence = 0; sequence < 4; ++sequence) {
    b.offsets.push_back(sequence * 10);
    b.tables.insert(b.tables.end(), pages.begin() + sequence * 10,
                    pages.begin() + sequence * 10 + 10);
  }
  b.tables.resize(b.tables.size() + spare_tables, 0);
  return b;
}

/// One layer with an attention and a mixture of experts, on a GPU object of its own, whose scratch
/// memory has no size yet.
class toy_model {
public:
  explicit toy_model(std::mt19937& random) {
    std::string error;
    ops_ = troupe::kernels::cuda::make_cuda_ops(0, error);
    REQUIRE(ops_ != nullptr);
    table_ =
      place(random_weight(element_type::bf16, kVocabulary, kHidden, random), weight_use::stored);
    query_ = place(random_weight(element_type::f8_e4m3, kHidden, kHidden, random, true));
    output_ = place(random_weight(element_type::bf16, kHidden, kHeads * kLatent, random));
    router_ = place(random_weight(element_type::bf16, 8, kHidden, random), weight_use::stored);
    make_experts(random);
    norm_ = vector(random_matrix(1, kHidden, random).data);
    frequencies_ = vector({1.0F, 0.5F, 0.25F, 0.1F, 0.05F, 0.01F, 0.001F, 0.0001F});
    for (auto* buffer : {&x_, &normed_, &queries_, &attended_, &delta_, &expert_out_}) {
      *buffer = ops_->allocate(std::size_t(kMostRows) * 2 * kHidden * 2);
    }
    pages_ = ops_->allocate(std::size_t(kPages) * kPageTokens * (kLatent + kRope) * 2);
  }

  gpu_ops& ops() { return *ops_; }
  const std::vector<expert_weights>& experts() const { return experts_; }

  /// Others than before, if there were any.
  void make_experts(std::mt19937& random) {
    experts_.clear();
    for (int e = 0; e < 8; ++e) {
      const auto gate = place(random_weight(element_type::f8_e4m3, 80, kHidden, random, true));
      const auto up = place(random_weight(element_type::f8_e4m3, 80, kHidden, random, true));
      experts_.push_back(
        {gate, up, place(random_weight(element_type::f8_e4m3, kHidden, 80, random, true))});
    }
  }

  /// Records the layer for so many rows, without computing it.
  void record(int rows, std::uint64_t what, std::mt19937& random) {
    const auto batch = random_batch(rows, random);
    REQUIRE(ops_->record_only(true));
    ops_->step({what, rows}, batch.ids, batch.view(), [&] { queue(batch); });
    ops_->record_only(false);
  }

  /// Queues the layer, for as many rows as there are ids.
  void queue(const toy_batch& b) {
    const auto rows = static_cast<int>(b.ids.size());
    const auto batch = b.view();
    const rows_view x{x_.get(), rows, kHidden, kHidden};
    const rows_view normed{normed_.get(), rows, kHidden, kHidden};
    const rows_view q{queries_.get(), rows, kHidden, kHidden};
    const rows_view attended{attended_.get(), rows, kHeads * kLatent, kHeads * kLatent};
    const rows_view delta{delta_.get(), rows, kHidden, kHidden};
    const kv_layer_view kv{pages_.get(), kPages, kPageTokens, kLatent, kRope};
    ops_->embed(table_, b.ids, x);
    ops_->rms_norm(x, norm_, 1e-6F, normed);
    ops_->linear(normed, query_, q);
    const auto q_rope = columns(q, kHeads * kLatent, kHeads * kRope);
    const auto key = columns(normed, kLatent, kRope);
    ops_->rope(q_rope, kHeads, kRope, 0, kRope, batch.positions, frequencies_, 1.0F);
    ops_->rope(key, 1, kRope, 0, kRope, batch.positions, frequencies_, 1.0F);
    ops_->append_kv(columns(normed, 0, kLatent), key, batch, kv);
    ops_->latent_attention(columns(q, 0, kHeads * kLatent), q_rope, kRope, kHeads, 0.1F, batch, kv,
                           attended);
    ops_->linear(attended, output_, delta);
    ops_->add_rms_norm(x, delta, norm_, 1e-6F, normed);
    mixture_weights w;
    w.router = router_;
    w.experts = experts_;
    const rows_view expert_out{expert_out_.get(), rows * 2, kHidden, kHidden};
    const router_params params{8, 1, 1, 2, 1.0F, true};
    mixed_ = ops_->mixture(normed, w, params, {{}, {}, {}, expert_out}, x);
  }

  matrix read(int rows) {
    CHECK(mixed_);
    std::vector<std::uint16_t> bits(std::size_t(rows) * kHidden);
    ops_->copy_to_host({x_.get(), rows, kHidden, kHidden}, bits.data());
    matrix result(rows, kHidden);
    std::transform(bits.begin(), bits.end(), result.data.begin(), bf16_value);
    return result;
  }

  matrix compute(const toy_batch& b) {
    queue(b);
    return read(static_cast<int>(b.ids.size()));
  }

  /// The same as a step, with something that is not of the layer behind it.
  matrix step(const toy_batch& b, std::uint64_t what = 1, const std::function<void()>& more = {}) {
    const auto rows = static_cast<std::int32_t>(b.ids.size());
    ops_->step({what, rows}, b.ids, b.view(), [&] {
      queue(b);
      if (more) {
        more();
      }
    });
    return read(rows);
  }

  /// Makes scratch memory move: rows that have to be padded.
  void grow_scratch(int rows) {
    std::mt19937 random(5);
    const auto w = place(random_weight(element_type::bf16, 16, 72, random));
    const auto in = ops_->allocate(std::size_t(rows) * 72 * 2);
    const auto out = ops_->allocate(std::size_t(rows) * 16 * 2);
    ops_->linear({in.get(), rows, 72, 72}, w, {out.get(), rows, 16, 16});
    ops_->synchronise();
  }

private:
  weight_matrix place(const test_weight& w, weight_use use = weight_use::product) {
    return ops_->place(w.view, use);
  }

  const float* vector(const std::vector<float>& values) {
    weight_matrix w;
    w.data = values.data();
    w.num_rows = 1;
    w.num_cols = static_cast<std::int32_t>(values.size());
    return static_cast<const float*>(ops_->place(w, weight_use::stored).data);
  }

  static rows_view columns(const rows_view& x, int first, int count) {
    auto result = x;
    result.data = static_cast<std::uint16_t*>(x.data) + first;
    result.num_cols = count;
    return result;
  }

  std::unique_ptr<gpu_ops> ops_;
  weight_matrix table_, query_, output_, router_;
  std::vector<expert_weights> experts_;
  const float* norm_ = nullptr;
  const float* frequencies_ = nullptr;
  std::shared_ptr<void> x_, normed_, queries_, attended_, delta_, expert_out_, pages_;
  bool mixed_ = false;
};

} // namespace

TEST_CASE("a step that is only recorded computes nothing, and is repeated from then on") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(47);
  toy_model model(random);
  const auto known = random_batch(64, random);
  const auto before = model.step(known); // scratch memory has its size
  REQUIRE(model.ops().record_only(true));
  for (const int rows : {5, 64, 5}) {
    const auto batch = random_batch(rows, random);
    model.ops().step({1, rows}, batch.ids, batch.view(), [&] { model.queue(batch); });
  }
  model.ops().record_only(false);
  CHECK(same_bits(model.read(64), before));
  CHECK(model.ops().num_repeated_steps() == 0);
  std::uint64_t repeated = 0;
  for (const int rows : {5, 64}) {
    const auto batch = random_batch(rows, random);
    const auto got = model.step(batch);
    CHECK(model.ops().num_repeated_steps() == ++repeated);
    CHECK(same_bits(got, model.compute(batch)));
  }
}

TEST_CASE("experts have to be known before a step with them is only recorded") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(48);
  toy_model model(random);
  model.step(random_batch(64, random)); // scratch memory has its size
  std::uint64_t expected_repeats = 0;
  for (const bool are_known : {true, false}) {
    INFO((are_known ? "known" : "not known"));
    const std::uint64_t what = are_known ? 2 : 3;
    model.make_experts(random);
    if (are_known) {
      model.ops().know_experts(model.experts());
    }
    model.record(5, what, random);
    // What could not be recorded beforehand is computed once, and recorded then.
    expected_repeats += are_known ? 1 : 0;
    for (int round = 0; round < 3; ++round) {
      const auto batch = random_batch(5, random);
      const auto got = model.step(batch, what);
      CHECK(model.ops().num_repeated_steps() == expected_repeats++);
      CHECK(same_bits(got, model.compute(batch)));
    }
    expected_repeats -= 1;
  }
  CHECK(model.ops().failure().empty());
}

TEST_CASE("a step that is repeated computes what it is given then") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(41);
  toy_model model(random);
  std::uint64_t expected_repeats = 0;
  std::vector<int> met(kMostRows + 1, 0);
  for (const int rows : {3, 3, 3, 1, 3, 1, 64, 1, 64, 3, 33, 64, 33, 33, 8, 9, 9, 8, 3, 1}) {
    const auto batch = random_batch(rows, random);
    const auto got = model.step(batch);
    expected_repeats += met[rows]++ > 0 ? 1 : 0;
    INFO(rows << " rows, met " << met[rows] << " times");
    CHECK(same_bits(got, model.compute(batch)));
    CHECK(model.ops().num_repeated_steps() == expected_repeats);
    // The same once more, from where nothing has changed.
    CHECK(same_bits(model.step(batch), got));
    expected_repeats += 1;
    met[rows]++;
  }
  CHECK(model.ops().num_repeated_steps() == expected_repeats);
  CHECK(model.ops().failure().empty());
}

TEST_CASE("a recorded step is recorded anew when memory has moved", "[large]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(42);
  toy_model model(random);
  for (int round = 0; round < 6; ++round) {
    for (int again = 0; again < 3; ++again) {
      // Block tables outgrow their place, too.
      const auto batch = random_batch(5, random, round % 2 == 1 ? 5000 * round : 0);
      const auto got = model.step(batch);
      INFO("round " << round << ", " << again);
      CHECK(same_bits(got, model.compute(batch)));
    }
    model.grow_scratch(100 << (2 * round));
  }
  CHECK(model.ops().num_repeated_steps() == 17);
  CHECK(model.ops().failure().empty());
}

TEST_CASE("steps of many keys keep apart, and the oldest make room", "[large]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(43);
  toy_model model(random);
  for (const int count : {50, 50, 50, 80, 80, 20, 20}) {
    for (int what = 0; what < count; ++what) {
      const int rows = 1 + what % 3;
      const auto batch = random_batch(rows, random);
      const auto got = model.step(batch, what);
      INFO("step " << what << " of " << rows << " rows");
      CHECK(same_bits(got, model.compute(batch)));
    }
  }
  CHECK(model.ops().num_repeated_steps() >= 120);
  CHECK(model.ops().failure().empty());
}

TEST_CASE("what cannot be recorded is computed all the same") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(44);
  toy_model model(random);
  const auto memory = model.ops().allocate(64);
  const rows_view rows{memory.get(), 1, 8, 8};
  for (int round = 0; round < 4; ++round) {
    int calls = 0;
    bool finite = false;
    const auto batch = random_batch(4, random);
    // It waits for the device.
    const auto got = model.step(batch, 2, [&] {
      finite = model.ops().all_finite(rows);
      ++calls;
    });
    CHECK(finite);
    CHECK(calls == (round == 1 ? 2 : 1));
    CHECK(same_bits(got, model.compute(batch)));
  }
  CHECK(model.ops().num_repeated_steps() == 0);
  // Another step does as well as before.
  for (int round = 0; round < 3; ++round) {
    const auto batch = random_batch(4, random);
    CHECK(same_bits(model.step(batch, 3), model.compute(batch)));
  }
  CHECK(model.ops().num_repeated_steps() == 2);
  CHECK(model.ops().failure().empty());
}

} // namespace kernel_tests
