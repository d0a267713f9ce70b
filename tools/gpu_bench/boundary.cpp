#include "boundary.hpp"

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "timing.hpp"
#include "troupe/kernels/cuda/shared_memory.hpp"

namespace gpu_bench {

namespace {

using namespace troupe::kernels;

constexpr std::size_t kOffset = 256;
constexpr std::size_t kBytes = std::size_t{32} << 20;
constexpr int kHidden = 7168;

/// Owns memory of the first GPU and says by which handle it is mapped; as a keeper does.
[[noreturn]] void keep(int out) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::string error;
  const auto made = cuda::export_memory(0, kBytes, error);
  if (made.memory == nullptr) {
    std::fprintf(stderr, "gpu-bench: %s\n", error.c_str());
    ::_exit(1);
  }
  if (::write(out, made.handle.data(), made.handle.size()) < 0) {
    ::_exit(1);
  }
  for (;;) {
    ::pause();
  }
}

/// Also checks that what arrives is what was sent.
bool measure(gpu_ops& sender, gpu_ops& receiver, void* outbox, const void* seen, int rows) {
  const auto elements = static_cast<std::size_t>(rows) * kHidden;
  const auto from = random_rows(sender, elements);
  const auto to = receiver.allocate(elements * 2);
  receiver.synchronise();
  std::vector<unsigned short> host(elements), arrived(elements);
  const rows_view from_rows{from.get(), rows, kHidden, kHidden};
  const rows_view to_rows{to.get(), rows, kHidden, kHidden};
  bool is_whole = true;
  const int rounds = rows > 256 ? 20 : 200;
  const double leave =
    time_calls(sender, rounds, [&] { sender.leave_rows(from_rows, 1, outbox, kOffset); });
  const double fetch = time_calls(receiver, rounds, [&] {
    is_whole &= receiver.fetch_rows(seen, kOffset, 1, to_rows) == cuda::fetched_rows::whole;
  });
  sender.copy_to_host(from_rows, host.data());
  receiver.copy_to_host(to_rows, arrived.data());
  is_whole &= host == arrived;
  const double down =
    time_calls(sender, rounds, [&] { sender.copy_to_host(from_rows, host.data()); });
  const double up =
    time_calls(receiver, rounds, [&] { receiver.copy_from_host(host.data(), to_rows); });
  std::printf("%5d rows, %8zu bytes: leave %7.1f us, fetch %7.1f us (%5.1f GB/s);  to the host "
              "%7.1f us, from the host %7.1f us\n",
              rows, elements * 2, leave, fetch, static_cast<double>(elements) * 2e-3 / fetch, down,
              up);
  if (!is_whole) {
    std::fprintf(stderr, "gpu-bench: the rows did not arrive as they were\n");
  }
  return is_whole && sender.failure().empty() && receiver.failure().empty();
}

} // namespace

int bench_boundary() {
  std::array<int, 2> way{};
  if (::pipe(way.data()) != 0) {
    return 1;
  }
  const auto keeper = ::fork();
  if (keeper == 0) {
    keep(way[1]);
  }
  ::close(way[1]);
  std::array<char, 64> handle{};
  const bool has_handle = ::read(way[0], handle.data(), handle.size()) == 64;
  std::string error;
  int code = has_handle ? 0 : 1;
  for (int device = 0; code == 0 && device < std::min(cuda::num_devices(), 2); ++device) {
    const auto sender = cuda::make_cuda_ops(0, error);
    const auto receiver = cuda::make_cuda_ops(device, error);
    const std::string name(handle.data(), handle.size());
    const auto outbox = cuda::import_memory(0, name, error);
    const auto seen = cuda::import_memory(device, name, error);
    if (sender == nullptr || receiver == nullptr || outbox == nullptr || seen == nullptr) {
      std::fprintf(stderr, "gpu-bench: %s\n", error.c_str());
      code = 1;
      break;
    }
    std::printf("from cuda:0 to cuda:%d\n", device);
    for (const int rows : {1, 2, 8, 32, 128, 1024, 2048}) {
      if (!measure(*sender, *receiver, outbox.get(), seen.get(), rows)) {
        code = 1;
      }
    }
  }
  ::kill(keeper, SIGKILL);
  ::waitpid(keeper, nullptr, 0);
  return code;
}

} // namespace gpu_bench
