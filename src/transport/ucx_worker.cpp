#include "troupe/transport/ucx_worker.hpp"

#include "troupe/transport/checksum.hpp"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <span>
#include <sstream>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <net/if.h>
#include <spdlog/spdlog.h>

namespace troupe::transport {

namespace {

/// Bounds one call of progress(), so that a flood of arrivals cannot starve commands.
constexpr int max_progress_steps = 64;

tl::unexpected<error> start_failure(std::string_view step, ucs_status_t status) {
  return fail(error_code::unavailable,
              fmt::format("UCX cannot start: {}: {}", step, ucs_status_string(status)),
              "check transport.interface and the transports of this machine with `ucx_info -d`");
}

expected<void> modify(ucp_config_t* config, const char* key, const std::string& value) {
  if (const auto status = ucp_config_modify(config, key, value.c_str()); status != UCS_OK)
    return start_failure(fmt::format("{}={}", key, value), status);
  return {};
}

/// UCX only warns of a device that does not exist, and then reaches nobody.
expected<void> check_devices(const std::string& interface) {
  std::istringstream devices{interface};
  for (std::string device; std::getline(devices, device, ',');) {
    const auto name = device.substr(0, device.find(':')); // "mlx5_0:1" is a device and its port
    std::error_code ignored;
    if (name != "all" && ::if_nametoindex(name.c_str()) == 0
        && !std::filesystem::exists("/sys/class/infiniband/" + name, ignored))
      return fail(error_code::unavailable, fmt::format("there is no network device '{}'", name),
                  "name one of `ip link` as transport.interface");
  }
  return {};
}

expected<void> configure(ucp_config_t* config, const std::string& transports,
                         const std::string& interface) {
  if (auto done = modify(config, "TLS", transports); !done)
    return done;
  // A refused connection is news to UCX and an error value to us.
  if (std::getenv("UCX_LOG_LEVEL") == nullptr)
    if (auto done = modify(config, "LOG_LEVEL", "fatal"); !done)
      return done;
  // The handshake begins with the first frame, not with the connection (see peer_table).
  if (auto done = modify(config, "RESOLVE_REMOTE_EP_ID", "n"); !done)
    return done;
  // UCX_CMA_MEMORY_INVALIDATE. Without it UCX leaves CMA aside as soon as peer failures
  // are to be reported.
  if (transports.find("cma") != std::string::npos)
    if (auto done = modify(config, "MEMORY_INVALIDATE", "y"); !done)
      return done;
  if (!interface.empty())
    return modify(config, "NET_DEVICES", interface);
  return {};
}

} // namespace

error to_error(ucs_status_t status, std::string_view peer) {
  const auto make = [&](error_code code, std::string_view what) {
    return fail(code, fmt::format("{} '{}': {}", what, peer, ucs_status_string(status))).value();
  };
  switch (status) {
  case UCS_ERR_EXCEEDS_LIMIT: return make(error_code::too_large, "frame refused by");
  case UCS_ERR_NO_MEMORY: return make(error_code::resource_exhausted, "no memory for a frame to");
  case UCS_ERR_INVALID_PARAM: return make(error_code::invalid_request, "frame refused by");
  case UCS_ERR_REJECTED: return make(error_code::stale_epoch, "fenced off by");
  default: return make(error_code::peer_lost, "lost peer");
  }
}

ucs_status_t to_status(error_code code) {
  switch (code) {
  case error_code::too_large: return UCS_ERR_EXCEEDS_LIMIT;
  case error_code::resource_exhausted: return UCS_ERR_NO_MEMORY;
  case error_code::stale_epoch: return UCS_ERR_REJECTED;
  default: return UCS_ERR_INVALID_PARAM;
  }
}

expected<ucx_worker> ucx_worker::open(const std::string& transports, const std::string& interface) {
  if (auto done = check_devices(interface); !done)
    return tl::unexpected(std::move(done).error());
  ucx_worker result;
  ucp_config_t* config = nullptr;
  if (const auto status = ucp_config_read(nullptr, nullptr, &config); status != UCS_OK)
    return start_failure("reading its configuration", status);
  auto configured = configure(config, transports, interface);
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  const auto initialized =
    configured ? ucp_init(&params, config, &result.context_) : UCS_ERR_INVALID_PARAM;
  ucp_config_release(config);
  if (!configured)
    return tl::unexpected(std::move(configured).error());
  if (initialized != UCS_OK) {
    result.context_ = nullptr;
    return start_failure(fmt::format("transports '{}' on interface '{}'", transports, interface),
                         initialized);
  }
  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  const auto created = ucp_worker_create(result.context_, &worker_params, &result.worker_);
  if (created != UCS_OK) {
    result.worker_ = nullptr;
    return start_failure(fmt::format("worker with '{}' on '{}'", transports, interface), created);
  }
  if (auto done = result.read_attributes(); !done)
    return tl::unexpected(std::move(done).error());
  return result;
}

expected<void> ucx_worker::read_attributes() {
  if (const auto status = ucp_worker_get_efd(worker_, &event_fd_); status != UCS_OK)
    return start_failure("event descriptor", status);
  ucp_worker_attr_t attributes{};
  attributes.field_mask = UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
  if (const auto status = ucp_worker_query(worker_, &attributes); status != UCS_OK)
    return start_failure("header limit", status);
  max_header_ = attributes.max_am_header;
  ucp_address_t* raw = nullptr;
  std::size_t length = 0;
  if (const auto status = ucp_worker_get_address(worker_, &raw, &length); status != UCS_OK)
    return start_failure("worker address", status);
  address_.assign(reinterpret_cast<const char*>(raw), length);
  ucp_worker_release_address(worker_, raw);
  return {};
}

ucx_worker::ucx_worker(ucx_worker&& other) noexcept
  : context_(std::exchange(other.context_, nullptr)),
    worker_(std::exchange(other.worker_, nullptr)),
    event_fd_(std::exchange(other.event_fd_, -1)),
    max_header_(other.max_header_),
    address_(std::move(other.address_)) {}

ucx_worker& ucx_worker::operator=(ucx_worker&& other) noexcept {
  std::swap(context_, other.context_);
  std::swap(worker_, other.worker_);
  std::swap(event_fd_, other.event_fd_);
  std::swap(max_header_, other.max_header_);
  std::swap(address_, other.address_);
  return *this;
}

ucx_worker::~ucx_worker() {
  close();
}

void ucx_worker::close() {
  if (worker_ != nullptr)
    ucp_worker_destroy(std::exchange(worker_, nullptr));
  if (context_ != nullptr)
    ucp_cleanup(std::exchange(context_, nullptr));
}

expected<ucp_ep_h> ucx_worker::open_endpoint(std::string_view address,
                                             ucp_err_handler_cb_t on_error, void* context) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                      | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = on_error;
  params.err_handler.arg = context;
  ucp_ep_h result = nullptr;
  if (const auto status = ucp_ep_create(worker_, &params, &result); status != UCS_OK)
    return fail(error_code::peer_lost,
                fmt::format("cannot reach a peer: {}", ucs_status_string(status)),
                "both ends must name interfaces of the same network");
  return result;
}

