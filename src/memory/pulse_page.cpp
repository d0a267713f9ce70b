#include "troupe/memory/pulse_page.hpp"

#include "troupe/base/unique_fd.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace troupe::memory {

namespace {

constexpr std::uint64_t page_magic = 0x45534c5550505254; // "TRPPULSE" in memory
constexpr std::uint32_t page_version = 4;
constexpr std::size_t cache_line = 64;

/// A counter on a cache line of its own.
struct alignas(cache_line) counter {
  std::atomic<std::uint64_t> value{0};
};

} // namespace

/// The state is published with release after the name, which never changes while it is not `none`.
struct alignas(cache_line) activity::line {
  std::atomic<activity_state> state{activity_state::none};
  std::uint32_t reserved = 0;
  std::atomic<std::uint64_t> progress{0};
  std::array<char, pulse::max_name_bytes + 1> name{};
};

/// What a process ends of. `is_taken` is for its threads, `is_said` for its parent.
struct alignas(cache_line) testament {
  std::atomic<std::uint32_t> is_taken{0};
  std::atomic<std::uint32_t> is_said{0};
  std::array<char, pulse::max_word_bytes + 1> words{};

  void say(std::string_view name, std::string_view text) {
    if (is_taken.exchange(1, std::memory_order_relaxed) != 0)
      return;
    std::size_t at = 0;
    for (auto part : {name, std::string_view(name.empty() ? "" : ": "), text}) {
      const auto count = std::min(part.size(), pulse::max_word_bytes - at);
      std::copy_n(part.begin(), count, words.begin() + static_cast<std::ptrdiff_t>(at));
      at += count;
    }
    is_said.store(1, std::memory_order_release);
  }
};

/// The page as both processes see it. Fixed: a parent may read children of another build.
struct pulse_page::mapping {
  struct layout {
    std::uint64_t magic = page_magic;
    std::uint32_t version = page_version;
    std::uint32_t max_activities = pulse::max_activities;
    counter beat;
    counter beat_thread; // its id
    counter control;
    alignas(cache_line) life_line life;
    testament last_words;
    std::array<activity::line, pulse::max_activities> activities;
  };

  mapping(unique_fd descriptor, void* address)
    : fd(std::move(descriptor)), page(static_cast<layout*>(address)) {}
  mapping(const mapping&) = delete;
  mapping& operator=(const mapping&) = delete;
  ~mapping() { ::munmap(page, bytes); }

  static constexpr std::size_t bytes = 4096;

  unique_fd fd;
  layout* page;
};

pulse_page::pulse_page(std::shared_ptr<mapping> mapped) : mapped_(std::move(mapped)) {}
pulse_page::pulse_page(pulse_page&& other) noexcept = default;
pulse_page& pulse_page::operator=(pulse_page&& other) noexcept = default;
pulse_page::~pulse_page() = default;

expected<pulse_page> pulse_page::create() {
  static_assert(sizeof(mapping::layout) <= mapping::bytes);
  static_assert(sizeof(activity::line) == cache_line && sizeof(counter) == cache_line);
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
  static_assert(std::atomic<activity_state>::is_always_lock_free);
  unique_fd fd(::memfd_create("troupe-pulse", MFD_CLOEXEC));
  if (!fd || ::ftruncate(fd.get(), mapping::bytes) != 0)
    return fail(error_code::resource_exhausted,
                fmt::format("cannot create a pulse page: {}", std::strerror(errno)));
  void* address = ::mmap(nullptr, mapping::bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED)
    return fail(error_code::resource_exhausted,
                fmt::format("cannot map a pulse page: {}", std::strerror(errno)));
  new (address) mapping::layout;
  return pulse_page(std::make_shared<mapping>(std::move(fd), address));
}

expected<pulse_page> pulse_page::attach(int fd) {
  unique_fd owned(fd);
  struct stat info {};
  if (::fstat(fd, &info) != 0)
    return fail(error_code::io_failed,
                fmt::format("pulse page descriptor {}: {}", fd, std::strerror(errno)));
  if (info.st_size != static_cast<off_t>(mapping::bytes))
    return fail(error_code::io_failed,
                fmt::format("descriptor {} is not a pulse page: {} bytes", fd, info.st_size));
  void* address = ::mmap(nullptr, mapping::bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED)
    return fail(error_code::io_failed,
                fmt::format("cannot map pulse page {}: {}", fd, std::strerror(errno)));
  auto mapped = std::make_shared<mapping>(std::move(owned), address);
  const auto& page = *mapped->page;
  if (page.magic != page_magic || page.version != page_version
      || page.max_activities != pulse::max_activities)
    return fail(error_code::io_failed,
                fmt::format("descriptor {} is not a pulse page of version {}: magic {:x}, "
                            "version {}, {} activities",
                            fd, page_version, page.magic, page.version, page.max_activities));
  return pulse_page(std::move(mapped));
}

int pulse_page::fd() const {
  return mapped_->fd.get();
}

std::shared_ptr<life_line> pulse_page::life() const {
  return {mapped_, &mapped_->page->life};
}

void pulse_page::sample(pulse_sample& into) const {
  const auto& page = *mapped_->page;
  into.beat = page.beat.value.load(std::memory_order_relaxed);
  into.beat_thread = static_cast<int>(page.beat_thread.value.load(std::memory_order_relaxed));
  into.control = page.control.value.load(std::memory_order_relaxed);
  std::size_t count = 0;
  for (const auto& line : page.activities) {
    const auto state = line.state.load(std::memory_order_acquire);
    if (state == activity_state::none)
      break;
    if (into.activities.size() == count)
      into.activities.emplace_back();
    auto& activity = into.activities[count++];
    activity.state = state > activity_state::waiting ? activity_state::idle : state;
    activity.progress = line.progress.load(std::memory_order_relaxed);
    activity.name.assign(line.name.data(), ::strnlen(line.name.data(), line.name.size()));
  }
  into.activities.resize(count);
}

