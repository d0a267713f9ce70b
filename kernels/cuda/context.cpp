#include "troupe/kernels/cuda/context.hpp"

#include <algorithm>
#include <cstring>
#include <functional>

#include "troupe/kernels/cuda/exceptions.hpp"

namespace troupe::kernels::cuda {

namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::size_t kRingBytes = std::size_t{16} << 20;

std::size_t aligned(std::size_t bytes) {
  return std::max<std::size_t>((bytes + kAlignment - 1) / kAlignment, 1) * kAlignment;
}

} // namespace

context::context(std::int32_t device) : device_(device) {
  if (!check(cudaSetDevice(device), "cudaSetDevice")) {
    return;
  }
  cudaDeviceProp properties{};
  if (check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties")) {
    name_ = properties.name;
    is_hopper_ = properties.major == 9 && properties.minor == 0;
    num_multiprocessors_ = properties.multiProcessorCount;
  }
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
}

context::~context() {
  if (stream_ != nullptr) {
    cudaSetDevice(device_);
    cudaStreamDestroy(stream_);
  }
}

cudaStream_t context::stream() {
  check(cudaSetDevice(device_), "cudaSetDevice");
  return stream_;
}

bool context::check(cudaError_t status, const char* what) {
  if (status != cudaSuccess && is_recording_) {
    spoil_recording(cudaGetErrorName(status));
    cudaGetLastError();
    return failure_.empty();
  }
  if (status != cudaSuccess && failure_.empty()) {
    failure_ = "cuda:" + std::to_string(device_) + ": " + what + ": " + cudaGetErrorName(status)
               + ": " + cudaGetErrorString(status);
  }
  return failure_.empty();
}

void context::fail(const std::string& why) {
  if (failure_.empty()) {
    failure_ = "cuda:" + std::to_string(device_) + ": " + why;
  }
}

bool context::synchronise() {
  if (is_recording_) {
    spoil_recording("it waits for the device");
    return failure_.empty();
  }
  const auto queue = stream();
  const auto begin = std::chrono::steady_clock::now();
  current_wait_.store(++num_waits_, std::memory_order_relaxed);
  if (are_exceptions_local()) {
    launch_nothing(queue);
  }
  const auto status = cudaStreamSynchronize(queue);
  current_wait_.store(0, std::memory_order_relaxed);
  longest_wait_ =
    std::max<std::chrono::nanoseconds>(longest_wait_, std::chrono::steady_clock::now() - begin);
  return check(status, "waiting for the stream");
}

void context::begin_recording() {
  is_recording_ = true;
  spoilt_by_.clear();
}

void context::spoil_recording(const char* why) {
  if (spoilt_by_.empty()) {
    spoilt_by_ = why;
  }
}

std::string context::end_recording() {
  is_recording_ = false;
  return spoilt_by_;
}

std::shared_ptr<void> device_pool::new_slab(std::size_t bytes) {
  gpu_.stream();
  if (!gpu_.ok()) {
    return nullptr;
  }
  if (source_ != nullptr) {
    auto piece = source_->piece(num_slabs_++, bytes);
    if (piece == nullptr) {
      gpu_.run_out();
    }
    return piece;
  }
  void* memory = nullptr;
  // Too little memory is an answer, not a failure of the device.
  if (cudaMalloc(&memory, bytes) != cudaSuccess) {
    cudaGetLastError();
    gpu_.run_out();
    return nullptr;
  }
  return {memory, [](void* at) { cudaFree(at); }};
}

std::shared_ptr<void> device_pool::take(std::size_t bytes) {
  bytes = aligned(bytes);
  if (slab_ == nullptr || used_ + bytes > size_) {
    const std::size_t size = std::max(bytes, slab_bytes_);
    auto slab = new_slab(size);
    if (slab == nullptr) {
      return nullptr;
    }
    if (bytes >= slab_bytes_ / 2) {
      return slab; // the current slab still has room for small pieces
    }
    slab_ = slab;
    size_ = size;
    used_ = 0;
  }
  auto* at = static_cast<std::byte*>(slab_.get()) + used_;
  used_ += bytes;
  return {slab_, at};
}

