#include "deterministic.hpp"
#include "fake_boundary.hpp"

#include "troupe/actors/scheduler.hpp"
#include "troupe/actors/stage.hpp"
#include "troupe/base/fault_point.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include <unistd.h>

using namespace troupe;
using namespace troupe::messages;
using namespace std::chrono_literals;

// The real scheduler and the real stages, with a fake computation, in one thread: any order of
// messages, any moment of death.

namespace {

constexpr std::int32_t vocabulary = 50;

/// The "model": the next token depends on every token so far, through a running hash kept in "KV"
/// by page and position, as the real one is.
struct fake_kv {
  std::map<std::pair<std::int32_t, std::uint32_t>, std::uint64_t> state; ///< (page, offset)
};

std::uint64_t mix(std::uint64_t h, std::uint64_t x) {
  h = (h ^ x) * 0x9E3779B97F4A7C15U;
  return h ^ (h >> 29U);
}

std::vector<std::int32_t> expected_tokens(const std::vector<std::int32_t>& prompt,
                                          std::size_t count) {
  std::uint64_t h = 0;
  for (auto t : prompt)
    h = mix(h, static_cast<std::uint64_t>(t));
  std::vector<std::int32_t> result;
  while (result.size() < count) {
    auto token = static_cast<std::int32_t>(h % vocabulary);
    result.push_back(token);
    h = mix(h, static_cast<std::uint64_t>(token));
  }
  return result;
}

constexpr std::uint32_t page_tokens = 4;
constexpr std::uint32_t resend_ms = 300;

actors::stage_result damaged(std::uint64_t step) {
  return {step, nullptr, nullptr,
          std::make_shared<error>(error{error_code::internal, "a damaged page", "", ""}), true};
}

/// Computes one stage's part. Only the last stage looks at KV and draws; the others hand the tokens
/// on, so that a lost or mixed-up boundary shows as wrong tokens.
actors::stage_result compute(const actors::stage_work& work, bool is_first, bool is_last,
                             fake_kv& kv, transport::buffer_pool& buffers) {
  const auto& batch = *work.batch;
  actors::stage_result result;
  result.step = batch.step();
  std::vector<std::int32_t> hidden(batch.tokens().begin(), batch.tokens().end());
  if (!is_first) {
    REQUIRE(work.input != nullptr);
    REQUIRE(work.input->payload.size() == hidden.size() * sizeof(std::int32_t));
    std::memcpy(hidden.data(), work.input->payload.data(), work.input->payload.size());
  }
  if (!is_last) {
    result.output = std::make_shared<transport::buffer>(
      std::move(*buffers.take(hidden.size() * sizeof(std::int32_t))));
    std::memcpy(result.output->data(), hidden.data(), result.output->size());
    return result;
  }
  std::map<std::uint32_t, std::uint64_t> hash_of_row;
  std::uint32_t row = 0;
  int first_page = 0;
  for (int s = 0; s < batch.first_positions_size(); ++s) {
    auto page_of = [&](std::uint32_t position) {
      return batch.pages(first_page + static_cast<int>(position / page_tokens));
    };
    for (std::uint32_t i = 0; i < batch.row_counts(s); ++i, ++row) {
      auto position = batch.first_positions(s) + i;
      std::uint64_t before = 0;
      if (position > 0) {
        auto known = kv.state.find({page_of(position - 1), (position - 1) % page_tokens});
        if (known == kv.state.end())
          return damaged(batch.step());
        before = known->second;
      }
      auto h = mix(before, static_cast<std::uint64_t>(hidden[row]));
      kv.state[{page_of(position), position % page_tokens}] = h;
      hash_of_row[row] = h;
    }
    first_page += static_cast<int>(batch.page_counts(s));
  }
  result.done = std::make_shared<proto::MicroBatchDone>();
  result.done->set_step(batch.step());
  for (const auto& o : batch.outputs()) {
    result.done->add_tokens(static_cast<std::int32_t>(hash_of_row.at(o.row()) % vocabulary));
    result.done->add_logprobs(0);
    result.done->add_top_counts(0);
  }
  return result;
}

struct client_log {
  std::map<schedule::request_id, std::vector<std::int32_t>> tokens;
  std::map<schedule::request_id, schedule::finish_reason> finished;
  std::map<schedule::request_id, error> errors;
  std::vector<proto::ReplayReport> replays;
};

actors::scheduler_client::behavior_type client(actors::scheduler_client::pointer,
                                               std::shared_ptr<client_log> log) {
  return {[log](const actors::progress_ptr& made) {
            for (const auto& event : made->events) {
              if (event.has_token) {
                auto& tokens = log->tokens[event.request];
                REQUIRE(event.token_index == tokens.size()); // exactly once, in order
                tokens.push_back(event.token.token);
              }
              if (event.finish != schedule::finish_reason::none)
                REQUIRE(log->finished.emplace(event.request, event.finish).second);
            }
            for (const auto& [id, why] : made->errors)
              REQUIRE(log->errors.emplace(id, why).second);
          },
          [](const actors::replica_report&) {},
          [log](const replay_report& report) { log->replays.push_back(report.body); }};
}

/// What computing threads are to fail with.
struct failures {
  int num_computations = 0;
  int num_damaged_pages = 0; ///< of the last stage; found when they are read
};

/// What is lost between processes.
struct losses {
  std::mt19937_64 random;
  double probability = 0; ///< of each message and frame
  int num_left = 0;

