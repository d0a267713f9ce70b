#include "troupe/transport/endpoint.hpp"

#include "troupe/base/fault_point.hpp"
#include "troupe/transport/address.hpp"
#include "troupe/transport/checksum.hpp"
#include "troupe/transport/doorbell.hpp"
#include "troupe/transport/inbox.hpp"
#include "troupe/transport/injected_sends.hpp"
#include "troupe/transport/peer_table.hpp"
#include "troupe/transport/sleeping_place.hpp"
#include "troupe/transport/ucx_worker.hpp"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <future>
#include <mutex>
#include <optional>
#include <thread>
#include <variant>

#include <fmt/format.h>
#include <pthread.h>
#include <spdlog/spdlog.h>

namespace troupe::transport {

namespace {

using clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds max_spin{50};
/// Events wake the thread; this only bounds the harm if one were ever missed.
constexpr std::chrono::milliseconds longest_sleep{100};
constexpr std::chrono::milliseconds sleep_for_hellos{10};
constexpr std::chrono::milliseconds sleep_for_injected{1};
/// After the drain of stop(): for the last bytes, and again for closed connections to report.
constexpr std::chrono::milliseconds closing_time{200};

struct identify_command {
  proto::FrameHeader own;
};

struct connect_command {
  std::string peer;
  std::uint64_t incarnation;
  std::string address;
};

struct disconnect_command {
  std::string peer;
};

struct send_command {
  std::unique_ptr<send_operation> operation;
};

/// A send that ends without UCX: refused, or to this process itself.
struct local_command {
  expected<frame> outcome;
  completion done;
};

using command =
  std::variant<identify_command, connect_command, disconnect_command, send_command, local_command>;

error stopped() {
  return fail(error_code::unavailable, "this process's transport is stopped").value();
}

} // namespace

std::vector<std::pair<std::string, std::string>> required_environment() {
  return {{"UCX_HANDLE_ERRORS", "none"}, {"UCX_MEM_MMAP_HOOK_MODE", "none"}};
}

/// UCX's worker, and who calls it: one thread at a time, the holder of `driving_`. That is the
/// progress thread unless
///   - another one waits in `drive`: then that one hears what arrives, and the progress thread only
///     carries out commands; or
///   - another one sends while nobody holds `driving_`: then it sends the frame itself.
/// Nobody holds it while asleep. Either way a frame costs one thread less to be woken, at each end.
///
/// Neighbours ring for whoever sleeps (doorbell.hpp). UCX's descriptor is watched by who drives,
/// too, but where all peers are neighbours: then UCX tells of deaths alone, the progress thread
/// watches for them, and a driver makes no system call for UCX's sake.
class endpoint::engine {
public:
  engine(endpoint_options options, endpoint_callbacks callbacks)
    : pool(options.max_cached_bytes),
      options_(std::move(options)),
      callbacks_(std::move(callbacks)) {}

  ~engine() { stop(default_drain); }

  expected<void> start();
  void identify(std::string name, std::uint64_t incarnation);
  void post(command next);
  bool drive(const std::function<bool()>& done, clock::time_point deadline);
  void interrupt();
  void stop(std::chrono::milliseconds drain);

  const endpoint_options& options() const { return options_; }
  const std::string& address() const { return address_; }
  std::size_t max_header() const { return max_header_; }

  buffer_pool pool;

private:
  struct communication {
    communication(ucx_worker opened, inbox::options receiving, buffer_pool pool,
                  const proto::FrameHeader& own, const proto::HostPlace* place,
                  peer_table::lost_callback on_lost)
      : worker(std::move(opened)),
        in(std::move(receiving), std::move(pool)),
        peers(worker, in, own, place, std::move(on_lost)) {}
    // UCX may still call back into the others while its worker is destroyed.
    ~communication() { worker.close(); }

    ucx_worker worker;
    inbox in;
    peer_table peers;
  };

  /// Holds `driving_` and says who does, for callbacks that post.
  class driver_lock {
  public:
    explicit driver_lock(engine& owner, bool waits = true) : owner_(owner) {
      if (waits)
        lock();
      else if (owner_.driving_.try_lock())
        take();
    }
    driver_lock(const driver_lock&) = delete;
    driver_lock& operator=(const driver_lock&) = delete;
    ~driver_lock() {
      if (holds_)
        unlock();
    }

    explicit operator bool() const { return holds_; }

    void lock() {
      owner_.driving_.lock();
      take();
    }

    void unlock() {
      holds_ = false;
      owner_.driver_.store(std::thread::id{}, std::memory_order_relaxed);
      owner_.driving_.unlock();
    }

