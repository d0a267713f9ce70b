#include "bench.hpp"
#include "bench_stream.hpp"

#include "troupe/base/child_processes.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/base/log.hpp"
#include "troupe/base/startup_report.hpp"
#include "troupe/transport/endpoint.hpp"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <future>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>

#include <fmt/format.h>
#include <unistd.h>

namespace troupe::tools::bench {

namespace {

using namespace std::chrono_literals;
using nlohmann::json;

constexpr auto start_patience = 20s;
constexpr auto measure_patience = 60s;
constexpr std::uint64_t hello_step = ~std::uint64_t{0};

/// What the answering process does with a frame; travels in FrameHeader.layer.
enum class wish : std::uint32_t { send_back = 0, acknowledge = 1 };

struct transport_arguments {
  std::vector<std::size_t> sizes{std::size_t{4} << 10, std::size_t{64} << 10, std::size_t{4} << 20};
  unsigned rounds = 3;
  unsigned window = 8;
  std::string transports = transport::endpoint_options{}.transports;
  bool rings = true;
  int startup_fd = -1;        ///< of the answering process, like what follows
  std::string parent_address; ///< in hexadecimal digits
  bool checksums = true;
  bool as_json = false;
};

std::string to_hex(const std::string& bytes) {
  std::string result;
  for (unsigned char byte : bytes)
    result += fmt::format("{:02x}", byte);
  return result;
}

std::string from_hex(const std::string& digits) {
  std::string result;
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2)
    result += static_cast<char>(std::strtoul(digits.substr(i, 2).c_str(), nullptr, 16));
  return result;
}

/// UCX reads its environment while it is being loaded, so that this process may have to begin anew.
expected<void> begin_with_environment() {
  bool complete = true;
  for (const auto& [key, value] : transport::required_environment()) {
    const char* present = std::getenv(key.c_str());
    complete = complete && present != nullptr && value == present;
    ::setenv(key.c_str(), value.c_str(), 1);
  }
  if (complete)
    return {};
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::string line(std::istreambuf_iterator<char>(file), {});
  std::vector<char*> arguments;
  for (std::size_t at = 0; at < line.size(); at += std::strlen(line.c_str() + at) + 1)
    arguments.push_back(line.data() + at);
  arguments.push_back(nullptr);
  ::execv("/proc/self/exe", arguments.data());
  return fail(error_code::io_failed, fmt::format("cannot start anew: {}", std::strerror(errno)));
}

/// The answering process: says hello with its address, then does what each frame wishes.
int answer(const transport_arguments& given) {
  set_process_name("answer");
  start_logging("warn");
  // Frames may arrive before start() has returned.
  auto ready = std::make_shared<std::promise<transport::endpoint*>>();
  auto self = ready->get_future().share();
  transport::endpoint_callbacks callbacks;
  callbacks.on_frame = [self](transport::frame arrived) {
    auto memory = std::make_shared<transport::buffer>(std::move(arrived.payload));
    transport::payload_view payload;
    if (static_cast<wish>(arrived.header.layer()) == wish::send_back)
      payload = {std::as_const(*memory).bytes(), memory};
    self.get()->send("bench", std::move(arrived.header), std::move(payload), nullptr);
  };
  callbacks.on_peer_lost = [](const std::string&, std::uint64_t, const error&) {
    std::_Exit(EXIT_SUCCESS);
  };
  transport::endpoint_options options;
  options.name = "answer";
  options.incarnation = 1;
  options.transports = given.transports;
  options.checksums = given.checksums;
  auto endpoint = transport::endpoint::start(options, std::move(callbacks));
  if (!endpoint) {
    report_not_started(given.startup_fd, endpoint.error());
    return EXIT_FAILURE;
  }
  ready->set_value(endpoint->get());
  (*endpoint)->connect("bench", 1, from_hex(given.parent_address));
  auto address = std::make_shared<std::string>((*endpoint)->address());
  proto::FrameHeader hello;
  hello.set_kind(proto::BOUNDARY);
  hello.set_step(hello_step);
  (*endpoint)->send("bench", hello, {std::as_bytes(std::span(*address)), address}, nullptr);
  report_started(given.startup_fd, 0);
  for (;;)
    ::pause();
}

/// Two endpoints in two processes, and one measurement after another between them. Frames are
/// sent and taken on the progress threads: handing one over to an actor is not part of it.
class link {
public:
  static expected<std::unique_ptr<link>> start(child_processes& children, bool checksums,
                                               const std::string& transports, bool rings);