  bool strikes() {
    if (num_left == 0 || std::uniform_real_distribution<double>()(random) >= probability)
      return false;
    --num_left;
    return true;
  }
};

using link_actor = stage_actor::extend_with<scheduler_actor>;

/// The connection between a scheduler and a stage: hands on in order, or loses.
link_actor::behavior_type connection(link_actor::pointer self, actors::stage_local stage,
                                     std::shared_ptr<losses> lost) {
  auto scheduler = std::make_shared<scheduler_actor>();
  return {[=](const run_micro_batch& asked) {
            *scheduler = caf::actor_cast<scheduler_actor>(self->current_sender());
            if (!lost->strikes())
              self->send(stage, asked);
          },
          [=](const micro_batch_done& done) {
            if (!lost->strikes())
              self->send(*scheduler, done);
          },
          [=](const micro_batch_failed& failed) {
            if (!lost->strikes())
              self->send(*scheduler, failed);
          }};
}

actors::stage_compute_actor::behavior_type
fake_compute(actors::stage_compute_actor::pointer self, bool is_first, bool is_last,
             std::shared_ptr<fake_kv> kv, std::shared_ptr<failures> fails,
             std::shared_ptr<bool> alive, std::shared_ptr<test::fake_hand_over> rows) {
  return {[=](const actors::stage_work& work) {
    if (!*alive)
      return; // the process is dead, its computing thread with it
    transport::buffer_pool buffers(1 << 20);
    auto asker = caf::actor_cast<actors::stage_local>(self->current_sender());
    if (work.left)
      return self->send(asker, rows->work(work, {}));
    if (fails->num_damaged_pages > 0 && is_last && work.batch->first_positions(0) > 0) {
      --fails->num_damaged_pages;
      auto last = work.batch->first_positions(0) - 1;
      kv->state.erase(
        {work.batch->pages(static_cast<int>(last / page_tokens)), last % page_tokens});
    }
    if (fails->num_computations > 0 && fails->num_computations-- > 0)
      self->send(asker, actors::stage_result{
                          work.batch->step(), nullptr, nullptr,
                          std::make_shared<error>(error{error_code::internal, "a NaN", "", ""})});
    else
      self->send(asker, rows->work(work, [&](const actors::stage_work& whole) {
        return compute(whole, is_first, is_last, *kv, buffers);
      }));
  }};
}

class pipeline : public test::deterministic_system {
public:
  /// `device`: of all stages.
  pipeline(std::uint32_t num_stages, std::uint32_t num_pages, const std::string& device = "cpu:0")
    : num_stages_(num_stages) {
    proto::ClusterPlan plan;
    plan.set_num_replicas(1);
    plan.set_num_stages(num_stages);
    plan.set_kv_pages(num_pages);
    plan.set_page_tokens(page_tokens);
    plan.set_max_batch_tokens(16);
    plan.set_max_batch_sequences(8);
    plan.set_prefill_chunk_tokens(5);
    plan.set_max_queue(64);
    plan.set_max_context(64);
    plan.set_request_timeout_s(60);
    plan.set_resend_ms(resend_ms);
    view_.set_version(1);
    view_.set_epoch(1);
    for (std::uint32_t i = 0; i < num_stages; ++i) {
      auto* w = view_.add_workers();
      w->mutable_plan()->set_name("worker-" + std::to_string(i));
      w->mutable_plan()->set_node("node-0");
      w->mutable_plan()->set_device(device);
      auto* a = w->mutable_plan()->add_actors();
      a->set_kind(proto::STAGE);
      a->set_id("stage-" + std::to_string(i));
      a->set_index(i);
      auto* memory = w->add_kv();
      memory->set_actor(a->id());
      memory->set_generation(1);
      kv_.push_back(std::make_shared<fake_kv>());
      stages_.emplace_back();
      links_.emplace_back();
      alive_.emplace_back();
      start_stage(i);
    }
    client_ = system.spawn(client, log_);
    scheduler_ = system.spawn<actors::scheduler>(0U, std::uint64_t{1}, cluster_plan{plan}, client_,
                                                 std::make_shared<connector>(*this));
    publish();
  }

