#include "troupe/telemetry/nvml.hpp"

#include <array>
#include <utility>

#include <dlfcn.h>
#include <fmt/format.h>

namespace troupe::telemetry {

using namespace nvml_api;

namespace {

/// Asks if there is such a function. True: it has answered.
template <class Function, class... Arguments>
bool tell(Function ask, Arguments... arguments) {
  return ask != nullptr && ask(arguments...) == success;
}

template <class Function>
void find(void* library, const char* name, Function& to) {
  to = reinterpret_cast<Function>(::dlsym(library, name));
}

functions find_all(void* library) {
  functions api;
#define TROUPE_FIND(name) find(library, #name, api.name)
  TROUPE_FIND(nvmlInit_v2);
  TROUPE_FIND(nvmlShutdown);
  TROUPE_FIND(nvmlErrorString);
  TROUPE_FIND(nvmlDeviceGetCount_v2);
  TROUPE_FIND(nvmlDeviceGetHandleByIndex_v2);
  TROUPE_FIND(nvmlDeviceGetHandleByPciBusId_v2);
  TROUPE_FIND(nvmlDeviceGetName);
  TROUPE_FIND(nvmlDeviceGetUUID);
  TROUPE_FIND(nvmlDeviceGetUtilizationRates);
  TROUPE_FIND(nvmlDeviceGetMemoryInfo);
  TROUPE_FIND(nvmlDeviceGetTemperature);
  TROUPE_FIND(nvmlDeviceGetClockInfo);
  TROUPE_FIND(nvmlDeviceGetPowerUsage);
  TROUPE_FIND(nvmlDeviceGetTotalEccErrors);
  TROUPE_FIND(nvmlDeviceGetNvLinkState);
  TROUPE_FIND(nvmlDeviceGetNvLinkErrorCounter);
  TROUPE_FIND(nvmlDeviceGetFieldValues);
#undef TROUPE_FIND
  return api;
}

double ratio(unsigned percent) {
  return percent / 100.0;
}

std::uint64_t hertz(unsigned megahertz) {
  return std::uint64_t{megahertz} * 1'000'000;
}

} // namespace

std::optional<std::uint64_t> count_of(const field_value& field) {
  if (field.status != success)
    return std::nullopt;
  switch (field.type) {
  case value_unsigned_int: return field.value.as_unsigned;
  case value_unsigned_long: return field.value.as_unsigned_long;
  case value_unsigned_long_long: return field.value.as_unsigned_long_long;
  case value_unsigned_short: return field.value.as_unsigned_short;
  case value_double:
    if (field.value.as_double >= 0 && field.value.as_double < 0x1p63)
      return static_cast<std::uint64_t>(field.value.as_double);
    return std::nullopt;
  case value_signed_long_long:
    if (field.value.as_long_long >= 0)
      return static_cast<std::uint64_t>(field.value.as_long_long);
    return std::nullopt;
  case value_signed_int:
    if (field.value.as_int >= 0)
      return static_cast<std::uint64_t>(field.value.as_int);
    return std::nullopt;
  default: return std::nullopt;
  }
}

expected<nvml> nvml::open(const std::string& library) {
  void* opened = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) {
    const char* why = ::dlerror();
    return fail(error_code::unavailable, why == nullptr ? library + " cannot be opened" : why);
  }
  const auto api = find_all(opened);
  if (api.nvmlInit_v2 == nullptr) {
    ::dlclose(opened);
    return fail(error_code::unavailable, library + " has no nvmlInit_v2");
  }
  if (const auto status = api.nvmlInit_v2(); status != success) {
    const auto why =
      fmt::format("{} does not start: {}", library,
                  api.nvmlErrorString == nullptr ? fmt::format("NVML error {}", status)
                                                 : std::string(api.nvmlErrorString(status)));
    ::dlclose(opened);
    return fail(error_code::unavailable, why);
  }
  return nvml(opened, api);
}

nvml::nvml(nvml&& other) noexcept
  : library_(std::exchange(other.library_, nullptr)), api_(other.api_) {}

nvml::~nvml() {
  if (library_ == nullptr)
    return;
  tell(api_.nvmlShutdown);
  ::dlclose(library_);
}

std::vector<gpu_identity> nvml::gpus() const {
  unsigned count = 0;
  if (!tell(api_.nvmlDeviceGetCount_v2, &count))
    return {};
  std::vector<gpu_identity> result;
  for (unsigned i = 0; i < count; ++i) {
    auto* gpu = at_index(i);
    result.push_back({text(api_.nvmlDeviceGetUUID, gpu), text(api_.nvmlDeviceGetName, gpu)});
  }
  return result;
}

