#include "troupe/kernels/cuda/nccl_communicators.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>
#include <unistd.h>

#include "troupe/kernels/cuda/summing_group.hpp"

namespace troupe::kernels::cuda {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

/// How long the guard may take to abort, which frees memory of all GPUs.
constexpr milliseconds kAbortPatience{3000};

/// How long a call of a rank may keep its communicator from the guard.
constexpr milliseconds kCallPatience{1000};

/// Takes the names of the memory that ranks share out of the file system. NCCL would do so when a
/// communicator is destroyed, which a process that is killed does not get to. All ranks are of this
/// process and have it mapped by now.
void forget_names() {
  constexpr std::string_view kPrefix = "/dev/shm/nccl-";
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const auto at = line.find(kPrefix);
    if (at != std::string::npos && line.find(' ', at) == std::string::npos) { // not "(deleted)"
      ::unlink(line.c_str() + at);
    }
  }
}

} // namespace

/// Everything that the guard uses, so that it can be left behind.
struct nccl_communicators::state {
  /// Communicators are not made for several threads at a time.
  struct seat {
    std::timed_mutex mutex;
    nccl_api::communicator communicator = nullptr; ///< null: aborted, or not made
  };

  state(const nccl_api::functions& functions, std::span<const std::int32_t> gpus,
        shared_progress memory)
    : api(functions),
      devices(gpus.begin(), gpus.end()),
      progress(std::move(memory)),
      seats(gpus.size()),
      watch(gpus.size()) {}

  const nccl_api::functions api;
  const std::vector<std::int32_t> devices;
  const shared_progress progress;
  std::vector<seat> seats;
  sum_watch watch;
  std::atomic<milliseconds> deadline{milliseconds(0)};
  std::atomic<bool> is_ending{false}; ///< nobody waits for a communicator any more
  std::atomic<bool> has_failed{false};

  mutable std::mutex mutex; ///< guards what follows
  std::condition_variable changed;
  bool is_made = false;
  bool is_over = false; ///< the guard has ended
  std::string why;
  stuck_sum stuck;

  void guard();
  bool make_communicators();
  bool await_all(const std::vector<nccl_api::communicator>& made);
  void watch_until_end();
  void look();
  void abort();
  void fail(std::string cause, stuck_sum of = {});
  void end();
  std::string describe(nccl_api::result status, nccl_api::communicator communicator) const;
  bool wait_until(bool state::*what, milliseconds patience);
};

std::string nccl_communicators::state::describe(nccl_api::result status,
                                                nccl_api::communicator communicator) const {
  const char* const name = api.ncclGetErrorString(status);
  const char* const more = api.ncclGetLastError(communicator);
  std::string result = "NCCL: ";
  result += name == nullptr ? "error " + std::to_string(status) : std::string(name);
  if (more != nullptr && *more != '\0') {
    result += ": ";
    result += more;
  }
  return result;
}

void nccl_communicators::state::fail(std::string cause, stuck_sum of) {
  {
    const std::lock_guard lock(mutex);
    if (has_failed.load()) {
      return;
    }
    why = std::move(cause);
    stuck = of;
    has_failed.store(true, std::memory_order_release);
  }
  end();
}

void nccl_communicators::state::end() {
  {
    const std::lock_guard lock(mutex);
    is_ending.store(true);
  }
  changed.notify_all();
}

bool nccl_communicators::state::wait_until(bool state::*what, milliseconds patience) {
  std::unique_lock lock(mutex);
  return changed.wait_for(lock, patience, [&] { return this->*what || is_over; });
}

/// The life of the guard.
void nccl_communicators::state::guard() {
  if (make_communicators()) {
    forget_names();
    {
      const std::lock_guard lock(mutex);
      is_made = true;
    }
    changed.notify_all();
    watch_until_end();
  }
  abort();
  {
    const std::lock_guard lock(mutex);
    is_over = true;
  }
  changed.notify_all();
}