  ~pipeline() {
    for (auto& s : stages_)
      if (s)
        caf::anon_send_exit(s, caf::exit_reason::kill);
    for (auto& l : links_)
      caf::anon_send_exit(l, caf::exit_reason::kill);
    caf::anon_send_exit(scheduler_, caf::exit_reason::kill);
    caf::anon_send_exit(client_, caf::exit_reason::kill);
    run();
  }

  void submit(schedule::request_id id, std::vector<std::int32_t> prompt, std::uint32_t max_tokens,
              schedule::time_point deadline = schedule::time_point::max()) {
    auto r = std::make_shared<schedule::request>();
    r->id = id;
    r->prompt = std::move(prompt);
    r->max_tokens = max_tokens;
    r->deadline = deadline;
    caf::anon_send(scheduler_, actors::submission(std::move(r)));
  }

  void cancel(schedule::request_id id) {
    caf::anon_send(scheduler_, actors::cancel_atom::value, id);
  }

  /// The stage's process dies: whatever was on its way to it is lost, its KV memory is not.
  void kill(std::uint32_t i) {
    *alive_[i] = false;
    caf::anon_send_exit(stages_[i], caf::exit_reason::kill);
    caf::anon_send_exit(links_[i], caf::exit_reason::kill);
    auto* w = view_.mutable_workers(static_cast<int>(i));
    w->set_state(proto::LOST);
    view_.set_epoch(view_.epoch() + 1);
    publish();
  }

  /// The whole node dies: its KV memory too.
  void kill_with_memory(std::uint32_t i) {
    kill(i);
    kv_[i]->state.clear();
    auto* memory = view_.mutable_workers(static_cast<int>(i))->mutable_kv(0);
    memory->set_generation(memory->generation() + 1);
  }

  /// Gives a worker up for good.
  void give_up(std::uint32_t i) {
    kill(i);
    auto* w = view_.mutable_workers(static_cast<int>(i));
    w->set_state(proto::FAILED);
    w->mutable_error()->set_cause("it died too often");
    publish();
  }

  void restart(std::uint32_t i) {
    start_stage(i);
    publish();
  }

