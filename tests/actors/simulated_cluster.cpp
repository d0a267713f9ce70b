#include "simulated_cluster.hpp"

#include "troupe/actors/convert.hpp"

#include <algorithm>
#include <cstdio>

#include <fmt/format.h>
#include <unistd.h>

namespace troupe::test {

using namespace messages;
using namespace std::chrono_literals;

using dial_atom = caf::atom_constant<caf::atom("dial")>;
using event_atom = caf::atom_constant<caf::atom("event")>;

namespace {

constexpr std::uint32_t num_pages = 24;
/// Of a stage's outbox: now and then too little.
constexpr std::size_t outbox_room = 6 * actors::boundary_outbox::alignment;
constexpr auto redial_interval = 200ms;
constexpr auto dial_timeout = 2000ms;

/// A controller's side of a connection and the other: hands everything on, or nothing.
caf::behavior connection(caf::event_based_actor* self, caf::actor upper, caf::actor lower,
                         std::shared_ptr<const bool> cut) {
  self->set_default_handler(
    [=](caf::scheduled_actor* me, caf::message_view& what) -> caf::result<caf::message> {
      bool is_from_above = me->current_sender() == upper;
      if (!*cut)
        caf::actor_cast<caf::strong_actor_ptr>(is_from_above ? lower : upper)
          ->enqueue(caf::actor_cast<caf::strong_actor_ptr>(me), caf::make_message_id(),
                    what.move_content_to_message(), nullptr);
      return caf::message{};
    });
  return {[](dial_atom) {}};
}

/// A scheduler's connection to a stage.
caf::behavior link(caf::event_based_actor* self, simulated_cluster* c, process_ptr process,
                   actors::stage_local stage) {
  auto scheduler = std::make_shared<scheduler_actor>();
  auto hand_on = [=](const auto& to, const auto& what) {
    milliseconds again{};
    if (!process->alive || process->node->is_cut_off() || !c->passes(again))
      return;
    self->send(to, what);
    if (again > 0ms)
      self->delayed_send(to, again, what);
  };
  return {[=](const run_micro_batch& asked) {
            *scheduler = caf::actor_cast<scheduler_actor>(self->current_sender());
            hand_on(stage, asked);
          },
          [=](const micro_batch_done& done) { hand_on(*scheduler, done); },
          [=](const micro_batch_failed& failed) { hand_on(*scheduler, failed); }};
}

/// A stage's device: takes its time, and is at work until its stage has the result.
using computing_actor =
  actors::stage_compute_actor::extend<caf::reacts_to<actors::stage_local, actors::stage_result>>;

computing_actor::behavior_type computing(computing_actor::pointer self, simulated_cluster* c,
                                         process_ptr process,
                                         std::pair<std::uint32_t, std::uint32_t> who, bool is_first,
                                         bool is_last, std::shared_ptr<simulated_kv> kv,
                                         std::shared_ptr<fake_hand_over> rows) {
  return {[=](const actors::stage_work& work) {
            if (!process->alive)
              return;
            transport::buffer_pool buffers(1 << 20);
            std::optional<std::string> wrong;
            auto& in_work = process->in_work[who];
            in_work = {kv, {}};
            auto result = rows->work(work, [&](const actors::stage_work& whole) {
              return compute(whole, is_first, is_last, *kv, buffers, wrong, in_work.values);
            });
            if (wrong)
              c->fail(fmt::format("{}: {}", process->name, *wrong));
            auto stage = caf::actor_cast<actors::stage_local>(self->current_sender());
            auto luck = c->pick(100);
            if (luck < 10)
              self->delayed_send(self, c->some_time(luck == 0 ? 700ms : 30ms), stage,
                                 std::move(result));
            else
              self->send(self, stage, std::move(result));
          },
          [=](const actors::stage_local& stage, const actors::stage_result& result) {
            process->in_work.erase(who);
            self->send(stage, result);
          }};
}

caf::behavior timer(caf::event_based_actor*, std::deque<std::uint64_t>* due) {
  return {[=](event_atom, std::uint64_t id) { due->push_back(id); }};
}

} // namespace

/// Delivers boundaries to the addressed process, or to nobody.
struct simulated_cluster::wire final : actors::frame_sink {
  wire(simulated_cluster& cluster, process_ptr p) : c(cluster), from(std::move(p)) {}

