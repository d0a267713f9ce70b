#include "../model/tiny_checkpoint.hpp"
#include "deterministic.hpp"

#include "troupe/actors/stage.hpp"
#include "troupe/actors/worker_parts.hpp"
#include "troupe/base/fault_point.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <vector>

#include <unistd.h>

using namespace troupe;
using namespace troupe::actors;
using namespace std::chrono_literals;

// A stage's computing half over real parts: a tiny model, KV memory of another "process".

namespace {

constexpr std::uint32_t page_tokens = 4;
constexpr std::uint32_t num_pages = 16;
constexpr std::size_t kv_bytes =
  2 * num_pages * page_tokens * 12 * 4 + memory::page_seals::bytes(num_pages);

/// Arms this process with one rule for a while.
class drill {
public:
  drill(faults::point where, faults::kind what, std::uint32_t count = 1) {
    faults::rule rule;
    rule.process = "*";
    rule.where = where;
    rule.what = what;
    rule.count = count;
    rule.seed = 5;
    REQUIRE(board_.add(rule));
    ::setenv(faults::board::variable, board_.value().c_str(), 1);
    REQUIRE(faults::arm());
  }
  ~drill() {
    ::unsetenv(faults::board::variable);
    static_cast<void>(faults::arm());
    std::filesystem::remove(file_);
  }

private:
  std::filesystem::path file_ =
    std::filesystem::temp_directory_path() / ("troupe-board-" + std::to_string(::getpid()));
  faults::board board_ = std::move(*faults::board::create(file_));
};

class worker_fixture : public test::deterministic_system {
public:
  explicit worker_fixture(std::uint32_t end_layer = 2) {
    model::test::write_file(model_.path() / "config.json", model::test::tiny_config().dump());
    auto config = model::load_model_config(model_.path());
    REQUIRE(config);
    model::test::write_sharded(model_.path(), model::test::tiny_blobs(*config));
    auto* plan = assignment_.mutable_plan();
    plan->set_model_path(model_.path());
    plan->set_kv_pages(num_pages);
    plan->set_page_tokens(page_tokens);
    plan->set_max_batch_tokens(32);
    plan->set_transport_interface("lo");
    assignment_.set_name("node-0/worker-0");
    auto* actor = assignment_.add_actors();
    actor->set_id("replica-0/stage-0");
    actor->set_kind(proto::STAGE);
    actor->set_end_layer(end_layer);
    auto* kv = assignment_.add_kv();
    kv->set_actor(actor->id());
    kv->set_bytes(kv_bytes);
    kv->set_owner_pid(static_cast<std::uint32_t>(::getpid()));
    kv->set_owner_fd(kv_.fd());
    restart();
  }
  ~worker_fixture() {
    caf::anon_send_exit(compute_, caf::exit_reason::kill);
    run();
    parts_->plane->stop();
  }

  /// The worker's successor, with the same KV memory.
  void restart() {
    if (compute_) {
      caf::anon_send_exit(compute_, caf::exit_reason::kill);
      run();
    }
    auto parts = load_parts(assignment_, ++incarnation_, *pulse_);
    if (!parts)
      FAIL(parts.error().text());
    parts_ = *parts;
    auto& s = parts_->stages.at(0);
    compute_ = system.spawn<stage_compute>(s.ops, s.model, s.experts, parts_->plane->buffers(),
                                           stage_traits{s.plan.id(), s.pulse, false, s.seals});
  }

  /// Computes the positions from `first` of a sequence of these tokens; its pages are 3, 4, ...
  stage_result compute(std::uint32_t first, const std::vector<std::int32_t>& log) {
    auto batch = std::make_shared<proto::RunMicroBatch>();
    batch->set_step(7);
    auto end = static_cast<std::uint32_t>(log.size());
    batch->add_first_positions(first);
    batch->add_row_counts(end - first);
    auto pages = (end + page_tokens - 1) / page_tokens;
    batch->add_page_counts(pages);
    for (std::uint32_t i = 0; i < pages; ++i)
      batch->add_pages(static_cast<std::int32_t>(3 + i));
    for (auto p = first; p < end; ++p)
      batch->add_tokens(log[p]);
    auto* o = batch->add_outputs();
    o->set_row(end - first - 1);
    o->set_target(-1);
    o->set_position(end);
    self->send(compute_, stage_work{batch, nullptr});
    run();
    stage_result result;
    self->receive([&](const stage_result& r) { result = r; });
    return result;
  }

  /// `count` greedy tokens behind a prompt.
  std::vector<std::int32_t> generate(std::vector<std::int32_t> log, std::size_t count) {
    std::uint32_t first = 0;
    for (std::size_t i = 0; i < count; ++i) {
      auto result = compute(first, log);
      REQUIRE(result.done != nullptr);
      first = static_cast<std::uint32_t>(log.size());
      log.push_back(result.done->tokens(0));
    }
    return log;
  }