  bool is_lost(std::uint32_t i) const {
    return view_.workers(static_cast<int>(i)).state() != proto::RUNNING;
  }
  const client_log& log() const { return *log_; }
  std::uint64_t epoch() const { return view_.epoch(); }
  /// The next `count` computations fail.
  void fail_computations(int count) { fails_->num_computations = count; }
  void damage_page() { ++fails_->num_damaged_pages; }
  losses& lost() { return *lost_; }
  test::fake_blocks& blocks() { return *blocks_; }
  /// The stage's present process cannot map the memory of others.
  void cut_from_devices(std::uint32_t i, bool on = true) { *cut_[i] = on; }
  /// The stage is on another host from the next view on.
  void move(std::uint32_t i, const std::string& node) {
    view_.mutable_workers(static_cast<int>(i))->mutable_plan()->set_node(node);
    publish();
  }
  std::size_t num_left(std::uint32_t i) const { return hand_overs_[i]->num_left(); }
  /// Frames with a payload that a stage was sent.
  int num_payloads() const { return num_payloads_; }
  /// Of every process from now on.
  void room_of_outboxes(std::size_t bytes) { room_ = bytes; }
  const actors::scheduler_local& scheduler_handle() const { return scheduler_; }

private:
  struct connector final : actors::stage_connector {
    explicit connector(pipeline& p) : owner(p) {}
    void connect(actors::scheduler_local::base*, const proto::WorkerView& worker, std::uint32_t,
                 std::uint32_t index, std::function<void(const stage_actor&)> on_connected,
                 std::function<void(const error&)> on_error) override {
      if (owner.is_lost(index)
          || owner.view_.workers(static_cast<int>(index)).incarnation() != worker.incarnation())
        on_error(error{error_code::peer_lost, "gone", "", ""});
      else
        on_connected(caf::actor_cast<stage_actor>(owner.links_[index]));
    }
    pipeline& owner;
  };

  /// Delivers boundaries to the addressed incarnation, or to nobody.
  struct wire final : actors::frame_sink {
    wire(pipeline& p, std::uint32_t stage, std::uint64_t life)
      : owner(p), from(stage), incarnation(life) {}
    void send(const actors::frame_target& to, proto::FrameHeader header,
              transport::payload_view payload) override {
      auto index = header.actor_index();
      if (owner.is_lost(index)
          || owner.view_.workers(static_cast<int>(index)).incarnation() != to.incarnation
          || owner.lost_->strikes())
        return;
      auto frame = std::make_shared<transport::frame>();
      frame->header = std::move(header);
      frame->header.set_sender(owner.view_.workers(static_cast<int>(from)).plan().name());
      frame->header.set_sender_incarnation(incarnation);
      owner.num_payloads_ += payload.bytes.empty() ? 0 : 1;
      transport::buffer_pool buffers(1 << 20);
      frame->payload = std::move(*buffers.take(payload.bytes.size()));
      std::copy(payload.bytes.begin(), payload.bytes.end(), frame->payload.data());
      caf::anon_send(owner.stages_[index], actors::frame_ptr(std::move(frame)));
    }
    pipeline& owner;
    std::uint32_t from;
    std::uint64_t incarnation;
  };

  void start_stage(std::uint32_t i) {
    auto* w = view_.mutable_workers(static_cast<int>(i));
    w->set_incarnation(w->incarnation() + 1);
    w->set_state(proto::RUNNING);
    alive_[i] = std::make_shared<bool>(true);
    hand_overs_.resize(num_stages_);
    cut_.resize(num_stages_);
    cut_[i] = std::make_shared<bool>(false);
    hand_overs_[i] = std::make_shared<test::fake_hand_over>(
      blocks_, "stage-" + std::to_string(i), w->incarnation(), sizeof(std::int32_t), room_,
      [cut = cut_[i]] { return *cut; });
    auto compute = system.spawn(fake_compute, i == 0, i + 1 == num_stages_, kv_[i], fails_,
                                alive_[i], hand_overs_[i]);
    stages_[i] = system.spawn<actors::stage>(
      0U, i, num_stages_, 1U, std::make_shared<wire>(*this, i, w->incarnation()), compute);
    links_[i] = system.spawn(connection, stages_[i], lost_);
  }

