#include "troupe/actors/runtime.hpp"

#include "troupe/actors/cluster_plan.hpp"
#include "troupe/actors/cluster_supervisor.hpp"
#include "troupe/actors/gateway.hpp"
#include "troupe/actors/gpu_device.hpp"
#include "troupe/base/startup_report.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/config/cluster_config.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/messages/actor_config.hpp"
#include "troupe/model/chat_template.hpp"
#include "troupe/http/message.hpp"
#include "troupe/model/model_tokenizer.hpp"
#include "troupe/transport/endpoint.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <thread>

#include <fmt/format.h>
#include <netdb.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <unistd.h>

namespace troupe::actors {

using namespace messages;

namespace {

/// A connection is given up after this many heartbeats without a sign of life. Generous, since a
/// death is seen by the parent at once and a stall on a busy machine is none.
constexpr std::uint32_t heartbeats_to_live = 20;

/// Actors that may run at once in a process whose work is mostly elsewhere.
constexpr std::uint32_t control_threads = 2;

/// What answers under way get when a frontend is told to stop.
constexpr auto drain_time = std::chrono::milliseconds(500);

messages::actor_config make_config(std::uint32_t heartbeat_ms) {
  return messages::actor_config(control_threads, heartbeat_ms, heartbeat_ms * heartbeats_to_live);
}

void wait_for_stop_signal() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  int number = 0;
  sigwait(&signals, &number);
  spdlog::info("stopping: signal {}", number);
}

/// Beats for the parent until the process ends; `root` is to answer its knocks.
expected<std::shared_ptr<memory::pulse>> start_pulse(int fd, std::uint32_t heartbeat_ms) {
  auto interval = std::chrono::milliseconds(std::clamp(heartbeat_ms / 2, 5U, 50U));
  auto pulse = memory::pulse::start(fd, interval);
  if (!pulse)
    return tl::unexpected(pulse.error());
  return std::shared_ptr<memory::pulse>(std::move(*pulse));
}

template <class Handle>
void knock_at(memory::pulse& pulse, const Handle& root) {
  pulse.on_beat([root] { caf::anon_send(root, knock_atom::value); });
}

/// Ends the process without waiting for actors: an actor system's destructor waits for ever for one
/// that does not end, and everything that must outlive the process has left it already.
[[noreturn]] void leave(int code, memory::pulse& pulse) {
  spdlog::default_logger()->flush();
  if (code != exit_restart)
    pulse.leave();
  std::_Exit(code);
}

int not_started(int startup_fd, const error& why) {
  spdlog::critical("{}", why.text());
  report_not_started(startup_fd, why);
  return is_permanent(why.code) ? exit_permanent : EXIT_FAILURE;
}

/// Publishes an actor on a port; 0 takes any. Returns the port.
template <class Handle>
expected<std::uint16_t> publish(caf::actor_system& system, const Handle& actor, std::uint16_t port,
                                const std::string& bind) {
  auto bound = system.middleman().publish(actor, port, bind.c_str(), true);
  if (!bound)
    return fail(error_code::resource_exhausted,
                fmt::format("cannot listen on {}:{}: {}", bind, port, system.render(bound.error())),
                "network.bind must be an address of this host, and the port free");
  return *bound;
}

/// Sends SIGTERM to this process when an actor ends, so that main's wait is over. Whoever watches
/// has to be kept: an actor that nobody refers to is ended by CAF, whatever it waits for.
template <class Handle>
[[nodiscard]] caf::actor stop_when_down(caf::actor_system& system, const Handle& actor) {
  return system.spawn<caf::detached>([actor](caf::event_based_actor* self) -> caf::behavior {
    self->set_down_handler([self](caf::down_msg& down) {
      if (down.reason)
        spdlog::critical("the root actor ended: {}", self->system().render(down.reason));
      ::kill(::getpid(), SIGTERM);
      self->quit();
    });
    self->monitor(actor);
    return {[](stop_atom) {}}; // an actor without behavior ends at once
  });
}

http::serving_model make_serving_model(const proto::ClusterPlan& plan,
                                       const model::model_config& config) {
  http::serving_model served;
  served.name = plan.model_name();
  served.max_context = plan.max_context();
  served.vocab_size = config.vocab_size;
  served.eos_tokens = config.eos_tokens;
  served.defaults.temperature = config.default_temperature.value_or(1.0F);
  served.defaults.top_p = config.default_top_p.value_or(1.0F);
  return served;
}

/// Opens the controller's journal and hands what is in it to its successor.
expected<std::optional<recovery::journal>> open_journal(const std::filesystem::path& directory,
                                                        recovery::membership& members) {
  if (directory.empty())
    return std::nullopt;
  std::vector<std::string> records;
  auto journal = recovery::journal::open(directory / "controller.journal", records);
  if (!journal)
    return tl::unexpected(journal.error());
  proto::ControllerState state;
  if (!records.empty() && state.ParseFromString(records.back())) {
    spdlog::info("the journal knows epoch {}, version {}", state.view().epoch(),
                 state.view().version());
    members.restore(state, std::chrono::steady_clock::now());
  }
  return std::move(*journal);
}

struct frontend_parts {
  config::cluster_config config;
  std::shared_ptr<const model::tokenizer> tokenizer;
  std::shared_ptr<const model::chat_renderer> chat; ///< null: the model has no template
  http::serving_model served;                       ///< points to the two above
};

expected<frontend_parts> load_frontend(const config_source& source) {
  auto config = config::load(source.file, source.settings);
  if (!config)
    return tl::unexpected(config.error());
  auto model = model::load_model_config(config->model.path);
  if (!model)
    return tl::unexpected(model.error());
  auto plan = make_cluster_plan(*config, *model);
  if (!plan)
    return tl::unexpected(plan.error());
  auto tokenizer = model::load_tokenizer(config->model.path, *model);
  if (!tokenizer)
    return tl::unexpected(tokenizer.error());
  auto chat = model::chat_renderer::load(config->model.path);
  if (!chat && chat.error().code != error_code::not_found)
    return tl::unexpected(chat.error());
  frontend_parts parts;
  parts.served = make_serving_model(*plan, *model);
  parts.config = std::move(*config);
  parts.tokenizer = std::make_shared<const model::tokenizer>(std::move(*tokenizer));
  if (chat)
    parts.chat = std::make_shared<const model::chat_renderer>(std::move(*chat));
  parts.served.tokenizer = parts.tokenizer.get();
  parts.served.chat = parts.chat.get();
  return parts;
}

} // namespace

