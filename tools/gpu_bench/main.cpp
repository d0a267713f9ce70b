#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <string>

#include "boundary.hpp"
#include "ranks.hpp"
#include "step.hpp"
#include "timing.hpp"

/// The kernels of the CUDA back end on the shapes of DeepSeek-R1, beside the ceilings measured in
/// the same run.

namespace gpu_bench {

namespace {

using namespace troupe::kernels;

constexpr std::array kParts{"linear", "prefill", "heads", "attention", "sample", "experts",
                            "step",   "exact",   "ranks", "tensor",    "load"};

constexpr std::size_t kColdBytes = std::size_t{256} << 20; ///< several times the L2

double copy_ceiling = 0.0;
double product_ceiling = 0.0;

void print(const std::string& name, double time, double bytes, double operations) {
  if (time <= 0.0) {
    std::printf("%-48s failed\n", name.c_str());
    return;
  }
  std::printf("%-48s %9.1f us  %7.0f GB/s %3.0f %%  %7.1f TFLOP/s %3.0f %%\n", name.c_str(), time,
              bytes / time * 1e-3, 100.0 * bytes / time * 1e6 / copy_ceiling,
              operations / time * 1e-6, 100.0 * operations / time * 1e6 / product_ceiling);
  std::fflush(stdout);
}

/// Random bytes that are finite in every type, from which all weights are made.
const std::vector<unsigned char>& noise() {
  static const auto bytes = [] {
    std::vector<unsigned char> result(std::size_t{1000} << 20);
    std::uint64_t state = 1234567;
    for (std::size_t i = 0; i < result.size(); i += 8) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      // The second byte of a bf16 gives small magnitudes; no e4m3 code is all ones.
      const std::uint64_t bits = (state >> 8 & 0x80BF80BF80BF80BFULL) ^ 0x3C003C003C003C00ULL;
      std::memcpy(&result[i], &bits, 8);
    }
    return result;
  }();
  return bytes;
}

const std::vector<float>& ones() {
  static const std::vector<float> values(8 << 20, 0.01F);
  return values;
}

weight_matrix place(gpu_ops& ops, element_type type, std::int32_t rows, std::int32_t cols) {
  weight_matrix w;
  w.data = noise().data();
  w.type = type;
  w.num_rows = rows;
  w.num_cols = cols;
  if (type == element_type::f8_e4m3) {
    w.scales = ones().data();
  } else if (type == element_type::i8 || type == element_type::i4) {
    w.scales = ones().data();
    w.block_rows = 1;
  }
  return ops.place(w, weight_use::product);
}

const char* name_of(element_type type) {
  switch (type) {
  case element_type::f8_e4m3: return "f8";
  case element_type::i8: return "i8";
  case element_type::i4: return "i4";
  default: return "bf16";
  }
}

struct linear_shape {
  std::int32_t rows, cols;
  element_type type;
};

void bench_linear(gpu_ops& ops, const linear_shape& shape, const std::vector<int>& batches) {
  const double weight_bytes = static_cast<double>(shape.rows) * row_bytes(shape.type, shape.cols);
  const int copies = std::clamp<int>(static_cast<int>(kColdBytes / weight_bytes) + 1, 1, 64);
  std::vector<weight_matrix> weights;
  for (int i = 0; i < copies; ++i) {
    weights.push_back(place(ops, shape.type, shape.rows, shape.cols));
  }
  const int most = *std::max_element(batches.begin(), batches.end());
  const auto x = random_rows(ops, static_cast<std::size_t>(most) * shape.cols);
  const auto out = ops.allocate(static_cast<std::size_t>(most) * shape.rows * 2);
  for (const int batch : batches) {
    const int repeats = batch > 256 ? 4 : std::max(copies, 8);
    const double time = time_graph(ops, repeats, [&](int i) {
      ops.linear({x.get(), batch, shape.cols, shape.cols}, weights[i % copies],
                 {out.get(), batch, shape.rows, shape.rows});
    });
    char name[80];
    std::snprintf(name, sizeof(name), "linear %s %d x %d, %d rows", name_of(shape.type), shape.rows,
                  shape.cols, batch);
    print(name, time, weight_bytes + 2.0 * batch * (shape.rows + shape.cols),
          2.0 * batch * shape.rows * shape.cols);
  }
}

void bench_heads(gpu_ops& ops) {
  for (const auto& [in, out_dim] : {std::pair{128, 512}, std::pair{512, 128}}) {
    const auto w = place(ops, element_type::bf16, 128 * out_dim, in);
    const auto x = random_rows(ops, std::size_t{512} * 128 * in);
    const auto out = ops.allocate(std::size_t{512} * 128 * out_dim * 2);
    for (const int batch : {1, 8, 32, 128}) {
      const double time = time_graph(ops, 16, [&](int) {
        ops.linear_per_head({x.get(), batch, 128 * in, 128 * in}, in, w, 128,
                            {out.get(), batch, 128 * out_dim, 128 * out_dim}, out_dim);
      });
      char name[80];
      std::snprintf(name, sizeof(name), "128 heads %d to %d (warm), %d rows", in, out_dim, batch);
      print(name, time, 2.0 * 128 * in * out_dim + 256.0 * batch * (in + out_dim),
            256.0 * batch * in * out_dim);
    }
  }
}

void bench_attention(gpu_ops& ops) {
  constexpr int kHeads = 128, kLatent = 512, kRope = 64, kPage = 64;
  for (const auto& [batch, context] :
       {std::pair{1, 1024}, std::pair{1, 8192}, std::pair{32, 1024}, std::pair{32, 4096},
        std::pair{128, 1024}, std::pair{128, 4096}}) {
    const int pages_each = context / kPage;
    const auto pages =
      random_rows(ops, static_cast<std::size_t>(batch) * pages_each * kPage * (kLatent + kRope));
    std::vector<std::int32_t> positions(batch, context - 1), sequences(batch), offsets(batch);
    std::vector<std::int32_t> tables(static_cast<std::size_t>(batch) * pages_each);
    std::iota(sequences.begin(), sequences.end(), 0);
    std::iota(tables.begin(), tables.end(), 0);
    std::shuffle(tables.begin(), tables.end(), std::mt19937(1));
    for (int i = 0; i < batch; ++i) {
      offsets[i] = i * pages_each;
    }
    const auto q = random_rows(ops, static_cast<std::size_t>(batch) * kHeads * kLatent);
    const auto rope = random_rows(ops, static_cast<std::size_t>(batch) * kHeads * kRope);
    const auto out = ops.allocate(static_cast<std::size_t>(batch) * kHeads * kLatent * 2);
    const kv_layer_view kv{pages.get(), batch * pages_each, kPage, kLatent, kRope};
    const double time = time_graph(ops, 8, [&](int) {
      ops.latent_attention({q.get(), batch, kHeads * kLatent, kHeads * kLatent},
                           {rope.get(), batch, kHeads * kRope, kHeads * kRope}, kRope, kHeads, 0.1F,
                           {positions, sequences, tables, offsets}, kv,
                           {out.get(), batch, kHeads * kLatent, kHeads * kLatent});
    });
    char name[80];
    std::snprintf(name, sizeof(name), "latent attention, %d rows at %d", batch, context);
    const double keys = static_cast<double>(batch) * context;
    print(name, time, keys * 2 * (kLatent + kRope) + 2.0 * batch * kHeads * (2 * kLatent + kRope),
          2.0 * keys * kHeads * (2 * kLatent + kRope));
  }
}

void bench_experts(gpu_ops& ops) {
  constexpr int kHidden = 7168, kInner = 2048, kExperts = 256, kTopK = 8;
  std::vector<expert_weights> experts;
  for (int e = 0; e < kExperts; ++e) {
    experts.push_back({place(ops, element_type::f8_e4m3, kInner, kHidden),
                       place(ops, element_type::f8_e4m3, kInner, kHidden),
                       place(ops, element_type::f8_e4m3, kHidden, kInner)});
  }
  constexpr int kMost = 2048;
  const auto x = random_rows(ops, std::size_t{kMost} * kHidden);
  const auto out = ops.allocate(std::size_t{kMost} * kTopK * kHidden * 2);
  std::mt19937 random(7);
  for (const int batch : {1, 8, 32, 128, 2048}) {
    std::vector<expert_task> tasks;
    std::vector<std::int32_t> order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    for (int row = 0; row < batch; ++row) {
      std::shuffle(order.begin(), order.end(), random);
      for (int k = 0; k < kTopK; ++k) {
        tasks.push_back({row, order[k]});
      }
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const auto& a, const auto& b) { return a.expert < b.expert; });
    int distinct = 0;
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      distinct += i == 0 || tasks[i].expert != tasks[i - 1].expert ? 1 : 0;
    }
    const auto num_tasks = static_cast<int>(tasks.size());
    const double time = time_graph(ops, 4, [&](int) {
      ops.experts({x.get(), batch, kHidden, kHidden}, tasks, experts,
                  {out.get(), num_tasks, kHidden, kHidden});
    });
    char name[80];
    std::snprintf(name, sizeof(name), "experts f8, %d rows, %d of %d used", batch, distinct,
                  kExperts);
    print(name, time, 3.0 * distinct * kHidden * kInner + 4.0 * num_tasks * kHidden,
          6.0 * num_tasks * kHidden * kInner);
  }

  weight_matrix router;
  router.data = noise().data();
  router.type = element_type::bf16;
  router.num_rows = kExperts;
  router.num_cols = kHidden;
  mixture_weights w;
  w.router = ops.place(router, weight_use::stored);
  w.experts = experts;
  w.shared = &experts.front();
  router_params params{kExperts, 8, 4, kTopK, 2.5F};
  constexpr int kMixed = 64;
  const auto sum = random_rows(ops, std::size_t{kMixed} * kHidden);
  const auto room = ops.allocate(std::size_t{kMixed} * (2 * kInner + kHidden) * 2);
  const auto rows_at = [&](std::size_t first, int rows, int cols) {
    return rows_view{static_cast<std::uint16_t*>(room.get()) + first, rows, cols, cols};
  };
  for (const int batch : {1, 8, 32, 64}) {
    const mixture_scratch scratch{rows_at(0, batch, kInner),
                                  rows_at(std::size_t{kMixed} * kInner, batch, kInner),
                                  rows_at(std::size_t{kMixed} * 2 * kInner, batch, kHidden),
                                  {out.get(), batch * kTopK, kHidden, kHidden}};
    const double time = time_graph(ops, 4, [&](int) {
      ops.mixture({x.get(), batch, kHidden, kHidden}, w, params, scratch,
                  {sum.get(), batch, kHidden, kHidden});
    });
    std::printf("mixture f8 with router and shared expert, %2d rows %7.1f us\n", batch, time);
  }
}

