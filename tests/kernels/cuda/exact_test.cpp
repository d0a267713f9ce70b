#include "gpu.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

/// Exact numerics: operations are those of the CPU with exact numerics, but for the order of sums,
/// and a row has the same bits in any company.
namespace kernel_tests {

using troupe::kernels::batch_view;
using troupe::kernels::expert_task;
using troupe::kernels::expert_weights;
using troupe::kernels::group_rank;
using troupe::kernels::mixture_scratch;
using troupe::kernels::mixture_weights;
using troupe::kernels::router_params;
using troupe::kernels::router_score;
using troupe::kernels::weight_use;

namespace {

/// Sums of a few thousand float32 products in two orders.
constexpr double kExact = 2e-6;

gpu_rows rows_of(const matrix& from, int stride = 0) {
  return gpu_rows(from, stride, *exact_gpu());
}

gpu_rows new_rows(int rows, int cols, int stride = 0) {
  return gpu_rows(rows, cols, stride, *exact_gpu());
}

struct format {
  element_type type;
  int block_rows = 0; ///< 0: no scales
  int block_cols = 0;
};

test_weight weight_of(const format& f, int rows, int cols, std::mt19937& random) {
  if (f.type == element_type::i4) {
    return random_i4(rows, cols, f.block_cols, random);
  }
  return random_weight(f.type, rows, cols, random, f.block_rows > 0, std::max(f.block_rows, 1),
                       std::max(f.block_cols, 1));
}

const format kFormats[] = {
  {element_type::f32},
  {element_type::bf16},
  {element_type::f16},
  {element_type::f8_e4m3},
  {element_type::f8_e4m3, 128, 128},
  {element_type::f8_e4m3, 32, 48},
  {element_type::f8_e4m3, 1, 100000}, // by channel
  {element_type::i8, 1, 128},
  {element_type::i8, 1, 20},
  {element_type::i4, 1, 128},
  {element_type::i4, 1, 32},
};

/// `shapes`: rows and columns of weights.
void check_products(std::initializer_list<std::pair<int, int>> shapes) {
  auto& device = *exact_gpu();
  CHECK(device.activation_type() == element_type::f32);
  CHECK(device.kv_type() == element_type::f32);
  std::mt19937 random(71);
  for (const auto& f : kFormats) {
    for (const auto& [rows, cols] : shapes) {
      INFO("type " << int(f.type) << ", blocks of " << f.block_rows << " x " << f.block_cols << ", "
                   << rows << " x " << cols);
      const auto w = weight_of(f, rows, cols, random);
      const auto placed = device.place(w.view);
      constexpr int kRows = 130;
      auto x = random_matrix(kRows, cols, random);
      matrix expected(kRows, rows);
      reference().linear(x.view(), w.view, expected.view());
      const auto out = new_rows(kRows, rows);
      device.linear(rows_of(x).view(), placed, out.view());
      const auto got = out.read();
      CHECK(distance(got, expected) < kExact);
      for (const int count : {1, 2, 4, 5, 7, 16, 17, 64, 65}) {
        // On borders of 16 bytes as rows of a model are, and anywhere.
        for (const int stride : {(cols + 7) / 4 * 4, cols + (cols % 2 == 0 ? 1 : 2)}) {
          auto order = shuffled(kRows, random);
          order.resize(count);
          const auto some = rows_of(select_rows(x, order), stride);
          const auto some_out = new_rows(count, rows, rows + 3);
          device.linear(some.view(), placed, some_out.view());
          INFO(count << " rows, " << stride << " apart");
          CHECK(same_bits(some_out.read(), select_rows(got, order)));
        }
      }
      const auto logits = new_rows(kRows, rows);
      device.logits(rows_of(x).view(), placed, logits.view());
      CHECK(same_bits(logits.read(), got));
    }
  }
  CHECK(device.failure().empty());
}

} // namespace

TEST_CASE("exact products are those of the CPU, the same bits for a row in any company",
          "[exact]") {
  if (gpu() != nullptr) {
    check_products({{64, 128}, {130, 200}, {33, 100}, {3, 5}, {257, 77}, {40, 1031}});
  }
}

TEST_CASE("exact products of large weights are those of the CPU", "[exact][slow]") {
  if (gpu() != nullptr) {
    check_products({{576, 7168}, {2112, 512}});
  }
}

TEST_CASE("exact products know every code of f8 and i8, NaN included", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  for (const auto type : {element_type::f8_e4m3, element_type::i8}) {
    std::vector<unsigned char> codes(256 * 256, 0);
    for (int i = 0; i < 256; ++i) {
      codes[i * 257] = static_cast<unsigned char>(i);
    }
    const auto placed = exact_gpu()->place({codes.data(), type, 256, 256});
    matrix x(256, 256);
    for (int i = 0; i < 256; ++i) {
      x.at(i, i) = 1.0F;
    }
    const auto out = new_rows(256, 256);
    exact_gpu()->linear(rows_of(x).view(), placed, out.view());
    const auto got = out.read();
    for (int i = 0; i < 256; ++i) {
      const double want =
        type == element_type::f8_e4m3 ? e4m3_value(codes[i * 257]) : std::int8_t(codes[i * 257]);
      INFO("code " << i);
      CHECK((want == want ? got.at(i, i) == want : got.at(i, i) != got.at(i, i)));
    }
  }
}

TEST_CASE("exact weights kept in 8 bit are those of the CPU", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(72);
  for (const auto type : {element_type::f32, element_type::bf16, element_type::f16}) {
    const auto w = random_weight(type, 70, 300, random);
    const auto placed = exact_gpu()->place(w.view, weight_use::int8_product);
    const auto on_host = reference().place(w.view, weight_use::int8_product);
    CHECK(placed.type == element_type::i8);
    auto x = random_matrix(20, 300, random);
    matrix expected(20, 70);
    reference().linear(x.view(), on_host, expected.view());
    const auto out = new_rows(20, 70);
    exact_gpu()->linear(rows_of(x).view(), placed, out.view());
    CHECK(distance(out.read(), expected) < kExact);
  }
}

TEST_CASE("exact products by heads are those of the CPU", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(73);
  struct heads {
    int count, in, out, in_stride, out_stride;
  };
  for (const auto& h :
       {heads{4, 32, 64, 48, 64}, heads{6, 48, 24, 48, 24}, heads{3, 20, 12, 29, 13},
        heads{16, 128, 512, 192, 512}, heads{16, 512, 128, 512, 128}}) {
    for (const auto type : {element_type::f32, element_type::bf16}) {
      INFO(h.count << " heads, " << h.in << " to " << h.out);
      const auto w = random_weight(type, h.count * h.out, h.in, random);
      const auto placed = exact_gpu()->place(w.view);
      auto x = random_matrix(70, h.count * h.in_stride, random);
      matrix expected(70, h.count * h.out_stride);
      reference().linear_per_head(x.view(), h.in_stride, w.view, h.count, expected.view(),
                                  h.out_stride);
      const auto input = rows_of(x);
      const auto out = rows_of(matrix(70, h.count * h.out_stride));
      exact_gpu()->linear_per_head(input.view(), h.in_stride, placed, h.count, out.view(),
                                   h.out_stride);
      const auto got = out.read();
      CHECK(distance(got, expected) < kExact);
      for (const int count : {1, 7, 64}) {
        const auto some = rows_of(matrix(count, h.count * h.out_stride));
        exact_gpu()->linear_per_head(input.first_rows(count), h.in_stride, placed, h.count,
                                     some.view(), h.out_stride);
        std::vector<int> first(count);
        std::iota(first.begin(), first.end(), 0);
        CHECK(same_bits(some.read(), select_rows(got, first)));
      }
    }
  }
  CHECK(exact_gpu()->failure().empty());
}

namespace {

/// Experts on both devices, of several formats.
struct experts_of_both {
  std::vector<test_weight> kept;
  std::vector<expert_weights> on_host, on_gpu;

