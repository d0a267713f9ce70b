#include "troupe/kernels/cuda/sampler.cuh"

#include <algorithm>
#include <cmath>

#include <cooperative_groups.h>

/// Drawing the tokens of rows. A cluster of blocks draws one, each block has a part of the row,
/// with what it has found out about it in shared memory; they read and write each other's
/// (distributed shared memory, CUDA programming guide, "Thread block clusters").
namespace troupe::kernels::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = kSamplerThreads;
constexpr int kBlocks = 16;     ///< of a cluster
constexpr int kBins = 2048;     ///< two for each thread
constexpr int kListSize = 1024; ///< one for each thread
constexpr int kLists = 8;       ///< more than are made for a row
constexpr int kFewListed = 32;  ///< in a list that is looked through as it is

/// Bins that a block adds up over all blocks: two for each of 64 threads for each block.
constexpr int kBinsOfBlock = kBins / kBlocks;
static_assert(kBinsOfBlock * kBlocks == 2 * kThreads && kBinsOfBlock == 2 * 64);

/// Probabilities relative to the best token are counted in units of 2^-40, as whole numbers: their
/// sums do not depend on the order in which they are made. What is less than half a unit is never
/// drawn.
constexpr double kUnits = 1099511627776.0;

/// How much shared memory the tokens of a block may take: two floats each. What has no room is
/// computed whenever it is needed.
constexpr std::int32_t kMostCached = 20 << 10;

struct draw_memory {
  count64 block[kThreads / 32];
  count64 room[2 * kListSize]; ///< for a list and for bins on their way, in turn
  alignas(16) count64 sums[kBinsOfBlock];
  alignas(16) count64 merged[kBins]; ///< the bins of all blocks
  alignas(16) std::uint32_t low[kBins];
  alignas(16) std::uint32_t high[kBins];
  std::int32_t list_sizes[kLists]; ///< of the first block
  count64 totals[2][kBlocks];
  std::int32_t first_place;
  std::int32_t bin;
  count64 before; ///< what the bins before `bin` hold
  count64 found;  ///< as the first block says
  count64 sum;

  /// The list of the first block: candidates of one bin, from all blocks.
  __device__ count64* ranks() { return room; }
  __device__ count64* amounts() { return room + kListSize; }

  /// What block `i` has in the bins that this one adds up.
  __device__ count64* part(int i) { return room + i * kBinsOfBlock; }
};
static_assert(kBlocks * kBinsOfBlock <= 2 * kListSize);

/// How a token of a row weighs.
struct weighing {
  float best;
  float temperature;
  float min_p;

  /// Relative to the best token; 0 for those that are out.
  __device__ float power(float logit) const {
    if (!(logit > -INFINITY)) {
      return 0.0F;
    }
    const float value = expf((logit - best) / temperature);
    return logit < best && !(value > 0.0F && value >= min_p) ? 0.0F : value;
  }

  /// Rises as logits fall, from 0 to kBins - 1, where NaN and what is far below the best are too.
  __device__ int bin(float logit) const {
    const float place = (best - logit) / temperature * (kBins / 29.0F);
    return place < kBins - 1 ? static_cast<int>(place) : kBins - 1;
  }

  /// The same within a bin.
  __device__ int fine_bin(float logit) const {
    const float place = (best - logit) / temperature * (kBins / 29.0F);
    const float within = (place - static_cast<float>(bin(logit))) * kBins;
    return within < kBins - 1 ? static_cast<int>(within) : kBins - 1;
  }
};

/// What a sum over candidates counts.
enum class counting : std::uint8_t { nothing, tokens, units };

/// A candidate, and the sum over all up to it.
struct selected {
  count64 rank;
  count64 sum;
};

/// One block's part in drawing the token of a row. All blocks of the cluster call the same members
/// in the same order, with the same arguments.
class drawing {
public:
  __device__ drawing(const float* logits, std::int32_t num_tokens, const weighing& weigh,
                     draw_memory& memory, float* cache, std::int32_t most_cached)
    : cluster_(cg::this_cluster()),
      block_(static_cast<int>(cluster_.block_rank())),
      weigh_(weigh),
      memory_(memory) {
    first_ = static_cast<std::int32_t>(std::int64_t{num_tokens} * block_ / kBlocks);
    const auto end = static_cast<std::int32_t>(std::int64_t{num_tokens} * (block_ + 1) / kBlocks);
    num_ = end - first_;
    logits_ = logits + first_;
    num_cached_ = min(num_, most_cached);
    cached_logits_ = cache;
    cached_powers_ = cache + num_cached_;
    for (std::int32_t i = threadIdx.x; i < num_cached_; i += kThreads) {
      const float logit = logits_[i];
      cached_logits_[i] = logit; // read by the same thread alone
      cached_powers_[i] = weigh_.power(logit);
    }
    if (threadIdx.x < kLists) {
      memory_.list_sizes[threadIdx.x] = 0;
    }
  }