  void publish() {
    view_.set_version(view_.version() + 1);
    for (std::uint32_t i = 0; i < num_stages_; ++i)
      if (!is_lost(i))
        caf::anon_send(stages_[i], cluster_view{view_});
    caf::anon_send(scheduler_, cluster_view{view_});
  }

  std::uint32_t num_stages_;
  proto::ClusterView view_;
  std::vector<std::shared_ptr<fake_kv>> kv_;
  std::vector<actors::stage_local> stages_;
  std::vector<link_actor> links_;            ///< by stage, the scheduler's way to it
  std::vector<std::shared_ptr<bool>> alive_; ///< by stage, of its present incarnation
  std::shared_ptr<client_log> log_ = std::make_shared<client_log>();
  std::shared_ptr<failures> fails_ = std::make_shared<failures>();
  std::shared_ptr<losses> lost_ = std::make_shared<losses>();
  std::shared_ptr<test::fake_blocks> blocks_ = std::make_shared<test::fake_blocks>();
  std::vector<std::shared_ptr<test::fake_hand_over>> hand_overs_; ///< by stage
  std::vector<std::shared_ptr<bool>> cut_;                        ///< likewise
  std::size_t room_ = 1 << 20;
  int num_payloads_ = 0;
  actors::scheduler_client client_;
  actors::scheduler_local scheduler_;
};

} // namespace

TEST_CASE("requests run through the stages and give the tokens of the model") {
  pipeline p(2, 64);
  p.submit(1, {3, 1, 4, 1, 5, 9, 2}, 10);
  p.submit(2, {2, 7}, 5);
  p.run();
  CHECK(p.log().tokens.at(1) == expected_tokens({3, 1, 4, 1, 5, 9, 2}, 10));
  CHECK(p.log().tokens.at(2) == expected_tokens({2, 7}, 5));
  CHECK(p.log().finished.at(1) == schedule::finish_reason::length);
}

TEST_CASE("nothing is sent while a stage is missing, and everything goes on when it is back") {
  pipeline p(2, 64);
  p.run();
  p.kill(1);
  p.run();
  p.submit(1, {1, 2, 3}, 4);
  p.run();
  CHECK(p.log().tokens.empty());
  p.restart(1);
  p.run();
  CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 4));
  CHECK(p.log().replays.back().phase() == proto::SERVING);
  CHECK(p.log().replays.back().epoch() == p.epoch());
}

TEST_CASE("a step that cannot be computed fails its requests with the reason and no others") {
  pipeline p(2, 64);
  p.run();
  p.fail_computations(2); // the first attempt and the one after it
  p.submit(1, {1, 2, 3}, 4);
  p.run();
  p.submit(2, {4, 5}, 3);
  p.run();
  REQUIRE(p.log().errors.count(1) == 1);
  CHECK(p.log().errors.at(1).cause == "a NaN");
  CHECK(p.log().tokens.at(2) == expected_tokens({4, 5}, 3));
}

TEST_CASE("a computation that fails once is tried again and nobody notices") {
  for (std::uint32_t num_stages : {1U, 2U, 3U}) {
    CAPTURE(num_stages);
    pipeline p(num_stages, 64);
    p.run();
    p.fail_computations(1);
    p.submit(1, {1, 2, 3}, 4);
    p.run();
    p.advance(1s); // the input of a later stage is asked for once more, too
    CHECK(p.log().errors.empty());
    CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 4));
  }
}