bool ucx_worker::progress() {
  int steps = 0;
  while (steps < max_progress_steps && ucp_worker_progress(worker_) != 0)
    ++steps;
  return steps != 0;
}

// A forced close of UCX 1.13 returns while copies by CMA are under way on the connection's lanes,
// and one copy is made per progress. Destroying the worker before the last trips the assertion
// ucs_arbiter_group_is_empty (src/uct/sm/scopy/base/scopy_ep.c). A flush of the worker waits for
// lanes being discarded as well (src/ucp/rma/flush.c, flush_ops_count).
bool ucx_worker::finish(std::chrono::steady_clock::time_point deadline) {
  const ucp_request_param_t params{};
  const auto request = ucp_worker_flush_nbx(worker_, &params);
  if (!UCS_PTR_IS_PTR(request))
    return request == nullptr;
  while (ucp_request_check_status(request) == UCS_INPROGRESS
         && std::chrono::steady_clock::now() < deadline)
    if (ucp_worker_progress(worker_) == 0)
      std::this_thread::yield();
  const auto status = ucp_request_check_status(request);
  ucp_request_free(request);
  return status == UCS_OK;
}

bool ucx_worker::arm() {
  const auto status = ucp_worker_arm(worker_);
  if (status != UCS_OK && status != UCS_ERR_BUSY)
    spdlog::warn("UCX cannot arm its event descriptor ({}); waking up by timer instead",
                 ucs_status_string(status));
  return status != UCS_ERR_BUSY;
}

} // namespace troupe::transport
