#include "troupe/actors/node_supervisor.hpp"

#include "troupe/actors/dial.hpp"
#include "troupe/actors/runtime.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/memory/keeper.hpp"
#include "troupe/placement/plan.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <random>
#include <ranges>
#include <utility>
#include <variant>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

namespace troupe::actors {

using namespace messages;
using namespace std::chrono_literals;

namespace {

/// Pause between two attempts to reach the controller.
constexpr auto redial_interval = 200ms;

/// What running workers get to end by themselves.
constexpr auto stop_grace = 1000ms;

constexpr const char* controller_name = "controller";

/// A process that is ready to dump the state of its GPU handles what goes wrong in its kernels by
/// itself, within its own context (CUDA-GDB manual, "GPU core dump support"). Otherwise the driver
/// resets channels of the GPU, and until it has, for 100 to 240 ms after an illegal access,
/// no process computes there. Whoever has set the first of these knows better.
std::vector<std::pair<std::string, std::string>> exceptions_stay_local(const std::string& log) {
  constexpr const char* enabled = "CUDA_ENABLE_COREDUMP_ON_EXCEPTION";
  if (std::getenv(enabled) != nullptr)
    return {};
  return {{enabled, "1"},
          {"CUDA_COREDUMP_FILE", log + ".gpu-core"},
          {"CUDA_COREDUMP_GENERATION_FLAGS",
           "skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory,skip_local_memory,"
           "skip_constbank_memory"}};
}

std::uint64_t random_seed() {
  std::random_device random;
  return std::uint64_t{random()} << 32U | random();
}

} // namespace

node_supervisor::node_supervisor(caf::actor_config& config, node_options options)
  : node_supervisor_local::base(config),
    options_(std::move(options)),
    policy_(options_.name, options_.incarnation, options_.bind, random_seed()) {
  set_down_handler([this](caf::down_msg& down) {
    if (controller_ && controller_.address() == down.source) {
      spdlog::warn("the connection to the controller broke; the workers go on");
      controller_ = nullptr;
      policy_.disconnected();
      delayed_send(this, redial_interval, redial_atom::value);
    }
  });
}

node_supervisor::~node_supervisor() = default;

void node_supervisor::dial_controller() {
  dial<cluster_supervisor_actor>(
    this, options_.controller_host, options_.controller_port, 2000ms,
    [this](cluster_supervisor_actor controller) {
      controller_ = std::move(controller);
      monitor(controller_);
      carry_out(policy_.connected());
    },
    [this](const error& e) {
      spdlog::debug("{}", e.text());
      delayed_send(this, redial_interval, redial_atom::value);
    });
}

void node_supervisor::send_heartbeat() {
  auto heartbeat = policy_.heartbeat();
  if (auto report = gpu_monitor_ ? gpu_monitor_->take() : std::nullopt) {
    for (auto& view : *report->mutable_keepers())
      if (auto k = keepers_.find(view.device()); k != keepers_.end())
        view.set_pid(static_cast<std::uint32_t>(k->second.pid));
    *heartbeat.mutable_devices() = std::move(*report);
  }
  send(controller_, node_heartbeat{std::move(heartbeat)});
}

void node_supervisor::carry_out(policy::effects todo) {
  for (auto& effect : todo)
    std::visit([this](auto& what) { carry_out(what); }, effect);
}

void node_supervisor::carry_out(const policy::start_process& what) {
  auto started = spawn(what);
  if (!started) {
    carry_out(policy_.not_started(what.process, started.error(), std::chrono::steady_clock::now()));
    return;
  }
  auto pid = static_cast<std::uint32_t>(started->pid);
  running_.insert_or_assign(what.process, std::move(*started));
  carry_out(policy_.started(what.process, pid));
}

void node_supervisor::carry_out(const policy::kill_process& what) {
  children_->signal(what.process, SIGKILL);
}

void node_supervisor::carry_out(policy::assign& what) {
  if (what.assignment.device().empty()) // a standby, which may have to take any worker's place
    what.assignment.set_device(fmt::format("{}", fmt::join(std::views::keys(keepers_), ",")));
  for (const auto& device : placement::devices_of(what.assignment.device()))
    if (auto keeper = keepers_.find(device); keeper != keepers_.end())
      what.assignment.add_keepers(keeper->second.address);
  for (const auto& actor : what.assignment.actors()) {
    auto found = kv_.find(actor.id());
    if (found == kv_.end())
      continue;
    auto* kv = what.assignment.add_kv();
    kv->set_actor(actor.id());
    kv->set_owner_pid(static_cast<std::uint32_t>(::getpid()));
    kv->set_owner_fd(found->second.fd());
    kv->set_bytes(found->second.size());
  }
  if (auto c = running_.find(what.process); c != running_.end())
    send(c->second.handle, worker_assignment{std::move(what.assignment)});
}

void node_supervisor::carry_out(const policy::send_view& what) {
  if (auto c = running_.find(what.process); c != running_.end())
    send(c->second.handle, cluster_view{policy_.view()});
}

void node_supervisor::carry_out(const policy::keep_memory& what) {
  auto kept = create_memory(what);
  carry_out(kept ? policy_.memory_kept(what.worker)
                 : policy_.memory_refused(what.worker, kept.error()));
}

void node_supervisor::carry_out(const policy::drop_memory& what) {
  kv_.erase(what.actor);
}

void node_supervisor::carry_out(const policy::note& what) {
  spdlog::log(what.is_bad ? spdlog::level::err : spdlog::level::info, "{}", what.text);
}

void node_supervisor::carry_out(proto::NodeHello& hello) {
  hello.set_host(host_name());
  hello.set_pid(static_cast<std::uint32_t>(::getpid()));
  hello.set_memory_bytes(host_memory_bytes());
  send(controller_, node_hello{std::move(hello)});
}

void node_supervisor::carry_out(proto::WorkerChanged& change) {
  send(controller_, worker_changed{std::move(change)});
}

std::string node_supervisor::device_of(const std::string& worker) const {
  for (const auto& planned : policy_.plan().workers())
    if (planned.name() == worker)
      return planned.device();
  return {};
}

expected<void> node_supervisor::create_memory(const policy::keep_memory& what) {
  if (std::ranges::count(gpu_places_, device_of(what.worker)) > 0)
    return {}; // the worker asks the keepers
  for (const auto& [actor, bytes] : what.actors) {
    auto segment =
      memory::segment::create("troupe:" + policy_.plan().cluster() + "/" + actor, bytes);
    if (!segment)
      return tl::unexpected(segment.error());
    kv_.insert_or_assign(actor, std::move(*segment));
  }
  return {};
}

expected<node_supervisor::child> node_supervisor::spawn(const policy::start_process& what) {
  child c;
  child_spec spec;
  spec.name = what.process;
  spec.arguments = {"worker",
                    "--name",
                    what.name,
                    "--incarnation",
                    std::to_string(what.incarnation),
                    "--node",
                    fmt::format("{}:{}", options_.bind, port_),
                    "--heartbeat-ms",
                    std::to_string(options_.heartbeat_ms),
                    "--log-level",
                    options_.log_level};
  if (!policy_.plan().unprotected()) {
    auto watch = child_watch::begin(spec, std::chrono::milliseconds(policy_.plan().hang_ms()));
    if (!watch)
      return tl::unexpected(watch.error());
    c.watch = std::move(*watch);
    spec.life = c.watch->life();
  }
  spec.log_path = log_path_of(what.name);
  if (!keepers_.empty())
    spec.environment = exceptions_stay_local(spec.log_path);
  auto pid = children_->spawn(std::move(spec));
  if (!pid)
    return tl::unexpected(pid.error());
  c.pid = *pid;
  return c;
}

std::string node_supervisor::log_path_of(const std::string& process) const {
  auto file = process;
  std::replace(file.begin(), file.end(), '/', '-');
  return fmt::format("{}/{}.log", options_.log_directory, file);
}

/// One for each GPU of this node, before its first worker.
void node_supervisor::start_keepers(const proto::ClusterPlan& plan) {
  for (const auto& worker : plan.workers()) {
    if (worker.node() != options_.name || !worker.device().starts_with("cuda:")
        || std::ranges::count(gpu_places_, worker.device()) > 0)
      continue;
    gpu_places_.push_back(worker.device());
    for (const auto& device : placement::devices_of(worker.device()))
      if (keepers_.count(device) == 0)
        start_keeper(device);
  }
}

void node_supervisor::start_keeper(const std::string& device) {
  auto index = device.substr(device.find(':') + 1);
  auto address = memory::keeper_address(static_cast<std::uint32_t>(::getpid()),
                                        static_cast<std::uint32_t>(std::stoul(index)));
  child_spec spec;
  spec.name = fmt::format("{}/keeper-{}", options_.name, index);
  spec.arguments = {"keeper",    "--name", spec.name,     "--device",        index,
                    "--address", address,  "--log-level", options_.log_level};
  spec.log_path = log_path_of(spec.name);
  // Without one, the worker says what it misses.
  auto& started = keepers_.emplace(device, keeper{spec.name, address}).first->second;
  if (auto pid = children_->spawn(std::move(spec)))
    started.pid = *pid;
  else
    spdlog::error("{}", pid.error().text());
}

void node_supervisor::watch_gpus() {
  if (gpu_monitor_ || keepers_.empty())
    return;
  std::vector<telemetry::watched_gpu> gpus;
  for (const auto& [device, k] : keepers_)
    gpus.push_back({device, k.name, k.address});
  gpu_monitor_ = std::make_unique<telemetry::gpu_monitor>(options_.name, std::move(gpus));
}

void node_supervisor::keeper_exited(const child_exit& exit) {
  if (!exit.signalled && exit.status == exit_permanent) {
    spdlog::error("{} found no GPU; its workers say why", exit.name);
    for (auto& [device, k] : keepers_)
      if (k.name == exit.name)
        k.pid = 0;
    return;
  }
  const auto why =
    fmt::format("{} {}: the memory of its GPU is gone, and this node ends to begin anew", exit.name,
                exit.text());
  spdlog::critical("{}", why);
  if (options_.pulse)
    options_.pulse->last_words(why);
  quit(caf::exit_reason::kill);
}

void node_supervisor::child_exited(const child_exit& exit) {
  if (exit.name.starts_with(options_.name + "/keeper-"))
    return keeper_exited(exit);
  auto found = running_.find(exit.name);
  if (found == running_.end())
    return;
  auto& c = found->second;
  if (!c.is_ending)
    faults::suffer(faults::point::node_exit_seen, exit.name);
  bool was_judged = c.watch && !c.watch->verdict().empty();
  policy::process_end end{exit.name, c.watch ? c.watch->cause_of(exit) : exit.text(),
                          was_judged ? c.watch->verdict() : "",
                          was_judged ? c.watch->judged() : exit.detected};
  auto now = std::chrono::steady_clock::now();
  if (!exit.is_gone) {
    c.is_ending = true;
    c.ending_since = exit.detected;
    carry_out(policy_.process_ending(end, now));
    return;
  }
  if (c.is_ending)
    spdlog::info("{} (pid {}) {}; clearing up behind it took {:.1f} ms", exit.name, exit.pid,
                 exit.text(),
                 std::chrono::duration<double, std::milli>(exit.detected - c.ending_since).count());
  if (c.is_ending && !was_judged)
    end.detected = c.ending_since;
  running_.erase(found);
  carry_out(policy_.process_exited(end, now));
}

void node_supervisor::look_at_pulses(time_point now) {
  for (auto& [name, c] : running_) {
    if (!c.watch || c.is_ending || !c.watch->look(c.pid, now))
      continue;
    spdlog::error("{} (pid {}): {}; killing it", name, c.pid, c.watch->verdict());
    children_->signal(name, SIGKILL);
  }
}

node_supervisor::behavior_type node_supervisor::make_behavior() {
  return {
    [this](const node_assignment& assignment) {
      if (faults::is_cut_off(controller_name))
        return;
      start_keepers(assignment->plan());
      watch_gpus();
      carry_out(policy_.assigned(assignment.body));
    },
    [this](const cluster_view& view) {
      if (!faults::is_cut_off(controller_name))
        carry_out(policy_.view_changed(view.body));
    },
    [this](const node_heartbeat& answer) {
      if (!faults::is_cut_off(controller_name) && answer->say_hello())
        carry_out(policy_.hello_wanted());
    },
    [this](const worker_hello& hello) {
      auto process = policy_.process_of(hello.body);
      auto c = process ? running_.find(*process) : running_.end();
      if (c == running_.end()) {
        spdlog::warn("refused a worker {} of incarnation {}", hello->name(), hello->incarnation());
        return;
      }
      c->second.handle = caf::actor_cast<worker_actor>(current_sender());
      carry_out(policy_.process_connected(*process));
    },
    [this](const worker_report& said) { carry_out(policy_.process_reported(said.body)); },
    [this](start_atom, std::uint16_t port) {
      port_ = port;
      auto self = caf::actor_cast<node_supervisor_local>(this);
      auto children =
        child_processes::start([self](const child_exit& exit) { caf::anon_send(self, exit); });
      if (!children) {
        spdlog::critical("{}", children.error().text());
        quit(caf::exit_reason::kill);
        return;
      }
      children_ = std::move(*children);
      dial_controller();
      delayed_send(this, 1ms, tick_atom::value);
    },
    [this](redial_atom) {
      if (!controller_)
        dial_controller();
    },
    [this](tick_atom) {
      auto now = std::chrono::steady_clock::now();
      auto heartbeat = std::chrono::milliseconds(options_.heartbeat_ms);
      auto hang_ms = policy_.plan().hang_ms();
      auto look = child_watch::interval(std::chrono::milliseconds(hang_ms == 0 ? 800 : hang_ms));
      delayed_send(this, std::min(heartbeat, look), tick_atom::value);
      if (controller_ && now - last_heartbeat_ >= heartbeat * 9 / 10) {
        last_heartbeat_ = now;
        send_heartbeat();
      }
      look_at_pulses(now);
      carry_out(policy_.tick(now));
    },
    [this](knock_atom) {
      if (options_.pulse)
        options_.pulse->answered();
    },
    [this](const child_exit& exit) { child_exited(exit); },
    [this](stop_atom) {
      if (children_)
        children_->stop_all(stop_grace);
      children_.reset();
      gpu_monitor_.reset();
      quit();
    },
  };
}

} // namespace troupe::actors