TEST_CASE("a damaged KV page costs a computation from the token logs and no request") {
  for (std::uint32_t num_stages : {1U, 2U, 3U}) {
    CAPTURE(num_stages);
    pipeline p(num_stages, 64);
    p.submit(1, {1, 2, 3, 4, 5, 6}, 20);
    p.submit(2, {7, 8}, 20);
    std::mt19937_64 random(1);
    for (int i = 0; i < 60; ++i)
      p.run_one(random);
    p.damage_page();
    p.run();
    CHECK(p.log().errors.empty());
    CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3, 4, 5, 6}, 20));
    CHECK(p.log().tokens.at(2) == expected_tokens({7, 8}, 20));
  }
}

TEST_CASE("whatever is lost on its way is sent again after resend_ms") {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    CAPTURE(seed);
    pipeline p(3, 64);
    p.run();
    p.lost().random.seed(seed);
    p.lost().probability = 0.2;
    p.lost().num_left = 1;
    p.submit(1, {1, 2, 3}, 4);
    p.run();
    bool was_lost = p.lost().num_left == 0;
    CHECK(p.log().finished.empty() == was_lost);
    p.advance(200ms);
    CHECK(p.log().finished.empty() == was_lost); // not too early
    p.advance(100ms);
    p.advance(50ms);
    CHECK(p.log().finished.size() == 1);
    CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 4));
  }
}

TEST_CASE("whatever a drill does to control messages, every token comes once") {
  auto file =
    std::filesystem::temp_directory_path() / ("troupe-board-" + std::to_string(::getpid()));
  auto board = faults::board::create(file);
  REQUIRE(board);
  ::setenv(faults::board::variable, board->value().c_str(), 1);
  REQUIRE(faults::arm());
  using faults::kind;
  for (auto what : {kind::drop, kind::delay, kind::duplicate, kind::reorder})
    for (auto peer : {"frontend", "worker-*"}) {
      CAPTURE(faults::to_string(what), peer);
      faults::rule rule;
      rule.process = "*";
      rule.peer = peer;
      rule.where = faults::point::message_receive;
      rule.what = what;
      rule.probability = 0.3;
      rule.count = 12;
      rule.delay_ms = 70;
      auto number = board->add(rule);
      REQUIRE(number);
      pipeline p(2, 64);
      for (schedule::request_id id = 1; id <= 6; ++id)
        p.submit(id, {static_cast<std::int32_t>(id), 2, 3}, 10);
      for (int i = 0; i < 600; ++i)
        p.advance(50ms);
      CHECK(board->num_hits(*number) > 2);
      CHECK(p.log().errors.empty());
      for (schedule::request_id id = 1; id <= 6; ++id)
        CHECK(p.log().tokens.at(id) == expected_tokens({static_cast<std::int32_t>(id), 2, 3}, 10));
      board->remove(*number);
    }
  // A cut is as if nothing came.
  auto cut = board->cut("frontend", "*");
  REQUIRE(cut);
  pipeline p(2, 64);
  p.submit(1, {1, 2, 3}, 4);
  for (int i = 0; i < 20; ++i)
    p.advance(50ms);
  CHECK(p.log().tokens.empty());
  board->remove(*cut);
  for (int i = 0; i < 60; ++i)
    p.advance(50ms);
  CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 4));
  ::unsetenv(faults::board::variable);
  REQUIRE(faults::arm());
  std::filesystem::remove(file);
}

TEST_CASE("KV memory is known by its actor, wherever that runs") {
  pipeline p(2, 64);
  p.submit(1, {1, 2, 3}, 40);
  std::mt19937_64 random(1);
  for (int i = 0; i < 60; ++i)
    p.run_one(random);
  p.kill_with_memory(1);
  p.run();
  p.restart(1);
  p.run();
  CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 40));
  CHECK(p.log().errors.empty());
}

TEST_CASE("a request past its deadline ends with a typed error") {
  pipeline p(1, 64);
  p.run();
  p.kill(0);
  p.submit(1, {1}, 5, std::chrono::steady_clock::now() - 1s);
  p.run();
  p.advance(60ms);
  REQUIRE(p.log().errors.count(1) == 1);
  CHECK(p.log().errors.at(1).code == error_code::deadline_exceeded);
}

