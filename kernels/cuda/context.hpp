#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/shared_memory.hpp"

namespace troupe::kernels::cuda {

/// One GPU as one object of `ops` uses it: its stream and the first thing that went wrong. A failed
/// GPU stays failed for the life of the process, so whatever is asked of it later does nothing.
class context {
public:
  explicit context(std::int32_t device);
  ~context();
  context(const context&) = delete;
  context& operator=(const context&) = delete;

  std::int32_t device() const { return device_; }
  std::int32_t num_multiprocessors() const { return num_multiprocessors_; }
  /// Has the matrix unit of Hopper, for which there is machine code of its own.
  bool is_hopper() const { return is_hopper_; }
  const std::string& name() const { return name_; }
  bool ok() const { return failure_.empty(); }
  const std::string& failure() const { return failure_; }

  /// Makes the device current in the calling thread and gives the stream.
  cudaStream_t stream();

  /// Keeps the first failure. True if there is none.
  bool check(cudaError_t status, const char* what);

  /// Keeps a failure that the driver does not know of, if it is the first.
  void fail(const std::string& why);

  /// Waits for everything queued.
  bool synchronise();

  /// Somebody was refused memory.
  bool has_run_out() const { return has_run_out_; }
  void run_out() { has_run_out_ = true; }

  /// While a step is recorded (recording.hpp), nothing may wait, move memory or upload. Who has to
  /// says so instead of doing it, and the recording is thrown away. Nothing that is queued
  /// meanwhile runs, and errors are not the GPU's.
  void begin_recording();
  bool is_recording() const { return is_recording_; }
  void spoil_recording(const char* why);

  /// Says what has spoilt it; empty if nothing has.
  std::string end_recording();

  /// Scratch memory has moved so often. A recorded step is good for one generation.
  std::uint64_t generation() const { return generation_; }
  void begin_generation() { ++generation_; }

private:
  std::int32_t device_;
  std::int32_t num_multiprocessors_ = 1;
  bool is_hopper_ = false;
  bool has_run_out_ = false;
  std::string name_;
  std::string failure_;
  cudaStream_t stream_ = nullptr;
  bool is_recording_ = false;
  std::string spoilt_by_;
  std::uint64_t generation_ = 0;
};

/// Device memory in slabs, so that the driver is asked seldom. A piece lives as long as the
/// pointer to it; a slab goes back to the driver with its last piece.
class device_pool {
public:
  /// Slabs come from the driver, or from `source` if there is one.
  device_pool(context& gpu, std::size_t slab_bytes, std::shared_ptr<weight_memory> source = nullptr)
    : gpu_(gpu), slab_bytes_(slab_bytes), source_(std::move(source)) {}

  /// 256-byte aligned, not zeroed; null if there is not that much.
  std::shared_ptr<void> take(std::size_t bytes);

private:
  std::shared_ptr<void> new_slab(std::size_t bytes);

  context& gpu_;
  std::size_t slab_bytes_;
  std::shared_ptr<weight_memory> source_;
  std::size_t num_slabs_ = 0;
  std::shared_ptr<void> slab_;
  std::size_t used_ = 0;
  std::size_t size_ = 0;
};

/// Device memory that is kept between calls and grows when more is asked for.
class scratch {
public:
  scratch(context& gpu, device_pool& pool) : gpu_(gpu), pool_(pool) {}

  template <class T>
  T* take(std::size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

private:
  void* take_bytes(std::size_t bytes);

  context& gpu_;
  device_pool& pool_;
  std::shared_ptr<void> memory_;
  std::size_t size_ = 0;
};

/// Small host arrays on their way to the device, by way of pinned memory. Neither side is used
/// again before the stream has passed it.
class upload_ring {
public:
  explicit upload_ring(context& gpu) : gpu_(gpu) {}
  ~upload_ring();
  upload_ring(const upload_ring&) = delete;
  upload_ring& operator=(const upload_ring&) = delete;

  /// A copy in device memory, valid for what is queued before the ring comes round; null after
  /// a failure.
  template <class T>
  const T* put(std::span<const T> values) {
    return static_cast<const T*>(put_bytes(values.data(), values.size_bytes()));
  }

  /// The same into device memory of the caller.
  void put_into(void* to, const void* from, std::size_t bytes);

private:
  const void* put_bytes(const void* from, std::size_t bytes);
  std::size_t reserve(std::size_t bytes);

  context& gpu_;
  std::byte* host_ = nullptr;
  std::byte* device_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

/// A host array that many operations are given again and again: uploaded when it changed. The
/// device address stays the same until the array outgrows it.
class mirrored_array {
public:
  mirrored_array(context& gpu, device_pool& pool, upload_ring& ring)
    : gpu_(gpu), memory_(gpu, pool), ring_(ring) {}

  /// Where `values` are in device memory. Parts of the array last given are recognised.
  const std::int32_t* find(std::span<const std::int32_t> values);

  /// Puts `values` at the begin of the device's array, where `find` then knows it.
  void place(std::span<const std::int32_t> values);

private:
  context& gpu_;
  scratch memory_;
  upload_ring& ring_;
  const std::int32_t* host_ = nullptr;
  std::vector<std::int32_t> content_;
  std::int32_t* device_ = nullptr;
};

/// Pinned host memory into which results are copied.
class download_buffer {
public:
  explicit download_buffer(context& gpu) : gpu_(gpu) {}
  ~download_buffer();
  download_buffer(const download_buffer&) = delete;
  download_buffer& operator=(const download_buffer&) = delete;

  /// Room for so many bytes; what was there before is lost. Null after a failure.
  void* take(std::size_t bytes);

private:
  context& gpu_;
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

} // namespace troupe::kernels::cuda
