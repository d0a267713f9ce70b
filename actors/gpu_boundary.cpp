#include "troupe/actors/boundary.hpp"

#include "troupe/memory/keeper.hpp"

#include <charconv>
#include <chrono>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#ifdef TROUPE_HAS_CUDA
#include "troupe/kernels/cuda/cuda_ops.hpp"
#include "troupe/kernels/cuda/shared_memory.hpp"
#endif

namespace troupe::actors {

#ifdef TROUPE_HAS_CUDA

namespace {

/// What a keeper that runs gets to answer. The stage's thread waits meanwhile, and is taken for
/// hanging when that takes long; there is another way for the rows.
constexpr auto patience = std::chrono::milliseconds(200);

/// A block of a keeper as this process has it mapped. The keeper keeps it as long as that.
struct mapped_block {
  std::string keeper;
  std::string block;
  memory::keeper_client connection;
  std::shared_ptr<void> memory;
};

expected<mapped_block> map_block(std::int32_t device, const proto::DevicePlace& place,
                                 std::chrono::milliseconds answer_time) {
  auto connection = memory::keeper_client::connect(place.keeper(), patience, answer_time);
  if (!connection)
    return tl::unexpected(connection.error());
  auto granted = connection->open(place.block(), "", place.block_bytes());
  if (!granted)
    return tl::unexpected(granted.error());
  std::string why;
  auto memory = kernels::cuda::import_memory(device, granted->handle, why);
  if (!memory)
    return fail(error_code::unavailable, std::move(why));
  return mapped_block{place.keeper(), place.block(), std::move(*connection), std::move(memory)};
}

class gpu_boundary final : public boundary_device {
public:
  gpu_boundary(std::shared_ptr<kernels::ops> owner, kernels::cuda::gpu_ops& ops,
               std::int32_t device, std::optional<mapped_block> outbox)
    : owner_(std::move(owner)), ops_(ops), device_(device), outbox_(std::move(outbox)) {}

  void leave(std::size_t offset, std::uint64_t oldest, const kernels::rows_view& rows) override {
    ops_.leave_rows(rows, oldest, outbox_->memory.get(), offset);
  }

  void read_back(std::size_t offset, std::int32_t num_rows, std::int32_t num_cols,
                 void* to) override {
    auto* from = static_cast<std::byte*>(outbox_->memory.get()) + offset;
    ops_.copy_to_host({from, num_rows, num_cols, num_cols}, to);
  }

  expected<void> fetch(const proto::DevicePlace& from, const kernels::rows_view& to) override {
    auto bytes = static_cast<std::size_t>(to.num_rows) * static_cast<std::size_t>(to.num_cols)
                 * kernels::size_of(ops_.activation_type());
    if (from.offset() % boundary_outbox::alignment != 0 || from.offset() > from.block_bytes()
        || from.block_bytes() - from.offset() < bytes)
      return fail(error_code::invalid_request,
                  fmt::format("{} rows do not lie within {} of {} bytes", to.num_rows, from.block(),
                              from.block_bytes()));
    if (!source_ || source_->keeper != from.keeper() || source_->block != from.block()) {
      source_.reset();
      auto mapped = map_block(device_, from, patience);
      if (!mapped)
        return tl::unexpected(std::move(mapped.error()));
      spdlog::info("takes rows from {} of {}", from.block(), from.keeper());
      source_ = std::move(*mapped);
    }
    switch (ops_.fetch_rows(source_->memory.get(), from.offset(), from.ticket(), to)) {
    case kernels::cuda::fetched_rows::gone:
      return fail(error_code::stale_epoch, "the rows have made room for others");
    case kernels::cuda::fetched_rows::not_finite:
      return fail(error_code::internal, "hidden rows that came hold values that are not finite");
    default: return {};
    }
  }

private:
  std::shared_ptr<kernels::ops> owner_;
  kernels::cuda::gpu_ops& ops_;
  std::int32_t device_;
  std::optional<mapped_block> outbox_;
  std::optional<mapped_block> source_; ///< the previous stage's
};

} // namespace

expected<std::shared_ptr<boundary_device>> open_gpu_boundary(std::shared_ptr<kernels::ops> ops,
                                                             const std::string& device,
                                                             const proto::DevicePlace* outbox) {
  auto* gpu = dynamic_cast<kernels::cuda::gpu_ops*>(ops.get());
  std::int32_t index = -1;
  auto digits = device.substr(std::min(device.size(), device.find(':') + 1));
  std::from_chars(digits.data(), digits.data() + digits.size(), index);
  if (gpu == nullptr || index < 0)
    return fail(error_code::internal, fmt::format("{} is no GPU", device));
  std::optional<mapped_block> own;
  if (outbox != nullptr) {
    auto mapped = map_block(index, *outbox, memory::keeper_client::usual_answer_time);
    if (!mapped)
      return tl::unexpected(std::move(mapped.error()));
    own = std::move(*mapped);
  }
  return std::make_shared<gpu_boundary>(std::move(ops), *gpu, index, std::move(own));
}

#else

expected<std::shared_ptr<boundary_device>> open_gpu_boundary(std::shared_ptr<kernels::ops>,
                                                             const std::string& device,
                                                             const proto::DevicePlace*) {
  return fail(error_code::internal, fmt::format("{}: this troupe was built without CUDA", device));
}

#endif

} // namespace troupe::actors