  experts_of_both(int count, int hidden, int inner, const std::vector<format>& formats,
                  std::mt19937& random) {
    for (int e = 0; e < count; ++e) {
      add(formats[e % formats.size()], hidden, inner, random);
    }
  }

  void add(const format& f, int hidden, int inner, std::mt19937& random) {
    for (const auto& [rows, cols] :
         {std::pair{inner, hidden}, std::pair{inner, hidden}, std::pair{hidden, inner}}) {
      kept.push_back(weight_of(f, rows, cols, random));
    }
    const auto* last = &kept.back();
    on_host.push_back({last[-2].view, last[-1].view, last[0].view});
    on_gpu.push_back({exact_gpu()->place(last[-2].view), exact_gpu()->place(last[-1].view),
                      exact_gpu()->place(last[0].view)});
  }
};

} // namespace

TEST_CASE("exact experts are those of the CPU, whatever the crowd", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(74);
  for (const auto& [hidden, inner] : {std::pair{192, 80}, {256, 128}, {100, 77}}) {
    // Some with scales, some without, in one call.
    const experts_of_both experts(
      6, hidden, inner, {{element_type::f8_e4m3, 128, 128}, {element_type::bf16}}, random);
    auto x = random_matrix(90, hidden, random, 0.3F);
    std::vector<expert_task> tasks;
    for (int e = 0; e < 6; ++e) {
      for (int row = 0; row < 90; ++row) {
        if (e != 2 && (row * 7 + e) % (e * e * e + 1) == 0) {
          tasks.push_back({row, e});
        }
      }
    }
    const auto num_tasks = static_cast<int>(tasks.size());
    matrix expected(num_tasks, hidden);
    reference().experts(x.view(), tasks, experts.on_host, expected.view());
    const auto input = rows_of(x);
    const auto out = new_rows(num_tasks, hidden);
    exact_gpu()->experts(input.view(), tasks, experts.on_gpu, out.view());
    const auto got = out.read();
    INFO(hidden << " x " << inner);
    CHECK(distance(got, expected) < kExact);
    for (int t = 0; t < num_tasks; t += 11) {
      const auto alone = new_rows(1, hidden);
      exact_gpu()->experts(input.view(), {&tasks[t], 1}, experts.on_gpu, alone.view());
      CHECK(same_bits(alone.read(), select_rows(got, {t})));
    }
  }
  CHECK(exact_gpu()->failure().empty());
}

TEST_CASE("an exact mixture has the bits of its operations by way of the host", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  auto& device = *exact_gpu();
  std::mt19937 random(75);
  constexpr int kExperts = 16, kTopK = 4;
  for (const auto& [hidden, inner, f] :
       {std::tuple{192, 80, format{element_type::f8_e4m3, 128, 128}},
        std::tuple{100, 52, format{element_type::bf16}},
        std::tuple{256, 128, format{element_type::i4, 1, 128}}}) {
    const experts_of_both experts(kExperts, hidden, inner, {f}, random);
    const experts_of_both shared(1, hidden, 2 * inner, {f}, random);
    const auto router = random_weight(element_type::bf16, kExperts, hidden, random);
    const auto bias = random_matrix(1, kExperts, random, 0.3F).data;
    const router_params params{
      kExperts, 4, 2, kTopK, 2.5F, true, router_score::sigmoid, group_rank::best_two};
    mixture_weights w;
    w.router = device.place(router.view, weight_use::stored);
    w.bias = gpu_vector(bias, device);
    w.experts = experts.on_gpu;
    for (const bool with_shared : {true, false}) {
      w.shared = with_shared ? shared.on_gpu.data() : nullptr;
      for (const int count : {1, 3, 17, 64}) {
        INFO(hidden << " x " << inner << ", " << count << " rows");
        auto x = random_matrix(count, hidden, random, 0.3F);
        const auto base = random_matrix(count, hidden, random);
        const auto input = rows_of(x);
        const auto gate = new_rows(count, 2 * inner), up = new_rows(count, 2 * inner);
        const auto shared_out = new_rows(count, hidden),
                   expert_out = new_rows(count * kTopK, hidden);
        const auto out = rows_of(base);
        REQUIRE(device.mixture(input.view(), w, params,
                               {gate.view(), up.view(), shared_out.view(), expert_out.view()},
                               out.view()));
        const auto size = std::size_t(count) * kTopK;
        std::vector<std::int32_t> chosen(size), places(size);
        std::vector<float> factors(size);
        device.route(input.view(), w.router, w.bias, params, chosen, factors);
        std::vector<expert_task> tasks;
        for (int e = 0; e < kExperts; ++e) {
          for (std::size_t i = 0; i < size; ++i) {
            if (chosen[i] == e) {
              places[i] = static_cast<std::int32_t>(tasks.size());
              tasks.push_back({static_cast<std::int32_t>(i / kTopK), e});
            }
          }
        }
        const auto expected = rows_of(base);
        device.experts(input.view(), tasks, w.experts, expert_out.view());
        if (with_shared) {
          device.mlp(input.view(), *w.shared, gate.view(), up.view(), shared_out.view());
        }
        device.combine(expert_out.view(), places, factors, kTopK,
                       with_shared ? shared_out.view() : rows_view{}, expected.view());
        CHECK(same_bits(out.read(), expected.read()));
        CHECK(distance(out.read(), base) > 1e-3);
      }
    }
  }
  CHECK(device.failure().empty());
}

TEST_CASE("exact norms, activations, sums and biases are those of the CPU", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  auto& device = *exact_gpu();
  std::mt19937 random(76);
  for (const int cols : {1, 24, 192, 1536, 7168}) {
    INFO(cols << " columns");
    auto x = random_matrix(37, cols, random, 3.0F);
    auto y = random_matrix(37, cols, random);
    const auto weight = random_matrix(1, cols, random).data;
    const auto* on_gpu = gpu_vector(weight, device);
    const auto a = rows_of(x, cols + 8), b = rows_of(y), out = new_rows(37, cols);
    matrix expected(37, cols);
    reference().rms_norm(x.view(), weight.data(), 1e-6F, expected.view());
    device.rms_norm(a.view(), on_gpu, 1e-6F, out.view());
    const auto normed = out.read();
    CHECK(distance(normed, expected) < kExact);
    const auto alone = new_rows(1, cols);
    device.rms_norm(a.first_rows(1), on_gpu, 1e-6F, alone.view());
    CHECK(same_bits(alone.read(), select_rows(normed, {0})));

    reference().swiglu(x.view(), y.view(), expected.view());
    device.swiglu(a.view(), b.view(), out.view());
    CHECK(distance(out.read(), expected) < kExact);

    const auto once = rows_of(x), at_once = new_rows(37, cols);
    device.add_rms_norm(once.view(), b.view(), on_gpu, 1e-6F, at_once.view());
    auto sum = x;
    reference().add(sum.view(), y.view());
    device.add(a.view(), b.view());
    CHECK(same_bits(a.read(), sum));
    CHECK(same_bits(once.read(), sum));
    device.rms_norm(a.view(), on_gpu, 1e-6F, out.view());
    CHECK(same_bits(at_once.read(), out.read()));
    reference().add_bias(sum.view(), weight.data());
    device.add_bias(a.view(), on_gpu);
    CHECK(same_bits(a.read(), sum));
    device.clear(a.view());
    CHECK(same_bits(a.read(), matrix(37, cols)));
  }
}

TEST_CASE("exact rotations are those of the CPU", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  auto& device = *exact_gpu();
  std::mt19937 random(77);
  constexpr int kHeads = 3, kStride = 80, kOffset = 10, kWidth = 64;
  std::vector<float> inv_freq;
  for (int i = 0; i < kWidth / 2; ++i) {
    inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / kWidth)));
  }
  const std::vector<std::int32_t> positions{0, 1, 17, 4095, 163839};
  for (const bool halves : {false, true}) {
    auto x = random_matrix(int(positions.size()), kHeads * kStride, random);
    const auto on_gpu = rows_of(x);
    const auto turn = halves ? &ops::rope_halves : &ops::rope;
    (device.*turn)(on_gpu.view(), kHeads, kStride, kOffset, kWidth, positions,
                   gpu_vector(inv_freq, device), 1.3F);
    (reference().*turn)(x.view(), kHeads, kStride, kOffset, kWidth, positions, inv_freq.data(),
                        1.3F);
    CHECK(distance(on_gpu.read(), x) < kExact);
  }
}

