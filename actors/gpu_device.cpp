#include "troupe/actors/gpu_device.hpp"

#include "troupe/actors/runtime.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/memory/keeper.hpp"

#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/signalfd.h>

#ifdef TROUPE_HAS_CUDA
#include "troupe/kernels/cuda/cuda_ops.hpp"
#include "troupe/kernels/cuda/shared_memory.hpp"
#endif

namespace troupe::actors {

#ifdef TROUPE_HAS_CUDA

namespace {

/// A keeper makes its CUDA context first, which on a cold machine takes seconds.
constexpr auto keeper_patience = std::chrono::milliseconds(20'000);

/// How long the ranks of a stage wait for each other.
constexpr auto sum_deadline = std::chrono::milliseconds(2'000);

using kernels::cuda::sum_transport;

sum_transport transport_of(proto::AllReduce wanted) {
  switch (wanted) {
  case proto::ALL_REDUCE_PEER: return sum_transport::peer;
  case proto::ALL_REDUCE_NCCL: return sum_transport::nccl;
  default: return sum_transport::automatic;
  }
}

/// The least that is worth a block of its own.
constexpr std::size_t marker_bytes = 256;

expected<std::int32_t> index_of(const std::string& device) {
  std::int32_t index = -1;
  auto digits = device.substr(std::min(device.size(), device.find(':') + 1));
  std::from_chars(digits.data(), digits.data() + digits.size(), index);
  auto count = kernels::cuda::num_devices();
  if (index < 0 || index >= count)
    return fail(
      error_code::invalid_config,
      count == 0
        ? fmt::format("there is no {}: this host has no GPU that CUDA can use", device)
        : fmt::format("there is no {}: this host has {} GPU(s), from cuda:0 on", device, count),
      "nvidia-smi shows the GPUs; correct nodes.devices, or the driver");
  return index;
}

/// Weights in blocks of a keeper. They count as whole when a marker, and each of the blocks, has
/// been sealed: blocks are given up one by one.
class kept_weights final : public kernels::cuda::weight_memory {
public:
  kept_weights(std::shared_ptr<memory::keeper_client> keeper, std::int32_t device, std::string name,
               std::string content)
    : keeper_(std::move(keeper)),
      device_(device),
      name_(std::move(name)),
      content_(std::move(content)) {}

  expected<void> find(bool may_be_filled) {
    auto marker = keeper_->open(name_, content_, marker_bytes);
    if (!marker)
      return tl::unexpected(marker.error());
    is_filled_ = may_be_filled && marker->is_sealed;
    return {};
  }

  std::shared_ptr<void> piece(std::size_t index, std::size_t bytes) override {
    auto name = fmt::format("{}/{}", name_, index);
    auto granted = keeper_->open(name, content_, bytes);
    if (!granted) {
      failure_ = granted.error();
      return nullptr;
    }
    are_sealed_ = are_sealed_ && granted->is_sealed;
    std::string why;
    auto mapped = kernels::cuda::import_memory(device_, granted->handle, why);
    if (!mapped)
      failure_ = fail(error_code::io_failed, std::move(why)).value();
    pieces_.push_back(std::move(name));
    return mapped;
  }

  bool is_filled() const override { return is_filled_; }

  /// False: what was taken for filled was not.
  bool is_whole() const { return !is_filled_ || are_sealed_; }

  expected<void> seal() {
    pieces_.push_back(name_);
    for (const auto& piece : pieces_)
      if (auto sealed = keeper_->seal(piece); !sealed)
        return sealed;
    return {};
  }

  const std::optional<error>& failure() const { return failure_; }

private:
  std::shared_ptr<memory::keeper_client> keeper_;
  std::int32_t device_;
  std::string name_;
  std::string content_;
  bool is_filled_ = false;
  bool are_sealed_ = true;
  std::vector<std::string> pieces_;
  std::optional<error> failure_;
};

class cuda_gpu final : public gpu_device {
public:
  cuda_gpu(std::string name, std::int32_t device, memory::keeper_client keeper)
    : name_(std::move(name)),
      device_(device),
      keeper_(std::make_shared<memory::keeper_client>(std::move(keeper))) {}

  const std::string& name() const override { return name_; }

  expected<gpu_memory> memory() override {
    auto kept = keeper_->report();
    if (!kept)
      return tl::unexpected(kept.error());
    auto now = kernels::cuda::memory_of(device_);
    return gpu_memory{now.total_bytes, now.free_bytes, kept->kept_bytes};
  }

  expected<std::shared_ptr<void>> map_kv(const std::string& actor, std::size_t bytes) override {
    auto granted = keeper_->open(actor + "/kv", "", bytes);
    if (!granted) {
      auto why = granted.error();
      why.cure = "lower serving.kv_tokens, or use more GPUs";
      return tl::unexpected(std::move(why));
    }
    std::string why;
    auto mapped = kernels::cuda::import_memory(device_, granted->handle, why);
    if (!mapped)
      return fail(error_code::io_failed, why);
    return {{mapped.get(), [mapped, keeper = keeper_](void*) {}}};
  }

  expected<void> load(const std::string& actor, const std::string& content, kernels::numerics mode,
                      const gpu_rank& rank, weights_taken which, const memory::activity& pulse,
                      const loading& load) override {
    for (bool may_be_filled : {true, false}) {
      auto weights = std::make_shared<kept_weights>(keeper_, device_, actor + "/weights", content);
      if (auto found = weights->find(may_be_filled); !found)
        return found;
      if (which == weights_taken::kept_only && !weights->is_filled())
        return fail(error_code::unavailable,
                    fmt::format("{}: {} does not keep its weights whole", actor, name_));
      std::string why;
      auto made = kernels::cuda::make_cuda_ops(device_, why, pulse.counter(), weights, rank.group,
                                               rank.rank, mode);
      if (!made)
        return fail(error_code::internal, why);
      auto* device = made.get();
      std::shared_ptr<kernels::ops> ops(
        made.release(), [pulse, keeper = keeper_](kernels::ops* owned) { delete owned; });
      auto loaded = load(ops);
      if (weights->failure())
        return tl::unexpected(*weights->failure());
      if (device->has_run_out())
        return fail(error_code::resource_exhausted,
                    fmt::format("{}: {} has too little memory for activations: {:.2f} GB of {:.1f} "
                                "GB are left",
                                actor, name_, double(device->memory().free_bytes) / 1e9,
                                double(device->memory().total_bytes) / 1e9),
                    "lower serving.max_batch_tokens or serving.kv_tokens, or use more GPUs");
      if (!device->failure().empty())
        return fail(error_code::internal, device->failure());
      if (!loaded)
        return loaded;
      if (weights->is_whole()) {
        spdlog::info("{}: weights {}", actor,
                     weights->is_filled() ? "are those of the predecessor" : "loaded");
        device->synchronise();
        return weights->is_filled() ? expected<void>() : weights->seal();
      }
    }
    return fail(error_code::internal, fmt::format("{}: weights cannot be placed", actor));
  }

  device_waits waits_of(const std::shared_ptr<kernels::ops>& loaded) const override {
    auto ops = std::static_pointer_cast<kernels::cuda::gpu_ops>(loaded);
    return {{ops, &ops->current_wait()}, [ops] { return ops->take_longest_wait(); }};
  }

private:
  std::string name_;
  std::int32_t device_;
  std::shared_ptr<memory::keeper_client> keeper_;
};

expected<memory::device_block> allocate(std::int32_t device, std::size_t bytes) {
  std::string why;
  auto made = kernels::cuda::export_memory(device, bytes, why);
  if (!made.memory)
    return fail(error_code::resource_exhausted, why,
                "use more GPUs, or lower serving.kv_tokens or serving.max_batch_tokens");
  return memory::device_block{std::move(made.memory), std::move(made.handle)};
}

unique_fd stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  return unique_fd(::signalfd(-1, &signals, SFD_CLOEXEC));
}

} // namespace

expected<std::shared_ptr<gpu_device>> gpu_device::open(const std::string& device,
                                                       const std::string& keeper) {
  auto index = index_of(device);
  if (!index)
    return tl::unexpected(index.error());
  // The first use of a GPU makes the process its context: here, and not when work waits.
  std::string why;
  if (!kernels::cuda::make_cuda_ops(*index, why))
    return fail(error_code::internal, why, "nvidia-smi and dmesg say more");
  auto client = memory::keeper_client::connect(keeper, keeper_patience);
  if (!client)
    return tl::unexpected(client.error());
  return std::make_shared<cuda_gpu>(device, *index, std::move(*client));
}

expected<std::shared_ptr<kernels::cuda::gpu_rank_group>>
gpu_device::join(std::span<const std::shared_ptr<gpu_device>> ranks, std::int32_t max_rows,
                 std::int32_t num_cols, kernels::numerics mode, proto::AllReduce wanted) {
  std::vector<std::int32_t> devices;
  for (const auto& rank : ranks) {
    auto index = index_of(rank->name());
    if (!index)
      return tl::unexpected(index.error());
    devices.push_back(*index);
  }
  std::string why;
  auto begin = std::chrono::steady_clock::now();
  auto group = kernels::cuda::make_gpu_rank_group(devices, max_rows, num_cols, why, sum_deadline,
                                                  transport_of(wanted), mode);
  if (!group)
    return fail(
      error_code::unavailable, why,
      "nvidia-smi topo -p2p r shows which GPUs reach each other; others need NCCL (libnccl.so.2), "
      "or parallel.tensor: 1");
  spdlog::info(
    "{} GPUs add up rows by {}, ready in {:.0f} ms", group->size(),
    group->transport() == sum_transport::nccl ? "NCCL" : "peer memory",
    std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  return group;
}

void gpu_device::prepare_environment() {
  kernels::cuda::prepare_environment();
}

int run_keeper(const keeper_options& options) {
  auto device = static_cast<std::int32_t>(options.device);
  if (auto index = index_of(fmt::format("cuda:{}", device)); !index) {
    spdlog::critical("{}", index.error().text());
    return exit_permanent;
  }
  auto stop = stop_signals();
  memory::kept_blocks blocks([device](std::size_t bytes) { return allocate(device, bytes); });
  spdlog::info("keeps the memory of cuda:{}", device);
  auto ended = memory::serve_kept_blocks(options.address, std::move(blocks), stop.get(),
                                         kernels::cuda::pci_bus_id(device));
  if (!ended) {
    spdlog::critical("{}", ended.error().text());
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}

#else

expected<std::shared_ptr<gpu_device>> gpu_device::open(const std::string& device,
                                                       const std::string&) {
  return fail(error_code::invalid_config,
              fmt::format("{} cannot be used: this troupe was built without CUDA", device),
              "build it where nvcc is found (README, GPUs), or write cpu in nodes.devices");
}

expected<std::shared_ptr<kernels::cuda::gpu_rank_group>>
gpu_device::join(std::span<const std::shared_ptr<gpu_device>>, std::int32_t, std::int32_t,
                 kernels::numerics, proto::AllReduce) {
  return fail(error_code::invalid_config, "this troupe was built without CUDA");
}

void gpu_device::prepare_environment() {}

int run_keeper(const keeper_options&) {
  spdlog::critical("this troupe was built without CUDA");
  return exit_permanent;
}

#endif

} // namespace troupe::actors
