#include "commands.hpp"

#include "troupe/actors/gpu_device.hpp"
#include "troupe/actors/runtime.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/base/log.hpp"

#include <memory>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::tools {

namespace {

/// Options that several processes share.
struct process_arguments {
  actors::config_source config;
  std::string name;
  actors::process_options process;
  std::uint16_t port = 0;
  std::uint16_t controller_port = 0;
  std::string peer; ///< HOST:PORT
  std::string bind;
  std::string log_directory;
  std::string log_level = "info";
  std::uint32_t heartbeat_ms = 100;
};

using arguments_ptr = std::shared_ptr<process_arguments>;

void begin(const process_arguments& arguments, const std::string& name) {
  set_process_name(name);
  start_logging(arguments.log_level);
  actors::block_stop_signals();
  if (auto armed = faults::arm(); !armed)
    spdlog::error("{}", armed.error().text());
  faults::suffer(faults::point::process_init);
}

CLI::App* declare(CLI::App& app, const char* name, const char* help,
                  const arguments_ptr& arguments) {
  auto* sub = app.add_subcommand(name, help);
  sub->group("Processes (started by the others)");
  sub->add_option("--incarnation", arguments->process.incarnation,
                  "how often this process has been started");
  sub->add_option("--log-level", arguments->log_level, "debug, info, warn or error");
  sub->add_option("--heartbeat-ms", arguments->heartbeat_ms, "between two signs of life");
  sub->add_option("--startup-fd", arguments->process.startup_fd, "pipe to the launcher");
  sub->add_option("--pulse-fd", arguments->process.pulse_fd, "page of memory for signs of life");
  sub->add_option("--state-directory", arguments->process.state_directory, "for journals");
  return sub;
}

void add_config(CLI::App* sub, const arguments_ptr& arguments) {
  sub->add_option("--config", arguments->config.file, "cluster file")->required();
  sub->add_option("--set", arguments->config.settings, "KEY=VALUE put over the file")
    ->allow_extra_args(false);
}

/// HOST and PORT of "HOST:PORT"; HOST without the brackets of "[::1]:PORT".
std::pair<std::string, std::uint16_t> split_peer(const std::string& peer) {
  auto colon = peer.rfind(':');
  auto host = peer.substr(0, colon);
  if (host.starts_with('[') && host.ends_with(']'))
    host = host.substr(1, host.size() - 2);
  return {std::move(host), static_cast<std::uint16_t>(std::stoul(peer.substr(colon + 1)))};
}

} // namespace

void add_processes(CLI::App& app, command& run) {
  auto arguments = std::make_shared<process_arguments>();
  CLI::Validator host_port(
    [](const std::string& text) {
      auto colon = text.rfind(':');
      bool ok = colon != std::string::npos && colon > 0 && colon + 1 < text.size()
                && text.find_first_not_of("0123456789", colon + 1) == std::string::npos
                && text.size() - colon <= 6 && std::stoul(text.substr(colon + 1)) <= 65535;
      return ok ? std::string() : "'" + text + "' is not HOST:PORT";
    },
    "HOST:PORT");

  auto* controller = declare(app, "controller", "Membership, placement, epochs", arguments);
  add_config(controller, arguments);
  controller->add_option("--port", arguments->port, "listen here; 0: any port");
  controller->callback([arguments, &run] {
    run = [arguments] {
      begin(*arguments, "controller");
      return actors::run_controller({arguments->config, arguments->process, arguments->port});
    };
  });

  auto* frontend = declare(app, "frontend", "HTTP, scheduling", arguments);
  add_config(frontend, arguments);
  frontend->add_option("--port", arguments->port, "listen here instead of where the config says");
  frontend->add_option("--controller-port", arguments->controller_port, "of the controller")
    ->required();
  frontend->callback([arguments, &run] {
    run = [arguments] {
      begin(*arguments, "frontend");
      return actors::run_frontend(
        {arguments->config, arguments->process, arguments->controller_port, arguments->port});
    };
  });

  auto* node = declare(
    app, "node",
    "Parent of a host's workers and keeper of their memory; by hand for `launch: join`", arguments);
  node->add_option("--name", arguments->name, "as in the cluster file")->required();
  node->add_option("--controller", arguments->peer, "HOST:PORT of the controller")
    ->required()
    ->check(host_port);
  node->add_option("--bind", arguments->bind,
                   "address that workers and peers reach this node at; default: the one that the "
                   "controller sees");
  node->add_option("--log-directory", arguments->log_directory,
                   "one log a worker goes here; default: $XDG_RUNTIME_DIR/troupe/NAME, or "
                   "/tmp/troupe-UID/NAME");
  node->callback([arguments, node, &run] {
    if (node->count("--incarnation") == 0)
      arguments->process.incarnation = 0;
    run = [arguments] {
      begin(*arguments, arguments->name);
      actors::node_options options;
      options.name = arguments->name;
      options.incarnation = arguments->process.incarnation;
      std::tie(options.controller_host, options.controller_port) = split_peer(arguments->peer);
      options.bind = arguments->bind;
      options.log_directory = arguments->log_directory;
      options.log_level = arguments->log_level;
      options.heartbeat_ms = arguments->heartbeat_ms;
      return actors::run_node(std::move(options), arguments->process.pulse_fd);
    };
  });

  auto* keeper =
    declare(app, "keeper", "Owner of a GPU's memory, which computes nothing", arguments);
  auto keeping = std::make_shared<actors::keeper_options>();
  keeper->add_option("--name", arguments->name, "NODE/keeper-N")->required();
  keeper->add_option("--device", keeping->device, "number of the GPU")->required();
  keeper->add_option("--address", keeping->address, "where workers reach it")->required();
  keeper->callback([arguments, keeping, &run] {
    run = [arguments, keeping] {
      begin(*arguments, arguments->name);
      return actors::run_keeper(*keeping);
    };
  });

  auto* worker =
    declare(app, "worker",
            "Stages and expert groups of a device, or of those that compute together", arguments);
  worker->add_option("--name", arguments->name, "NODE/worker-N")->required();
  worker->add_option("--node", arguments->peer, "HOST:PORT of the node process")
    ->required()
    ->check(host_port);
  worker->callback([arguments, &run] {
    run = [arguments] {
      begin(*arguments, arguments->name);
      actors::worker_options options;
      options.name = arguments->name;
      options.incarnation = arguments->process.incarnation;
      std::tie(options.node_host, options.node_port) = split_peer(arguments->peer);
      return actors::run_worker(std::move(options), arguments->heartbeat_ms,
                                arguments->process.pulse_fd);
    };
  });
}

} // namespace troupe::tools