  /// From now on, no token beyond this rank is a candidate.
  __device__ void cut_behind(count64 rank) { last_ = rank; }

  /// The first candidate, in order, with which more than threshold(total) have been counted; the
  /// last one where they are not that many.
  template <class Threshold>
  __device__ selected select(counting what, const Threshold& threshold) {
    if (counted_ != what) {
      count(what, -1);
      counted_ = what;
    }
    const auto merged = [&](int bin) { return memory_.merged[bin]; };
    const count64 wanted = locate(merged, 0, threshold);
    const int coarse = memory_.bin;
    count64 before = memory_.before;
    int fine = -1;
    std::int32_t size = list(what, coarse, fine);
    if (size > kListSize) {
      count(what, coarse);
      counted_ = counting::nothing;
      locate(merged, before, [&](count64) { return wanted; });
      fine = memory_.bin;
      before = memory_.before;
      size = list(what, coarse, fine);
    }
    return size <= kListSize ? pick(size, fine < 0, before, wanted)
                             : halve(what, coarse, fine, before, wanted);
  }

private:
  __device__ float logit(std::int32_t i) const {
    return i < num_cached_ ? cached_logits_[i] : logits_[i];
  }

  __device__ count64 rank(std::int32_t i) const { return rank_of(logit(i), first_ + i); }

  /// 0 for those that are out.
  __device__ count64 amount(counting what, std::int32_t i) const {
    const float power = i < num_cached_ ? cached_powers_[i] : weigh_.power(logits_[i]);
    if (!(power > 0.0F) || rank(i) > last_) {
      return 0;
    }
    const auto units = static_cast<count64>(__double2ll_rn(static_cast<double>(power) * kUnits));
    return what == counting::tokens ? (units != 0 ? 1 : 0) : units;
  }