void bench_sample(gpu_ops& ops) {
  constexpr int kVocabulary = 129280;
  const auto w = place(ops, element_type::bf16, kVocabulary, 256);
  const auto x = random_rows(ops, 64 * 256);
  const auto logits = ops.allocate(std::size_t{64} * kVocabulary * 4);
  ops.logits({x.get(), 64, 256, 256}, w, {logits.get(), 64, kVocabulary, kVocabulary});
  for (const int rows : {1, 64}) {
    for (const int kind : {0, 1, 2}) {
      std::vector<sampling_params> params(rows);
      for (int i = 0; i < rows; ++i) {
        params[i].temperature = kind == 0 ? 0.0F : 0.6F;
        params[i].top_p = kind == 2 ? 0.95F : 1.0F;
        params[i].seed = i;
      }
      std::vector<sampled_token> out(rows);
      const double time = time_calls(ops, 20, [&] {
        ops.sample({logits.get(), rows, kVocabulary, kVocabulary}, params, out);
      });
      char name[80];
      std::snprintf(name, sizeof(name), "sample %s, %d rows, with the way back",
                    kind == 0   ? "greedy"
                    : kind == 1 ? "at temperature 0.6"
                                : "at 0.6, top_p 0.95",
                    rows);
      print(name, time, 4.0 * rows * kVocabulary, 0.0);
    }
  }
}

