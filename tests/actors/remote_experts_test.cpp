#include "troupe/actors/expert_group.hpp"
#include "troupe/actors/remote_experts.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/model/rows.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

using namespace troupe;
using namespace troupe::actors;
using namespace std::chrono_literals;

// A stage's side of expert calls against processes that answer, are silent or refuse, over the real
// transport.

namespace {

constexpr std::int32_t num_cols = 8;
constexpr std::int32_t num_rows = 5;
constexpr auto timeout = 150ms; // far more than an answer takes, on a busy machine too

/// A process with a copy of the one group. What it computes for a task is the row times
/// (expert + 1) plus layer.
struct copy_process {
  std::shared_ptr<data_plane> plane;
  std::atomic<int> num_asked{0};
  std::atomic<bool> is_silent{false};
  std::atomic<int> refusals_left{0};

  explicit copy_process(const std::string& name) {
    plane = *data_plane::start(name, 1, "lo");
    plane->route_dispatch(0, [this](frame_ptr dispatch) { answer(*dispatch); });
  }

  void answer(const transport::frame& dispatch) {
    ++num_asked;
    if (is_silent)
      return;
    const auto& asked = dispatch.header;
    proto::FrameHeader header;
    header.set_actor_index(asked.reply_index());
    header.set_epoch(asked.epoch());
    header.set_call(asked.call());
    data_plane::target back{asked.sender(), asked.sender_incarnation()};
    if (refusals_left > 0) {
      --refusals_left;
      header.set_kind(proto::REFUSED);
      header.set_error_code(static_cast<std::uint32_t>(error_code::resource_exhausted));
      plane->send(back, header, {});
      return;
    }
    std::vector<kernels::expert_task> tasks(asked.num_tasks());
    auto task_bytes = tasks.size() * sizeof(kernels::expert_task);
    std::memcpy(tasks.data(), dispatch.payload.data(), task_bytes);
    auto reply =
      std::make_shared<transport::buffer>(*plane->buffers().take(tasks.size() * num_cols * 4));
    const auto* rows = reinterpret_cast<const float*>(dispatch.payload.data() + task_bytes);
    auto* out = reinterpret_cast<float*>(reply->data());
    for (std::size_t t = 0; t < tasks.size(); ++t)
      for (std::int32_t c = 0; c < num_cols; ++c)
        out[t * num_cols + c] = rows[tasks[t].row * num_cols + c] * (tasks[t].expert + 1.0F)
                                + static_cast<float>(asked.layer());
    header.set_kind(proto::COMBINE);
    plane->send(back, header, {reply->bytes(), reply});
  }
};

/// A caller and two copies of one group of four experts: the first copy is on the caller's node.
struct exchange_fixture {
  std::shared_ptr<data_plane> plane = *data_plane::start("node-0/worker-0", 1, "lo");
  copy_process near{"node-0/worker-1"};
  copy_process far{"node-1/worker-0"};
  proto::ClusterView view;
  std::unique_ptr<kernels::ops> ops = kernels::make_cpu_ops(1);
  std::unique_ptr<remote_experts> experts;
  std::vector<float> input = std::vector<float>(num_rows * num_cols);

  explicit exchange_fixture(std::chrono::milliseconds patience = 3s) {
    view.set_version(1);
    view.set_epoch(1);
    add_worker("node-0", "node-0/worker-0", *plane, false);
    add_worker("node-0", "node-0/worker-1", *near.plane, true);
    add_worker("node-1", "node-1/worker-0", *far.plane, true);
    auto dispatch = model::dispatch_plan::make(std::vector<model::expert_range>{{0, 4}}, 4, 64, 2);
    experts = std::make_unique<remote_experts>(plane, *ops, std::move(*dispatch), std::pair{0U, 0U},
                                               1, call_limits{patience, timeout});
    publish();
    for (std::size_t i = 0; i < input.size(); ++i)
      input[i] = static_cast<float>(i);
  }
  ~exchange_fixture() {
    for (const auto& each : {plane, near.plane, far.plane})
      each->stop();
  }

  void add_worker(const std::string& node, const std::string& name, data_plane& of,
                  bool has_group) {
    auto* w = view.add_workers();
    w->mutable_plan()->set_name(name);
    w->mutable_plan()->set_node(node);
    w->set_incarnation(1);
    w->set_state(proto::RUNNING);
    w->set_transport_address(of.address());
    if (has_group)
      w->mutable_plan()->add_actors()->set_kind(proto::EXPERT_GROUP);
  }

  void publish() {
    view.set_version(view.version() + 1);
    for (const auto& each : {plane, near.plane, far.plane})
      each->take_view(view);
  }

  /// One layer; true when every value is right.
  expected<bool> call(std::int32_t layer) {
    kernels::rows_view x{input.data(), num_rows, num_cols, num_cols};
    std::vector<std::int32_t> chosen;
    for (std::int32_t r = 0; r < num_rows; ++r)
      chosen.insert(chosen.end(), {r % 4, (r + 1) % 4});
    std::vector<float> output(chosen.size() * num_cols);
    std::vector<std::int32_t> rows(chosen.size());
    if (auto begun = experts->begin(layer, x, chosen, 2); !begun)
      return tl::unexpected(begun.error());
    kernels::rows_view out{output.data(), static_cast<std::int32_t>(chosen.size()), num_cols,
                           num_cols};
    if (auto done = experts->finish(out, rows); !done)
      return tl::unexpected(done.error());
    for (std::size_t i = 0; i < chosen.size(); ++i)
      for (std::int32_t c = 0; c < num_cols; ++c) {
        auto wanted = input[i / 2 * num_cols + static_cast<std::size_t>(c)]
                        * (static_cast<float>(chosen[i]) + 1.0F)
                      + static_cast<float>(layer);
        if (output[static_cast<std::size_t>(rows[i]) * num_cols + static_cast<std::size_t>(c)]
            != wanted)
          return false;
      }
    return true;
  }

