#include "troupe/http/server_shard.hpp"

#include <utility>
#include <vector>

#include <boost/asio/post.hpp>

namespace troupe::http {

namespace {

constexpr std::chrono::milliseconds sweep_period{50};

} // namespace

shard::shard(const server_options& options, const request_handler& handler,
             std::atomic<std::size_t>& num_connections)
  : options_(options),
    handler_(handler),
    num_connections_(num_connections),
    work_(boost::asio::make_work_guard(context_)),
    sweep_timer_(context_) {}

shard::~shard() {
  join();
}

void shard::start() {
  thread_ = std::thread([this] {
    context_.run();
    const std::lock_guard lock{ended_mutex_};
    ended_ = true;
    ended_changed_.notify_all();
  });
}

void shard::drain() {
  boost::asio::post(context_, [this] {
    draining_ = true;
    work_.reset();
    for_each([](shard_member& member) { member.drain(); });
  });
}

void shard::close_all() {
  boost::asio::post(context_, [this] { for_each([](shard_member& member) { member.close(); }); });
}

bool shard::wait_until(clock::time_point deadline) {
  std::unique_lock lock{ended_mutex_};
  return ended_changed_.wait_until(lock, deadline, [this] { return ended_; });
}

void shard::join() {
  if (thread_.joinable())
    thread_.join();
}

void shard::add(std::shared_ptr<shard_member> member) {
  members_.insert(std::move(member));
  ++num_connections_;
  if (!sweeping_)
    schedule_sweep();
}

void shard::remove(const std::shared_ptr<shard_member>& member) {
  if (members_.erase(member) == 0)
    return;
  --num_connections_;
  if (members_.empty())
    sweep_timer_.cancel();
}

// Visitors may remove members, so they are given a copy of the list.
template <class F>
void shard::for_each(F visit) {
  const std::vector<std::shared_ptr<shard_member>> members(members_.begin(), members_.end());
  for (const auto& member : members)
    visit(*member);
}

void shard::schedule_sweep() {
  sweeping_ = true;
  sweep_timer_.expires_after(sweep_period);
  sweep_timer_.async_wait([this](const boost::system::error_code&) {
    const auto now = clock::now();
    for_each([now](shard_member& member) { member.check_deadline(now); });
    sweeping_ = false;
    if (!members_.empty())
      schedule_sweep();
  });
}

std::string_view shard::date() {
  const std::time_t now = std::time(nullptr);
  if (now != date_second_) {
    std::tm parts{};
    gmtime_r(&now, &parts);
    char text[64];
    date_.assign(text, std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts));
    date_second_ = now;
  }
  return date_;
}

} // namespace troupe::http