  void send(const actors::frame_target& to, proto::FrameHeader header,
            transport::payload_view payload) override {
    if (!from->alive)
      return;
    header.set_sender(from->name);
    header.set_sender_incarnation(from->incarnation);
    if (header.kind() == proto::BOUNDARY) {
      auto& newest = c.sent_epochs_[{fmt::format("pid {}", from->pid), header.actor_index()}];
      if (header.epoch() < newest)
        c.fail(fmt::format("{} sends a boundary in epoch {} after {}", from->name, header.epoch(),
                           newest));
      newest = header.epoch();
    }
    auto process = c.find_process(to.worker, to.incarnation);
    milliseconds again{};
    bool is_away = process && process->node != from->node
                   && (process->node->is_cut_off() || from->node->is_cut_off());
    if (!process || is_away || !c.passes(again))
      return;
    auto stage = process->stages.find({header.replica(), header.actor_index()});
    if (stage == process->stages.end())
      return;
    auto frame = std::make_shared<transport::frame>();
    frame->header = std::move(header);
    transport::buffer_pool buffers(1 << 20);
    frame->payload = std::move(*buffers.take(payload.bytes.size()));
    std::copy(payload.bytes.begin(), payload.bytes.end(), frame->payload.data());
    caf::anon_send(stage->second, actors::frame_ptr(frame));
    if (again > 0ms)
      c.self->delayed_send(stage->second, again, actors::frame_ptr(frame));
  }

  simulated_cluster& c;
  process_ptr from;
};

struct simulated_cluster::connector final : actors::stage_connector {
  explicit connector(simulated_cluster& cluster) : c(cluster) {}

  void connect(actors::scheduler_local::base* scheduler, const proto::WorkerView& worker,
               std::uint32_t replica, std::uint32_t index,
               std::function<void(const stage_actor&)> on_connected,
               std::function<void(const error&)> on_error) override {
    scheduler
      ->request(c.dialer_, dial_timeout, dial_atom::value, worker.plan().name(),
                worker.incarnation(), replica, index)
      .then([=](const caf::actor& stage) { on_connected(caf::actor_cast<stage_actor>(stage)); },
            [=](caf::error&) {
              on_error(error{error_code::peer_lost, "nobody there", "", ""});
            });
  }