void block_stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

int run_controller(const controller_options& options) {
  auto startup_fd = options.process.startup_fd;
  auto config = config::load(options.config.file, options.config.settings);
  if (!config)
    return not_started(startup_fd, config.error());
  auto pulse = start_pulse(options.process.pulse_fd, config->recovery.heartbeat_ms);
  if (!pulse)
    return not_started(startup_fd, pulse.error());
  auto model = model::load_model_config(config->model.path);
  if (!model)
    return not_started(startup_fd, model.error());
  auto plan = make_cluster_plan(*config, *model);
  if (!plan)
    return not_started(startup_fd, plan.error());
  auto system_config = make_config(config->recovery.heartbeat_ms);
  caf::actor_system system{system_config};
  recovery::membership members(std::move(*plan), options.process.incarnation,
                               static_cast<std::uint32_t>(::getpid()));
  auto journal = open_journal(options.process.state_directory, members);
  if (!journal)
    leave(not_started(startup_fd, journal.error()), **pulse);
  auto supervisor = system.spawn<cluster_supervisor, caf::detached>(std::move(members),
                                                                    std::move(*journal), *pulse);
  knock_at(**pulse, supervisor);
  auto port = publish(system, caf::actor_cast<cluster_supervisor_actor>(supervisor), options.port,
                      config->network.bind);
  if (!port)
    leave(not_started(startup_fd, port.error()), **pulse);
  const auto watch = stop_when_down(system, supervisor);
  spdlog::info("the controller listens on {}:{}", config->network.bind, *port);
  report_started(startup_fd, *port);
  wait_for_stop_signal();
  leave(EXIT_SUCCESS, **pulse);
}

int run_frontend(const frontend_options& options) {
  auto parts = load_frontend(options.config);
  if (!parts)
    return not_started(options.process.startup_fd, parts.error());
  const auto& serving = parts->config.serving;
  auto heartbeat_ms = parts->config.recovery.heartbeat_ms;
  auto pulse = start_pulse(options.process.pulse_fd, heartbeat_ms);
  if (!pulse)
    return not_started(options.process.startup_fd, pulse.error());
  auto system_config = make_config(heartbeat_ms);
  caf::actor_system system{system_config};

  // The door opens before the gateway is there, since the gateway needs the door's port: calls
  // that are earlier wait for it.
  auto ready = std::make_shared<std::promise<gateway_actor>>();
  std::shared_future<gateway_actor> gateway_future = ready->get_future().share();
  http::server_options server_options;
  server_options.host = serving.listen_host;
  server_options.port = options.port != 0 ? options.port : serving.listen_port;
  auto server =
    http::server::start(server_options, [gateway_future](http::request request,
                                                         std::shared_ptr<http::response> response) {
      auto call = std::make_shared<http_call>(http_call{std::move(request), std::move(response)});
      caf::anon_send(gateway_future.get(), http_call_ptr(std::move(call)));
    });
  if (!server)
    leave(not_started(options.process.startup_fd, server.error()), **pulse);
  auto port = (*server)->port();
  gateway_options gateway_settings;
  gateway_settings.incarnation = options.process.incarnation;
  gateway_settings.endpoint = "http://" + http::host_port(serving.listen_host, port);
  gateway_settings.controller_host = parts->config.network.bind;
  gateway_settings.controller_port = options.controller_port;
  gateway_settings.pulse = *pulse;
  gateway_settings.served = parts->served;
  gateway_settings.tokenizer = parts->tokenizer;
  auto& journal = gateway_settings.journal;
  journal.limits.retain_ms = std::int64_t{1000} * serving.retain_s;
  if (!options.process.state_directory.empty()
      && parts->config.recovery.level == config::protection::full)
    journal.file = options.process.state_directory / "frontend.journal";
  journal.fresh = options.process.incarnation == 1;
  spdlog::info("the frontend listens on {}", gateway_settings.endpoint);
  auto door = system.spawn<gateway>(std::move(gateway_settings));
  caf::anon_send(door, start_atom::value);
  knock_at(**pulse, door);
  ready->set_value(door);
  const auto watch = stop_when_down(system, door);
  report_started(options.process.startup_fd, port);
  wait_for_stop_signal();
  (*server)->stop(drain_time);
  leave(EXIT_SUCCESS, **pulse);
}