TEST_CASE("exact rows of a table, of any type, and copies", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  auto& device = *exact_gpu();
  std::mt19937 random(78);
  for (const auto type :
       {element_type::f32, element_type::bf16, element_type::f16, element_type::f8_e4m3}) {
    const auto table = random_weight(type, 50, 100, random, type == element_type::f8_e4m3, 16, 32);
    const auto placed = device.place(table.view, weight_use::stored);
    const std::vector<std::int32_t> ids{49, 0, 7, 7};
    matrix expected(4, 100);
    reference().embed(table.view, ids, expected.view());
    const auto out = new_rows(4, 100);
    device.embed(placed, ids, out.view());
    CHECK(same_bits(out.read(), expected));
  }
  const auto x = random_matrix(50, 33, random);
  CHECK(same_bits(rows_of(x, 40).read(), x));
}

TEST_CASE("exact weighted sums of expert rows are those of the CPU", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(79);
  constexpr int kRows = 13, kTopK = 8, kCols = 200;
  auto expert_out = random_matrix(kRows * kTopK, kCols, random);
  auto shared = random_matrix(kRows, kCols, random);
  const auto order = shuffled(kRows * kTopK, random);
  const std::vector<std::int32_t> rows(order.begin(), order.end());
  const auto weights = random_matrix(1, kRows * kTopK, random).data;
  for (const bool with_shared : {false, true}) {
    auto x = random_matrix(kRows, kCols, random);
    const auto out = rows_of(x), experts = rows_of(expert_out), on_gpu = rows_of(shared);
    reference().combine(expert_out.view(), rows, weights, kTopK,
                        with_shared ? shared.view() : rows_view{}, x.view());
    exact_gpu()->combine(experts.view(), rows, weights, kTopK,
                         with_shared ? on_gpu.view() : rows_view{}, out.view());
    CHECK(distance(out.read(), x) < kExact);
  }
}

