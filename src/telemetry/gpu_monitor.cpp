#include "troupe/telemetry/gpu_monitor.hpp"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include <spdlog/spdlog.h>

namespace troupe::telemetry {

namespace {

/// What a call of the driver gets to end before its thread is left behind.
constexpr auto ending_time = std::chrono::milliseconds(1000);

} // namespace

struct gpu_monitor::shared {
  std::mutex mutex;
  std::condition_variable changed;
  bool stop = false;
  bool has_ended = false;
  std::optional<proto::DeviceReport> newest;
};

gpu_monitor::gpu_monitor(std::string node, std::vector<watched_gpu> gpus,
                         gpu_sampler::options given, std::chrono::milliseconds interval)
  : shared_(std::make_shared<shared>()) {
  auto watch = [s = shared_, node = std::move(node), gpus = std::move(gpus),
                given = std::move(given), interval]() mutable {
    gpu_sampler sampler(std::move(node), std::move(gpus), std::move(given));
    std::unique_lock lock(s->mutex);
    while (!s->stop) {
      lock.unlock();
      auto report = sampler.sample();
      lock.lock();
      s->newest = std::move(report);
      s->changed.wait_for(lock, interval, [&] { return s->stop; });
    }
  };
  std::thread([s = shared_, watch = std::move(watch)]() mutable {
    {
      auto own = std::move(watch);
      own();
    } // the library is closed before anybody is told
    const std::lock_guard lock(s->mutex);
    s->has_ended = true;
    s->changed.notify_all();
  }).detach();
}

gpu_monitor::~gpu_monitor() {
  std::unique_lock lock(shared_->mutex);
  shared_->stop = true;
  shared_->changed.notify_all();
  if (!shared_->changed.wait_for(lock, ending_time, [&] { return shared_->has_ended; }))
    spdlog::warn("the driver does not answer about its GPUs; its thread is left behind");
}

std::optional<proto::DeviceReport> gpu_monitor::take() {
  const std::lock_guard lock(shared_->mutex);
  return std::exchange(shared_->newest, std::nullopt);
}

} // namespace troupe::telemetry
