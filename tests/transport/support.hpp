#pragma once

#include "troupe/transport/endpoint.hpp"

#include <catch2/catch.hpp>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace troupe::transport::testing {

using namespace std::chrono_literals;

/// Seeded bytes: the same seed and size give the same content in every process.
inline void fill(std::span<std::byte> bytes, std::uint64_t seed) {
  std::mt19937_64 random{seed};
  std::size_t done = 0;
  for (; done + 8 <= bytes.size(); done += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + done, &word, 8);
  }
  for (; done < bytes.size(); ++done)
    bytes[done] = static_cast<std::byte>(random());
}

struct tensor {
  std::shared_ptr<std::vector<std::byte>> memory;

  tensor(std::size_t size, std::uint64_t seed)
    : memory(std::make_shared<std::vector<std::byte>>(size)) {
    fill(*memory, seed);
  }
  payload_view view() const { return {*memory, memory}; }
  bool equals(const buffer& other) const {
    return other.size() == memory->size()
           && (other.empty() || std::memcmp(other.data(), memory->data(), other.size()) == 0);
  }
};

inline proto::FrameHeader header(std::uint64_t step) {
  proto::FrameHeader result;
  result.set_kind(proto::BOUNDARY);
  result.set_step(step);
  return result;
}

struct loss {
  std::string name;
  std::uint64_t incarnation;
  error why;
  std::chrono::steady_clock::time_point at;
};

struct dropped {
  proto::FrameHeader header;
  error why;
};

/// Collects what an endpoint reports, so that a test can wait for it.
class recorder {
public:
  endpoint_callbacks callbacks() {
    return {[this](frame arrived) {
              if (!keep_payloads)
                arrived.payload = buffer{};
              add(frames, std::move(arrived));
            },
            [this](const std::string& name, std::uint64_t incarnation, const error& why) {
              add(losses, loss{name, incarnation, why, std::chrono::steady_clock::now()});
            },
            [this](const proto::FrameHeader& of, const error& why) {
              add(drops, dropped{of, why});
            }};
  }

  completion outcome() {
    return [this](expected<void> result) { add(outcomes, std::move(result)); };
  }

  /// Waits until `ready`, called with the lists locked, holds.
  bool wait(const std::function<bool()>& ready, std::chrono::milliseconds limit = 20s) {
    std::unique_lock lock{mutex_};
    return changed_.wait_for(lock, limit, ready);
  }
  bool wait_frames(std::size_t count) {
    return wait([&] { return frames.size() >= count; });
  }
  bool wait_losses(std::size_t count) {
    return wait([&] { return losses.size() >= count; });
  }
  bool wait_drops(std::size_t count) {
    return wait([&] { return drops.size() >= count; });
  }
  bool wait_outcomes(std::size_t count) {
    return wait([&] { return outcomes.size() >= count; });
  }
  void clear() {
    std::lock_guard guard{mutex_};
    frames.clear();
    losses.clear();
    drops.clear();
    outcomes.clear();
  }

  bool keep_payloads = true; ///< set before frames arrive
  std::vector<frame> frames;
  std::vector<loss> losses;
  std::vector<dropped> drops;
  std::vector<expected<void>> outcomes;

private:
  template <class T>
  void add(std::vector<T>& list, T item) {
    {
      std::lock_guard guard{mutex_};
      list.push_back(std::move(item));
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
};

/// While it lives, parties send through rings where they can, or by UCX alone. What a test asks of
/// both: `const carrier by{GENERATE(true, false)};`
struct carrier {
  explicit carrier(bool by_rings) { rings = by_rings; }
  ~carrier() { rings = true; }
  carrier(const carrier&) = delete;
  carrier& operator=(const carrier&) = delete;

  static inline bool rings = true;
};

/// An endpoint with its recorder.
struct party {
  explicit party(std::string name, std::uint64_t incarnation = 1)
    : party(with_name(std::move(name), incarnation)) {}

  explicit party(endpoint_options options) : name(options.name), incarnation(options.incarnation) {
    auto started = endpoint::start(std::move(options), heard.callbacks());
    if (!started)
      FAIL(started.error().text());
    end = std::move(*started);
  }

  static endpoint_options with_name(std::string name, std::uint64_t incarnation = 1) {
    endpoint_options result;
    result.name = std::move(name);
    result.incarnation = incarnation;
    result.rings = carrier::rings;
    return result;
  }

  void connect(const party& other) {
    end->connect(other.name, other.incarnation, other.end->address());
  }
  void send(const party& other, std::uint64_t step, const tensor& content) {
    end->send(other.name, header(step), content.view(), heard.outcome());
  }

  std::string name;
  std::uint64_t incarnation;
  recorder heard;
  std::unique_ptr<endpoint> end;
};

inline void connect_both(party& a, party& b) {
  a.connect(b);
  b.connect(a);
}

} // namespace troupe::transport::testing