  simulated_cluster& c;
};

caf::behavior simulated_cluster::dialer(caf::event_based_actor* me) {
  return {[=, this](dial_atom, const std::string& worker, std::uint64_t incarnation,
                    std::uint32_t replica, std::uint32_t index) -> caf::result<caf::actor> {
    auto process = find_process(worker, incarnation);
    if (process && process->node->is_cut_off())
      return caf::result<caf::actor>{caf::delegated<caf::actor>{}}; // no answer
    auto stage =
      process ? process->stages.find({replica, index}) : decltype(process->stages.find({})){};
    if (!process || stage == process->stages.end())
      return caf::make_error(caf::sec::cannot_connect_to_node);
    auto handle = track(me->system().spawn(link, this, process, stage->second));
    process->links.push_back(handle);
    return handle;
  }};
}

caf::behavior simulated_cluster::gateway(caf::event_based_actor* me) {
  struct state {
    caf::actor controller;
    std::map<std::uint32_t, proto::ReplayReport> replays;
  };
  auto s = std::make_shared<state>();
  auto uncut = std::make_shared<bool>(false);
  auto dial = [=, this] {
    s->controller = dial_controller(me, uncut);
    if (!s->controller) {
      me->delayed_send(me, redial_interval, actors::redial_atom::value);
      return;
    }
    me->monitor(s->controller);
    proto::FrontendHello hello;
    hello.mutable_frontend()->set_incarnation(1);
    hello.mutable_frontend()->set_endpoint("http://here");
    *hello.mutable_view() = frontend_view_;
    me->send(s->controller, frontend_hello{std::move(hello)});
  };
  me->set_down_handler([=](caf::down_msg& down) {
    if (s->controller && s->controller.address() == down.source) {
      s->controller = nullptr;
      me->delayed_send(me, redial_interval, actors::redial_atom::value);
    }
  });
  me->send(me, actors::redial_atom::value);
  me->delayed_send(me, 200ms, actors::tick_atom::value);
  return {
    [](const cluster_plan&) {},
    [=, this](const cluster_view& view) {
      if (view->version() <= frontend_view_.version())
        return;
      check_view(view.body, frontend_view_, "the frontend");
      frontend_view_ = view.body;
      for (const auto& w : view->workers())
        given_up_ = given_up_ || w.state() == proto::FAILED;
      for (const auto& scheduler : schedulers_)
        me->send(scheduler, view);
    },
    [](const frontend_heartbeat&) {},
    [=](const replay_report& report) {
      s->replays[report->replica()] = report.body;
      if (s->controller)
        me->send(s->controller, report);
    },
    [=](actors::redial_atom) {
      if (!s->controller)
        dial();
    },
    [=, this](actors::tick_atom) {
      me->delayed_send(me, 200ms, actors::tick_atom::value);
      if (!s->controller)
        return;
      proto::FrontendHeartbeat beat;
      beat.set_incarnation(1);
      beat.set_view_version(frontend_view_.version());
      for (const auto& [replica, replay] : s->replays)
        *beat.add_replays() = replay;
      me->send(s->controller, frontend_heartbeat{std::move(beat)});
      if (controller_)
        me->request(controller_, 1s, status_atom::value)
          .then([=, this](const cluster_status& status) { status_ = status.body; },
                [](caf::error&) {});
    },
  };
}

simulated_cluster::simulated_cluster(const simulation_options& options, std::uint64_t seed)
  : random(seed), options_(options), num_mishaps_(options.num_mishaps) {
  plan_.set_cluster("simulation");
  plan_.set_num_replicas(options.num_replicas);
  plan_.set_num_stages(options.num_stages);
  plan_.set_kv_pages(num_pages);
  plan_.set_page_tokens(page_tokens);
  plan_.set_max_batch_tokens(16);
  plan_.set_max_batch_sequences(8);
  plan_.set_prefill_chunk_tokens(5);
  plan_.set_max_queue(64);
  plan_.set_max_context(64);
  plan_.set_request_timeout_s(3600);
  plan_.set_heartbeat_ms(200);
  plan_.set_hang_ms(800);
  plan_.set_node_grace_ms(500);
  plan_.set_suspicion(8);
  plan_.set_resend_ms(300);
  plan_.set_max_restarts(options.max_restarts);
  plan_.set_within_s(3600);
  plan_.set_standbys(options.num_standbys);
  std::uint32_t next = 0;
  for (std::uint32_t d = 0; d < options.num_devices; ++d)
    for (std::uint32_t n = 0; n < options.num_nodes; ++n) {
      auto* w = plan_.add_workers();
      w->set_node(fmt::format("node-{}", n));
      w->set_name(fmt::format("node-{}/worker-{}", n, d));
      w->set_device(fmt::format("{}:{}", options.on_gpus ? "cuda" : "cpu", d));
      auto num_stages = options.num_replicas * options.num_stages;
      auto num_workers = options.num_devices * options.num_nodes;
      // What does not find a worker of its own shares one.
      for (auto s = next; s < num_stages; s += num_workers) {
        auto* a = w->add_actors();
        a->set_kind(proto::STAGE);
        a->set_replica(s / options.num_stages);
        a->set_index(s % options.num_stages);
        a->set_id(fmt::format("replica-{}/stage-{}", a->replica(), a->index()));
        a->set_kv_bytes(1);
      }
      ++next;
    }
  journal_ = std::filesystem::temp_directory_path()
             / fmt::format("troupe-simulation-{}.journal", ::getpid());
  std::filesystem::remove(journal_);

  timer_ = track(system.spawn(timer, &due_));
  dialer_ = track(system.spawn([this](caf::event_based_actor* me) { return dialer(me); }));
  gateway_ = track(system.spawn([this](caf::event_based_actor* me) { return gateway(me); }));
  client_ = system.spawn(
    [this](actors::scheduler_client::pointer) -> actors::scheduler_client::behavior_type {
      return {[this](const actors::progress_ptr& made) {
                for (const auto& event : made->events) {
                  auto id = event.request;
                  if (log_.finished.count(id) != 0)
                    fail(fmt::format("an event of request {} behind its end", id));
                  if (event.has_token) {
                    auto& tokens = log_.tokens[id];
                    if (event.token_index != tokens.size())
                      fail(fmt::format("token {} of request {} where {} is due", event.token_index,
                                       id, tokens.size()));
                    tokens.push_back(event.token.token);
                  }
                  if (event.finish != schedule::finish_reason::none)
                    log_.finished.emplace(id, event.finish);
                }
                for (const auto& [id, why] : made->errors)
                  if (!log_.errors.emplace(id, why).second || log_.finished.count(id) != 0)
                    fail(fmt::format("request {} ends twice", id));
              },
              [this](const actors::replica_report& report) {
                serving_[report.replica] = report.serving;
                has_begun_ = has_begun_
                             || (serving_.size() == plan_.num_replicas()
                                 && std::all_of(serving_.begin(), serving_.end(),
                                                [](const auto& s) { return s.second; }));
              },
              [this](const replay_report& report) { caf::anon_send(gateway_, report); }};
    });
  track(client_);
  for (std::uint32_t r = 0; r < options.num_replicas; ++r)
    schedulers_.push_back(track(system.spawn<actors::scheduler>(
      r, std::uint64_t{1}, cluster_plan{plan_}, client_, std::make_shared<connector>(*this))));
  nodes_.resize(options.num_nodes);
  node_incarnations_.resize(options.num_nodes);
  start_controller(journal_state::whole);
  for (std::uint32_t i = 0; i < options.num_nodes; ++i)
    start_node(i);
}

simulated_cluster::~simulated_cluster() {
  // The last words of some make others be spawned.
  for (std::size_t i = 0; i < spawned_.size();) {
    for (; i < spawned_.size(); ++i)
      if (auto a = caf::actor_cast<caf::actor>(spawned_[i]))
        caf::anon_send_exit(a, caf::exit_reason::kill);
    scheduler.run();
  }
  std::filesystem::remove(journal_);
}

void simulated_cluster::tell(const std::string& what) const {
  if (verbose)
    std::printf("%8.3f s  %s\n", static_cast<double>(now().count()) / 1e3, what.c_str());
}

milliseconds simulated_cluster::now() const {
  return std::chrono::duration_cast<milliseconds>(scheduler.clock().now().time_since_epoch());
}

std::uint64_t simulated_cluster::pick(std::uint64_t n) {
  return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(random);
}

void simulated_cluster::fail(const std::string& why) {
  if (wrong_.empty())
    wrong_ = why;
  tell("WRONG: " + why);
}

void simulated_cluster::after(milliseconds delay, std::function<void()> what) {
  events_.emplace(next_event_, std::move(what));
  self->delayed_send(timer_, delay, event_atom::value, next_event_++);
}

void simulated_cluster::step() {
  while (!due_.empty()) {
    auto event = events_.extract(due_.front());
    due_.pop_front();
    event.mapped()();
  }
  if (!run_one(random))
    scheduler.trigger_timeout();
  else if (pick(500) == 0)
    scheduler.clock().advance_time(some_time(30ms)); // messages take their time, too
}

void simulated_cluster::submit(schedule::request_id id, std::vector<std::int32_t> prompt,
                               std::uint32_t max_tokens) {
  auto r = std::make_shared<schedule::request>();
  r->id = id;
  r->prompt = std::move(prompt);
  r->max_tokens = max_tokens;
  caf::anon_send(schedulers_[id % schedulers_.size()], actors::submission(std::move(r)));
}

void simulated_cluster::cancel(schedule::request_id id) {
  caf::anon_send(schedulers_[id % schedulers_.size()], actors::cancel_atom::value, id);
}

/// Ends an actor before anything else happens.
void simulated_cluster::kill_now(const caf::actor& a) {
  caf::anon_send_exit(a, caf::exit_reason::kill);
  if (scheduler.prioritize(a))
    scheduler.run_once();
}

void simulated_cluster::start_controller(journal_state state) {
  recovery::membership members(plan_, ++controller_incarnation_, next_pid_++);
  std::optional<recovery::journal> journal;
  if (state != journal_state::none) {
    std::vector<std::string> records;
    journal = std::move(*recovery::journal::open(journal_, records));
    if (state == journal_state::old && !records.empty()) {
      records.resize(pick(records.size()) + 1);
      (void)journal->rewrite(records);
    }
    proto::ControllerState known;
    if (!records.empty() && known.ParseFromString(records.back()))
      members.restore(known, scheduler.clock().now());
  }
  tell(fmt::format("controller {} starts in epoch {}, version {}", controller_incarnation_,
                   members.view().epoch(), members.view().version()));
  controller_ = caf::actor_cast<caf::actor>(
    track(system.spawn<actors::cluster_supervisor>(std::move(members), std::move(journal))));
}

void simulated_cluster::kill_controller() {
  if (!controller_)
    return;
  tell("the controller dies");
  kill_now(controller_);
  controller_ = nullptr;
  for (const auto& c : connections_)
    caf::anon_send_exit(c, caf::exit_reason::kill);
  connections_.clear();
}

caf::actor simulated_cluster::dial_controller(const caf::actor& caller, std::shared_ptr<bool> cut) {
  if (!controller_ || *cut)
    return {};
  connections_.push_back(track(system.spawn(connection, controller_, caller, std::move(cut))));
  return connections_.back();
}

void simulated_cluster::break_connection(const caf::actor& c) {
  if (c)
    caf::anon_send_exit(c, caf::exit_reason::kill);
}

void simulated_cluster::break_a_link() {
  std::vector<caf::actor> all;
  for (const auto& p : processes_)
    all.insert(all.end(), p->links.begin(), p->links.end());
  if (!all.empty())
    caf::anon_send_exit(all[pick(all.size())], caf::exit_reason::kill);
}

void simulated_cluster::start_node(std::uint32_t i) {
  if (nodes_[i])
    return;
  auto name = fmt::format("node-{}", i);
  nodes_[i] = std::make_shared<simulated_node>(*this, name, ++node_incarnations_[i]);
  tell(fmt::format("{} starts, incarnation {}", name, node_incarnations_[i]));
  auto* n = nodes_[i].get();
  n->handle = track(system.spawn([n](caf::event_based_actor* me) { return n->behave(me); }));
}

void simulated_cluster::kill_node(std::uint32_t i) {
  auto n = nodes_[i];
  if (!n)
    return;
  tell(n->name() + " dies with everything on it");
  n->is_dead = true;
  auto running = processes_;
  for (const auto& p : running)
    if (p->node == n.get())
      kill(p, 0ms, false);
  kill_now(n->handle);
  break_connection(n->connection());
  dead_nodes_.push_back(n);
  nodes_[i] = nullptr;
}

std::vector<process_ptr> simulated_cluster::live_processes() const {
  return processes_;
}

process_ptr simulated_cluster::find_process(const std::string& worker,
                                            std::uint64_t incarnation) const {
  for (const auto& p : processes_)
    if (p->name == worker && p->incarnation == incarnation)
      return p;
  return nullptr;
}

void simulated_cluster::start_stages(const process_ptr& p,
                                     const proto::WorkerAssignment& assignment) {
  for (const auto& actor : assignment.actors()) {
    auto kv = p->node->kv(actor.id());
    if (!kv) {
      kill(p, 0ms, false); // assigned anew meanwhile: its memory is gone
      return;
    }
    bool is_first = actor.index() == 0;
    bool is_last = actor.index() + 1 == plan_.num_stages();
    auto rows = std::make_shared<fake_hand_over>(p->node->blocks(), p->name + "/" + actor.id(),
                                                 p->incarnation, sizeof(std::uint64_t), outbox_room,
                                                 [this] { return pick(500) == 0; });
    auto compute = track(system.spawn(computing, this, p, std::pair{actor.replica(), actor.index()},
                                      is_first, is_last, kv, rows));
    p->stages[{actor.replica(), actor.index()}] =
      track(system.spawn<actors::stage>(actor.replica(), actor.index(), plan_.num_stages(), 1U,
                                        std::make_shared<wire>(*this, p), compute));
  }
}

bool simulated_cluster::passes(milliseconds& again) {
  if (num_mishaps_ > 0 && chance(options_.loss)) {
    --num_mishaps_;
    return false;
  }
  if (num_mishaps_ > 0 && chance(options_.repeat)) {
    --num_mishaps_;
    again = 1ms + some_time(2000ms);
  }
  return true;
}

bool simulated_cluster::refuses() {
  if (num_mishaps_ <= 0 || !chance(options_.refusal))
    return false;
  --num_mishaps_;
  return true;
}

void simulated_cluster::check_view(const proto::ClusterView& seen, const proto::ClusterView& before,
                                   const std::string& who) {
  if (verbose) {
    std::string line =
      fmt::format("{} sees version {}, epoch {}:", who, seen.version(), seen.epoch());
    for (const auto& w : seen.workers()) {
      line += fmt::format(" {}#{} {}", w.plan().name(), w.incarnation(),
                          proto::ProcessState_Name(w.state()));
      for (const auto& a : w.plan().actors())
        line += "+" + a.id();
    }
    for (const auto& n : seen.nodes())
      line += fmt::format(" {} {}", n.name(), proto::ProcessState_Name(n.state()));
    tell(line);
  }
  if (seen.epoch() < before.epoch())
    fail(fmt::format("{} sees the epoch fall from {} to {}", who, before.epoch(), seen.epoch()));
  std::set<std::string> owned;
  for (const auto& w : seen.workers())
    for (const auto& a : w.plan().actors())
      if (!owned.insert(a.id()).second)
        fail(fmt::format("{} sees two owners of {} in version {}", who, a.id(), seen.version()));
}

std::string simulated_cluster::not_settled() {
  if (!controller_)
    return "there is no controller";
  if (!status_.ready())
    return "the controller does not call it ready";
  for (const auto& r : status_.recoveries())
    if (r.phase() != proto::SERVING)
      return fmt::format("recovery {} ({}) is not over", r.id(), r.cause());
  const auto& view = status_.view();
  if (view.version() != frontend_view_.version())
    return "the frontend has another view";
  std::size_t num_actors = 0;
  std::set<std::uint32_t> known;
  for (const auto& w : view.workers()) {
    if (w.plan().actors().empty())
      continue;
    auto process = find_process(w.plan().name(), w.incarnation());
    if (!process || process->stages.size() != static_cast<std::size_t>(w.plan().actors_size()))
      return fmt::format(
        "{} (incarnation {}) is not what the view says: {}", w.plan().name(), w.incarnation(),
        process ? fmt::format("pid {} runs {} actors", process->pid, process->stages.size())
                : std::string("there is no such process"));
    for (const auto& a : w.plan().actors())
      if (process->stages.count({a.replica(), a.index()}) == 0)
        return fmt::format("{} does not run {}", w.plan().name(), a.id());
    num_actors += static_cast<std::size_t>(w.plan().actors_size());
    known.insert(process->pid);
  }
  if (num_actors != plan_.num_stages() * plan_.num_replicas())
    return "an actor runs nowhere";
  for (const auto& p : processes_)
    if (!p->stages.empty() && known.count(p->pid) == 0)
      return fmt::format("{} (incarnation {}) runs though nobody wants it", p->name,
                         p->incarnation);
  for (std::uint32_t i = 0; i < num_nodes(); ++i) {
    const auto& n = view.nodes(static_cast<int>(i));
    bool is_there = nodes_[i] != nullptr;
    if (is_there && (n.state() != proto::RUNNING || n.incarnation() != nodes_[i]->incarnation()))
      return n.name() + " is there and not known to be";
    if (!is_there && n.state() == proto::RUNNING)
      return n.name() + " is gone and counts as running";
  }
  for (std::uint32_t r = 0; r < plan_.num_replicas(); ++r)
    if (!serving_[r])
      return fmt::format("replica-{} does not serve", r);
  return {};
}

} // namespace troupe::test
