#include "troupe/telemetry/gpu_totals.hpp"

#include <future>
#include <memory>
#include <thread>
#include <utility>

namespace troupe::telemetry {

namespace {

using totals = std::vector<std::optional<std::uint64_t>>;

totals ask(const std::string& library, const cuda_environment& environment) {
  totals result;
  const auto driver = nvml::open(library);
  if (!driver)
    return result;
  for (const auto& index : visible_gpus(driver->gpus(), environment)) {
    auto& total = result.emplace_back();
    auto* gpu = index ? driver->at_index(*index) : nullptr;
    if (gpu == nullptr)
      continue;
    if (const auto reading = driver->read(gpu); reading.has_memory_total_bytes())
      total = reading.memory_total_bytes();
  }
  return result;
}

} // namespace

totals gpu_totals(std::chrono::milliseconds patience, const std::string& library,
                  const cuda_environment& environment) {
  // A driver that hangs keeps its thread and nobody else.
  auto promised = std::make_shared<std::promise<totals>>();
  auto answer = promised->get_future();
  std::thread([promised, library, environment] {
    promised->set_value(ask(library, environment));
  }).detach();
  if (answer.wait_for(patience) != std::future_status::ready)
    return {};
  return answer.get();
}

} // namespace troupe::telemetry