TEST_CASE("answers of an older epoch and of unknown steps are dropped") {
  pipeline p(1, 64);
  p.submit(1, {1, 2}, 3);
  p.run();
  auto before = p.log().tokens.at(1);
  proto::MicroBatchDone stale;
  stale.set_epoch(p.epoch() - 1);
  stale.set_step((std::uint64_t{1} << 40U) + 1);
  stale.add_tokens(7);
  caf::anon_send(p.scheduler_handle(), micro_batch_done{stale});
  stale.set_epoch(p.epoch());
  caf::anon_send(p.scheduler_handle(), micro_batch_done{stale}); // arrays of different lengths, too
  p.run();
  CHECK(p.log().tokens.at(1) == before);
}

TEST_CASE("a replica that is given up fails what it has and what comes, with the reason") {
  pipeline p(2, 64);
  p.submit(1, {1, 2, 3}, 40);
  std::mt19937_64 random(1);
  for (int i = 0; i < 40; ++i)
    p.run_one(random);
  p.give_up(1);
  p.run();
  REQUIRE(p.log().errors.count(1) == 1);
  CHECK(p.log().errors.at(1).code == error_code::unavailable);
  CHECK(p.log().errors.at(1).cause == "it died too often");
  p.submit(2, {1}, 1);
  p.run();
  CHECK(p.log().errors.count(2) == 1);
}

TEST_CASE("rows stay on the device where both stages are on GPUs of one node, and only there") {
  for (std::string device : {"cpu:0", "cuda:0"}) {
    CAPTURE(device);
    bool stay = device == "cuda:0";
    pipeline p(3, 64, device);
    p.run();
    p.submit(1, {1, 2, 3}, 8);
    p.run();
    CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 8));
    CHECK(p.blocks().num_fetched == (stay ? 16 : 0));
    CHECK(p.num_payloads() == (stay ? 0 : 16));
    CHECK(p.num_left(0) <= 1); // the last step is dropped with the next one
    p.move(2, "node-1");
    p.submit(2, {4, 5}, 8);
    p.run();
    CHECK(p.log().tokens.at(2) == expected_tokens({4, 5}, 8));
    CHECK(p.blocks().num_fetched == (stay ? 24 : 0));
    CHECK(p.num_payloads() == (stay ? 8 : 32));
    CHECK(p.blocks().num_gone == 0);
  }
}

TEST_CASE("a stage that cannot map its predecessor's memory is given the rows by the host") {
  pipeline p(2, 64, "cuda:0");
  p.cut_from_devices(1);
  p.run();
  p.submit(1, {1, 2, 3}, 8);
  p.run();
  CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 8));
  CHECK(p.log().errors.empty());
  CHECK(p.blocks().num_fetched == 0);
  CHECK(p.num_payloads() == 8); // asked for once, by the host ever since
  // Its successor is another process, which can.
  p.kill(1);
  p.restart(1);
  p.submit(2, {4, 5}, 8);
  p.run();
  CHECK(p.log().tokens.at(2) == expected_tokens({4, 5}, 8));
  CHECK(p.blocks().num_fetched == 8);
}

TEST_CASE("an outbox without room leaves rows to the host") {
  pipeline p(2, 64, "cuda:0");
  p.run();
  p.room_of_outboxes(256); // of the lowest ticket
  p.kill(0);
  p.restart(0);
  p.submit(1, {1, 2, 3}, 8);
  p.run();
  CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 8));
  CHECK(p.blocks().num_fetched == 0);
  CHECK(p.num_payloads() == 8);
}