TEST_CASE("the exact router chooses as the CPU does", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(80);
  for (const auto type : {element_type::f32, element_type::bf16, element_type::f16}) {
    const router_params p{64, 8, 4, 6, 2.5F, true, router_score::sigmoid, group_rank::best_two};
    const auto w = random_weight(type, p.num_experts, 192, random);
    const auto placed = exact_gpu()->place(w.view, weight_use::stored);
    auto x = random_matrix(200, 192, random, 0.3F);
    const auto size = std::size_t(200) * p.top_k;
    std::vector<std::int32_t> experts(size), expected(size);
    std::vector<float> weights(size), expected_weights(size);
    reference().route(x.view(), w.view, nullptr, p, expected, expected_weights);
    const auto input = rows_of(x);
    exact_gpu()->route(input.view(), placed, nullptr, p, experts, weights);
    CHECK(experts == expected); // of random rows, none is nearly tied
    for (std::size_t i = 0; i < size; ++i) {
      CHECK(weights[i] == Approx(expected_weights[i]).epsilon(1e-5));
    }
  }
}

namespace {

/// Sequences of these lengths in shuffled pages, on both devices.
struct exact_cache {
  std::vector<std::int32_t> tables, offsets, positions, sequences;
  std::vector<float> on_host;
  std::shared_ptr<void> on_gpu;
  int num_pages = 1;

