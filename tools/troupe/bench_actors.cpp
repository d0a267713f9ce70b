#include "bench.hpp"
#include "bench_stream.hpp"

#include "troupe/actors/dial.hpp"
#include "troupe/actors/runtime.hpp"
#include "troupe/base/child_processes.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/base/log.hpp"
#include "troupe/base/startup_report.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/messages/actor_config.hpp"
#include "troupe/messages/serving_protocol.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <future>
#include <memory>
#include <optional>

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

namespace troupe::tools::bench {

namespace {

using namespace std::chrono_literals;
using namespace messages;
using nlohmann::json;

// As actors/processes.cpp sets up the processes of a cluster.
constexpr std::uint32_t actor_threads = 2;
constexpr std::uint32_t heartbeat_ms = 100;
constexpr std::uint32_t timeout_ms = 500;

constexpr auto start_patience = 20s;
constexpr auto measure_patience = 120s;
constexpr auto dial_patience = 5000ms;
constexpr std::size_t num_warm_up = 1000;

struct actor_arguments {
  unsigned rounds = 3;
  unsigned round_trips = 20000;
  unsigned window = 32;
  int startup_fd = -1; ///< of the answering processes
  bool as_json = false;
};

/// What a scheduler sends to a stage for one token of one sequence.
proto::RunMicroBatch decode_message(std::uint64_t step) {
  proto::RunMicroBatch batch;
  batch.set_epoch(1);
  batch.set_step(step);
  batch.set_oldest_step(step);
  batch.add_first_positions(100);
  batch.add_row_counts(1);
  batch.add_page_counts(7);
  for (int page = 0; page < 7; ++page)
    batch.add_pages(page + 40);
  batch.add_tokens(1234);
  auto* output = batch.add_outputs();
  output->set_target(-1);
  output->set_position(101);
  return batch;
}

/// Answers at once, as a stage that has nothing to compute.
stage_actor::behavior_type answer_at_once(stage_actor::pointer self) {
  return {[self](const run_micro_batch& asked) {
    proto::MicroBatchDone done;
    done.set_epoch(asked->epoch());
    done.set_step(asked->step());
    done.add_tokens(1234);
    done.add_logprobs(-0.5F);
    self->send(caf::actor_cast<scheduler_actor>(self->current_sender()),
               micro_batch_done{std::move(done)});
  }};
}

/// One measurement: round trips with so many under way at any time.
struct exchange {
  std::size_t round_trips = 0;
  std::size_t window = 1;
};

struct outcome {
  std::vector<double> microseconds; ///< of each round trip
  double seconds = 0;               ///< of all
};

struct asker_state {
  asker_state() = default; // no aggregate: CAF would give its first member the actor