  private:
    void take() {
      holds_ = true;
      owner_.driver_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    }

    engine& owner_;
    bool holds_ = false;
  };

  proto::FrameHeader own_header() const;
  expected<std::unique_ptr<communication>> open();
  void run(std::promise<expected<void>> started);
  void serve(communication& with);
  bool shut_down(communication& with);
  bool step(communication& with);
  bool step_network(communication& with);
  bool rest(communication& with, listener who);
  bool rest_network(communication& with);
  void sleep_in_background(std::chrono::milliseconds limit);
  bool execute_commands(communication& with);
  void execute(communication& with, command& next);
  void send_injected(communication& with);
  std::chrono::milliseconds longest_sleep_of(const communication& with) const;
  void drive_until(driver_lock& lock, const std::function<bool()>& done,
                   clock::time_point deadline);
  bool is_stopping();

  endpoint_options options_; ///< identify() fills in what was left open, nothing else changes
  const endpoint_callbacks callbacks_;
  sleeping_place background_;    ///< of the progress thread
  sleeping_place foreground_;    ///< of who is in `drive`
  std::optional<doorbell> bell_; ///< none: frames go by UCX alone
  std::string address_;          // this and the next: set before start() returns
  std::size_t max_header_ = 0;

  std::mutex driving_;
  std::atomic<std::thread::id> driver_{}; ///< who holds driving_
  std::atomic<bool> is_driven_{false};    ///< somebody is in `drive`
  /// UCX may have something to do: it was used, or its descriptor said so.
  std::atomic<bool> network_is_due_{true};
  bool network_is_driven_ = false; // guarded by driving_: who is in `drive` watches UCX
  communication* with_ = nullptr;  // guarded by driving_; null before start and after stop
  std::vector<command> executing_; // guarded by driving_
  injected_sends injected_;        // guarded by driving_

  std::mutex mutex_;
  std::vector<command> commands_;                // guarded by mutex_
  bool stopping_ = false;                        // guarded by mutex_
  std::optional<clock::time_point> drain_until_; // guarded by mutex_