  exact_cache(const std::vector<int>& lengths, int page_tokens, int width, std::mt19937& random) {
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      offsets.push_back(static_cast<std::int32_t>(tables.size()));
      for (int p = 0; p < lengths[s]; p += page_tokens) {
        tables.push_back(num_pages++);
      }
      for (int p = 0; p < lengths[s]; ++p) {
        positions.push_back(p);
        sequences.push_back(static_cast<std::int32_t>(s));
      }
    }
    std::shuffle(tables.begin(), tables.end(), random);
    const auto count = std::size_t(num_pages) * page_tokens * width;
    on_host.assign(count, std::nanf(""));
    on_gpu = exact_gpu()->allocate(count * sizeof(float));
    exact_gpu()->copy_from_host(on_host.data(), {on_gpu.get(), 1, int(count), int(count)});
  }

  int size() const { return static_cast<int>(positions.size()); }
  batch_view view() const { return {positions, sequences, tables, offsets}; }

  /// Some of the rows.
  exact_cache select(const std::vector<int>& rows) const {
    auto result = *this;
    result.positions.clear();
    result.sequences.clear();
    for (const int row : rows) {
      result.positions.push_back(positions[row]);
      result.sequences.push_back(sequences[row]);
    }
    return result;
  }
};

} // namespace

