#include "../model/tiny_checkpoint.hpp"
#include "deterministic.hpp"
#include "fake_boundary.hpp"

#include "troupe/actors/stage.hpp"
#include "troupe/actors/worker_parts.hpp"
#include "troupe/base/fault_point.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <chrono>
#include <cstdlib>
#include <cstring>
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
  explicit worker_fixture(std::uint32_t end_layer = 2, std::uint32_t first_layer = 0) {
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
    actor->set_first_layer(first_layer);
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
    stage_traits traits{s.plan.id(), s.pulse, false, s.seals, nullptr, nullptr};
    if (blocks_) {
      traits.boundary = std::make_shared<test::fake_boundary>(blocks_, "a/boundary", 4,
                                                              [this] { return cannot_map; });
      proto::DevicePlace block;
      block.set_block("a/boundary");
      block.set_block_bytes(1 << 16);
      traits.outbox = outbox =
        std::make_shared<boundary_outbox>(traits.boundary, block, incarnation_, 4);
    }
    compute_ =
      system.spawn<stage_compute>(s.ops, s.model, s.experts, parts_->plane->buffers(), traits);
  }

  /// From now on hidden rows may stay on the "device", whose memory this is.
  void use_device(std::shared_ptr<test::fake_blocks> blocks) {
    blocks_ = std::move(blocks);
    restart();
  }

  std::shared_ptr<boundary_outbox> outbox;
  bool cannot_map = false;

  stage_result work(stage_work what) {
    self->send(compute_, std::move(what));
    run();
    stage_result result;
    self->receive([&](const stage_result& r) { result = r; });
    return result;
  }

  /// Computes the positions from `first` of a sequence of these tokens; its pages are 3, 4, ...
  stage_result compute(std::uint32_t first, const std::vector<std::int32_t>& log,
                       frame_ptr input = nullptr, bool stays = false) {
    return work({batch_of(first, log), std::move(input), stays});
  }

  static std::shared_ptr<proto::RunMicroBatch> batch_of(std::uint32_t first,
                                                        const std::vector<std::int32_t>& log) {
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
    return batch;
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
  std::shared_ptr<test::fake_blocks> blocks_;
  stage_compute_actor compute_;
};

/// A boundary as it arrives.
frame_ptr frame_of(const stage_result& result, std::size_t num_rows, std::size_t num_cols) {
  auto frame = std::make_shared<transport::frame>();
  frame->header.set_kind(proto::BOUNDARY);
  frame->header.set_sender("node-0/worker-0");
  frame->header.set_num_rows(static_cast<std::uint32_t>(num_rows));
  frame->header.set_num_cols(static_cast<std::uint32_t>(num_cols));
  if (result.left) {
    *frame->header.mutable_place() = result.left->place;
  } else {
    transport::buffer_pool pool(1 << 20);
    frame->payload = std::move(*pool.take(result.output->size()));
    std::memcpy(frame->payload.data(), result.output->data(), result.output->size());
  }
  return frame;
}

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

TEST_CASE(
  "hidden rows that stay on the device are the same rows, and come to the host when asked") {
  worker_fixture whole;
  auto right = whole.generate(prompt, 1).back();
  auto blocks = std::make_shared<test::fake_blocks>();
  worker_fixture first(1);
  worker_fixture last(2, 1);
  auto by_host = first.compute(0, prompt);
  REQUIRE(by_host.output);
  CHECK_FALSE(by_host.left);
  auto done = last.compute(0, prompt, frame_of(by_host, prompt.size(), 12));
  REQUIRE(done.done);
  CHECK(done.done->tokens(0) == right);

  first.use_device(blocks);
  auto stayed = first.compute(0, prompt, nullptr, true);
  REQUIRE(stayed.left);
  CHECK_FALSE(stayed.output);
  CHECK_FALSE(stayed.is_copy);
  CHECK(first.outbox->num_left() == 1);
  auto frame = frame_of(stayed, prompt.size(), 12);
  auto refused = last.compute(0, prompt, frame); // it knows no device
  REQUIRE(refused.failure);
  CHECK(refused.input_is_lost);
  CHECK(refused.failure->code == error_code::unavailable);
  last.use_device(blocks);
  for (int i = 0; i < 2; ++i) {
    done = last.compute(0, prompt, frame);
    REQUIRE(done.done);
    CHECK(done.done->tokens(0) == right);
  }
  last.cannot_map = true;
  CHECK(last.compute(0, prompt, frame).input_is_lost);
  last.cannot_map = false;
  blocks->are_damaged = true;
  auto damaged = last.compute(0, prompt, frame);
  REQUIRE(damaged.failure);
  CHECK_FALSE(damaged.input_is_lost); // it failed, and is tried again as such
  blocks->are_damaged = false;

  auto copy = first.work({first.batch_of(0, prompt), nullptr, false, stayed.left});
  CHECK(copy.is_copy);
  REQUIRE(copy.output);
  REQUIRE(copy.output->size() == by_host.output->size());
  CHECK(std::memcmp(copy.output->data(), by_host.output->data(), copy.output->size()) == 0);

  // Other rows have taken their place: they are never taken for the right ones.
  stayed = {};
  copy = {};
  while (blocks->at.at("a/boundary").oldest <= frame->header.place().ticket())
    REQUIRE(first.compute(0, {5, 6, 7, 8, 9, 10}, nullptr, true).left);
  auto gone = last.compute(0, prompt, frame);
  CHECK(gone.input_is_lost);
  REQUIRE(gone.failure);
  CHECK(gone.failure->code == error_code::stale_epoch);
  CHECK_FALSE(gone.done);
  // A header that does not fit is a failure like any other.
  auto wrong = last.compute(0, prompt,
                            frame_of(stayed.left ? stayed : first.compute(0, prompt, nullptr, true),
                                     prompt.size() - 1, 12));
  REQUIRE(wrong.failure);
  CHECK_FALSE(wrong.input_is_lost);
}

TEST_CASE("an outbox without room, or memory that runs out for a copy, costs the process nothing") {
  worker_fixture first(1);
  first.use_device(std::make_shared<test::fake_blocks>());
  std::vector<std::shared_ptr<const left_rows>> kept;
  for (;;) {
    auto result = first.compute(0, prompt, nullptr, true);
    REQUIRE_FALSE(result.failure);
    if (result.output)
      break;
    kept.push_back(result.left);
    REQUIRE(kept.size() < 1000);
  }
  CHECK(kept.size() == ((1 << 16) - 256) / 512); // 9 rows of 48 bytes: two units each
  drill d(faults::point::allocation, faults::kind::fail);
  auto copy = first.work({first.batch_of(0, prompt), nullptr, false, kept.front()});
  CHECK(copy.is_copy);
  CHECK_FALSE(copy.output);
  kept.clear();
  CHECK(first.outbox->num_left() == 0);
  CHECK(first.compute(0, prompt, nullptr, true).left);
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