  /// Sends a tensor that comes back, `count` times; microseconds of each.
  expected<std::vector<double>> round_trips(std::size_t size, std::size_t count);

  /// Sends `count` tensors, of which `window` are not acknowledged at any time; bytes a second.
  expected<double> bandwidth(std::size_t size, std::size_t count, std::size_t window);

private:
  link() = default;
  void take(transport::frame arrived);
  void send_next(); ///< with mutex_ held
  void fail_with(const error& why);
  expected<void> exchange(wish what, std::size_t size, std::size_t count, std::size_t window);

  std::mutex mutex_; // guards what follows
  std::condition_variable changed_;
  std::string peer_address_;
  std::optional<error> failure_;
  wish what_ = wish::send_back;
  std::shared_ptr<transport::buffer> content_;
  std::size_t count_ = 0;
  std::size_t num_answered_ = 0;
  std::vector<steady::time_point> sent_; ///< by step
  std::vector<double> microseconds_;
  double seconds_ = 0;

  std::unique_ptr<transport::endpoint> endpoint_; // last: stops first
};

expected<std::unique_ptr<link>> link::start(child_processes& children, bool checksums,
                                            const std::string& transports, bool rings) {
  std::unique_ptr<link> self(new link);
  transport::endpoint_options options;
  options.name = "bench";
  options.incarnation = 1;
  options.transports = transports;
  options.checksums = checksums;
  options.rings = rings; // an end without them is enough
  transport::endpoint_callbacks callbacks;
  callbacks.on_frame = [raw = self.get()](transport::frame arrived) {
    raw->take(std::move(arrived));
  };
  callbacks.on_peer_lost = [raw = self.get()](const std::string&, std::uint64_t, const error& why) {
    raw->fail_with(why);
  };
  auto endpoint = transport::endpoint::start(options, std::move(callbacks));
  if (!endpoint)
    return tl::unexpected(endpoint.error());
  self->endpoint_ = std::move(*endpoint);

  auto pipe = startup_pipe::open();
  if (!pipe)
    return tl::unexpected(pipe.error());
  child_spec spec;
  spec.name = checksums ? "answer-checked" : "answer-unchecked";
  spec.arguments = {
    "bench",        "answer-transport", "--parent",     to_hex(self->endpoint_->address()),
    "--transports", transports,         "--startup-fd", std::to_string(pipe->child_fd())};
  if (!checksums)
    spec.arguments.push_back("--no-checksums");
  spec.environment = transport::required_environment();
  spec.inherited_fds = {pipe->child_fd()};
  if (auto pid = children.spawn(std::move(spec)); !pid)
    return tl::unexpected(pid.error());
  if (auto started = pipe->wait(start_patience); !started)
    return tl::unexpected(started.error());
  std::unique_lock lock(self->mutex_);
  if (!self->changed_.wait_for(lock, start_patience, [&] { return !self->peer_address_.empty(); }))
    return fail(error_code::deadline_exceeded, "the answering process does not say hello");
  self->endpoint_->connect("answer", 1, self->peer_address_);
  return self;
}

void link::fail_with(const error& why) {
  std::lock_guard lock(mutex_);
  failure_ = why;
  changed_.notify_all();
}

void link::send_next() {
  proto::FrameHeader header;
  header.set_kind(proto::BOUNDARY);
  header.set_step(sent_.size());
  header.set_layer(static_cast<std::uint32_t>(what_));
  sent_.push_back(steady::now());
  endpoint_->send("answer", std::move(header), {std::as_const(*content_).bytes(), content_},
                  [this](expected<void> sent) {
                    if (!sent)
                      fail_with(sent.error());
                  });
}

void link::take(transport::frame arrived) {
  auto now = steady::now();
  std::lock_guard lock(mutex_);
  auto step = arrived.header.step();
  if (step == hello_step) {
    auto bytes = arrived.payload.bytes();
    peer_address_.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    changed_.notify_all();
    return;
  }
  if (step >= sent_.size())
    return;
  microseconds_.push_back(milliseconds(now - sent_[step]) * 1000);
  ++num_answered_;
  if (sent_.size() < count_)
    send_next();
  if (num_answered_ < count_)
    return;
  seconds_ = milliseconds(now - sent_.front()) / 1000;
  changed_.notify_all();
}

expected<void> link::exchange(wish what, std::size_t size, std::size_t count, std::size_t window) {
  auto memory = endpoint_->pool().take(size);
  if (!memory)
    return tl::unexpected(memory.error());
  for (std::size_t i = 0; i < size; ++i)
    memory->data()[i] = static_cast<std::byte>(i * 131 >> 3);
  std::unique_lock lock(mutex_);
  content_ = std::make_shared<transport::buffer>(std::move(*memory));
  what_ = what;
  count_ = count;
  num_answered_ = 0;
  sent_.clear();
  sent_.reserve(count);
  microseconds_.clear();
  microseconds_.reserve(count);
  while (sent_.size() < std::min(window, count))
    send_next();
  changed_.wait_for(lock, measure_patience, [this] { return failure_ || num_answered_ == count_; });
  if (failure_)
    return tl::unexpected(*failure_);
  if (num_answered_ < count_)
    return fail(
      error_code::deadline_exceeded,
      fmt::format("{} of {} frames of {} bytes were answered in 60 s", num_answered_, count, size));
  return {};
}

expected<std::vector<double>> link::round_trips(std::size_t size, std::size_t count) {
  if (auto done = exchange(wish::send_back, size, count, 1); !done)
    return tl::unexpected(done.error());
  std::lock_guard lock(mutex_);
  return microseconds_;
}

expected<double> link::bandwidth(std::size_t size, std::size_t count, std::size_t window) {
  if (auto done = exchange(wish::acknowledge, size, count, window); !done)
    return tl::unexpected(done.error());
  std::lock_guard lock(mutex_);
  return static_cast<double>(size) * static_cast<double>(count) / seconds_;
}

/// Frames of one measurement: enough for a p99, not so many that large ones take for ever.
std::size_t frames_of(std::size_t size) {
  return std::clamp<std::size_t>((std::size_t{512} << 20) / std::max<std::size_t>(size, 1), 200,
                                 4000);
}

/// The figures of one size, with checksums or without; one value a round.
struct series {
  std::vector<double> p50, p99, one_way, gigabytes;
};

expected<void> run_round(link& over, std::size_t size, unsigned window, series& into) {
  auto trips = over.round_trips(size, frames_of(size));
  if (!trips)
    return tl::unexpected(trips.error());
  auto rate = over.bandwidth(size, frames_of(size), window);
  if (!rate)
    return tl::unexpected(rate.error());
  into.p50.push_back(percentile(*trips, 0.5));
  into.p99.push_back(percentile(*trips, 0.99));
  into.one_way.push_back(into.p50.back() / 2);
  into.gigabytes.push_back(*rate / 1e9);
  return {};
}

std::string size_text(std::size_t size) {
  if (size >= std::size_t{1} << 20 && size % (std::size_t{1} << 20) == 0)
    return fmt::format("{} MiB", size >> 20);
  return size >= 1024 && size % 1024 == 0 ? fmt::format("{} KiB", size >> 10)
                                          : fmt::format("{} B", size);
}

expected<report> measure(const transport_arguments& given) {
  set_process_name("bench");
  start_logging("warn");
  if (auto begun = begin_with_environment(); !begun)
    return tl::unexpected(begun.error());
  auto children = child_processes::start([](const child_exit&) {});
  if (!children)
    return tl::unexpected(children.error());
  std::vector<std::unique_ptr<link>> links; // with checksums, without
  for (bool checksums : {true, false}) {
    auto started = link::start(**children, checksums, given.transports, given.rings);
    if (!started)
      return tl::unexpected(started.error());
    links.push_back(std::move(*started));
  }
  progress shown;
  std::vector<std::vector<series>> all(given.sizes.size(), std::vector<series>(links.size()));
  for (std::size_t s = 0; s < given.sizes.size(); ++s) {
    for (auto& over : links)
      if (auto warm = over->bandwidth(given.sizes[s], 50, given.window); !warm)
        return tl::unexpected(warm.error());
    for (unsigned r = 0; r < given.rounds; ++r)
      for (std::size_t l = 0; l < links.size(); ++l) {
        shown.say(fmt::format("transport: {}, round {} of {}", size_text(given.sizes[s]), r + 1,
                              given.rounds));
        if (auto done = run_round(*links[l], given.sizes[s], given.window, all[s][l]); !done)
          return tl::unexpected(done.error());
      }
  }
  table shown_table({"tensor", "checksums", "round trip p50, us", "round trip p99, us",
                     "one way p50, us", fmt::format("GB/s, {} in flight", given.window)},
                    2);
  report result;
  json rows = json::array();
  for (std::size_t s = 0; s < given.sizes.size(); ++s)
    for (std::size_t l = 0; l < links.size(); ++l) {
      const auto& v = all[s][l];
      shown_table.add({size_text(given.sizes[s]), l == 0 ? "on" : "off", show(spread_of(v.p50), 1),
                       show(spread_of(v.p99), 1), show(spread_of(v.one_way), 1),
                       show(spread_of(v.gigabytes), 2)});
      rows.push_back({{"bytes", given.sizes[s]},
                      {"checksums", l == 0},
                      {"round_trip_p50_us", to_json(spread_of(v.p50))},
                      {"round_trip_p99_us", to_json(spread_of(v.p99))},
                      {"one_way_p50_us", to_json(spread_of(v.one_way))},
                      {"gigabytes_per_s", to_json(spread_of(v.gigabytes))}});
    }
  result.text = shown_table.text();
  result.figures = {{"rounds", given.rounds},
                    {"window", given.window},
                    {"transports", given.transports},
                    {"rows", std::move(rows)}};
  return result;
}

} // namespace