  __device__ void clear_bins() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      memory_.low[i] = 0;
      memory_.high[i] = 0;
    }
    __syncthreads();
  }

  __device__ void add_to_bin(int bin, count64 amount) {
    const auto low = static_cast<std::uint32_t>(amount);
    const std::uint32_t old = atomicAdd(&memory_.low[bin], low);
    const std::uint32_t carry = old + low < old ? 1 : 0;
    const std::uint32_t high = static_cast<std::uint32_t>(amount >> 32) + carry;
    if (high != 0) {
      atomicAdd(&memory_.high[bin], high);
    }
  }

  /// Of this block.
  __device__ count64 bin_of_block(int bin) const {
    return count64{memory_.high[bin]} << 32 | memory_.low[bin];
  }

  /// Counts the candidates of a bin (-1: all) by bins of their own, over the cluster.
  __device__ void count(counting what, int coarse) {
    clear_bins();
    for (std::int32_t i = threadIdx.x; i < num_; i += kThreads) {
      const float at = logit(i);
      if (coarse >= 0 && weigh_.bin(at) != coarse) {
        continue;
      }
      const count64 mine = amount(what, i);
      if (mine != 0) {
        add_to_bin(coarse < 0 ? weigh_.bin(at) : weigh_.fine_bin(at), mine);
      }
    }
    cluster_.sync();
    merge_bins();
    cluster_.sync();
  }

  /// Every block adds up some of the bins of all blocks and tells all of them. Two warps read from
  /// and write to one block, neighbouring bins at a time: single words of others are slow.
  __device__ void merge_bins() {
    const int other = static_cast<int>(threadIdx.x) / 64;
    const int pair = static_cast<int>(threadIdx.x) % 64; // of neighbouring bins
    const int first = block_ * kBinsOfBlock;
    draw_memory& there = *cluster_.map_shared_rank(&memory_, other);
    const auto low = reinterpret_cast<const uint2*>(there.low + first)[pair];
    const auto high = reinterpret_cast<const uint2*>(there.high + first)[pair];
    memory_.part(other)[2 * pair] = count64{high.x} << 32 | low.x;
    memory_.part(other)[2 * pair + 1] = count64{high.y} << 32 | low.y;
    __syncthreads();
    if (threadIdx.x < kBinsOfBlock) {
      count64 sum = 0;
      for (int i = 0; i < kBlocks; ++i) {
        sum += memory_.part(i)[threadIdx.x];
      }
      memory_.sums[threadIdx.x] = sum;
    }
    __syncthreads();
    reinterpret_cast<ulonglong2*>(there.merged + first)[pair] =
      reinterpret_cast<const ulonglong2*>(memory_.sums)[pair];
  }

  /// Leaves in memory the bin in which the threshold is passed, or the last that holds any, and
  /// returns the threshold.
  template <class Bins, class Threshold>
  __device__ count64 locate(const Bins& bins, count64 before, const Threshold& threshold) {
    const int bin = 2 * threadIdx.x;
    const count64 first = bins(bin);
    const count64 second = bins(bin + 1);
    const auto all = add_up_block(first + second, memory_.block);
    const count64 total = before + all.total;
    const count64 wanted = min(threshold(total), total - 1);
    const count64 begin = before + all.before;
    const count64 middle = begin + first;
    if (begin <= wanted && wanted < middle + second) {
      memory_.bin = wanted < middle ? bin : bin + 1;
      memory_.before = wanted < middle ? begin : middle;
    }
    __syncthreads();
    return wanted;
  }

  /// Brings the candidates of a bin to the first block, as far as there is room, and returns how
  /// many there are.
  __device__ std::int32_t list(counting what, int coarse, int fine) {
    draw_memory& there = *cluster_.map_shared_rank(&memory_, 0);
    std::int32_t* size = &there.list_sizes[num_lists_++];
    const auto for_all = [&](const auto& use) {
      for (std::int32_t i = threadIdx.x; i < num_; i += kThreads) {
        const float at = logit(i);
        if (weigh_.bin(at) == coarse && (fine < 0 || weigh_.fine_bin(at) == fine)) {
          const count64 mine = amount(what, i);
          if (mine != 0) {
            use(i, mine);
          }
        }
      }
    };
    // Each block takes the room for all it has at once.
    std::int32_t count = 0;
    for_all([&](std::int32_t, count64) { ++count; });
    const auto places = add_up_block(static_cast<count64>(count), memory_.block);
    if (threadIdx.x == 0) {
      const auto total = static_cast<std::int32_t>(places.total);
      memory_.first_place = total > 0 ? atomicAdd(size, total) : 0;
    }
    __syncthreads();
    auto place = static_cast<std::int32_t>(places.before);
    place += memory_.first_place;
    for_all([&](std::int32_t i, count64 mine) {
      if (place < kListSize) {
        there.ranks()[place] = rank(i);
        there.amounts()[place] = mine;
      }
      ++place;
    });
    cluster_.sync();
    return *size;
  }

  /// The first block looks through its list, and tells all blocks.
  __device__ selected pick(std::int32_t size, bool is_coarse, count64 before, count64 wanted) {
    if (block_ == 0) {
      const bool is_listed = static_cast<std::int32_t>(threadIdx.x) < size;
      const count64 mine = is_listed ? memory_.ranks()[threadIdx.x] : kNobody;
      bool is_near = is_listed;
      if (is_coarse && size > kFewListed) {
        const count64 amount = is_listed ? memory_.amounts()[threadIdx.x] : 0;
        const int fine = is_listed ? weigh_.fine_bin(logit_in(mine)) : 0;
        clear_bins();
        if (is_listed) {
          add_to_bin(fine, amount);
        }
        __syncthreads();
        locate([&](int bin) { return bin_of_block(bin); }, before, [&](count64) { return wanted; });
        before = memory_.before;
        is_near = is_listed && fine == memory_.bin;
        size = shorten(is_near, mine, amount);
      }
      count64 sum = before;
      if (is_near) {
        for (std::int32_t i = 0; i < size; ++i) {
          sum += memory_.ranks()[i] <= mine ? memory_.amounts()[i] : 0;
        }
      }
      const count64 found = block_min(is_near && sum > wanted ? mine : kNobody, memory_.block);
      if (is_near && mine == found) {
        for (int other = 0; other < kBlocks; ++other) {
          draw_memory& there = *cluster_.map_shared_rank(&memory_, other);
          there.found = found;
          there.sum = sum;
        }
      }
    }
    cluster_.sync();
    return {memory_.found, memory_.sum};
  }

  /// Keeps of the list what is near, and returns how much that is.
  __device__ std::int32_t shorten(bool is_near, count64 rank, count64 amount) {
    const auto places = add_up_block(count64{is_near ? 1U : 0U}, memory_.block);
    if (is_near) {
      memory_.ranks()[places.before] = rank;
      memory_.amounts()[places.before] = amount;
    }
    __syncthreads();
    return static_cast<std::int32_t>(places.total);
  }

  /// Very many logits are (almost) equal: halves the range of ranks.
  __device__ selected halve(counting what, int coarse, int fine, count64 before, count64 wanted) {
    const auto sum_to = [&](count64 most) {
      count64 sum = 0;
      for (std::int32_t i = threadIdx.x; i < num_; i += kThreads) {
        const float at = logit(i);
        if (weigh_.bin(at) == coarse && weigh_.fine_bin(at) == fine && rank(i) <= most) {
          sum += amount(what, i);
        }
      }
      return before + cluster_total(sum);
    };
    count64 lowest = 0;
    count64 highest = kNobody;
    while (lowest < highest) {
      const count64 middle = lowest + (highest - lowest) / 2;
      if (sum_to(middle) > wanted) {
        highest = middle;
      } else {
        lowest = middle + 1;
      }
    }
    return {lowest, sum_to(lowest)};
  }

  __device__ count64 cluster_total(count64 value) {
    value = add_up_block(value, memory_.block).total;
    // The other half may still be read.
    const int half = num_totals_++ % 2;
    if (threadIdx.x < kBlocks) {
      cluster_.map_shared_rank(&memory_, static_cast<int>(threadIdx.x))->totals[half][block_] =
        value;
    }
    cluster_.sync();
    count64 sum = 0;
    for (const count64 one : memory_.totals[half]) {
      sum += one;
    }
    return sum;
  }

  cg::cluster_group cluster_;
  int block_;
  weighing weigh_;
  draw_memory& memory_;
  const float* logits_;
  std::int32_t first_;
  std::int32_t num_;
  std::int32_t num_cached_;
  float* cached_logits_;
  float* cached_powers_;
  count64 last_ = kNobody; ///< no token beyond this rank
  counting counted_ = counting::nothing;
  int num_lists_ = 0;
  int num_totals_ = 0;
};

