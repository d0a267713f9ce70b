#include "troupe/telemetry/visible_gpus.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>

namespace troupe::telemetry {

namespace {

using place = std::optional<std::size_t>;

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos)
    return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

std::optional<std::size_t> number_of(std::string_view digits) {
  std::size_t result = 0;
  const auto* end = digits.data() + digits.size();
  const auto [at, problem] = std::from_chars(digits.data(), end, result);
  if (problem != std::errc{} || at != end)
    return std::nullopt;
  return result;
}

bool begins_with(std::string_view whole, std::string_view part) {
  return whole.size() >= part.size()
         && std::equal(part.begin(), part.end(), whole.begin(), [](char a, char b) {
              return std::tolower(static_cast<unsigned char>(a))
                     == std::tolower(static_cast<unsigned char>(b));
            });
}

/// The only GPU whose UUID begins so.
std::optional<std::size_t> gpu_of(std::span<const gpu_identity> gpus, std::string_view uuid) {
  std::optional<std::size_t> found;
  for (std::size_t i = 0; i < gpus.size(); ++i) {
    if (!begins_with(gpus[i].uuid, uuid))
      continue;
    if (found)
      return std::nullopt;
    found = i;
  }
  return found;
}

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

} // namespace

cuda_environment cuda_environment::current() {
  return {variable("CUDA_VISIBLE_DEVICES"), variable("CUDA_DEVICE_ORDER")};
}

std::vector<place> visible_gpus(std::span<const gpu_identity> gpus,
                                const cuda_environment& environment) {
  const bool is_one_kind = std::all_of(gpus.begin(), gpus.end(), [&](const gpu_identity& gpu) {
    return gpu.name == gpus.front().name;
  });
  const bool counts_as_nvml = is_one_kind || environment.device_order == "PCI_BUS_ID";
  const auto at_number = [&](std::size_t i) { return counts_as_nvml ? place(i) : std::nullopt; };
  std::vector<place> result;
  if (!environment.visible_devices) {
    for (std::size_t i = 0; i < gpus.size(); ++i)
      result.push_back(at_number(i));
    return result;
  }
  std::vector<std::size_t> numbers; // that were given, known or not
  std::string_view rest = *environment.visible_devices;
  for (bool is_last = false; !is_last;) {
    const auto comma = rest.find(',');
    is_last = comma == std::string_view::npos;
    const auto entry = trimmed(rest.substr(0, comma));
    rest = is_last ? std::string_view() : rest.substr(comma + 1);
    if (begins_with(entry, "MIG-")) {
      result.push_back(std::nullopt);
      continue;
    }
    place found;
    if (begins_with(entry, "GPU-")) {
      found = gpu_of(gpus, entry);
      if (!found)
        break;
    } else {
      const auto number = number_of(entry);
      if (!number || *number >= gpus.size()
          || std::find(numbers.begin(), numbers.end(), *number) != numbers.end())
        break;
      numbers.push_back(*number);
      found = at_number(*number);
    }
    if (found && std::find(result.begin(), result.end(), found) != result.end())
      break;
    result.push_back(found);
  }
  return result;
}

std::optional<std::size_t> cuda_index(std::string_view device) {
  constexpr std::string_view kind = "cuda:";
  return device.starts_with(kind) ? number_of(device.substr(kind.size())) : std::nullopt;
}

} // namespace troupe::telemetry