std::string pulse_page::last_words() const {
  const auto& said = mapped_->page->last_words;
  if (said.is_said.load(std::memory_order_acquire) == 0)
    return {};
  std::string result(said.words.data(), ::strnlen(said.words.data(), said.words.size()));
  // They go to terminals, logs and messages, where anything else than a line of text does harm.
  for (char& c : result)
    if (c < ' ' || c > '~')
      c = ' ';
  return result;
}

void pulse_page::reset() {
  auto& page = *mapped_->page;
  page.last_words.words.fill('\0');
  page.last_words.is_said.store(0, std::memory_order_relaxed);
  page.last_words.is_taken.store(0, std::memory_order_relaxed);
  for (auto& line : page.activities) {
    line.state.store(activity_state::none, std::memory_order_relaxed);
    line.progress.store(0, std::memory_order_relaxed);
    line.name.fill('\0');
  }
  page.life.reset();
  page.control.value.store(0, std::memory_order_relaxed);
  page.beat.value.store(0, std::memory_order_release);
}

activity::activity(std::shared_ptr<pulse_page::mapping> mapped, line& line)
  : mapped_(std::move(mapped)), line_(&line) {}

void activity::last_words(std::string_view words) const {
  if (line_ != nullptr)
    mapped_->page->last_words.say(line_->name.data(), words);
}

void activity::computing() {
  // Progress first: who sees the state sees that it has just begun.
  tick();
  set(activity_state::computing);
}

std::atomic<std::uint64_t>* activity::counter() const {
  static memory::counter nobody_looks;
  return line_ ? &line_->progress : &nobody_looks.value;
}

void activity::set(activity_state s) {
  if (line_)
    line_->state.store(s, std::memory_order_release);
}

struct pulse::state {
  std::shared_ptr<pulse_page::mapping> mapped; // null: no page
  std::chrono::milliseconds interval{};

  std::mutex adding;
  std::size_t num_activities = 0;

  std::mutex knocking; // held while `knock` runs
  std::function<void()> knock;

  std::mutex mutex;
  std::condition_variable wake;
  bool stopping = false;
  std::thread thread;

  void run();
};

void pulse::state::run() {
  ::pthread_setname_np(::pthread_self(), "pulse");
  const life_line::holder life(mapped->page->life);
  auto& beat = mapped->page->beat.value;
  mapped->page->beat_thread.value.store(static_cast<std::uint64_t>(::gettid()),
                                        std::memory_order_relaxed);
  auto next = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex);
  while (!stopping) {
    lock.unlock();
    beat.fetch_add(1, std::memory_order_relaxed);
    {
      const std::lock_guard hold(knocking);
      if (knock)
        knock();
    }
    lock.lock();
    // Beats that were missed while the process stood still are not made up for.
    next = std::max(next + interval, std::chrono::steady_clock::now());
    wake.wait_until(lock, next, [this] { return stopping; });
  }
}

pulse::pulse(std::unique_ptr<state> s) : state_(std::move(s)) {}

expected<std::unique_ptr<pulse>> pulse::start(int fd, std::chrono::milliseconds interval) {
  auto s = std::make_unique<state>();
  if (fd < 0)
    return std::unique_ptr<pulse>(new pulse(std::move(s)));
  auto page = pulse_page::attach(fd);
  if (!page)
    return tl::unexpected(page.error());
  s->mapped = std::move(page->mapped_);
  s->interval = interval;
  // Signals are handled by the threads that expect them.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  expected<void> started;
  try {
    s->thread = std::thread([raw = s.get()] { raw->run(); });
  } catch (const std::system_error& e) {
    started = fail(error_code::resource_exhausted,
                   fmt::format("cannot start the beating thread: {}", e.what()));
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!started)
    return tl::unexpected(started.error());
  return std::unique_ptr<pulse>(new pulse(std::move(s)));
}

pulse::~pulse() {
  if (!state_->thread.joinable())
    return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->wake.notify_all();
  state_->thread.join();
}

void pulse::on_beat(std::function<void()> knock) {
  if (!state_->mapped)
    return;
  auto& control = state_->mapped->page->control.value;
  const std::lock_guard hold(state_->knocking);
  if (!knock)
    control.store(0, std::memory_order_relaxed);
  else if (control.load(std::memory_order_relaxed) == 0)
    control.store(1, std::memory_order_relaxed);
  state_->knock = std::move(knock);
}

void pulse::answered() {
  if (!state_->mapped)
    return;
  // An answer that comes after the asking has ended must not look like its beginning.
  auto& control = state_->mapped->page->control.value;
  auto answers = control.load(std::memory_order_relaxed);
  while (answers != 0
         && !control.compare_exchange_weak(answers, answers + 1, std::memory_order_relaxed))
    ;
}

void pulse::last_words(std::string_view words) {
  if (state_->mapped)
    state_->mapped->page->last_words.say({}, words);
}

void pulse::leave() {
  if (state_->mapped)
    state_->mapped->page->life.let_go();
}

expected<activity> pulse::add(std::string_view name) {
  if (!state_->mapped)
    return activity();
  const std::lock_guard hold(state_->adding);
  if (state_->num_activities == max_activities)
    return fail(error_code::resource_exhausted,
                fmt::format("more than {} activities in one process", max_activities));
  auto& line = state_->mapped->page->activities[state_->num_activities++];
  std::memcpy(line.name.data(), name.data(), std::min(name.size(), max_name_bytes));
  line.state.store(activity_state::idle, std::memory_order_release);
  return activity(state_->mapped, line);
}

} // namespace troupe::memory