nvml::device nvml::at_index(std::size_t index) const {
  device gpu = nullptr;
  return tell(api_.nvmlDeviceGetHandleByIndex_v2, static_cast<unsigned>(index), &gpu) ? gpu
                                                                                      : nullptr;
}

nvml::device nvml::at_bus_id(const std::string& bus_id) const {
  device gpu = nullptr;
  return tell(api_.nvmlDeviceGetHandleByPciBusId_v2, bus_id.c_str(), &gpu) ? gpu : nullptr;
}

std::string nvml::text(decltype(functions::nvmlDeviceGetName) ask, device gpu) const {
  std::array<char, text_size> buffer{};
  if (gpu == nullptr || !tell(ask, gpu, buffer.data(), text_size))
    return {};
  buffer.back() = '\0';
  return buffer.data();
}

proto::GpuReading nvml::read(device gpu) const {
  proto::GpuReading result;
  result.set_name(text(api_.nvmlDeviceGetName, gpu));
  result.set_uuid(text(api_.nvmlDeviceGetUUID, gpu));
  if (utilization busy{}; tell(api_.nvmlDeviceGetUtilizationRates, gpu, &busy)) {
    result.set_utilization(ratio(busy.gpu));
    result.set_memory_utilization(ratio(busy.memory));
  }
  if (memory held{}; tell(api_.nvmlDeviceGetMemoryInfo, gpu, &held)) {
    result.set_memory_used_bytes(held.used);
    result.set_memory_total_bytes(held.total);
  }
  unsigned number = 0;
  if (tell(api_.nvmlDeviceGetTemperature, gpu, temperature_gpu, &number))
    result.set_temperature_celsius(number);
  if (tell(api_.nvmlDeviceGetClockInfo, gpu, clock_sm, &number))
    result.set_sm_clock_hz(hertz(number));
  if (tell(api_.nvmlDeviceGetClockInfo, gpu, clock_memory, &number))
    result.set_memory_clock_hz(hertz(number));
  if (tell(api_.nvmlDeviceGetPowerUsage, gpu, &number))
    result.set_power_watts(number / 1000.0);
  unsigned long long errors = 0;
  if (tell(api_.nvmlDeviceGetTotalEccErrors, gpu, error_corrected, since_driver_load, &errors))
    result.set_ecc_corrected(errors);
  if (tell(api_.nvmlDeviceGetTotalEccErrors, gpu, error_uncorrected, since_driver_load, &errors))
    result.set_ecc_uncorrected(errors);
  read_links(gpu, result);
  return result;
}

void nvml::read_links(device gpu, proto::GpuReading& to) const {
  std::vector<unsigned> active;
  bool has_links = false;
  for (unsigned link = 0; link < max_links; ++link) {
    int is_active = 0;
    if (!tell(api_.nvmlDeviceGetNvLinkState, gpu, link, &is_active))
      continue; // a GPU has fewer links than the most
    has_links = true;
    if (is_active != 0)
      active.push_back(link);
  }
  if (!has_links)
    return;
  to.set_nvlink_active_links(static_cast<std::uint32_t>(active.size()));
  const auto count_errors = [&](link_error kind) {
    std::optional<std::uint64_t> sum;
    unsigned long long errors = 0;
    for (auto link : active)
      if (tell(api_.nvmlDeviceGetNvLinkErrorCounter, gpu, link, kind, &errors))
        sum = sum.value_or(0) + errors;
    return sum;
  };
  if (auto count = count_errors(link_replay))
    to.set_nvlink_replay_errors(*count);
  if (auto count = count_errors(link_recovery))
    to.set_nvlink_recovery_errors(*count);
  if (auto count = count_errors(link_crc_flit))
    to.set_nvlink_crc_flit_errors(*count);
  if (auto count = count_errors(link_crc_data))
    to.set_nvlink_crc_data_errors(*count);

  std::array<field_value, 2> fields{};
  fields[0].field_id = field_link_sent;
  fields[1].field_id = field_link_received;
  for (auto& field : fields) {
    field.scope_id = all_links;
    field.status = not_supported; // if it is left as it is
  }
  if (!tell(api_.nvmlDeviceGetFieldValues, gpu, static_cast<int>(fields.size()), fields.data()))
    return;
  if (auto kib = count_of(fields[0]))
    to.set_nvlink_sent_bytes(*kib * 1024);
  if (auto kib = count_of(fields[1]))
    to.set_nvlink_received_bytes(*kib * 1024);
}

} // namespace troupe::telemetry
