#include "gpu.hpp"

#include <algorithm>
#include <random>

namespace kernel_tests {

using troupe::kernels::batch_view;

namespace {

/// Sequences in pages, on both devices, and what stands in them.
struct cache {
  std::vector<std::int32_t> tables, offsets;
  std::vector<float> on_host;
  std::shared_ptr<void> on_gpu;
  int num_pages = 1; // the first page belongs to nobody
  int page_tokens = 16;

  cache(const std::vector<int>& lengths, int tokens_of_page, int width, std::mt19937& random)
    : page_tokens(tokens_of_page) {
    for (const int length : lengths) {
      offsets.push_back(static_cast<std::int32_t>(tables.size()));
      for (int p = 0; p < length; p += page_tokens) {
        tables.push_back(num_pages++);
      }
    }
    std::shuffle(tables.begin(), tables.end(), random);
    const auto count = std::size_t(num_pages) * page_tokens * width;
    on_host.assign(count, std::nanf(""));
    on_gpu = gpu()->allocate(count * 2);
    const std::vector<std::uint16_t> nan(count, 0x7FC0);
    gpu()->copy_from_host(nan.data(), {on_gpu.get(), 1, int(count), int(count)});
  }
};

/// Every position of every sequence, in any order.
struct batch {
  std::vector<std::int32_t> positions, sequences;

  batch(const std::vector<int>& lengths, std::mt19937& random) {
    std::vector<std::pair<int, int>> rows;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      for (int p = 0; p < lengths[s]; ++p) {
        rows.emplace_back(p, int(s));
      }
    }
    std::shuffle(rows.begin(), rows.end(), random);
    for (const auto& [position, sequence] : rows) {
      positions.push_back(position);
      sequences.push_back(sequence);
    }
  }

  int size() const { return static_cast<int>(positions.size()); }

  batch_view view(const cache& c) const { return {positions, sequences, c.tables, c.offsets}; }

  batch select(const std::vector<int>& rows) const {
    batch result = *this;
    result.positions.clear();
    result.sequences.clear();
    for (const int row : rows) {
      result.positions.push_back(positions[row]);
      result.sequences.push_back(sequences[row]);
    }
    return result;
  }
};

std::vector<int> last_rows(const batch& all, const std::vector<int>& lengths) {
  std::vector<int> result;
  for (int row = 0; row < all.size(); ++row) {
    if (all.positions[row] >= lengths[all.sequences[row]] - 3) {
      result.push_back(row);
    }
  }
  return result;
}

struct latent_case {
  int heads, latent, rope, page_tokens;
  std::vector<int> lengths;
};

} // namespace