  void check_layers(std::int32_t count) {
    for (std::int32_t layer = 0; layer < count; ++layer) {
      auto right = call(layer);
      if (!right)
        FAIL(right.error().text());
      REQUIRE(*right);
    }
  }
};

} // namespace

TEST_CASE("dispatches go to the box while somebody attends to it, and none is left behind") {
  dispatch_box box;
  auto dispatch = std::make_shared<transport::frame>();
  CHECK(!box.offer(dispatch));
  box.open();
  CHECK(box.offer(dispatch));
  CHECK(box.offer(dispatch));
  box.close();
  CHECK(!box.offer(dispatch));
  std::vector<frame_ptr> taken;
  CHECK(box.frames().take(taken, std::chrono::steady_clock::now()));
  CHECK(taken.size() == 2);
  CHECK(!box.frames().take(taken, std::chrono::steady_clock::now()));
  CHECK(taken.empty());
}

TEST_CASE("the copy on the caller's node is asked, and only that one") {
  exchange_fixture f;
  f.check_layers(20);
  CHECK(f.near.num_asked >= 18);
  CHECK(f.far.num_asked <= 2);
}

TEST_CASE("a copy that is silent costs one time-out, not one a layer") {
  exchange_fixture f;
  f.check_layers(2);
  f.near.is_silent = true;
  auto before = std::chrono::steady_clock::now();
  f.check_layers(20);
  auto took = std::chrono::steady_clock::now() - before;
  CHECK(took >= timeout);
  CHECK(took < 10 * timeout);
  CHECK(f.near.num_asked < 6);
  CHECK(f.far.num_asked >= 20);
  // It is asked again when it has been avoided for a while, and again trusted if it answers.
  f.near.is_silent = false;
  auto asked_before = f.near.num_asked.load();
  auto deadline = std::chrono::steady_clock::now() + 5 * data_plane::suspicion;
  while (f.near.num_asked == asked_before) {
    REQUIRE(std::chrono::steady_clock::now() < deadline);
    f.check_layers(1);
  }
}

TEST_CASE("another incarnation of a silent copy is not avoided") {
  exchange_fixture f;
  f.near.is_silent = true;
  f.check_layers(3);
  CHECK(f.near.num_asked <= 2);
  f.near.plane->stop();
  copy_process next("node-0/worker-1");
  next.plane->stop();
  next.plane = *data_plane::start("node-0/worker-1", 2, "lo");
  next.plane->route_dispatch(0, [&](frame_ptr dispatch) { next.answer(*dispatch); });
  auto* w = f.view.mutable_workers(1);
  w->set_incarnation(2);
  w->set_transport_address(next.plane->address());
  f.publish();
  next.plane->take_view(f.view);
  f.check_layers(3);
  CHECK(next.num_asked >= 2);
  next.plane->stop();
}

TEST_CASE("the only copy is asked again until it answers or the deadline passes") {
  exchange_fixture f(2500ms);
  f.view.mutable_workers(2)->set_state(proto::LOST);
  f.publish();
  f.near.is_silent = true;
  auto late = f.call(0);
  REQUIRE_FALSE(late);
  CHECK(late.error().code == error_code::deadline_exceeded);
  CHECK(f.near.num_asked >= 3);
  CHECK(f.near.num_asked <= 6);
  // It answers from the second time on that it is asked.
  std::thread waker([&, asked_before = f.near.num_asked.load()] {
    auto deadline = std::chrono::steady_clock::now() + 5s;
    while (f.near.num_asked == asked_before && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    f.near.is_silent = false;
  });
  f.check_layers(1);
  waker.join();
}

TEST_CASE("a refusal is tried once more, and the second ends the step") {
  exchange_fixture f;
  f.near.refusals_left = 1;
  f.check_layers(1);
  CHECK(f.far.num_asked >= 1); // rather another copy
  f.near.refusals_left = 1;
  f.far.refusals_left = 1;
  auto refused = f.call(0);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().cause.find("refused layer 0") != std::string::npos);
  f.check_layers(3);
}

TEST_CASE("whatever befalls the frames of calls, every answer is right") {
  exchange_fixture f;
  f.check_layers(1);
  auto file =
    std::filesystem::temp_directory_path() / ("troupe-board-" + std::to_string(::getpid()));
  auto board = faults::board::create(file);
  REQUIRE(board);
  ::setenv(faults::board::variable, board->value().c_str(), 1);
  REQUIRE(faults::arm());
  using faults::kind;
  std::uint64_t seed = 1;
  for (auto what : {kind::drop, kind::corrupt, kind::truncate, kind::duplicate, kind::reorder,
                    kind::delay, kind::wrong_epoch}) {
    CAPTURE(faults::to_string(what));
    faults::rule rule;
    rule.process = "*";
    rule.what = what;
    rule.probability = 0.1;
    rule.delay_ms = 20;
    rule.seed = seed++;
    auto number = board->add(rule);
    REQUIRE(number);
    f.check_layers(30);
    CHECK(board->num_hits(*number) > 0);
    board->remove(*number);
  }
  board->clear();
  ::unsetenv(faults::board::variable);
  REQUIRE(faults::arm());
  std::filesystem::remove(file);
}
