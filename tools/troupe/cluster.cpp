#include "commands.hpp"

#include "troupe/actors/cluster_plan.hpp"
#include "troupe/actors/device_needs.hpp"
#include "troupe/actors/runtime.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/base/log.hpp"
#include "troupe/base/startup_report.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/config/cluster_config.hpp"
#include "troupe/http/client.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/placement/place.hpp"
#include "troupe/recovery/relocation.hpp"
#include "troupe/telemetry/status_text.hpp"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>
#include <unistd.h>

namespace troupe::tools {

namespace {

using namespace std::chrono_literals;

struct up_arguments {
  actors::launch_options launch;
  bool detach = false;
  bool quiet = false;
};

void print_ready(const actors::cluster_state& state, double seconds) {
  fmt::print("cluster {} is ready after {:.2f} s: {}\n", state.cluster, seconds, state.endpoint);
  fmt::print("  troupe ask \"What is 347 + 86?\"\n  troupe status\n  troupe down\n");
  std::fflush(stdout);
}

void become_launcher() {
  set_process_name("launcher");
  start_logging("warn");
  actors::block_stop_signals();
  if (auto armed = faults::arm(); !armed)
    spdlog::error("{}", armed.error().text());
}

int up(up_arguments& arguments) {
  become_launcher();
  auto& launch = arguments.launch;
  launch.on_ready = print_ready;
  if (!arguments.quiet)
    launch.say = [](const std::string& line) {
      fmt::print("  {}\n", line);
      std::fflush(stdout);
    };
  auto ended = actors::launch(launch);
  if (!ended)
    return ended.error().code == error_code::cancelled ? 130 : complain(ended.error());
  return EXIT_SUCCESS;
}

/// Leaves a launcher behind and returns when the cluster is ready or has failed.
int up_detached(up_arguments& arguments) {
  auto pipe = startup_pipe::open();
  if (!pipe)
    return complain(pipe.error());
  pid_t child = ::fork();
  if (child < 0)
    return complain(fail(error_code::resource_exhausted, "cannot fork").value());
  if (child > 0) {
    auto config = config::load(arguments.launch.config.file, arguments.launch.config.settings);
    if (!config)
      return complain(config.error());
    auto started = pipe->wait(std::chrono::seconds(config->recovery.startup_s) + 30s);
    if (!started)
      return complain(started.error());
    auto state = actors::find_cluster(config->cluster);
    if (!state)
      return complain(state.error());
    fmt::print("cluster {} is ready: {}\n  `troupe status {}` shows it, `troupe down {}` ends it\n",
               state->cluster, state->endpoint, state->cluster, state->cluster);
    return EXIT_SUCCESS;
  }
  ::setsid();
  unique_fd terminal{::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3)};
  int null_fd = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  ::dup2(null_fd, STDIN_FILENO);
  ::dup2(null_fd, STDOUT_FILENO);
  ::dup2(null_fd, STDERR_FILENO);
  become_launcher();
  int report_fd = pipe->child_fd();
  bool reported = false;
  if (!arguments.quiet)
    arguments.launch.say = [&](const std::string& line) {
      if (terminal)
        ::dprintf(terminal.get(), "  %s\n", line.c_str());
    };
  arguments.launch.on_ready = [&](const actors::cluster_state&, double) {
    terminal.reset(); // whoever waits for its end need not wait for the cluster's
    report_started(report_fd, 0);
    reported = true;
  };
  auto ended = actors::launch(arguments.launch);
  if (!ended && !reported)
    report_not_started(report_fd, ended.error());
  std::_Exit(ended ? EXIT_SUCCESS : EXIT_FAILURE);
}

} // namespace

void add_up(CLI::App& app, command& run) {
  auto arguments = std::make_shared<up_arguments>();
  auto* sub = app.add_subcommand("up", "Launch a cluster from a config file");
  sub->footer("Example: troupe up configs/local.yaml --set serving.listen=127.0.0.1:9000");
  sub->add_option("CONFIG", arguments->launch.config.file, "cluster file (YAML)")->required();
  sub
    ->add_option(
      "--set", arguments->launch.config.settings,
      "KEY=VALUE put over the file, for instance serving.listen=127.0.0.1:0 (repeatable)")
    ->allow_extra_args(false);
  sub->add_flag("--detach", arguments->detach,
                "return when the cluster is ready; `troupe down` ends it");
  sub->add_flag("--quiet", arguments->quiet, "no progress");
  sub
    ->add_option("--log-level", arguments->launch.log_level,
                 "of all processes: debug, info, warn or error")
    ->check(CLI::IsMember({"debug", "info", "warn", "error"}));
  sub->callback([arguments, &run] {
    run = [arguments] { return arguments->detach ? up_detached(*arguments) : up(*arguments); };
  });
}