TEST_CASE("exact latent attention is that of the CPU, the same bits in any company", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  auto& device = *exact_gpu();
  std::mt19937 random(81);
  struct latent_case {
    int heads, latent, rope, page_tokens;
    std::vector<int> lengths;
  };
  for (const auto& c :
       {latent_case{4, 64, 32, 16, {1, 5, 40, 70}}, latent_case{5, 24, 10, 8, {9, 64}},
        latent_case{16, 512, 64, 64, {3, 64, 65, 200}}}) {
    INFO(c.heads << " heads of " << c.latent << " + " << c.rope);
    const exact_cache all(c.lengths, c.page_tokens, c.latent + c.rope, random);
    auto latents = random_matrix(all.size(), c.latent, random);
    auto keys = random_matrix(all.size(), c.rope, random);
    troupe::kernels::kv_layer_view host{const_cast<float*>(all.on_host.data()), all.num_pages,
                                        c.page_tokens, c.latent, c.rope};
    auto on_gpu = host;
    on_gpu.data = all.on_gpu.get();
    reference().append_kv(latents.view(), keys.view(), all.view(), host);
    device.append_kv(rows_of(latents).view(), rows_of(keys).view(), all.view(), on_gpu);
    const int rope_stride = c.rope + 8;
    auto q = random_matrix(all.size(), c.heads * c.latent, random);
    auto q_rope = random_matrix(all.size(), c.heads * rope_stride, random);
    const float scale = 0.7F / std::sqrt(float(c.latent + c.rope));
    matrix expected(all.size(), c.heads * c.latent);
    reference().latent_attention(q.view(), q_rope.view(), rope_stride, c.heads, scale, all.view(),
                                 host, expected.view());
    const auto out = new_rows(all.size(), c.heads * c.latent);
    device.latent_attention(rows_of(q).view(), rows_of(q_rope).view(), rope_stride, c.heads, scale,
                            all.view(), on_gpu, out.view());
    const auto got = out.read();
    CHECK(distance(got, expected) < kExact);
    for (const int count : {1, 7, 64}) {
      auto order = shuffled(all.size(), random);
      order.resize(std::min(count, all.size()));
      const auto some = all.select(order);
      const auto some_out = new_rows(some.size(), c.heads * c.latent);
      device.latent_attention(rows_of(select_rows(q, order)).view(),
                              rows_of(select_rows(q_rope, order)).view(), rope_stride, c.heads,
                              scale, some.view(), on_gpu, some_out.view());
      CHECK(same_bits(some_out.read(), select_rows(got, order)));
    }
  }
  CHECK(device.failure().empty());
}

