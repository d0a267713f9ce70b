#include "ranks.hpp"

#include <barrier>
#include <filesystem>
#include <optional>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "troupe/kernels/cuda/nccl_group.hpp"
#include "troupe/kernels/cuda/nccl_library.hpp"

namespace kernel_tests {

using troupe::kernels::cuda::kNcclLibrary;
using troupe::kernels::cuda::nccl_communicators;
using troupe::kernels::cuda::nccl_group;
using troupe::kernels::cuda::open_nccl;
using troupe::kernels::cuda::rank_progress;
using troupe::kernels::cuda::shared_progress;
using troupe::kernels::cuda::sum_transport;

namespace {

/// Beside this program, wherever it was carried.
std::string fake_nccl(const char* variant = "full") {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path()
          / ("libfake_nccl_" + std::string(variant) + ".so"))
    .string();
}

/// How the fake behaves, for a while.
class behaviour {
public:
  explicit behaviour(const char* how) { ::setenv("FAKE_NCCL", how, 1); }
  ~behaviour() { ::unsetenv("FAKE_NCCL"); }
  behaviour(const behaviour&) = delete;
  behaviour& operator=(const behaviour&) = delete;
};

int num_aborted() {
  void* const library = ::dlopen(fake_nccl().c_str(), RTLD_NOW | RTLD_NOLOAD);
  REQUIRE(library != nullptr);
  return reinterpret_cast<int (*)()>(::dlsym(library, "fake_nccl_num_aborted"))();
}

/// Communicators of the fake, without a GPU.
struct fake_ranks {
  explicit fake_ranks(int size, milliseconds patience = milliseconds(2000),
                      milliseconds deadline = milliseconds(100))
    : progress(new rank_progress[size]) {
    const auto api = open_nccl(fake_nccl(), error);
    REQUIRE(api);
    const std::vector<std::int32_t> devices(size, 0);
    communicators = nccl_communicators::make(*api, devices, progress, patience, deadline, error);
  }

  bool fails_within(milliseconds patience) const {
    const auto until = steady_clock::now() + patience;
    while (!communicators->has_failed() && steady_clock::now() < until) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    return communicators->has_failed();
  }

  template <class Work>
  void run(const Work& work) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < communicators->size(); ++rank) {
      threads.emplace_back([&work, rank] { work(rank); });
    }
    for (auto& thread : threads) {
      thread.join();
    }
  }

  std::string error;
  shared_progress progress;
  std::unique_ptr<nccl_communicators> communicators;
};

} // namespace

TEST_CASE("a library that is not NCCL as it has to be is refused", "[nccl]") {
  std::string error;
  CHECK(!open_nccl("libno-such-thing.so.2", error));
  CHECK(error.find("libno-such-thing.so.2") != std::string::npos);
  error.clear();
  CHECK(!open_nccl(fake_nccl("lacking"), error));
  CHECK(error.find("has no ncclCommAbort") != std::string::npos);
  error.clear();
  const behaviour old("old");
  CHECK(!open_nccl(fake_nccl(), error));
  CHECK(error.find("is NCCL 2103, and 21800 or later is needed") != std::string::npos);
}

