#include "troupe/base/fault_point.hpp"

#include "troupe/base/fault_board.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/base/unique_fd.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace troupe::faults {

namespace {

constexpr int exit_code = 3;

constexpr std::array<std::string_view, num_points> point_names{
  "frame.send",     "message.receive",    "message.reply",     "connect",          "compute",
  "activation",     "kv.pages",           "allocation",        "journal.write",    "process.spawn",
  "process.init",   "worker.loading",     "worker.loaded",     "worker.activated", "worker.serving",
  "node.exit_seen", "controller.fencing", "frontend.replaying"};

constexpr std::array<std::string_view, num_kinds> kind_names{
  "none",        "drop",         "delay",       "duplicate",    "reorder",
  "corrupt",     "truncate",     "wrong_epoch", "fail",         "busy_loop",
  "deadlock",    "poison",       "flip_bit",    "no_space",     "io_error",
  "short_write", "exit",         "crash",       "device_error", "device_misaligned",
  "device_trap", "device_assert"};

template <class Enum, std::size_t N>
std::optional<Enum> named(const std::array<std::string_view, N>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end())
    return std::nullopt;
  return static_cast<Enum>(found - names.begin());
}

/// The board of this process. Never unmapped, as any thread may be reading it.
std::atomic<detail::board_page*> current_board{nullptr};

tl::unexpected<error> io_failure(const std::filesystem::path& file, const char* what) {
  return fail(error_code::io_failed,
              fmt::format("{}: {}: {}", file.string(), what, std::strerror(errno)));
}

expected<detail::board_page*> map(const std::filesystem::path& file, int fd) {
  void* at = ::mmap(nullptr, sizeof(detail::board_page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED)
    return io_failure(file, "the fault board cannot be mapped");
  return std::launder(static_cast<detail::board_page*>(at));
}

[[noreturn]] void block_for_ever() {
  for (;;)
    ::pause();
}

[[noreturn]] void spin_for_ever() {
  for (volatile std::uint64_t turns = 0;;)
    turns = turns + 1;
}

} // namespace

std::string_view to_string(point where) {
  const auto i = static_cast<std::size_t>(where);
  return i < num_points ? point_names[i] : "unknown";
}

std::string_view to_string(kind what) {
  const auto i = static_cast<std::size_t>(what);
  return i < num_kinds ? kind_names[i] : "unknown";
}

std::optional<point> point_named(std::string_view name) {
  return named<point>(point_names, name);
}

std::optional<kind> kind_named(std::string_view name) {
  return named<kind>(kind_names, name);
}

namespace detail {

std::atomic<bool> armed{false};

std::optional<fault> look_up(point where, std::string_view peer) {
  auto* page = current_board.load(std::memory_order_acquire);
  if (page == nullptr)
    return std::nullopt;
  const std::string_view self = process_name();
  const auto num_used = page->num_used.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < num_used && i < page->slots.size(); ++i)
    if (auto struck = page->slots[i].strike(where, self, peer))
      return struck;
  return std::nullopt;
}

bool look_up_cut(std::string_view peer) {
  const auto* page = current_board.load(std::memory_order_acquire);
  if (page == nullptr)
    return false;
  const std::string_view self = process_name();
  const auto num_used = page->num_used.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < num_used && i < page->slots.size(); ++i)
    if (page->slots[i].cuts(self, peer))
      return true;
  return false;
}

} // namespace detail

bool carry_out(const fault& f) {
  switch (f.what) {
  case kind::exit: spdlog::warn("fault: exit"); ::_exit(exit_code);
  case kind::crash: {
    spdlog::warn("fault: crash");
    std::signal(SIGSEGV, SIG_DFL);
    sigset_t unblocked;
    sigemptyset(&unblocked);
    sigaddset(&unblocked, SIGSEGV);
    pthread_sigmask(SIG_UNBLOCK, &unblocked, nullptr);
    std::raise(SIGSEGV);
    std::abort();
  }
  case kind::deadlock: spdlog::warn("fault: deadlock"); block_for_ever();
  case kind::busy_loop: spdlog::warn("fault: busy loop"); spin_for_ever();
  case kind::delay: std::this_thread::sleep_for(std::chrono::milliseconds(f.delay_ms)); return true;
  default: return false;
  }
}