TEST_CASE("exact grouped attention is that of the CPU, the same bits in any company", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  auto& device = *exact_gpu();
  std::mt19937 random(82);
  struct grouped_case {
    int heads, kv_heads, dim, page_tokens;
    std::vector<int> lengths;
  };
  for (const auto& c :
       {grouped_case{8, 2, 24, 16, {1, 5, 40, 70}}, grouped_case{32, 8, 128, 64, {130, 64, 20}},
        grouped_case{6, 1, 64, 16, {200}}}) {
    INFO(c.heads << " heads of " << c.dim << " on " << c.kv_heads);
    const exact_cache all(c.lengths, c.page_tokens, 2 * c.kv_heads * c.dim, random);
    auto keys = random_matrix(all.size(), c.kv_heads * c.dim, random);
    auto values = random_matrix(all.size(), c.kv_heads * c.dim, random);
    troupe::kernels::grouped_kv_view host{const_cast<float*>(all.on_host.data()), all.num_pages,
                                          c.page_tokens, c.kv_heads, c.dim};
    auto on_gpu = host;
    on_gpu.data = all.on_gpu.get();
    reference().append_grouped_kv(keys.view(), values.view(), all.view(), host);
    device.append_grouped_kv(rows_of(keys).view(), rows_of(values).view(), all.view(), on_gpu);
    auto q = random_matrix(all.size(), c.heads * c.dim, random);
    const float scale = 1.0F / std::sqrt(float(c.dim));
    matrix expected(all.size(), c.heads * c.dim);
    reference().grouped_attention(q.view(), c.heads, scale, all.view(), host, expected.view());
    const auto out = new_rows(all.size(), c.heads * c.dim);
    device.grouped_attention(rows_of(q).view(), c.heads, scale, all.view(), on_gpu, out.view());
    const auto got = out.read();
    CHECK(distance(got, expected) < kExact);
    for (const int count : {1, 7, 64}) {
      auto order = shuffled(all.size(), random);
      order.resize(std::min(count, all.size()));
      const auto some = all.select(order);
      const auto some_out = new_rows(some.size(), c.heads * c.dim);
      device.grouped_attention(rows_of(select_rows(q, order)).view(), c.heads, scale, some.view(),
                               on_gpu, some_out.view());
      CHECK(same_bits(some_out.read(), select_rows(got, order)));
    }
  }
  CHECK(device.failure().empty());
}

TEST_CASE("float32 values that are not finite are found, and rows are handed over", "[exact]") {
  if (gpu() == nullptr) {
    return;
  }
  using troupe::kernels::cuda::fetched_rows;
  auto& device = *exact_gpu();
  constexpr std::size_t kOffset = 256;
  constexpr std::uint64_t kTicket = 7;
  std::mt19937 random(83);
  for (const auto& [rows, cols, stride] :
       {std::tuple{1, 8, 8}, {3, 7, 9}, {33, 576, 580}, {1000, 1024, 1024}}) {
    INFO(rows << " x " << cols);
    auto x = random_matrix(rows, cols, random);
    // The lower half of a float32 says nothing, and neither does the upper half of another.
    const std::uint32_t harmless = 0x3F807F80U;
    std::memcpy(&x.data[0], &harmless, 4);
    const auto from = rows_of(x, stride), to = new_rows(rows, cols, stride);
    CHECK(device.all_finite(from.view()));
    const auto block = device.allocate(kOffset + x.data.size() * sizeof(float));
    device.leave_rows(from.view(), kTicket, block.get(), kOffset);
    CHECK(device.fetch_rows(block.get(), kOffset, kTicket, to.view()) == fetched_rows::whole);
    CHECK(same_bits(to.read(), x));
    CHECK(device.fetch_rows(block.get(), kOffset, kTicket - 1, to.view()) == fetched_rows::gone);
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
      auto damaged = x;
      damaged.data[random() % damaged.data.size()] = bad;
      const auto bad_rows = rows_of(damaged, stride);
      CHECK_FALSE(device.all_finite(bad_rows.view()));
      device.leave_rows(bad_rows.view(), kTicket, block.get(), kOffset);
      CHECK(device.fetch_rows(block.get(), kOffset, kTicket, to.view())
            == fetched_rows::not_finite);
    }
  }
  CHECK(device.failure().empty());
}

} // namespace kernel_tests