TEST_CASE("rows that a stage has left are there for the next process of the stage behind it, "
          "wherever it is") {
  for (bool moves : {false, true}) {
    CAPTURE(moves);
    pipeline p(2, 64, "cuda:0");
    p.run();
    p.kill(1);
    p.submit(1, {1, 2, 3}, 1);
    p.run();
    p.restart(1);
    p.run();
    CHECK(p.log().tokens.at(1) == expected_tokens({1, 2, 3}, 1));
    p.submit(2, {4, 5, 6}, 6);
    std::mt19937_64 random(1);
    while (p.num_left(0) == 0)
      REQUIRE(p.run_one(random));
    auto fetched = p.blocks().num_fetched;
    p.kill(1);
    if (moves)
      p.move(1, "node-1");
    p.restart(1);
    p.run();
    CHECK(p.log().tokens.at(2) == expected_tokens({4, 5, 6}, 6));
    CHECK((p.blocks().num_fetched == fetched) == moves);
    CHECK(p.log().errors.empty());
  }
}

TEST_CASE("any order of messages, losses and deaths gives every token once and the right one",
          "[seeds]") {
  int num_fetched = 0;
  int num_gone = 0;
  for (std::uint64_t seed = 1; seed <= 2500; ++seed) {
    CAPTURE(seed);
    bool on_devices = seed > 1500;
    std::mt19937_64 random(seed);
    auto pick = [&](std::uint64_t n) {
      return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(random);
    };
    auto num_stages = static_cast<std::uint32_t>(1 + seed % 3);
    pipeline p(num_stages, 24, on_devices ? "cuda:0" : "cpu:0");
    if (seed % 2 == 0)
      p.room_of_outboxes(256 * 4); // too little now and then
    std::map<schedule::request_id, std::vector<std::int32_t>> prompts;
    std::set<schedule::request_id> cancelled;
    constexpr schedule::request_id num_requests = 8;
    schedule::request_id next = 1;
    int deaths = static_cast<int>(seed % 6);
    p.lost().random.seed(seed);
    p.lost().probability = 0.03;
    p.lost().num_left = static_cast<int>(seed % 11);
    int damages = static_cast<int>(seed % 3);
    auto all_ended = [&] { return p.log().finished.size() == num_requests; };
    int moves = 0;
    while (!all_ended()) {
      REQUIRE(++moves < 100000);
      if (next <= num_requests && pick(20) == 0) {
        std::vector<std::int32_t> prompt(1 + pick(12));
        for (auto& t : prompt)
          t = static_cast<std::int32_t>(pick(vocabulary));
        prompts[next] = prompt;
        p.submit(next++, prompt, 12);
      }
      if (next > 3 && cancelled.empty() && pick(100) == 0) {
        cancelled.insert(2);
        p.cancel(2);
      }
      if (damages > 0 && pick(150) == 0) {
        --damages;
        p.damage_page();
      }
      for (std::uint32_t i = 0; i < num_stages; ++i) {
        if (on_devices && pick(2000) == 0)
          p.cut_from_devices(i);
        if (on_devices && pick(2000) == 0)
          p.move(i, pick(2) == 0 ? "node-0" : "node-1");
        if (p.is_lost(i) && pick(30) == 0)
          p.restart(i);
        else if (!p.is_lost(i) && deaths > 0 && pick(60) == 0) {
          --deaths;
          if (pick(3) == 0)
            p.kill_with_memory(i);
          else
            p.kill(i);
        }
      }
      if (!p.run_one(random) && pick(4) == 0)
        p.advance(50ms); // dials again, expires, sends again
    }
    for (const auto& [id, prompt] : prompts) {
      auto right = expected_tokens(prompt, 12);
      const auto& log = p.log();
      auto got = log.tokens.count(id) == 1 ? log.tokens.at(id) : std::vector<std::int32_t>{};
      if (log.finished.at(id) == schedule::finish_reason::cancelled) {
        REQUIRE(cancelled.count(id) == 1);
        right.resize(got.size());
      }
      REQUIRE(got == right);
    }
    REQUIRE(p.log().errors.empty());
    num_fetched += p.blocks().num_fetched;
    num_gone += p.blocks().num_gone;
    REQUIRE((on_devices || p.blocks().num_fetched == 0));
  }
  CHECK(num_fetched > 10'000);
  CHECK(num_gone > 10);
}