void add_transport(CLI::App& bench, command& run) {
  auto given = std::make_shared<transport_arguments>();
  auto* sub =
    bench.add_subcommand("transport", "Tensors between two processes: latency, bandwidth");
  sub->footer(
    "Checksums are computed by the sender and again by the receiver; a cluster has them on.");
  sub->add_option("--sizes", given->sizes, "bytes of a tensor: 4096,65536,4194304")
    ->delimiter(',')
    ->check(CLI::Range(1.0, 268435456.0));
  sub->add_option("--rounds", given->rounds, "of each, in turn")->check(at_least_one());
  sub->add_option("--window", given->window, "tensors in flight for GB/s")
    ->check(CLI::Range(1, 1000));
  sub->add_option("--transports", given->transports, "as in UCX_TLS");
  sub->add_flag("!--no-rings", given->rings, "by UCX alone, not through shared memory");
  add_json_flag(sub, given->as_json);
  sub->callback(
    [given, &run] { run = [given] { return finish(measure(*given), given->as_json); }; });

  auto* other = bench.add_subcommand("answer-transport", "answers another process");
  other->group("");
  other->add_option("--parent", given->parent_address, "address of the measuring process")
    ->required();
  other->add_option("--transports", given->transports, "as in UCX_TLS");
  other->add_flag("!--no-checksums", given->checksums, "neither compute nor verify");
  other->add_option("--startup-fd", given->startup_fd, "pipe to the measuring process")->required();
  other->callback([given, &run] { run = [given] { return answer(*given); }; });
}

} // namespace troupe::tools::bench