namespace {

/// The address that this host has for whoever is at `host`. No packet is sent.
expected<std::string> address_towards(const std::string& host, std::uint16_t port) {
  const auto refuse = [&](std::string_view why) {
    return fail(
      error_code::unavailable,
      fmt::format("cannot reach the controller at {}: {}", http::host_port(host, port), why),
      "--controller is what `troupe up` printed; --bind names this host's address");
  };
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (const int failed = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
      failed != 0)
    return refuse(::gai_strerror(failed));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owned{found, &::freeaddrinfo};
  const unique_fd socket{::socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  sockaddr_storage own{};
  socklen_t length = sizeof(own);
  std::array<char, NI_MAXHOST> text{};
  if (!socket || ::connect(socket.get(), found->ai_addr, found->ai_addrlen) != 0
      || ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&own), &length) != 0)
    return refuse(std::strerror(errno));
  if (const int failed =
        ::getnameinfo(reinterpret_cast<const sockaddr*>(&own), length, text.data(),
                      static_cast<socklen_t>(text.size()), nullptr, 0, NI_NUMERICHOST);
      failed != 0)
    return refuse(::gai_strerror(failed));
  return text.data();
}

/// What a launcher would have told a node that a user starts.
expected<void> find_out(node_options& options) {
  // Tenths of a second: above that of any start before, also by another user or after a reboot.
  if (options.incarnation == 0)
    options.incarnation = static_cast<std::uint64_t>(
      std::chrono::system_clock::now().time_since_epoch() / std::chrono::milliseconds(100));
  if (options.bind.empty()) {
    auto own = address_towards(options.controller_host, options.controller_port);
    if (!own)
      return tl::unexpected(own.error());
    options.bind = std::move(*own);
  }
  if (options.log_directory.empty()) {
    const auto directory = state_directory(options.name);
    std::error_code failed;
    std::filesystem::create_directories(directory, failed);
    if (failed)
      return fail(error_code::io_failed,
                  fmt::format("cannot write logs to {}: {}", directory.string(), failed.message()),
                  "--log-directory names another place");
    options.log_directory = directory.string();
    spdlog::info("the logs of this node's workers are in {}", options.log_directory);
  }
  for (const auto& [key, value] : transport::required_environment())
    ::setenv(key.c_str(), value.c_str(), 0);
  return {};
}

} // namespace

int run_node(node_options options, int pulse_fd) {
  if (auto known = find_out(options); !known)
    return not_started(-1, known.error());
  auto pulse = start_pulse(pulse_fd, options.heartbeat_ms);
  if (!pulse)
    return not_started(-1, pulse.error());
  options.pulse = *pulse;
  auto system_config = make_config(options.heartbeat_ms);
  caf::actor_system system{system_config};
  auto bind = options.bind;
  auto supervisor = system.spawn<node_supervisor, caf::detached>(std::move(options));
  auto port = publish(system, caf::actor_cast<node_supervisor_actor>(supervisor), 0, bind);
  if (!port)
    leave(not_started(-1, port.error()), **pulse);
  caf::anon_send(supervisor, start_atom::value, *port);
  knock_at(**pulse, supervisor);
  const auto watch = stop_when_down(system, supervisor);
  wait_for_stop_signal();
  caf::scoped_actor self{system};
  caf::anon_send(supervisor, stop_atom::value);
  self->wait_for(supervisor);
  leave(EXIT_SUCCESS, **pulse);
}

int run_worker(worker_options options, std::uint32_t heartbeat_ms, int pulse_fd) {
  gpu_device::prepare_environment();
  auto pulse = start_pulse(pulse_fd, heartbeat_ms);
  if (!pulse)
    return not_started(-1, pulse.error());
  options.pulse = *pulse;
  auto system_config = make_config(heartbeat_ms);
  caf::actor_system system{system_config};
  auto exit_code = std::make_shared<std::atomic<int>>(EXIT_SUCCESS);
  auto bind = options.node_host;
  auto root = system.spawn<worker>(std::move(options), exit_code);
  auto port = publish(system, caf::actor_cast<worker_actor>(root), 0, bind);
  if (!port)
    leave(not_started(-1, port.error()), **pulse);
  caf::anon_send(root, start_atom::value, *port);
  knock_at(**pulse, root);
  const auto watch = stop_when_down(system, root);
  wait_for_stop_signal();
  leave(exit_code->load(), **pulse);
}

} // namespace troupe::actors