void* scratch::take_bytes(std::size_t bytes) {
  if (bytes > size_ || memory_ == nullptr) {
    if (gpu_.is_recording()) {
      gpu_.spoil_recording("scratch memory grows");
      return memory_.get();
    }
    gpu_.begin_generation();
    gpu_.synchronise(); // the old piece may be in use
    memory_ = nullptr;
    memory_ = pool_.take(std::max(bytes, size_ * 2));
    size_ = memory_ == nullptr ? 0 : std::max(bytes, size_ * 2);
    if (memory_ == nullptr) {
      gpu_.check(cudaErrorMemoryAllocation, "scratch memory");
    }
  }
  return memory_.get();
}

upload_ring::~upload_ring() {
  cudaFreeHost(host_);
  cudaFree(device_);
}

std::size_t upload_ring::reserve(std::size_t bytes) {
  bytes = aligned(bytes);
  if (used_ + bytes <= size_) {
    const auto at = used_;
    used_ += bytes;
    return at;
  }
  // The host's side must not change under a copy that is still queued.
  gpu_.synchronise();
  if (bytes > size_ / 2) {
    cudaFreeHost(host_);
    cudaFree(device_);
    host_ = device_ = nullptr;
    size_ = std::max(kRingBytes, bytes * 4);
    gpu_.check(cudaMallocHost(reinterpret_cast<void**>(&host_), size_), "pinned memory");
    gpu_.check(cudaMalloc(reinterpret_cast<void**>(&device_), size_), "upload memory");
  }
  used_ = bytes;
  return 0;
}

const void* upload_ring::put_bytes(const void* from, std::size_t bytes) {
  if (gpu_.is_recording()) {
    gpu_.spoil_recording("it uploads");
    return device_;
  }
  const auto at = reserve(bytes);
  if (!gpu_.ok()) {
    return nullptr;
  }
  std::memcpy(host_ + at, from, bytes);
  gpu_.check(
    cudaMemcpyAsync(device_ + at, host_ + at, bytes, cudaMemcpyHostToDevice, gpu_.stream()),
    "upload");
  return device_ + at;
}

void upload_ring::put_into(void* to, const void* from, std::size_t bytes) {
  if (gpu_.is_recording()) {
    gpu_.spoil_recording("it uploads");
    return;
  }
  const auto at = reserve(bytes);
  if (!gpu_.ok()) {
    return;
  }
  std::memcpy(host_ + at, from, bytes);
  gpu_.check(cudaMemcpyAsync(to, host_ + at, bytes, cudaMemcpyHostToDevice, gpu_.stream()),
             "upload");
}

const std::int32_t* mirrored_array::find(std::span<const std::int32_t> values) {
  const auto count = values.size();
  const auto size = content_.size();
  const std::less_equal<const std::int32_t*> not_behind;
  if (host_ != nullptr && not_behind(host_, values.data())
      && not_behind(values.data() + count, host_ + size)) {
    const auto offset = values.data() - host_;
    if (std::equal(values.begin(), values.end(), content_.begin() + offset)) {
      return device_ + offset;
    }
  }
  place(values);
  return device_;
}

void mirrored_array::place(std::span<const std::int32_t> values) {
  // Something else at the same place, or another array with the same content.
  if (values.size() != content_.size()
      || !std::equal(values.begin(), values.end(), content_.begin())) {
    if (gpu_.is_recording()) {
      gpu_.spoil_recording("it uploads");
      return;
    }
    content_.assign(values.begin(), values.end());
    device_ = memory_.take<std::int32_t>(std::max<std::size_t>(values.size(), 4096));
    if (device_ != nullptr) {
      ring_.put_into(device_, content_.data(), values.size_bytes());
    }
  }
  host_ = values.data();
}

download_buffer::~download_buffer() {
  cudaFreeHost(memory_);
}

void* download_buffer::take(std::size_t bytes) {
  if (bytes > size_) {
    gpu_.synchronise(); // a copy may be on its way
    cudaFreeHost(memory_);
    memory_ = nullptr;
    size_ = bytes * 2;
    gpu_.check(cudaMallocHost(&memory_, size_), "pinned memory");
  }
  return gpu_.ok() ? memory_ : nullptr;
}

} // namespace troupe::kernels::cuda