/// The exit code, where the arguments are no parts.
std::optional<int> refuse(int argc, char** argv) {
  std::string usage =
    "usage: gpu-bench [PART ...], all parts if none is named; or gpu-bench boundary\nparts:";
  for (const char* part : kParts) {
    usage += std::string(" ") + part;
  }
  for (int i = 1; i < argc; ++i) {
    const std::string asked = argv[i];
    if (asked == "-h" || asked == "--help") {
      std::printf("%s\n", usage.c_str());
      return 0;
    }
    if (std::find(kParts.begin(), kParts.end(), asked) == kParts.end()) {
      std::fprintf(stderr, "gpu-bench: there is no part '%s'\n%s\n", asked.c_str(), usage.c_str());
      return 2;
    }
  }
  return std::nullopt;
}

int run(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "boundary") == 0) {
    return bench_boundary();
  }
  if (const auto refused = refuse(argc, argv)) {
    return *refused;
  }
  std::string error;
  const auto ops = cuda::num_devices() > 0 ? cuda::make_cuda_ops(0, error) : nullptr;
  if (ops == nullptr) {
    std::fprintf(stderr, "gpu-bench: no GPU here. %s\n", error.c_str());
    return 1;
  }
  const auto wanted = [&](const char* part) {
    bool found = argc < 2;
    for (int i = 1; i < argc; ++i) {
      found |= std::strcmp(argv[i], part) == 0;
    }
    return found;
  };
  copy_ceiling = copy_rate(*ops);
  product_ceiling = library_rate(*ops, 8192, 8192, 8192);
  std::printf("%s: copy %.2f TB/s, cuBLASLt bf16 8192^3 %.0f TFLOP/s\n", ops->description(),
              copy_ceiling * 1e-12, product_ceiling * 1e-12);
  if (product_ceiling == 0.0) {
    product_ceiling = 800e12;
  }
  const auto f8 = element_type::f8_e4m3;
  if (wanted("linear")) {
    for (const auto& [rows, cols] :
         {std::pair{2112, 7168}, std::pair{24576, 1536}, std::pair{7168, 16384},
          std::pair{4096, 7168}, std::pair{7168, 2048}, std::pair{36864, 7168},
          std::pair{7168, 18432}}) {
      bench_linear(*ops, {rows, cols, f8}, {1, 8, 32, 64, 128});
    }
    bench_linear(*ops, {32320, 7168, element_type::bf16}, {1, 8, 32, 64, 128});
    bench_linear(*ops, {129280, 7168, element_type::i8}, {1, 8, 32, 64, 128});
    bench_linear(*ops, {7168, 16384, element_type::bf16}, {1, 8, 32, 64, 128});
    bench_linear(*ops, {7168, 16384, element_type::i8}, {1, 32});
    bench_linear(*ops, {7168, 16384, element_type::i4}, {1, 32});
  }
  if (wanted("prefill")) {
    for (const auto& [rows, cols] :
         {std::pair{24576, 1536}, std::pair{7168, 16384}, std::pair{36864, 7168}}) {
      for (const auto type : {f8, element_type::bf16}) {
        bench_linear(*ops, {rows, cols, type}, {512, 4096});
      }
      std::printf("%-48s %53.1f TFLOP/s\n", "cuBLASLt bf16, the same, 4096 rows",
                  library_rate(*ops, 4096, rows, cols) * 1e-12);
    }
  }
  if (wanted("heads")) {
    bench_heads(*ops);
  }
  if (wanted("attention")) {
    bench_attention(*ops);
  }
  if (wanted("sample")) {
    bench_sample(*ops);
  }
  if (wanted("experts")) {
    bench_experts(*ops);
  }
  if (wanted("step")) {
    bench_steps(1, troupe::model::head_format::stored);
    bench_steps(1, troupe::model::head_format::int8);
  }
  if (wanted("exact")) {
    bench_steps(1, troupe::model::head_format::stored, troupe::kernels::numerics::exact);
  }
  if (wanted("ranks")) {
    bench_ranks();
  }
  if (wanted("tensor")) {
    bench_steps_of_ranks();
  }
  if (wanted("load")) {
    bench_load(troupe::model::head_format::stored);
    bench_load(troupe::model::head_format::int8);
  }
  if (!ops->failure().empty()) {
    std::fprintf(stderr, "gpu-bench: %s\n", ops->failure().c_str());
    return 1;
  }
  return 0;
}

} // namespace

} // namespace gpu_bench

int main(int argc, char** argv) {
  return gpu_bench::run(argc, argv);
}