bool nccl_communicators::state::make_communicators() {
  nccl_api::unique_id id{};
  if (const auto status = api.ncclGetUniqueId(&id); status != nccl_api::success) {
    fail(describe(status, nullptr));
    return false;
  }
  const auto size = static_cast<int>(devices.size());
  std::vector<nccl_api::communicator> made(devices.size());
  auto status = api.ncclGroupStart();
  for (int rank = 0; rank < size && status == nccl_api::success; ++rank) {
    nccl_api::config config;
    config.blocking = 0;
    cudaSetDevice(devices[rank]); // where that fails NCCL says so
    status = api.ncclCommInitRankConfig(&made[rank], size, id, rank, &config);
    status = status == nccl_api::in_progress ? nccl_api::success : status;
  }
  const auto ended = api.ncclGroupEnd();
  status = status == nccl_api::success ? ended : status;
  if (status != nccl_api::success && status != nccl_api::in_progress) {
    fail(describe(status, nullptr)); // what has been made of them nobody can know
    return false;
  }
  for (std::size_t rank = 0; rank < seats.size(); ++rank) {
    const std::lock_guard lock(seats[rank].mutex);
    seats[rank].communicator = made[rank];
  }
  return await_all(made);
}

bool nccl_communicators::state::await_all(const std::vector<nccl_api::communicator>& made) {
  for (auto* const one : made) {
    auto status = nccl_api::in_progress;
    while (status == nccl_api::in_progress && !is_ending.load()) {
      if (const auto asked = api.ncclCommGetAsyncError(one, &status); asked != nccl_api::success) {
        status = asked;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    if (status != nccl_api::success) {
      fail(describe(status, one));
      return false;
    }
  }
  return true;
}

void nccl_communicators::state::watch_until_end() {
  while (!is_ending.load()) {
    look();
    std::unique_lock lock(mutex);
    const auto pause = std::clamp(deadline.load() / 20, milliseconds(1), milliseconds(20));
    changed.wait_for(lock, pause, [this] { return is_ending.load(); });
  }
}

void nccl_communicators::state::look() {
  std::vector<rank_progress> now(seats.size());
  for (std::size_t rank = 0; rank < seats.size(); ++rank) {
    now[rank].left = std::atomic_ref(progress[rank].left).load(std::memory_order_acquire);
    now[rank].arrived = std::atomic_ref(progress[rank].arrived).load(std::memory_order_acquire);
  }
  if (const auto found = watch.look(now, steady_clock::now(), deadline.load())) {
    fail("a sum to which all ranks came " + std::to_string(deadline.load().count())
           + " ms ago does not end",
         *found);
    return;
  }
  for (std::size_t rank = 0; rank < seats.size(); ++rank) {
    // Who has it asks itself.
    const std::unique_lock lock(seats[rank].mutex, std::try_to_lock);
    auto status = nccl_api::success;
    if (!lock.owns_lock() || seats[rank].communicator == nullptr) {
      continue;
    }
    if (const auto asked = api.ncclCommGetAsyncError(seats[rank].communicator, &status);
        asked != nccl_api::success) {
      status = asked;
    }
    if (status != nccl_api::success && status != nccl_api::in_progress) {
      fail("rank " + std::to_string(rank) + ": " + describe(status, seats[rank].communicator));
      return;
    }
  }
}

/// All in one group: each waits until the others have been aborted, too. Kernels end at once; it
/// takes until recorded steps with calls of the communicators are gone.
void nccl_communicators::state::abort() {
  end();
  std::vector<nccl_api::communicator> mine;
  for (auto& seat : seats) {
    // A call that does not come back keeps its communicator, and is for the process to end.
    if (const std::unique_lock lock(seat.mutex, kCallPatience);
        lock.owns_lock() && seat.communicator != nullptr) {
      mine.push_back(std::exchange(seat.communicator, nullptr));
    }
  }
  if (mine.empty()) {
    return;
  }
  api.ncclGroupStart();
  for (auto* const one : mine) {
    api.ncclCommAbort(one);
  }
  api.ncclGroupEnd();
}

std::unique_ptr<nccl_communicators>
nccl_communicators::make(const nccl_api::functions& api, std::span<const std::int32_t> devices,
                         shared_progress progress, milliseconds patience, milliseconds deadline,
                         std::string& error) {
  const auto shared = std::make_shared<state>(api, devices, std::move(progress));
  shared->deadline.store(deadline);
  std::thread([shared] { shared->guard(); }).detach();
  std::unique_ptr<nccl_communicators> result(new nccl_communicators(shared));
  if (!shared->wait_until(&state::is_made, patience)) {
    result->give_up("NCCL was not ready within " + std::to_string(patience.count()) + " ms");
  }
  if (!shared->has_failed.load()) {
    return result;
  }
  error = result->failure(-1);
  return nullptr;
}

bool nccl_communicators::stop() {
  state_->end();
  return state_->wait_until(&state::is_over, kAbortPatience);
}

nccl_communicators::~nccl_communicators() {
  stop();
}

std::int32_t nccl_communicators::size() const {
  return static_cast<std::int32_t>(state_->devices.size());
}

/// A call of a communicator that does not block may be under way when it returns. Nothing must be
/// queued behind it before it is done.
template <class Call>
bool nccl_communicators::carry_out(std::int32_t rank, const Call& call) {
  auto& seat = state_->seats[rank];
  const std::lock_guard lock(seat.mutex);
  if (seat.communicator == nullptr || state_->is_ending.load()) {
    return false;
  }
  const auto begin = steady_clock::now();
  auto status = call(seat.communicator);
  while (status == nccl_api::in_progress) {
    if (state_->is_ending.load()) {
      return false;
    }
    // Twice the time that ranks have to come, so that who has not come is named first.
    if (steady_clock::now() - begin > 2 * state_->deadline.load()) {
      give_up("rank " + std::to_string(rank) + ": NCCL does not get a call done");
      return false;
    }
    if (const auto asked = state_->api.ncclCommGetAsyncError(seat.communicator, &status);
        asked != nccl_api::success) {
      status = asked;
    }
  }
  if (status != nccl_api::success) {
    give_up("rank " + std::to_string(rank) + ": " + state_->describe(status, seat.communicator));
  }
  return status == nccl_api::success;
}

bool nccl_communicators::all_gather(std::int32_t rank, void* all, std::size_t bytes,
                                    nccl_api::stream stream) {
  return carry_out(rank, [&](nccl_api::communicator communicator) {
    return state_->api.ncclAllGather(static_cast<std::byte*>(all) + rank * bytes, all, bytes,
                                     nccl_api::type_of_bytes, communicator, stream);
  });
}

bool nccl_communicators::all_to_all(std::int32_t rank, const void* out, void* in, std::size_t bytes,
                                    nccl_api::stream stream) {
  return carry_out(rank, [&](nccl_api::communicator communicator) {
    const auto& api = state_->api;
    auto status = api.ncclGroupStart();
    for (int peer = 0; peer < size() && status == nccl_api::success; ++peer) {
      if (peer == rank) {
        continue;
      }
      const auto sent = api.ncclSend(static_cast<const std::byte*>(out) + peer * bytes, bytes,
                                     nccl_api::type_of_bytes, peer, communicator, stream);
      const auto received = api.ncclRecv(static_cast<std::byte*>(in) + peer * bytes, bytes,
                                         nccl_api::type_of_bytes, peer, communicator, stream);
      for (const auto one : {sent, received}) {
        status = one == nccl_api::success || one == nccl_api::in_progress ? status : one;
      }
    }
    const auto ended = api.ncclGroupEnd();
    return status == nccl_api::success ? ended : status;
  });
}

void nccl_communicators::set_deadline(milliseconds deadline) {
  state_->deadline.store(deadline);
}

bool nccl_communicators::has_failed() const {
  return state_->has_failed.load(std::memory_order_acquire);
}

std::string nccl_communicators::failure(std::int32_t rank) const {
  if (!has_failed()) {
    return {};
  }
  const std::lock_guard lock(state_->mutex);
  if (state_->stuck.awaited >= 0) {
    return waited_in_vain(rank, state_->stuck.waiting, state_->stuck.awaited,
                          state_->deadline.load().count());
  }
  return state_->why;
}

void nccl_communicators::give_up(const std::string& why) {
  if (!has_failed()) {
    state_->fail(why);
  }
}

} // namespace troupe::kernels::cuda
