#include "troupe/telemetry/gpu_sampler.hpp"

#include <utility>

#include <spdlog/spdlog.h>

namespace troupe::telemetry {

gpu_sampler::gpu_sampler(std::string node, std::vector<watched_gpu> gpus, options given)
  : node_(std::move(node)), options_(std::move(given)) {
  for (auto& gpu : gpus)
    gpus_.push_back({std::move(gpu), std::nullopt, {}});
  auto opened = nvml::open(options_.library);
  if (!opened) {
    spdlog::info("no readings of GPUs: {}", opened.error().cause);
    return;
  }
  driver_.emplace(std::move(*opened));
  visible_ = visible_gpus(driver_->gpus(), options_.environment);
}

proto::KeeperView gpu_sampler::ask_keeper(watched& w) const {
  proto::KeeperView view;
  view.set_name(w.gpu.keeper);
  view.set_device(w.gpu.device);
  if (!w.keeper) {
    using namespace std::chrono_literals;
    auto connected =
      memory::keeper_client::connect(w.gpu.keeper_address, 0ms, options_.keeper_time);
    if (!connected)
      return view; // it starts, which takes seconds
    w.keeper.emplace(std::move(*connected));
  }
  auto said = w.keeper->report();
  if (!said) {
    w.keeper.reset(); // an answer that comes late must not be taken for that of a later question
    return view;
  }
  view.set_kept_bytes(said->kept_bytes);
  view.set_num_blocks(said->num_blocks);
  w.bus_id = said->pci_bus_id;
  return view;
}

nvml::device gpu_sampler::find(const watched& w) const {
  if (!w.bus_id.empty())
    if (auto* gpu = driver_->at_bus_id(w.bus_id); gpu != nullptr)
      return gpu;
  const auto index = cuda_index(w.gpu.device);
  if (!index || *index >= visible_.size() || !visible_[*index])
    return nullptr;
  return driver_->at_index(*visible_[*index]);
}

proto::DeviceReport gpu_sampler::sample() {
  proto::DeviceReport report;
  report.set_node(node_);
  for (auto& w : gpus_) {
    *report.add_keepers() = ask_keeper(w);
    auto* gpu = driver_ ? find(w) : nullptr;
    if (gpu == nullptr)
      continue;
    auto* reading = report.add_gpus();
    *reading = driver_->read(gpu);
    reading->set_device(w.gpu.device);
  }
  return report;
}

} // namespace troupe::telemetry
