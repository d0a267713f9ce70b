#include "troupe/recovery/accrual_detector.hpp"

#include <algorithm>
#include <cmath>

namespace troupe::recovery {

namespace {

/// -log10 of the chance that a standard normal variable exceeds `y`.
double surprise(double y) {
  const double z = y * (1.5976 + 0.070566 * y * y);
  // log10(1 + e^z), also where e^z is beyond a double.
  const double natural = z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
  return natural / std::log(10.0);
}

} // namespace

accrual_detector::accrual_detector(duration interval, duration least_patience)
  : least_patience_(least_patience),
    agreed_(interval),
    longest_lesson_(std::max<milliseconds>(least_patience, 4 * agreed_)) {}

void accrual_detector::heartbeat(time_point now) {
  if (started_) {
    learn(std::min<milliseconds>(silence(now), longest_lesson_));
  } else {
    learn(agreed_ * 0.75);
    learn(agreed_ * 1.25);
  }
  started_ = true;
  last_ = now;
}

void accrual_detector::learn(milliseconds interval) {
  intervals_[next_] = interval;
  next_ = (next_ + 1) % window;
  count_ = std::min(count_ + 1, window);
}

void accrual_detector::observer_paused(duration lost) {
  last_ += lost;
}

accrual_detector::duration accrual_detector::silence(time_point now) const {
  return started_ && now > last_ ? now - last_ : duration{};
}

double accrual_detector::phi(time_point now) const {
  const auto silent = silence(now);
  if (!started_ || silent <= least_patience_)
    return 0;
  double mean = 0;
  for (std::size_t i = 0; i < count_; ++i)
    mean += intervals_[i].count();
  mean /= static_cast<double>(count_);
  double variance = 0;
  for (std::size_t i = 0; i < count_; ++i)
    variance += (intervals_[i].count() - mean) * (intervals_[i].count() - mean);
  variance /= static_cast<double>(count_);
  // A peer may keep to the agreement even where it has been quicker, and no clock is exact.
  mean = std::max(mean, agreed_.count());
  const double deviation = std::max(std::sqrt(variance), agreed_.count() / 10);
  return surprise((milliseconds(silent).count() - mean) / deviation);
}

void accrual_detector::reset() {
  started_ = false;
  count_ = next_ = 0;
}

} // namespace troupe::recovery
