#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include <sys/mman.h>

namespace troupe::kernels::cpu {

/// Memory for std::free, aligned to 64 bytes; in large pages, where the system has them and it is
/// worth it. Null if there is not that much.
inline void* allocate_aligned(std::size_t bytes) {
  constexpr std::size_t large_page = std::size_t{1} << 21;
  const std::size_t unit = bytes >= large_page ? large_page : 64;
  bytes = (bytes < 1 ? unit : (bytes + unit - 1) / unit * unit);
  void* memory = std::aligned_alloc(unit, bytes);
  if (memory != nullptr && unit == large_page) {
    ::madvise(memory, bytes, MADV_HUGEPAGE); // without, it is slower but right
  }
  return memory;
}

/// Memory that grows to the largest size ever asked for and is kept, so that steady
/// work allocates nothing. Contents do not survive growth.
template <class T>
class scratch {
public:
  /// At least `count` elements, 64-byte aligned, with any contents.
  T* take(std::int64_t count) {
    if (count > capacity_) {
      const std::int64_t bigger = count > capacity_ * 3 / 2 ? count : capacity_ * 3 / 2;
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<T*>(allocate_aligned(static_cast<std::size_t>(bigger) * sizeof(T))));
      if (data_ == nullptr) {
        throw std::bad_alloc();
      }
      capacity_ = bigger;
    }
    return data_.get();
  }

private:
  struct release {
    void operator()(T* data) const { std::free(data); }
  };

  std::unique_ptr<T[], release> data_;
  std::int64_t capacity_ = 0;
};

} // namespace troupe::kernels::cpu