TEST_CASE("latent attention is that of the reference, the same bits in any company") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(4);
  const std::vector<latent_case> cases{{4, 64, 32, 16, {1, 5, 40, 70}},
                                       {6, 48, 16, 16, {33, 90}},
                                       {5, 24, 10, 8, {9, 64}},
                                       {16, 512, 64, 64, {3, 64, 65, 300}},
                                       {128, 512, 64, 64, {700, 20}}};
  for (const auto& c : cases) {
    const int width = c.latent + c.rope;
    INFO(c.heads << " heads of " << c.latent << " + " << c.rope);
    cache pages(c.lengths, c.page_tokens, width, random);
    const batch all(c.lengths, random);
    auto latents = random_rows(all.size(), c.latent, random);
    auto keys = random_rows(all.size(), c.rope, random);
    const troupe::kernels::kv_layer_view host{pages.on_host.data(), pages.num_pages, c.page_tokens,
                                              c.latent, c.rope};
    auto device = host;
    device.data = pages.on_gpu.get();
    reference().append_kv(latents.view(), keys.view(), all.view(pages), host);
    gpu()->append_kv(gpu_rows(latents).view(), gpu_rows(keys).view(), all.view(pages), device);

    // The longest rows and some others.
    auto rows = last_rows(all, c.lengths);
    for (int i = 0; i < 60 && i < all.size(); ++i) {
      rows.push_back(i);
    }
    const auto asked = all.select(rows);
    const int rope_stride = c.rope + 8;
    auto q = random_rows(asked.size(), c.heads * c.latent, random);
    auto q_rope = random_rows(asked.size(), c.heads * rope_stride, random);
    const float scale = 0.7F / std::sqrt(float(width));
    matrix expected(asked.size(), c.heads * c.latent);
    reference().latent_attention(q.view(), q_rope.view(), rope_stride, c.heads, scale,
                                 asked.view(pages), host, expected.view());
    const gpu_rows q_gpu(q), rope_gpu(q_rope), out(asked.size(), c.heads * c.latent);
    gpu()->latent_attention(q_gpu.view(), rope_gpu.view(), rope_stride, c.heads, scale,
                            asked.view(pages), device, out.view());
    const auto got = out.read();
    CHECK(distance(got, expected) < 2 * kRounding);
    for (const int count : {1, 7, 64}) {
      auto order = shuffled(asked.size(), random);
      order.resize(std::min<int>(count, asked.size()));
      const auto some = asked.select(order);
      const gpu_rows some_q(select_rows(q, order)), some_rope(select_rows(q_rope, order));
      const gpu_rows some_out(some.size(), c.heads * c.latent);
      gpu()->latent_attention(some_q.view(), some_rope.view(), rope_stride, c.heads, scale,
                              some.view(pages), device, some_out.view());
      CHECK(same_bits(some_out.read(), select_rows(got, order)));
    }
  }
  CHECK(gpu()->failure().empty());
}

TEST_CASE("grouped attention is that of the reference, the same bits in any company") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(5);
  struct grouped_case {
    int heads, kv_heads, dim, page_tokens;
    std::vector<int> lengths;
  };
  const std::vector<grouped_case> cases{{8, 2, 24, 16, {1, 5, 40, 70}},
                                        {4, 4, 32, 8, {33, 9}},
                                        {32, 8, 128, 64, {130, 64, 20}},
                                        {6, 1, 64, 16, {200}}};
  for (const auto& c : cases) {
    INFO(c.heads << " heads of " << c.dim << " on " << c.kv_heads);
    cache pages(c.lengths, c.page_tokens, 2 * c.kv_heads * c.dim, random);
    const batch all(c.lengths, random);
    auto keys = random_rows(all.size(), c.kv_heads * c.dim, random);
    auto values = random_rows(all.size(), c.kv_heads * c.dim, random);
    const troupe::kernels::grouped_kv_view host{pages.on_host.data(), pages.num_pages,
                                                c.page_tokens, c.kv_heads, c.dim};
    auto device = host;
    device.data = pages.on_gpu.get();
    reference().append_grouped_kv(keys.view(), values.view(), all.view(pages), host);
    gpu()->append_grouped_kv(gpu_rows(keys).view(), gpu_rows(values).view(), all.view(pages),
                             device);
    auto q = random_rows(all.size(), c.heads * c.dim, random);
    const float scale = 1.0F / std::sqrt(float(c.dim));
    matrix expected(all.size(), c.heads * c.dim);
    reference().grouped_attention(q.view(), c.heads, scale, all.view(pages), host, expected.view());
    const gpu_rows q_gpu(q), out(all.size(), c.heads * c.dim);
    gpu()->grouped_attention(q_gpu.view(), c.heads, scale, all.view(pages), device, out.view());
    const auto got = out.read();
    CHECK(distance(got, expected) < 2 * kRounding);
    for (const int count : {1, 7, 64}) {
      auto order = shuffled(all.size(), random);
      order.resize(std::min<int>(count, all.size()));
      const auto some = all.select(order);
      const gpu_rows some_q(select_rows(q, order)), some_out(some.size(), c.heads * c.dim);
      gpu()->grouped_attention(some_q.view(), c.heads, scale, some.view(pages), device,
                               some_out.view());
      CHECK(same_bits(some_out.read(), select_rows(got, order)));
    }
  }
  CHECK(gpu()->failure().empty());
}

} // namespace kernel_tests