TEST_CASE("what ranks hand over by NCCL arrives in the place of each", "[nccl]") {
  for (const int size : {2, 3, 4, 8}) {
    fake_ranks ranks(size);
    INFO(ranks.error);
    REQUIRE(ranks.communicators != nullptr);
    constexpr int kPart = 7;
    std::vector<std::vector<int>> all(size), out(size), in(size);
    ranks.run([&](int rank) {
      for (int round = 0; round < 50; ++round) {
        const int base = round * 10'000;
        all[rank].assign(size * kPart, -1);
        in[rank].assign(size * kPart, -1);
        out[rank].clear();
        for (int i = 0; i < size * kPart; ++i) {
          out[rank].push_back(base + rank * 1000 + i);
        }
        std::iota(all[rank].begin() + rank * kPart, all[rank].begin() + (rank + 1) * kPart,
                  base + rank * kPart);
        auto& them = *ranks.communicators;
        if (!them.all_gather(rank, all[rank].data(), kPart * sizeof(int), nullptr)
            || !them.all_to_all(rank, out[rank].data(), in[rank].data(), kPart * sizeof(int),
                                nullptr)) {
          return;
        }
      }
    });
    CHECK(ranks.communicators->failure(0).empty());
    for (int rank = 0; rank < size; ++rank) {
      std::vector<int> gathered(size * kPart);
      std::iota(gathered.begin(), gathered.end(), 490'000);
      CHECK(all[rank] == gathered);
      for (int peer = 0; peer < size; ++peer) {
        for (int i = 0; i < kPart; ++i) {
          const int sent = 490'000 + peer * 1000 + rank * kPart + i;
          CHECK(in[rank][peer * kPart + i] == (peer == rank ? -1 : sent));
        }
      }
    }
  }
}

TEST_CASE("a start of NCCL that fails or does not end is an error, in time", "[nccl]") {
  const auto begin = steady_clock::now();
  const auto refusal = [](const char* how) {
    const behaviour bad(how);
    const fake_ranks ranks(2, milliseconds(100));
    CHECK(ranks.communicators == nullptr);
    return ranks.error;
  };
  CHECK(refusal("refuses") == "NCCL: unhandled system error: no socket");
  CHECK(refusal("never-ready") == "NCCL was not ready within 100 ms");
  CHECK(refusal("stuck") == "NCCL was not ready within 100 ms");
  CHECK(steady_clock::now() - begin < std::chrono::seconds(6));
}

TEST_CASE("memory that NCCL shares has no name any more once a group is made", "[nccl]") {
  const std::string name = "/dev/shm/nccl-troupe-" + std::to_string(::getpid());
  const std::string other = "/dev/shm/other-troupe-" + std::to_string(::getpid());
  std::vector<void*> mapped;
  for (const auto& one : {name, other}) {
    const int file = ::open(one.c_str(), O_CREAT | O_RDWR, 0600);
    REQUIRE(file >= 0);
    REQUIRE(::ftruncate(file, 4096) == 0);
    mapped.push_back(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    REQUIRE(mapped.back() != MAP_FAILED);
    ::close(file);
  }
  {
    const fake_ranks ranks(2);
    REQUIRE(ranks.communicators != nullptr);
    CHECK_FALSE(std::filesystem::exists(name));
    CHECK(std::filesystem::exists(other)); // somebody else's
    *static_cast<int*>(mapped.front()) = 7;
  }
  ::unlink(other.c_str());
  for (void* const one : mapped) {
    ::munmap(one, 4096);
  }
}

TEST_CASE("communicators are aborted once, all of them, when the group ends", "[nccl]") {
  int before = 0;
  {
    const fake_ranks ranks(4);
    REQUIRE(ranks.communicators != nullptr);
    before = num_aborted();
  }
  CHECK(num_aborted() == before + 4);
}

TEST_CASE("a rank that does not come to a sum over NCCL is missed by name", "[nccl]") {
  fake_ranks ranks(3);
  REQUIRE(ranks.communicators != nullptr);
  const int before = num_aborted();
  const auto begin = steady_clock::now();
  std::vector<char> memory(64);
  // Two ranks wait in NCCL, and their GPUs have come; the third is not there.
  for (const int rank : {0, 1}) {
    std::atomic_ref(ranks.progress[rank].arrived).store(1);
  }
  std::vector<std::thread> waiting;
  for (const int rank : {0, 1}) {
    waiting.emplace_back([&, rank] {
      std::vector<char> own(64);
      CHECK(!ranks.communicators->all_gather(rank, own.data(), 16, nullptr));
    });
  }
  for (auto& thread : waiting) {
    thread.join();
  }
  CHECK(steady_clock::now() - begin >= milliseconds(100));
  CHECK(steady_clock::now() - begin < milliseconds(1000));
  CHECK(ranks.communicators->failure(0) == "rank 0 (this one) waited 100 ms for rank 2 in vain");
  CHECK(ranks.communicators->failure(2) == "rank 0 waited 100 ms for rank 2 (this one) in vain");
  CHECK(!ranks.communicators->all_gather(2, memory.data(), 16, nullptr));
  CHECK(ranks.communicators->stop());
  CHECK(num_aborted() == before + 3);
}

TEST_CASE("a call of NCCL that does not get done is a failure, in time", "[nccl]") {
  fake_ranks ranks(2);
  REQUIRE(ranks.communicators != nullptr);
  const auto begin = steady_clock::now();
  std::vector<char> memory(64);
  CHECK(!ranks.communicators->all_gather(1, memory.data(), 16, nullptr));
  CHECK(steady_clock::now() - begin < milliseconds(1000));
  CHECK(ranks.communicators->failure(0) == "rank 1: NCCL does not get a call done");
}

TEST_CASE("a sum over NCCL to which all came and that does not end is a failure", "[nccl]") {
  const fake_ranks ranks(2);
  REQUIRE(ranks.communicators != nullptr);
  for (const int rank : {0, 1}) {
    std::atomic_ref(ranks.progress[rank].arrived).store(1);
  }
  CHECK(ranks.fails_within(milliseconds(1000)));
  CHECK(ranks.communicators->failure(1) == "a sum to which all ranks came 100 ms ago does not end");
}

TEST_CASE("an error that NCCL reports later is a failure of all ranks", "[nccl]") {
  fake_ranks ranks(2);
  REQUIRE(ranks.communicators != nullptr);
  const behaviour bad("breaks");
  ranks.run([&](int rank) {
    std::vector<char> own(64);
    CHECK(!ranks.communicators->all_gather(rank, own.data(), 16, nullptr));
  });
  const auto why = ranks.communicators->failure(0);
  INFO(why);
  CHECK(why.find("NCCL: remote process exited or there was a network error") != std::string::npos);
}

TEST_CASE("who gives up is believed, and the first word counts", "[nccl]") {
  fake_ranks ranks(2);
  REQUIRE(ranks.communicators != nullptr);
  CHECK(ranks.communicators->failure(0).empty());
  ranks.communicators->give_up("rank 1 has failed: an illegal access");
  ranks.communicators->give_up("rank 0 has failed: something else");
  CHECK(ranks.communicators->failure(0) == "rank 1 has failed: an illegal access");
  std::vector<char> memory(64);
  CHECK(!ranks.communicators->all_gather(0, memory.data(), 16, nullptr));
}

TEST_CASE("communicators that cannot be aborted are left behind", "[nccl]") {
  const behaviour bad("hard-to-end");
  const auto begin = steady_clock::now();
  {
    fake_ranks ranks(2);
    REQUIRE(ranks.communicators != nullptr);
    CHECK(!ranks.communicators->stop());
  }
  CHECK(steady_clock::now() - begin < std::chrono::seconds(8));
}

// On GPUs.

namespace {

struct way_over {
  std::string name;
  std::vector<std::int32_t> devices;
  std::string library;
};

/// NCCL itself over all GPUs there are; the fake over ranks that share one.
std::vector<way_over> all_ways() {
  std::vector<way_over> result;
  std::string error;
  if (num_devices() > 1 && open_nccl(kNcclLibrary, error)) {
    std::vector<std::int32_t> devices(std::min(num_devices(), 8));
    std::iota(devices.begin(), devices.end(), 0);
    result.push_back({"NCCL", devices, kNcclLibrary});
  }
  for (const int size : {2, 3, 4, 8}) {
    result.push_back({"the fake, " + std::to_string(size) + " ranks",
                      std::vector<std::int32_t>(size, 0), fake_nccl()});
  }
  return result;
}

std::shared_ptr<gpu_rank_group> make_group(const way_over& way, int max_rows, int num_cols,
                                           milliseconds deadline = milliseconds(5000)) {
  std::string error;
  auto group = nccl_group::make(way.library, way.devices, max_rows, num_cols, deadline, error);
  INFO(way.name << ": " << error);
  CHECK(error.empty());
  return group;
}

std::optional<way_over> real_nccl() {
  auto ways = all_ways();
  return ways.front().name == "NCCL" ? std::optional(ways.front()) : std::nullopt;
}

} // namespace

TEST_CASE("sums over NCCL have the bits of sums in order of ranks", "[nccl][ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(61);
  for (const auto& way : all_ways()) {
    INFO(way.name);
    team ranks(way.devices, make_group(way, 640, 7168));
    ranks.reserve(std::size_t{720} * 7168);
    const int num_ranks = ranks.size();
    CHECK(ranks.group().transport() == sum_transport::nccl);
    for (const auto& at :
         {shape{1, 7168, 0}, shape{1, 1, 0}, shape{1, 7, 0, 3}, shape{2, 8, 0}, shape{3, 7168, 8},
          shape{17, 1001, 3}, shape{16, 1001, 0, 1}, shape{64, 7168, 0}, shape{90, 512, 0, 8},
          shape{333, 1537, 5, 1}, shape{600, 1000, 16}, shape{700, 7168, 0}, shape{1, 7168, 0}}) {
      INFO(at.rows << " rows of " << at.cols << ", " << at.gap << " apart, from " << at.first);
      const auto parts = random_parts(num_ranks, std::size_t(at.rows) * at.cols, random);
      const auto expected = sum_in_order(parts);
      std::vector<bits> got(num_ranks, bits(expected.size()));
      ranks.run([&](int rank) {
        const auto x = ranks.view(rank, at.rows, at.cols, at.cols + at.gap * rank, at.first);
        ranks.ops(rank).copy_from_host(parts[rank].data(), x);
        ranks.ops(rank).all_reduce(x);
        ranks.ops(rank).copy_to_host(x, got[rank].data());
      });
      for (int rank = 0; rank < num_ranks; ++rank) {
        INFO("rank " << rank);
        CHECK(num_different(got[rank], expected) == 0);
      }
      if (!ranks.works()) {
        return;
      }
    }
  }
}

TEST_CASE("float32 rows over NCCL have the bits of sums in order of ranks",
          "[nccl][ranks][exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(62);
  for (const auto& way : all_ways()) {
    INFO(way.name);
    team ranks(way.devices, make_group(way, 400, 2 * 1600), numerics::exact);
    check_exact_sums(ranks, random);
  }
}

TEST_CASE("recorded steps add up over NCCL as often as they are repeated", "[nccl][ranks]") {
  if (gpu() == nullptr || !real_nccl()) {
    return;
  }
  constexpr int kCols = 1536, kCalls = 20, kSteps = 20, kMostRows = 64;
  std::mt19937 random(63);
  const auto way = *real_nccl();
  team ranks(way.devices, make_group(way, kMostRows, kCols));
  const int num_ranks = ranks.size();
  ranks.reserve(std::size_t(kMostRows) * kCols * kCalls);
  const auto rows_of = [](int call) { return call % 10 == 9 ? kMostRows : 1 + call % 4; };
  const auto parts = random_parts(num_ranks, std::size_t(kMostRows) * kCols * kCalls, random);
  const auto expected = sum_in_order(parts);
  std::vector<std::size_t> different(num_ranks, 0);
  ranks.run([&](int rank) {
    auto& ops = ranks.ops(rank);
    bits got;
    for (int step = 0; step < kSteps; ++step) {
      const auto view = [&](int call) {
        return ranks.view(rank, rows_of(call), kCols, kCols, std::size_t(call) * kMostRows * kCols);
      };
      const auto part_of = [&](int call) {
        return std::size_t((call + step) % kCalls) * kMostRows * kCols;
      };
      for (int call = 0; call < kCalls; ++call) {
        ops.copy_from_host(&parts[rank][part_of(call)], view(call));
      }
      ops.step({7, 1}, {}, {}, [&] {
        for (int call = 0; call < kCalls; ++call) {
          ops.all_reduce(view(call));
        }
      });
      for (int call = 0; call < kCalls; ++call) {
        got.resize(std::size_t(rows_of(call)) * kCols);
        ops.copy_to_host(view(call), got.data());
        const auto from = expected.begin() + static_cast<std::ptrdiff_t>(part_of(call));
        different[rank] +=
          num_different(got, {from, from + static_cast<std::ptrdiff_t>(got.size())});
      }
    }
  });
  for (int rank = 0; rank < num_ranks; ++rank) {
    INFO("rank " << rank);
    CHECK(different[rank] == 0);
    CHECK(ranks.ops(rank).num_repeated_steps() == kSteps - 1);
  }
  ranks.works();
}

TEST_CASE("a rank that does not come is a failure of all, in time, over NCCL", "[nccl][ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  for (const auto& way : all_ways()) {
    for (const int rows : {1, 2000}) {
      for (const bool is_recorded : {false, true}) {
        if (is_recorded && way.name != "NCCL") {
          continue;
        }
        INFO(way.name << ", " << rows << " rows" << (is_recorded ? ", recorded" : ""));
        constexpr int kCols = 512;
        team ranks(way.devices, make_group(way, rows, kCols, milliseconds(200)));
        const auto begin = steady_clock::now();
        const int missing = ranks.size() - 1;
        ranks.reserve(std::size_t(rows) * kCols);
        const auto view = [&](int rank) { return ranks.view(rank, rows, kCols, kCols); };
        const auto add_up = [&](int rank) {
          auto& ops = ranks.ops(rank);
          if (is_recorded) {
            ops.step({3, 1}, {}, {}, [&] { ops.all_reduce(view(rank)); });
          } else {
            ops.all_reduce(view(rank));
          }
        };
        ranks.run([&](int rank) {
          for (int call = 0; call < 3; ++call) {
            add_up(rank);
          }
          ranks.ops(rank).synchronise();
        });
        CHECK(ranks.works());
        const auto last = steady_clock::now();
        ranks.run([&](int rank) {
          if (rank != missing) {
            for (int call = 0; call < 100; ++call) { // only the first waits
              add_up(rank);
            }
            ranks.ops(rank).synchronise();
          }
        });
        CHECK(steady_clock::now() - last >= milliseconds(200));
        // After it was aborted, each kernel of NCCL that is queued polls some 10,000 times before
        // it looks whether it was: 25 ms where it polls memory of the host.
        CHECK(steady_clock::now() - last < milliseconds(4000));
        const auto awaited = "for rank " + std::to_string(missing);
        for (int rank = 0; rank < missing; ++rank) {
          INFO(ranks.ops(rank).failure());
          CHECK(ranks.ops(rank).failure().find(awaited) != std::string::npos);
          CHECK(!ranks.ops(rank).all_finite(ranks.view(rank, 1, kCols, kCols)));
        }
        auto& late = ranks.ops(missing);
        late.all_reduce(view(missing));
        late.synchronise();
        INFO(late.failure());
        CHECK(late.failure().find(awaited + " (this one)") != std::string::npos);
        CHECK(steady_clock::now() - begin < std::chrono::seconds(8));
      }
    }
  }
}

/// Not among the others, since a process that it has run in cannot use the GPU any more.
TEST_CASE("a GPU that breaks down is a failure of all, in time, over NCCL", "[.][breaking-nccl]") {
  if (gpu() == nullptr || !real_nccl()) {
    return;
  }
  constexpr int kCols = 7168;
  const auto way = *real_nccl();
  const auto begin = steady_clock::now();
  {
    team ranks(way.devices, make_group(way, 1, kCols, milliseconds(500)));
    ranks.reserve(kCols);
    const auto last = steady_clock::now();
    ranks.run([&](int rank) {
      auto& ops = ranks.ops(rank);
      const auto x = ranks.view(rank, 1, kCols, kCols);
      for (int call = 0; call < 100; ++call) {
        if (rank == 1 && call == 50) {
          ops.break_down(troupe::kernels::breakdown::illegal_access);
        }
        ops.all_reduce(x);
      }
      ops.synchronise();
    });
    const std::chrono::duration<double, std::milli> took = steady_clock::now() - last;
    WARN("all ranks knew after " << took.count() << " ms");
    CHECK(took < milliseconds(2000));
    for (int rank = 0; rank < ranks.size(); ++rank) {
      WARN(ranks.ops(rank).failure());
      CHECK(!ranks.ops(rank).failure().empty());
    }
  }
  CHECK(steady_clock::now() - begin < std::chrono::seconds(30));
}

TEST_CASE("memory comes and goes while a rank waits for another GPU over NCCL", "[nccl][ranks]") {
  if (gpu() == nullptr || !real_nccl()) {
    return;
  }
  constexpr int kCols = 7168;
  const auto way = *real_nccl();
  team ranks(way.devices, make_group(way, 1, kCols, milliseconds(1500)));
  ranks.reserve(kCols);
  use_memory_while_a_rank_waits(ranks, kCols);
}

TEST_CASE("peer memory and NCCL give the same bits", "[nccl][ranks]") {
  if (gpu() == nullptr || !real_nccl()) {
    return;
  }
  constexpr int kCols = 7168;
  std::mt19937 random(64);
  const auto way = *real_nccl();
  team over_nccl(way.devices, make_group(way, 512, kCols));
  team by_peer(way.devices, 512, kCols);
  CHECK(by_peer.group().transport() == sum_transport::peer);
  for (const int rows : {1, 3, 64, 500}) {
    const auto parts = random_parts(by_peer.size(), std::size_t(rows) * kCols, random);
    std::vector<bits> got[2];
    for (auto* ranks : {&over_nccl, &by_peer}) {
      auto& mine = got[ranks == &by_peer ? 1 : 0];
      mine.resize(ranks->size(), bits(parts.front().size()));
      ranks->reserve(std::size_t(rows) * kCols);
      ranks->run([&](int rank) {
        const auto x = ranks->view(rank, rows, kCols, kCols);
        ranks->ops(rank).copy_from_host(parts[rank].data(), x);
        ranks->ops(rank).all_reduce(x);
        ranks->ops(rank).copy_to_host(x, mine[rank].data());
      });
      CHECK(ranks->works());
    }
    CHECK(got[0] == got[1]);
  }
}

TEST_CASE("ranks that share a GPU cannot have NCCL", "[nccl][ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  std::string error;
  const std::vector<std::int32_t> devices{0, 0};
  CHECK(make_gpu_rank_group(devices, 1, 8, error, milliseconds(100), sum_transport::nccl)
        == nullptr);
  CHECK(error == "NCCL needs a GPU for each rank");
}

} // namespace kernel_tests