__global__ void __launch_bounds__(kThreads)
  draw(const logit_rows rows, const device_sampling* all_params, const logit_survey* surveys,
       const float* all_allowed, std::int32_t most_cached, sampled_token* out) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<draw_memory*>(shared);
  follow();
  const auto row = static_cast<std::int64_t>(blockIdx.y);
  const device_sampling params = all_params[row];
  const float* logits =
    params.num_banned > 0 ? all_allowed + row * rows.num_tokens : rows.data + row * rows.stride;
  const float best = logit_of(logits, survey_of(surveys + row * kSurveys).allowed);
  if (!is_drawn(params, best)) {
    return; // with all blocks of the cluster
  }
  const weighing weigh{best, params.temperature, params.min_p > 0.0F ? params.min_p : 0.0F};
  drawing blocks(logits, rows.num_tokens, weigh, memory,
                 reinterpret_cast<float*>(shared + sizeof(draw_memory)), most_cached);
  if (params.top_k > 0 && params.top_k < rows.num_tokens) {
    const auto most = static_cast<count64>(params.top_k - 1);
    blocks.cut_behind(blocks.select(counting::tokens, [&](count64) { return most; }).rank);
  }
  count64 left = 0; // behind a cut by top_p
  if (params.top_p < 1.0F) {
    const auto last = blocks.select(counting::units, [&](count64 total) {
      const double enough = static_cast<double>(total) * fmaxf(params.top_p, 0.0F);
      const auto threshold = static_cast<count64>(__double2ll_ru(enough));
      return threshold > 0 ? threshold - 1 : 0;
    });
    blocks.cut_behind(last.rank);
    left = last.sum;
  }
  // What was counted before a cut by top_p is not counted again: the token is before the cut.
  const auto drawn = blocks.select(counting::units, [&](count64 total) {
    total = left > 0 ? left : total;
    return min(static_cast<count64>(__double2ll_rd(params.uniform * total)), total - 1);
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    out[row].token = static_cast<std::int32_t>(drawn.rank);
  }
}

} // namespace

void launch_draw(cudaStream_t stream, const logit_rows& rows, const device_sampling* params,
                 const logit_survey* surveys, const float* allowed, sampled_token* out) {
  const std::int32_t most_cached = std::min(ceil_div(rows.num_tokens, kBlocks), kMostCached);
  const auto bytes =
    sizeof(draw_memory) + static_cast<std::size_t>(most_cached) * 2 * sizeof(float);
  // Of the device that is current; costs nothing once it is set.
  cudaFuncSetAttribute(draw, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(sizeof(draw_memory) + kMostCached * 2 * sizeof(float)));
  cudaFuncSetAttribute(draw, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  launch_clusters(stream, dim3(kBlocks, rows.num_rows), kBlocks, kThreads, bytes, draw, rows,
                  params, surveys, allowed, most_cached, out);
}

} // namespace troupe::kernels::cuda
