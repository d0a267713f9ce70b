#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace troupe::kernels::cpu {

/// Memory that grows to the largest size ever asked for and is kept, so that steady
/// work allocates nothing. Contents do not survive growth.
template <class T>
class scratch {
public:
  /// At least `count` elements, 64-byte aligned, with any contents.
  T* take(std::int64_t count) {
    if (count > capacity_) {
      const std::int64_t bigger = count > capacity_ * 3 / 2 ? count : capacity_ * 3 / 2;
      const std::size_t bytes = (static_cast<std::size_t>(bigger) * sizeof(T) + 63) / 64 * 64;
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
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