  std::mutex join_mutex_;
  std::thread thread_; // guarded by join_mutex_
};

expected<void> endpoint::engine::start() {
  std::promise<expected<void>> started;
  auto result = started.get_future();
  // Signals are for the program's own threads.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  std::optional<error> refused;
  try {
    thread_ = std::thread([this, promise = std::move(started)]() mutable {
      ::pthread_setname_np(::pthread_self(), "transport");
      run(std::move(promise));
    });
  } catch (const std::system_error& failure) {
    refused = fail(error_code::resource_exhausted,
                   fmt::format("cannot start the transport's thread: {}", failure.what()))
                .value();
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (refused)
    return tl::unexpected(std::move(*refused));
  return result.get();
}

proto::FrameHeader endpoint::engine::own_header() const {
  proto::FrameHeader result;
  result.set_sender(options_.name);
  result.set_sender_incarnation(options_.incarnation);
  return result;
}

void endpoint::engine::identify(std::string name, std::uint64_t incarnation) {
  options_.name = std::move(name);
  options_.incarnation = incarnation;
  post(identify_command{own_header()});
}

expected<std::unique_ptr<endpoint::engine::communication>> endpoint::engine::open() {
  auto worker = ucx_worker::open(options_.transports, options_.interface);
  if (!worker)
    return tl::unexpected(std::move(worker).error());
  inbox::options receiving;
  receiving.max_payload = options_.max_payload;
  receiving.checksums = options_.checksums;
  receiving.on_frame = callbacks_.on_frame;
  receiving.on_dropped = callbacks_.on_dropped;
  if (options_.rings) {
    if (auto bell = doorbell::open())
      bell_.emplace(std::move(*bell));
    else
      spdlog::warn("transport: no shared memory with other processes: {}", bell.error().text());
  }
  const auto own = own_header();
  auto result =
    std::make_unique<communication>(std::move(*worker), std::move(receiving), pool, own,
                                    bell_ ? &bell_->place() : nullptr, callbacks_.on_peer_lost);
  if (auto done = result->in.listen(result->worker.get()); !done)
    return tl::unexpected(std::move(done).error());
  if (auto done = result->peers.listen(); !done)
    return tl::unexpected(std::move(done).error());
  const auto bell_of = [this](listener who) { return bell_ ? bell_->fd(who) : -1; };
  const int network = result->worker.event_fd();
  if (auto done = background_.open(network, bell_of(listener::background)); !done)
    return tl::unexpected(std::move(done).error());
  if (auto done = foreground_.open(network, bell_of(listener::foreground)); !done)
    return tl::unexpected(std::move(done).error());
  return result;
}

void endpoint::engine::run(std::promise<expected<void>> started) {
  auto opened = open();
  if (!opened) {
    started.set_value(tl::unexpected(std::move(opened).error()));
    return;
  }
  auto& with = **opened;
  proto::TransportAddress address;
  address.set_ucx(with.worker.address());
  if (bell_)
    *address.mutable_place() = bell_->place();
  address_ = write_address(address);
  max_header_ = with.worker.max_header();
  {
    driver_lock lock{*this};
    with_ = &with;
  }
  started.set_value({});
  serve(with);
  // From here on everything is this thread's, also what somebody in `drive` was watching.
  interrupt();
  driver_lock lock{*this};
  with_ = nullptr;
  background_.watch_network(true);
  if (!shut_down(with)) {
    // UCX 1.13 aborts the process where a worker with cancelled transfers or unanswered
    // handshakes is destroyed. Its peers know already; the rest ends with the process.
    spdlog::info("transport of '{}' stopped amid transfers", options_.name);
    [[maybe_unused]] const auto* left_behind = opened->release();
  }
}

bool endpoint::engine::is_stopping() {
  std::lock_guard guard{mutex_};
  return stopping_;
}

void endpoint::engine::serve(communication& with) {
  const auto spin = std::min(options_.spin, max_spin);
  auto last_event = clock::now();
  while (!is_stopping()) {
    std::chrono::milliseconds limit = longest_sleep;
    {
      driver_lock lock{*this};
      if (is_driven_) {
        bool busy = execute_commands(with);
        if (!network_is_driven_)
          busy |= step_network(with) | with.peers.settle();
        if (busy) {
          interrupt(); // it may be what the driver waits for, or wants to be looked after
          continue;
        }
        if (!network_is_driven_ && !rest_network(with))
          continue;
      } else {
        if (bell_)
          bell_->hush();
        if (step(with)) {
          if (spin.count() > 0)
            last_event = clock::now();
          continue;
        }
        if (spin.count() > 0 && clock::now() - last_event < spin)
          continue;
        if (!rest(with, listener::background))
          continue;
        limit = longest_sleep_of(with);
      }
    }
    sleep_in_background(limit);
  }
}

void endpoint::engine::sleep_in_background(std::chrono::milliseconds limit) {
  if (background_.sleep(limit))
    network_is_due_ = true;
}

bool endpoint::engine::drive(const std::function<bool()>& done, clock::time_point deadline) {
  if (driver_.load(std::memory_order_relaxed) != std::this_thread::get_id()
      && !is_driven_.exchange(true)) {
    driver_lock lock{*this};
    drive_until(lock, done, deadline);
    is_driven_ = false;
  }
  return done();
}

void endpoint::engine::drive_until(driver_lock& lock, const std::function<bool()>& done,
                                   clock::time_point deadline) {
  if (with_ == nullptr)
    return;
  network_is_driven_ = !bell_ || with_->peers.needs_network();
  foreground_.watch_network(network_is_driven_);
  background_.watch_network(!network_is_driven_);
  while (!done()) {
    const bool is_busy = step(*with_);
    const auto now = clock::now();
    if (now >= deadline || is_stopping())
      break;
    if (is_busy || !rest(*with_, listener::foreground))
      continue;
    const auto limit = std::min(longest_sleep_of(*with_),
                                std::chrono::ceil<std::chrono::milliseconds>(
                                  std::min<clock::duration>(deadline - now, longest_sleep)));
    lock.unlock();
    const bool network_spoke = foreground_.sleep(limit);
    lock.lock();
    if (with_ == nullptr)
      return;
    if (network_spoke)
      network_is_due_ = true;
    if (bell_)
      bell_->hush();
  }
  while (execute_commands(*with_)) {
  }
  // The progress thread sleeps: what comes from now on wakes it, and so does what came before.
  bool is_quiet = rest(*with_, listener::background);
  if (!is_quiet) {
    step(*with_);
    is_quiet = rest(*with_, listener::background);
  }
  background_.watch_network(true);
  if (!is_quiet || longest_sleep_of(*with_) != longest_sleep)
    background_.wake();
}

void endpoint::engine::interrupt() {
  if (is_driven_)
    foreground_.wake();
}

/// True when nothing is on its way any more, so that the worker may be destroyed.
bool endpoint::engine::shut_down(communication& with) {
  const auto work_until = [&](clock::time_point deadline, auto&& finished) {
    while (!finished() && clock::now() < deadline)
      if (!step(with) && rest(with, listener::background))
        sleep_in_background(longest_sleep_of(with));
  };
  clock::time_point deadline;
  {
    std::lock_guard guard{mutex_};
    deadline = *drain_until_;
  }
  execute_commands(with);
  work_until(deadline, [&] { return !with.peers.has_sends_in_flight(); });
  injected_.release_due(clock::time_point::max());
  send_injected(with);
  with.in.close();
  with.peers.flush_all();
  work_until(clock::now() + closing_time, [&] { return with.peers.all_flushed(); });
  const auto at_rest = [&] {
    return !with.peers.has_sends_in_flight() && with.peers.all_closed() && !with.in.is_receiving();
  };
  if (with.peers.all_flushed() && at_rest() && with.worker.finish(clock::now() + closing_time)) {
    with.peers.say_goodbyes();
    return true;
  }
  with.peers.close_all();
  work_until(clock::now() + closing_time, at_rest);
  return false;
}

/// True when something happened, so that more may be waiting.
bool endpoint::engine::step(communication& with) {
  bool busy = execute_commands(with);
  if (!injected_.is_idle()) [[unlikely]] {
    injected_.release_due(clock::now());
    send_injected(with);
  }
  busy |= step_network(with);
  busy |= with.peers.move_rings();
  busy |= with.peers.settle();
  return busy;
}

bool endpoint::engine::step_network(communication& with) {
  if (with.peers.take_ucx_use())
    network_is_due_ = true;
  return network_is_due_ && with.worker.progress();
}

/// Before `who` goes to sleep, last of all: what comes after it wakes the sleeper. False: something
/// came before.
bool endpoint::engine::rest(communication& with, listener who) {
  if (!rest_network(with))
    return false;
  if (!bell_)
    return true;
  bell_->listen(who);
  if (!with.peers.has_ring_work())
    return true;
  bell_->hush();
  return false;
}

bool endpoint::engine::rest_network(communication& with) {
  if (with.peers.take_ucx_use())
    network_is_due_ = true;
  if (!network_is_due_.exchange(false) || with.worker.arm())
    return true;
  network_is_due_ = true;
  return false;
}

bool endpoint::engine::execute_commands(communication& with) {
  {
    std::lock_guard guard{mutex_};
    executing_.swap(commands_);
  }
  for (auto& each : executing_)
    execute(with, each);
  const bool any = !executing_.empty();
  executing_.clear();
  return any;
}

void endpoint::engine::execute(communication& with, command& next) {
  if (auto* send = std::get_if<send_command>(&next)) {
    if (options_.tamper_header)
      options_.tamper_header(send->operation->header);
    auto fault = faults::hit(faults::point::frame_send, send->operation->to);
    if (!fault && injected_.is_idle()) [[likely]] {
      with.peers.send(std::move(send->operation));
      return;
    }
    injected_.take(std::move(send->operation), fault, clock::now());
    send_injected(with);
  } else if (auto* local = std::get_if<local_command>(&next)) {
    if (!local->outcome) {
      local->done(tl::unexpected(std::move(local->outcome).error()));
      return;
    }
    with.in.deliver(std::move(*local->outcome));
    local->done({});
    interrupt();
  } else if (auto* identify = std::get_if<identify_command>(&next)) {
    with.peers.identify(identify->own);
  } else if (auto* connect = std::get_if<connect_command>(&next)) {
    with.peers.connect(connect->peer, connect->incarnation, connect->address);
  } else if (auto* disconnect = std::get_if<disconnect_command>(&next)) {
    with.peers.disconnect(disconnect->peer);
  }
}

void endpoint::engine::send_injected(communication& with) {
  for (auto& each : std::exchange(injected_.ready(), {}))
    with.peers.send(std::move(each));
}

std::chrono::milliseconds endpoint::engine::longest_sleep_of(const communication& with) const {
  if (!injected_.is_idle()) [[unlikely]]
    return sleep_for_injected;
  return with.peers.awaits_hellos() ? sleep_for_hellos : longest_sleep;
}

void endpoint::engine::post(command next) {
  const bool is_send = std::holds_alternative<send_command>(next);
  bool refused = false;
  bool first = false;
  {
    std::lock_guard guard{mutex_};
    refused = stopping_;
    first = commands_.empty();
    if (!refused)
      commands_.push_back(std::move(next));
  }
  if (refused) {
    if (auto* send = std::get_if<send_command>(&next))
      send->operation->done(tl::unexpected(stopped()));
    else if (auto* local = std::get_if<local_command>(&next))
      local->done(tl::unexpected(stopped()));
    return;
  }
  if (!first || driver_.load(std::memory_order_relaxed) == std::this_thread::get_id())
    return;
  if (is_send) {
    driver_lock lock{*this, false};
    if (lock && with_ != nullptr && injected_.is_idle()) {
      while (execute_commands(*with_)) {
      }
      // Other threads may have posted more than sends meanwhile.
      if (injected_.is_idle() && !with_->peers.awaits_hellos()) [[likely]]
        return;
    }
  }
  background_.wake();
}

void endpoint::engine::stop(std::chrono::milliseconds drain) {
  {
    std::lock_guard guard{mutex_};
    stopping_ = true;
    if (!drain_until_)
      drain_until_ = clock::now() + drain;
  }
  if (driver_.load(std::memory_order_relaxed) == std::this_thread::get_id()) {
    spdlog::error("transport: stop() called from a callback of its own; not waiting for the end");
    return;
  }
  background_.wake();
  interrupt();
  std::lock_guard guard{join_mutex_};
  if (thread_.joinable())
    thread_.join();
}

expected<std::unique_ptr<endpoint>> endpoint::start(endpoint_options options,
                                                    endpoint_callbacks callbacks) {
  if (!callbacks.on_frame || !callbacks.on_peer_lost)
    return fail(error_code::invalid_request,
                "an endpoint needs the callbacks on_frame and on_peer_lost");
  if (!callbacks.on_dropped)
    callbacks.on_dropped = [](const proto::FrameHeader&, const error& why) {
      spdlog::warn("frame dropped: {}", why.text());
    };
  auto made = std::make_unique<engine>(std::move(options), std::move(callbacks));
  if (auto done = made->start(); !done)
    return tl::unexpected(std::move(done).error());
  return std::unique_ptr<endpoint>(new endpoint(std::move(made)));
}

endpoint::endpoint(std::unique_ptr<engine> started) : engine_(std::move(started)) {}

endpoint::~endpoint() = default;

const std::string& endpoint::address() const {
  return engine_->address();
}

void endpoint::identify(std::string name, std::uint64_t incarnation) {
  engine_->identify(std::move(name), incarnation);
}

void endpoint::connect(std::string peer, std::uint64_t incarnation, std::string address) {
  engine_->post(connect_command{std::move(peer), incarnation, std::move(address)});
}

void endpoint::disconnect(std::string peer) {
  engine_->post(disconnect_command{std::move(peer)});
}

void endpoint::send(std::string_view peer, proto::FrameHeader header, payload_view payload,
                    completion done) {
  const auto& options = engine_->options();
  if (!done)
    done = [](const expected<void>&) {};
  header.set_sender(options.name);
  header.set_sender_incarnation(options.incarnation);
  header.clear_checksum();
  if (payload.bytes.size() > options.max_payload) {
    auto refusal = fail(error_code::too_large,
                        fmt::format("a frame of {} bytes to '{}' exceeds the limit of {}",
                                    payload.bytes.size(), peer, options.max_payload),
                        "send fewer rows at once");
    engine_->post(local_command{std::move(refusal), std::move(done)});
    return;
  }
  if (peer == options.name) {
    auto copy = engine_->pool.take(payload.bytes.size());
    if (!copy) {
      engine_->post(local_command{tl::unexpected(std::move(copy).error()), std::move(done)});
      return;
    }
    if (!copy->empty())
      std::memcpy(copy->data(), payload.bytes.data(), copy->size());
    engine_->post(local_command{frame{std::move(header), std::move(*copy)}, std::move(done)});
    return;
  }
  if (options.checksums)
    header.set_checksum(checksum(payload.bytes));
  auto operation = std::make_unique<send_operation>();
  operation->to = peer;
  operation->header = header.SerializeAsString();
  operation->payload = std::move(payload);
  operation->done = std::move(done);
  if (operation->header.size() > engine_->max_header()) {
    auto refusal = fail(error_code::too_large,
                        fmt::format("a frame header of {} bytes to '{}' exceeds UCX's limit of {}",
                                    operation->header.size(), peer, engine_->max_header()),
                        "shorten the worker's name");
    engine_->post(local_command{std::move(refusal), std::move(operation->done)});
    return;
  }
  engine_->post(send_command{std::move(operation)});
}

bool endpoint::drive(const std::function<bool()>& done,
                     std::chrono::steady_clock::time_point deadline) {
  return engine_->drive(done, deadline);
}

void endpoint::interrupt() {
  engine_->interrupt();
}

void endpoint::stop(std::chrono::milliseconds drain) {
  engine_->stop(drain);
}

buffer_pool& endpoint::pool() {
  return engine_->pool;
}

} // namespace troupe::transport