  stage_actor stage;
  exchange plan;
  std::shared_ptr<std::promise<expected<outcome>>> result;
  outcome measured;
  std::vector<steady::time_point> sent; ///< by step
  steady::time_point begin;
};

using asker_pointer = scheduler_actor::stateful_pointer<asker_state>;

void ask(asker_pointer self) {
  auto& s = self->state;
  auto step = s.sent.size();
  s.sent.push_back(steady::now());
  self->send(s.stage, run_micro_batch{decode_message(step)});
}

void begin_asking(asker_pointer self, const stage_actor& stage) {
  auto& s = self->state;
  s.stage = stage;
  s.begin = steady::now();
  for (std::size_t i = 0; i < s.plan.window; ++i)
    ask(self);
}

void take_answer(asker_pointer self, std::uint64_t step) {
  auto& s = self->state;
  auto now = steady::now();
  s.measured.microseconds.push_back(milliseconds(now - s.sent[step]) * 1000);
  if (s.sent.size() < s.plan.round_trips)
    return ask(self);
  if (s.measured.microseconds.size() < s.plan.round_trips)
    return;
  s.measured.seconds = milliseconds(now - s.begin) / 1000;
  s.result->set_value(std::move(s.measured));
  self->quit();
}

/// Asks `near`, or the stage published at `port` if there is none.
scheduler_actor::behavior_type asker(asker_pointer self, const stage_actor& near,
                                     std::uint16_t port, exchange plan,
                                     std::shared_ptr<std::promise<expected<outcome>>> result) {
  auto& s = self->state;
  s.plan = plan;
  s.result = std::move(result);
  s.sent.reserve(plan.round_trips);
  s.measured.microseconds.reserve(plan.round_trips);
  if (near)
    begin_asking(self, near);
  else
    actors::dial<stage_actor>(
      self, "127.0.0.1", port, dial_patience,
      [self](const stage_actor& stage) { begin_asking(self, stage); },
      [self](const error& e) {
        self->state.result->set_value(tl::unexpected(e));
        self->quit();
      });
  return {[self](const micro_batch_done& done) { take_answer(self, done->step()); },
          [](const micro_batch_failed&) {}};
}

expected<outcome> run_exchange(caf::actor_system& system, const stage_actor& near,
                               std::uint16_t port, exchange plan) {
  auto result = std::make_shared<std::promise<expected<outcome>>>();
  auto future = result->get_future();
  system.spawn(asker, near, port, plan, result);
  if (future.wait_for(measure_patience) != std::future_status::ready)
    return fail(error_code::deadline_exceeded, "the answering actor has fallen silent");
  return future.get();
}

tl::unexpected<error> socket_failure(const char* what) {
  return fail(error_code::io_failed, fmt::format("{}: {}", what, std::strerror(errno)));
}

bool transfer_all(int fd, char* bytes, std::size_t size, bool sending) {
  for (std::size_t done = 0; done < size;) {
    auto moved = sending ? ::send(fd, bytes + done, size - done, MSG_NOSIGNAL)
                         : ::recv(fd, bytes + done, size - done, 0);
    if (moved <= 0)
      return false;
    done += static_cast<std::size_t>(moved);
  }
  return true;
}

sockaddr_in loopback(std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

void set_no_delay(int fd) {
  int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

/// The floor: the same bytes over a plain socket, written and read without any actor.
expected<outcome> run_sockets(std::uint16_t port, std::size_t round_trips, std::size_t size) {
  unique_fd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  auto address = loopback(port);
  if (!fd || ::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0)
    return socket_failure("cannot connect to the answering process");
  set_no_delay(fd.get());
  timeval patience{5, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  std::vector<char> bytes(size);
  outcome result;
  auto begin = steady::now();
  for (std::size_t i = 0; i < round_trips; ++i) {
    auto sent = steady::now();
    if (!transfer_all(fd.get(), bytes.data(), size, true)
        || !transfer_all(fd.get(), bytes.data(), size, false))
      return socket_failure("the answering process has fallen silent");
    result.microseconds.push_back(milliseconds(steady::now() - sent) * 1000);
  }
  result.seconds = milliseconds(steady::now() - begin) / 1000;
  return result;
}

/// The other end of run_sockets, one connection after another, until it is killed.
int answer_sockets(int startup_fd, std::size_t size) {
  unique_fd door(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  auto address = loopback(0);
  socklen_t length = sizeof(address);
  if (!door || ::bind(door.get(), reinterpret_cast<sockaddr*>(&address), length) != 0
      || ::listen(door.get(), 1) != 0
      || ::getsockname(door.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    report_not_started(startup_fd, socket_failure("cannot listen on 127.0.0.1").value());
    return EXIT_FAILURE;
  }
  report_started(startup_fd, ntohs(address.sin_port));
  std::vector<char> bytes(size);
  for (;;) {
    unique_fd fd(::accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!fd)
      return EXIT_FAILURE;
    set_no_delay(fd.get());
    while (transfer_all(fd.get(), bytes.data(), size, false)
           && transfer_all(fd.get(), bytes.data(), size, true)) {
    }
  }
}

/// The other end of the exchanges between processes, until it is killed.
int answer_actors(int startup_fd) {
  messages::actor_config config(actor_threads, heartbeat_ms, timeout_ms);
  caf::actor_system system{config};
  auto stage = system.spawn(answer_at_once);
  auto port = system.middleman().publish(stage, 0, "127.0.0.1", true);
  if (!port) {
    report_not_started(startup_fd,
                       fail(error_code::resource_exhausted,
                            "cannot publish an actor on 127.0.0.1: " + system.render(port.error()))
                         .value());
    std::_Exit(EXIT_FAILURE);
  }
  report_started(startup_fd, *port);
  for (;;)
    ::pause();
}

expected<std::uint16_t> start_answering(child_processes& children, const std::string& role) {
  auto pipe = startup_pipe::open();
  if (!pipe)
    return tl::unexpected(pipe.error());
  child_spec spec;
  spec.name = role;
  spec.arguments = {"bench", role, "--startup-fd", std::to_string(pipe->child_fd())};
  spec.inherited_fds = {pipe->child_fd()};
  if (auto pid = children.spawn(std::move(spec)); !pid)
    return tl::unexpected(pid.error());
  return pipe->wait(start_patience);
}

/// One way from an asker to an answerer, and what was measured on it.
struct path {
  const char* key;
  const char* head;
  bool has_window;
  std::vector<double> p50, p99, per_second; ///< one a round
};

expected<void> run_round(path& way, const std::function<expected<outcome>(exchange)>& go,
                         const actor_arguments& given) {
  auto single = go({given.round_trips, 1});
  if (!single)
    return tl::unexpected(single.error());
  way.p50.push_back(percentile(single->microseconds, 0.5));
  way.p99.push_back(percentile(single->microseconds, 0.99));
  if (!way.has_window)
    return {};
  auto many = go({given.round_trips, given.window});
  if (!many)
    return tl::unexpected(many.error());
  way.per_second.push_back(2.0 * given.round_trips / many->seconds);
  return {};
}

expected<report> measure_in(caf::actor_system& system, child_processes& children,
                            const actor_arguments& given) {
  auto actor_port = start_answering(children, "answer-actors");
  if (!actor_port)
    return tl::unexpected(actor_port.error());
  auto socket_port = start_answering(children, "answer-sockets");
  if (!socket_port)
    return tl::unexpected(socket_port.error());
  auto near = system.spawn(answer_at_once);
  auto size = decode_message(1).ByteSizeLong();
  std::array<path, 3> ways{{{"sockets", "two processes, plain TCP sockets", false, {}, {}, {}},
                            {"process", "actors in one process", true, {}, {}, {}},
                            {"processes", "actors in two processes", true, {}, {}, {}}}};
  std::array<std::function<expected<outcome>(exchange)>, 3> go{
    [&](exchange e) { return run_sockets(*socket_port, e.round_trips, size); },
    [&](exchange e) { return run_exchange(system, near, 0, e); },
    [&](exchange e) { return run_exchange(system, stage_actor{}, *actor_port, e); }};
  progress shown;
  for (std::size_t w = 0; w < ways.size(); ++w)
    if (auto warm = go[w]({num_warm_up, 1}); !warm)
      return tl::unexpected(warm.error());
  for (unsigned r = 0; r < given.rounds; ++r)
    for (std::size_t w = 0; w < ways.size(); ++w) {
      shown.say(fmt::format("actors: round {} of {}, {}", r + 1, given.rounds, ways[w].head));
      if (auto done = run_round(ways[w], go[w], given); !done)
        return tl::unexpected(done.error());
    }
  table shown_table({"request and response", "p50, us", "p99, us",
                     fmt::format("messages/s, {} in flight", given.window)},
                    1);
  report result;
  result.figures = {{"rounds", given.rounds},
                    {"round_trips", given.round_trips},
                    {"window", given.window},
                    {"request_bytes", size}};
  for (const auto& way : ways) {
    shown_table.add({way.head, show(spread_of(way.p50), 1), show(spread_of(way.p99), 1),
                     way.has_window ? show(spread_of(way.per_second), 0) : "-"});
    auto& shown_as = result.figures[way.key];
    shown_as = {{"p50_us", to_json(spread_of(way.p50))}, {"p99_us", to_json(spread_of(way.p99))}};
    if (way.has_window)
      shown_as["messages_per_s"] = to_json(spread_of(way.per_second));
  }
  result.text = shown_table.text();
  return result;
}

int measure(const actor_arguments& given) {
  set_process_name("bench");
  start_logging("warn");
  messages::actor_config config(actor_threads, heartbeat_ms, timeout_ms);
  caf::actor_system system{config};
  int code = EXIT_FAILURE;
  {
    auto children = child_processes::start([](const child_exit&) {});
    code = children ? finish(measure_in(system, **children, given), given.as_json)
                    : complain(children.error());
  }
  // The actor system's destructor would wait for an actor that has fallen silent.
  std::fflush(nullptr);
  std::_Exit(code);
}

CLI::App* add_answering(CLI::App& bench, const char* name,
                        const std::shared_ptr<actor_arguments>& given) {
  auto* sub = bench.add_subcommand(name, "answers another process");
  sub->group("");
  sub->add_option("--startup-fd", given->startup_fd, "pipe to the measuring process")->required();
  return sub;
}

} // namespace

void add_actors(CLI::App& bench, command& run) {
  auto given = std::make_shared<actor_arguments>();
  auto* sub =
    bench.add_subcommand("actors", "Messages between actors, in a process and across two");
  sub->footer(
    "The message is what a scheduler sends for one token, and its answer. The floor is the "
    "same number of bytes over plain sockets.");
  sub->add_option("--rounds", given->rounds, "of each, in turn")->check(at_least_one());
  sub->add_option("--round-trips", given->round_trips, "of a round")
    ->check(CLI::Range(1000.0, 1e8));
  sub->add_option("--window", given->window, "requests in flight for messages/s")
    ->check(CLI::Range(1, 1000));
  add_json_flag(sub, given->as_json);
  sub->callback([given, &run] { run = [given] { return measure(*given); }; });

  auto* actors = add_answering(bench, "answer-actors", given);
  actors->callback([given, &run] {
    run = [given] {
      set_process_name("answer");
      start_logging("warn");
      return answer_actors(given->startup_fd);
    };
  });
  auto* sockets = add_answering(bench, "answer-sockets", given);
  sockets->callback([given, &run] {
    run = [given] { return answer_sockets(given->startup_fd, decode_message(1).ByteSizeLong()); };
  });
}

} // namespace troupe::tools::bench