void add_down(CLI::App& app, command& run) {
  auto cluster = std::make_shared<std::string>();
  auto* sub = app.add_subcommand("down", "End a running cluster");
  sub->add_option("CLUSTER", *cluster, "its name; may be left out if only one runs");
  sub->callback([cluster, &run] {
    run = [cluster] {
      auto state = actors::find_cluster(*cluster);
      if (!state)
        return complain(state.error());
      ::kill(state->pid, SIGTERM);
      for (auto waited = 0ms; waited < 15s; waited += 20ms) {
        if (::kill(state->pid, 0) != 0) {
          fmt::print("cluster {} has ended\n", state->cluster);
          return EXIT_SUCCESS;
        }
        std::this_thread::sleep_for(20ms);
      }
      return complain(fail(error_code::deadline_exceeded,
                           fmt::format("the launcher (pid {}) has not ended in 15 s", state->pid),
                           fmt::format("kill -9 {} ends it with all its processes", state->pid))
                        .value());
    };
  });
}

void add_status(CLI::App& app, command& run) {
  struct arguments {
    std::string cluster, endpoint;
    bool json = false;
  };
  auto given = std::make_shared<arguments>();
  auto* sub = app.add_subcommand("status", "Show what runs where, and what has been recovered");
  sub->add_option("CLUSTER", given->cluster, "its name; may be left out if only one runs");
  sub->add_option("--endpoint", given->endpoint,
                  "ask this frontend instead, for instance 10.0.0.1:8000");
  sub->add_flag("--json", given->json, "for programs; the same as GET /v1/cluster");
  sub->callback([given, &run] {
    run = [given] {
      auto endpoint = resolve_endpoint(given->cluster, given->endpoint);
      if (!endpoint)
        return complain(endpoint.error());
      auto answer = http::fetch({"GET", *endpoint + "/v1/cluster", {}, {}}, 5000ms);
      if (!answer)
        return complain(answer.error());
      if (given->json) {
        fmt::print("{}\n", answer->body);
        return EXIT_SUCCESS;
      }
      auto status = nlohmann::json::parse(answer->body, nullptr, false);
      if (!status.is_object() || !status.contains("nodes"))
        return complain(fail(error_code::internal, *endpoint + " is no troupe frontend").value());
      fmt::print("{}", telemetry::status_text(status, has_colours()));
      return EXIT_SUCCESS;
    };
  });
}

void add_plan(CLI::App& app, command& run) {
  auto source = std::make_shared<actors::config_source>();
  auto* sub =
    app.add_subcommand("plan", "Check a config and its model, and show what would run where");
  sub->add_option("CONFIG", source->file, "cluster file (YAML)")->required();
  sub->add_option("--set", source->settings, "KEY=VALUE put over the file")
    ->allow_extra_args(false);
  sub->callback([source, &run] {
    run = [source] {
      auto config = config::load(source->file, source->settings);
      if (!config)
        return complain(config.error());
      auto checked = actors::check_before_launch(*config);
      if (!checked)
        return complain(checked.error());
      auto model = model::load_model_config(config->model.path);
      if (!model)
        return complain(model.error());
      auto placed = placement::place(*config, actors::shape_of(*model));
      if (!placed)
        return complain(placed.error());
      fmt::print("{}", placement::describe(*placed));
      for (const auto& gpu : actors::device_needs(*checked, *model))
        fmt::print("{} of {} is to hold {}\n", gpu.device, gpu.node, placement::describe(gpu.need));
      std::map<std::string, recovery::node_memory> memory;
      auto gpus = actors::local_gpu_bytes(*config, *checked);
      for (const auto& node : config->nodes)
        if (node.launch == config::launch_mode::local)
          memory[node.name] = {host_memory_bytes(), std::move(gpus[node.name])};
      for (const auto& line : recovery::foresee_losses(*checked, memory))
        fmt::print("{}\n", line);
      return EXIT_SUCCESS;
    };
  });
}

} // namespace troupe::tools
