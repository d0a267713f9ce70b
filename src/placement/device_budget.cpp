#include "troupe/placement/device_budget.hpp"

#include <fmt/format.h>

namespace troupe::placement {

namespace {

std::string gigabytes(std::uint64_t bytes) {
  const double number = static_cast<double>(bytes) / 1e9;
  return fmt::format("{:.{}f} GB", number, number < 10.0 ? 2 : 1);
}

/// Tokens for whose pages there is room once everything else is there; 0: not even for that.
std::uint64_t tokens_that_fit(const device_need& need, std::uint64_t available,
                              std::uint32_t kv_tokens) {
  const auto others = need.total() - need.kv_pages;
  if (need.kv_pages == 0 || kv_tokens == 0 || available <= others)
    return 0;
  const double of_a_token = static_cast<double>(need.kv_pages) / kv_tokens;
  const auto fit = static_cast<std::uint64_t>(static_cast<double>(available - others) / of_a_token);
  return fit / 1024 * 1024;
}

} // namespace

device_need& device_need::operator+=(const device_need& other) {
  weights += other.weights;
  kv_pages += other.kv_pages;
  scratch += other.scratch;
  graphs += other.graphs;
  contexts += other.contexts;
  return *this;
}

std::string describe(const device_need& need) {
  std::string text;
  const auto add = [&](const char* kind, std::uint64_t bytes) {
    if (bytes > 0)
      text += fmt::format("{}{} {}", text.empty() ? "" : ", ", kind, gigabytes(bytes));
  };
  add("weights", need.weights);
  add("KV pages", need.kv_pages);
  add("scratch", need.scratch);
  add("recorded steps", need.graphs);
  add("contexts", need.contexts);
  return text;
}

expected<void> check_device(const std::string& device, const device_need& need,
                            std::uint64_t available, std::uint32_t kv_tokens) {
  if (need.total() <= available)
    return {};
  std::string cure;
  if (const auto fit = tokens_that_fit(need, available, kv_tokens); fit > 0)
    cure = fmt::format("write serving.kv_tokens: {} or less (it is {}), or ", fit, kv_tokens);
  cure += "use more GPUs (parallel.pipeline, parallel.expert_groups), or a model in FP8 or INT8";
  if (need.scratch > available / 10)
    cure += ", or lower serving.max_batch_tokens";
  return fail(error_code::invalid_config,
              fmt::format("{} needs {} ({}) and has {}", device, gigabytes(need.total()),
                          describe(need), gigabytes(available)),
              std::move(cure));
}

} // namespace troupe::placement