  std::byte& kv_byte(std::size_t layer, std::size_t page, std::size_t offset) {
    auto& kv = *parts_->stages.at(0).kv;
    return kv.bytes()[(layer * num_pages + page) * page_tokens * 12 * 4 + offset];
  }

private:
  testing::temporary_directory model_;
  memory::segment kv_ = std::move(*memory::segment::create("troupe-test", kv_bytes));
  std::unique_ptr<memory::pulse> pulse_ = std::move(*memory::pulse::start(-1, 20ms));
  proto::WorkerAssignment assignment_;
  std::shared_ptr<worker_parts> parts_;
  std::uint64_t incarnation_ = 0;
  stage_compute_actor compute_;
};

const std::vector<std::int32_t> prompt{3, 9, 4, 1, 17, 30, 2, 8, 11};

} // namespace

TEST_CASE("a value that is not finite is caught, named, and gone with the next attempt") {
  worker_fixture w;
  auto right = w.generate(prompt, 1).back();
  stage_result spoilt;
  {
    drill d(faults::point::activation, faults::kind::poison);
    spoilt = w.compute(0, prompt);
    REQUIRE(spoilt.failure);
    CHECK(spoilt.failure->code == error_code::internal);
    for (auto part : {"replica-0/stage-0", "layers 0 to 1", "step 7", "not finite"})
      CHECK_THAT(spoilt.failure->cause, Catch::Contains(part));
    CHECK_FALSE(spoilt.kv_is_damaged);
    auto again = w.compute(0, prompt);
    REQUIRE(again.done);
    CHECK(again.done->tokens(0) == right);
  }
}

TEST_CASE("memory that runs out for a result fails the step and not the process") {
  worker_fixture w(1);
  drill d(faults::point::allocation, faults::kind::fail);
  auto result = w.compute(0, prompt);
  REQUIRE(result.failure);
  CHECK(result.failure->code == error_code::resource_exhausted);
  result = w.compute(0, prompt);
  CHECK_FALSE(result.failure);
  REQUIRE(result.output);
  CHECK(result.output->size() == prompt.size() * 12 * 4);
}

TEST_CASE("a bit that flips in a KV page is found, and the token log gives the same tokens again") {
  worker_fixture w;
  auto right = w.generate(prompt, 8);
  {
    drill d(faults::point::kv_pages, faults::kind::flip_bit);
    auto log = right;
    log.pop_back();
    auto damaged = w.compute(static_cast<std::uint32_t>(log.size()) - 1, log);
    REQUIRE(damaged.failure);
    CHECK(damaged.kv_is_damaged);
    CHECK_THAT(damaged.failure->cause, Catch::Contains("KV page"));
    CHECK_THAT(damaged.failure->cause, Catch::Contains("replica-0/stage-0"));
  }
  CHECK(w.generate(prompt, 8) == right);
  CHECK(w.generate({5, 6, 7, 8, 9, 10}, 8).size() == 14); // the same pages for another sequence
}

TEST_CASE("a successor verifies what it inherits before it uses it") {
  worker_fixture w;
  auto right = w.generate(prompt, 6);
  auto log = right;
  log.pop_back();
  auto first = static_cast<std::uint32_t>(log.size()) - 1;
  w.restart();
  auto same = w.compute(first, log);
  REQUIRE(same.done);
  CHECK(same.done->tokens(0) == right.back());
  w.restart();
  w.kv_byte(1, 4, 77) ^= std::byte{1}; // positions 4 to 7, second layer
  auto damaged = w.compute(first, log);
  REQUIRE(damaged.failure);
  CHECK(damaged.kv_is_damaged);
  CHECK_THAT(damaged.failure->cause, Catch::Contains("KV page 4"));
  CHECK(w.compute(first, log).kv_is_damaged); // the report may have been lost
  CHECK(w.generate(prompt, 6) == right);
}

TEST_CASE("KV memory that is not there is an error that names it") {
  worker_fixture w;
  proto::WorkerAssignment wrong;
  auto pulse = memory::pulse::start(-1, 20ms);
  REQUIRE(pulse);
  wrong.mutable_plan()->set_model_path("/nonexistent");
  auto parts = load_parts(wrong, 1, **pulse);
  REQUIRE_FALSE(parts);
  CHECK(parts.error().code == error_code::invalid_model);
}

TEST_CASE("what opening the transport costs a worker that starts", "[.cost]") {
  for (int i = 0; i < 10; ++i) {
    auto before = std::chrono::steady_clock::now();
    auto plane = data_plane::prepare("lo");
    auto opened = std::chrono::steady_clock::now();
    (*plane)->identify("w", 1);
    auto named = std::chrono::steady_clock::now();
    std::cout << "prepare " << std::chrono::duration<double, std::milli>(opened - before).count()
              << " ms, identify "
              << std::chrono::duration<double, std::milli>(named - opened).count() << " ms\n";
  }
}