expected<void> arm() {
  detail::armed.store(false);
  const char* name = std::getenv(board::variable);
  if (name == nullptr || *name == '\0')
    return {};
  const std::filesystem::path file{name};
  unique_fd fd{::open(file.c_str(), O_RDWR | O_CLOEXEC)};
  if (!fd)
    return io_failure(file, "the fault board cannot be opened");
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0)
    return io_failure(file, "the fault board cannot be read");
  if (static_cast<std::uint64_t>(info.st_size) != sizeof(detail::board_page))
    return fail(error_code::io_failed, fmt::format("{} is not a fault board", file.string()));
  auto page = map(file, fd.get());
  if (!page)
    return tl::unexpected(page.error());
  if ((*page)->magic.load(std::memory_order_acquire) != detail::board_page::magic_value
      || (*page)->version != detail::board_page::version_value) {
    ::munmap(*page, sizeof(detail::board_page));
    return fail(error_code::io_failed,
                fmt::format("{} is not a fault board of version {}", file.string(),
                            detail::board_page::version_value));
  }
  current_board.store(*page, std::memory_order_release);
  detail::armed.store(true);
  return {};
}

struct board::mapping {
  std::filesystem::path file;
  detail::board_page* page = nullptr;

  ~mapping() { ::munmap(page, sizeof(detail::board_page)); }

  /// Publishes a rule in a place that is free.
  expected<std::size_t> publish(detail::rule_content content, std::string_view process,
                                std::string_view peer) {
    if (process.size() >= content.process.size() || peer.size() >= content.peer.size())
      return fail(error_code::invalid_request,
                  fmt::format("{} is longer than {} bytes",
                              process.size() >= content.process.size() ? process : peer,
                              content.process.size() - 1));
    std::copy(process.begin(), process.end(), content.process.begin());
    std::copy(peer.begin(), peer.end(), content.peer.begin());
    for (std::size_t i = 0; i < page->slots.size(); ++i) {
      if (page->slots[i].is_in_force())
        continue;
      page->slots[i].publish(content);
      if (page->num_used.load(std::memory_order_relaxed) <= i)
        page->num_used.store(static_cast<std::uint32_t>(i + 1), std::memory_order_release);
      return i;
    }
    return fail(error_code::resource_exhausted,
                fmt::format("the fault board holds {} rules already", max_rules));
  }
};

board::board(std::unique_ptr<mapping> mapped) : mapped_(std::move(mapped)) {}
board::board(board&& other) noexcept = default;
board& board::operator=(board&& other) noexcept = default;
board::~board() = default;

expected<board> board::create(const std::filesystem::path& file) {
  std::error_code ignored;
  auto absolute = std::filesystem::absolute(file, ignored);
  ::unlink(absolute.c_str()); // who has mapped the older one keeps it
  unique_fd fd{::open(absolute.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
  if (!fd)
    return io_failure(absolute, "the fault board cannot be created");
  if (::ftruncate(fd.get(), sizeof(detail::board_page)) != 0)
    return io_failure(absolute, "the fault board cannot be sized");
  auto page = map(absolute, fd.get());
  if (!page)
    return tl::unexpected(page.error());
  (*page)->version = detail::board_page::version_value;
  (*page)->magic.store(detail::board_page::magic_value, std::memory_order_release);
  auto mapped = std::make_unique<mapping>();
  mapped->file = std::move(absolute);
  mapped->page = *page;
  return board{std::move(mapped)};
}

std::string board::value() const {
  return mapped_->file.string();
}

expected<std::size_t> board::add(const rule& r) {
  if (r.what == kind::none)
    return fail(error_code::invalid_request, "a rule without a fault");
  detail::rule_content content;
  content.where = static_cast<std::uint8_t>(r.where);
  content.what = static_cast<std::uint8_t>(r.what);
  content.any_peer = r.peer.empty() ? 1 : 0;
  content.count = r.count;
  content.delay_ms = r.delay_ms;
  content.seed = r.seed;
  content.threshold =
    static_cast<std::uint64_t>(std::clamp(r.probability, 0.0, 1.0) * 0x1p53); // of 53 random bits
  return mapped_->publish(content, r.process, r.peer);
}

expected<std::size_t> board::cut(const std::string& from, const std::string& to) {
  detail::rule_content content;
  content.is_cut = 1;
  return mapped_->publish(content, to, from);
}

void board::remove(std::size_t number) {
  if (number < max_rules)
    mapped_->page->slots[number].retract();
}

void board::clear() {
  for (auto& slot : mapped_->page->slots)
    slot.retract();
}

std::uint64_t board::num_hits(std::size_t number) const {
  return number < max_rules ? mapped_->page->slots[number].num_hits() : 0;
}

} // namespace troupe::faults
