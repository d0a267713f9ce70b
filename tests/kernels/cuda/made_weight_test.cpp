#include "gpu.hpp"

#include <algorithm>
#include <string>

#include <nlohmann/json.hpp>

#include "troupe/kernels/cuda/packed_matrix.hpp"
#include "troupe/kernels/made_weight.hpp"
#include "troupe/model/random_weights.hpp"

using namespace troupe;
using namespace troupe::model;
using kernel_tests::gpu;
using kernels::element_type;
using kernels::weight_matrix;
using kernels::weight_use;

namespace {

std::vector<unsigned char> download(const void* from, std::size_t bytes) {
  std::vector<unsigned char> result(bytes);
  const auto halves = static_cast<std::int32_t>(bytes / 2);
  gpu()->copy_to_host({const_cast<void*>(from), 1, halves, halves}, result.data());
  return result;
}

/// Whether two placed product weights are the same, bit by bit.
bool same(const weight_matrix& a, const weight_matrix& b) {
  const auto& x = *static_cast<const kernels::cuda::packed_matrix*>(a.packed);
  const auto& y = *static_cast<const kernels::cuda::packed_matrix*>(b.packed);
  const auto bytes =
    static_cast<std::size_t>(kernels::cuda::packed_bytes(x.num_rows, x.num_chunks));
  if (!kernels::cuda::same_shape(x, y) || (x.scales == nullptr) != (y.scales == nullptr)
      || download(x.data, bytes) != download(y.data, bytes))
    return false;
  const auto num_scales =
    static_cast<std::size_t>(kernels::cuda::ceil_div(x.num_rows, x.block_rows) * x.num_scale_cols);
  return x.scales == nullptr
         || download(x.scales, num_scales * 4) == download(y.scales, num_scales * 4);
}

/// A model whose matrices end in the middle of blocks and tiles.
random_weights source_of(const nlohmann::json& quantization, int vocab = 300, int hidden = 384,
                         int inner = 200) {
  nlohmann::json text{
    {"model_type", "llama"},         {"vocab_size", vocab},    {"hidden_size", hidden},
    {"intermediate_size", inner},    {"num_hidden_layers", 1}, {"num_attention_heads", 4},
    {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-6},   {"eos_token_id", 1}};
  if (!quantization.is_null())
    text["quantization_config"] = quantization;
  auto config = parse_model_config(text.dump(), "r.json");
  REQUIRE(config);
  return {*config, "r.json"};
}

const nlohmann::json kFp8{{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}};

nlohmann::json int8_of(int group) {
  return {
    {"quant_method", "compressed-tensors"},
    {"config_groups", {{"group_0", {{"weights", {{"num_bits", 8}, {"group_size", group}}}}}}}};
}

stored_weight find(random_weights& source, const nlohmann::json& quantization,
                   const std::string& name, int rows, int cols, weight_loading how) {
  model_config config;
  if (quantization == kFp8)
    config.fp8 = fp8_config{128, 128};
  auto weight = find_weight(source, config, name, rows, cols, how);
  if (!weight)
    FAIL(weight.error().cause);
  return std::move(*weight);
}

/// Weight memory that outlives those who use it, as a keeper's does.
class kept_memory final : public kernels::cuda::weight_memory {
public:
  std::shared_ptr<void> piece(std::size_t index, std::size_t bytes) override {
    if (index == pieces_.size()) {
      std::string error;
      pieces_.push_back(kernels::cuda::export_memory(0, bytes, error).memory);
    }
    return pieces_.at(index);
  }

  bool is_filled() const override { return is_filled_; }
  void fill() { is_filled_ = true; }

private:
  std::vector<std::shared_ptr<void>> pieces_;
  bool is_filled_ = false;
};

const std::string kUp = "model.layers.0.mlp.up_proj.weight";     // [inner, hidden]
const std::string kDown = "model.layers.0.mlp.down_proj.weight"; // [hidden, inner]

} // namespace

TEST_CASE("weights made by the GPU are those of the host, bit by bit") {
  if (gpu() == nullptr)
    return;
  const auto quantization = GENERATE(nlohmann::json(), kFp8, int8_of(128), int8_of(96));
  CAPTURE(quantization.dump());
  auto source = source_of(quantization);
  const struct {
    std::string name;
    int rows, cols;
  } matrices[] = {{kUp, 200, 384}, {kDown, 384, 200}, {"lm_head.weight", 300, 384}};
  for (const auto& [name, rows, cols] : matrices) {
    CAPTURE(name);
    const auto made = find(source, quantization, name, rows, cols, weight_loading::recipe);
    const auto stored = find(source, quantization, name, rows, cols, weight_loading::load);
    REQUIRE(made.recipe);
    REQUIRE(made.view().data == nullptr);
    CHECK(made.num_bytes == stored.num_bytes);
    CHECK(made.num_tensors == stored.num_tensors);
    CHECK(same(gpu()->place(made.view()), gpu()->place(stored.view())));
    const auto a = gpu()->place(made.view(), weight_use::stored);
    const auto b = gpu()->place(stored.view(), weight_use::stored);
    const auto bytes = static_cast<std::size_t>(rows) * cols * 2;
    CHECK(a.type == element_type::bf16);
    CHECK(download(a.data, bytes) == download(b.data, bytes));
  }
  CHECK(gpu()->failure().empty());
}

TEST_CASE("weights that the GPU rounds to 8 bit are those of the host, bit by bit") {
  if (gpu() == nullptr)
    return;
  // Made up, brought, and of every wider type.
  auto source = source_of(nlohmann::json());
  const auto made = find(source, {}, kDown, 384, 200, weight_loading::recipe);
  const auto stored = find(source, {}, kDown, 384, 200, weight_loading::load);
  const auto narrow = [](const weight_matrix& w) {
    const auto on_host = kernel_tests::reference().place(w, weight_use::int8_product);
    REQUIRE(on_host.type == element_type::i8);
    return gpu()->place(on_host);
  };
  const auto placed = gpu()->place(made.view(), weight_use::int8_product);
  CHECK(placed.type == element_type::i8);
  CHECK(same(placed, narrow(stored.view())));
  CHECK(same(gpu()->place(stored.view(), weight_use::int8_product), placed));
  std::mt19937 random(8);
  for (const auto type : {element_type::f32, element_type::bf16, element_type::f16})
    for (const auto& [rows, cols] : {std::pair{40, 384}, {33, 200}, {5, 72}}) {
      const auto w = kernel_tests::random_weight(type, rows, cols, random);
      CAPTURE(int(type), rows, cols);
      CHECK(same(gpu()->place(w.view, weight_use::int8_product), narrow(w.view)));
    }
  // What has scales already stays as it is.
  const auto quantised = kernel_tests::random_weight(element_type::f8_e4m3, 64, 256, random, true);
  CHECK(gpu()->place(quantised.view, weight_use::int8_product).type == element_type::f8_e4m3);
  CHECK(gpu()->failure().empty());
}

TEST_CASE("a successor finds weights where its predecessor left them, those in 8 bit too") {
  if (gpu() == nullptr)
    return;
  auto source = source_of(kFp8);
  const auto kept = std::make_shared<kept_memory>();
  std::vector<weight_matrix> left, found;
  std::vector<std::unique_ptr<kernels::cuda::gpu_ops>> owners; // placed weights live as long
  for (auto* all : {&left, &found}) {
    std::string error;
    auto& ops = owners.emplace_back(kernels::cuda::make_cuda_ops(0, error, nullptr, kept));
    REQUIRE(ops != nullptr);
    CHECK((ops->reads_of_weights() == kernels::weight_reading::shapes) == (all == &found));
    const auto place = [&](const std::string& name, int rows, int cols, weight_use use) {
      const auto made = find(source, kFp8, name, rows, cols, weight_loading::recipe);
      all->push_back(ops->place(made.view(), use));
    };
    place("model.embed_tokens.weight", 300, 384, weight_use::stored);
    place(kUp, 200, 384, weight_use::product);
    place("lm_head.weight", 300, 384, weight_use::int8_product);
    place(kDown, 384, 200, weight_use::product);
    ops->synchronise();
    CHECK(ops->failure().empty());
    kept->fill();
  }
  for (std::size_t i = 0; i < left.size(); ++i) {
    CAPTURE(i);
    CHECK(found[i].type == left[i].type);
    CHECK(found[i].data == left[i].data);
    CHECK(found[i].scales == left[i].scales);
    if (left[i].packed != nullptr)
      CHECK(same(found[i], left[i]));
  }
  CHECK(left[2].type == element_type::i8);
}

namespace {

/// What identical rows make of an exact weight.
kernel_tests::matrix product_of(kernels::cuda::gpu_ops& device, const weight_matrix& placed) {
  std::mt19937 random(9);
  const auto x = kernel_tests::random_matrix(3, placed.num_cols, random);
  const kernel_tests::gpu_rows input(x, 0, device), out(3, placed.num_rows, 0, device);
  device.linear(input.view(), placed, out.view());
  return out.read();
}

} // namespace

TEST_CASE("exact weights made by the GPU are those of the host", "[exact]") {
  if (gpu() == nullptr)
    return;
  auto& device = *kernel_tests::exact_gpu();
  for (const auto& quantization : {nlohmann::json(), kFp8, int8_of(128), int8_of(96)}) {
    CAPTURE(quantization.dump());
    auto source = source_of(quantization);
    const auto made = find(source, quantization, kUp, 200, 384, weight_loading::recipe);
    const auto stored = find(source, quantization, kUp, 200, 384, weight_loading::load);
    const auto product = product_of(device, device.place(made.view()));
    CHECK(kernel_tests::same_bits(product, product_of(device, device.place(stored.view()))));
    CHECK(product.data != kernel_tests::matrix(3, 200).data);
    const auto narrow = [&](const weight_matrix& w) {
      return product_of(device, device.place(w, weight_use::int8_product));
    };
    CHECK(kernel_tests::same_bits(narrow(made.view()), narrow(stored.view())));
  }
  CHECK(device.failure().empty());
}

TEST_CASE("a successor with exact numerics knows how wide its predecessor's weights are",
          "[exact]") {
  if (gpu() == nullptr)
    return;
  std::mt19937 random(10);
  const auto wide = kernel_tests::random_weight(element_type::f32, 70, 90, random);
  const auto halves = kernel_tests::random_weight(element_type::f16, 40, 100, random);
  const auto narrow = kernel_tests::random_weight(element_type::f8_e4m3, 130, 200, random, true);
  const auto kept = std::make_shared<kept_memory>();
  std::vector<weight_matrix> left, found;
  std::vector<kernel_tests::matrix> products;
  std::vector<std::unique_ptr<kernels::cuda::gpu_ops>> owners; // placed weights live as long
  for (auto* all : {&left, &found}) {
    std::string error;
    auto& ops = owners.emplace_back(
      kernels::cuda::make_cuda_ops(0, error, nullptr, kept, nullptr, 0, kernels::numerics::exact));
    REQUIRE(ops != nullptr);
    for (const auto* w : {&wide, &halves, &narrow}) {
      auto view = w->view;
      if (all == &found) { // of which only the shape is known, see weight_store::keep_shape
        view.data = nullptr;
        view.type = view.scales != nullptr ? view.type : element_type::bf16;
      }
      all->push_back(ops->place(view));
      products.push_back(product_of(*ops, all->back()));
    }
    all->push_back(
      ops->place(all == &left ? halves.view : weight_matrix{nullptr, element_type::f16, 40, 100},
                 weight_use::stored));
    ops->synchronise();
    CHECK(ops->failure().empty());
    kept->fill();
  }
  for (std::size_t i = 0; i < left.size(); ++i) {
    CAPTURE(i);
    CHECK(found[i].type == left[i].type);
    CHECK(found[i].data == left[i].data);
    if (i < 3)
      CHECK(kernel_tests::same_bits(products[i], products[i + 3]));
  }
  CHECK(left[3].type == element_type::f32);
}

TEST_CASE("a large weight that the GPU rounds in parts is whole", "[large]") {
  if (gpu() == nullptr)
    return;
  auto source = source_of({}, 300, 1024, 70000);
  const auto made = find(source, {}, kUp, 70000, 1024, weight_loading::recipe);
  const auto stored = find(source, {}, kUp, 70000, 1024, weight_loading::load);
  const auto on_host = kernel_tests::reference().place(stored.view(), weight_use::int8_product);
  const auto placed = gpu()->place(made.view(), weight_use::int8_product);
  CHECK(same(placed, gpu()->place(on_host)));
  CHECK(same(placed, gpu()->place(stored.view(), weight_use::int8_product)));
}

TEST_CASE("large weights made or brought in parts are whole", "[large]") {
  if (gpu() == nullptr)
    return;
  const auto quantization = GENERATE(nlohmann::json(), kFp8);
  auto source = source_of(quantization, 300, 1024, 70000);
  const auto made = find(source, quantization, kUp, 70000, 1024, weight_loading::recipe);
  const auto stored = find(source, quantization, kUp, 70000, 1024, weight_loading::load);
  const auto placed = gpu()->place(stored.view());
  CHECK(same(gpu()->place(made.view()), placed));
  // Rows of the last part, as a weight of their own.
  constexpr int first = 69888;
  auto last = stored.view();
  last.num_rows -= first;
  last.data = static_cast<const char*>(last.data) + first * kernels::row_bytes(last.type, 1024);
  if (last.scales != nullptr)
    last.scales += first / 128 * 8;
  const auto& whole = *static_cast<const kernels::cuda::packed_matrix*>(placed.packed);
  const auto part = gpu()->place(last);
  const auto bytes =
    static_cast<std::size_t>(kernels::cuda::packed_bytes(70000 - first, whole.num_chunks));
  const auto* at =
    static_cast<const char*>(whole.data) + kernels::cuda::packed_bytes(first, whole.num_chunks);
  CHECK(download(part.data, bytes) == download(at, bytes));
}

TEST_CASE("a part of a made-up weight has the codes and scales of the whole") {
  if (gpu() == nullptr)
    return;
  const auto quantization = GENERATE(nlohmann::json(), kFp8, int8_of(128), int8_of(0));
  CAPTURE(quantization.dump());
  auto source = source_of(quantization);
  const auto stored = find(source, quantization, kUp, 200, 384, weight_loading::load);
  const auto whole = stored.view();
  const bool scaled = whole.scales != nullptr;
  const struct {
    int first_row, end_row, first_col, end_col, block_rows;
  } parts[] = {{0, 128, 0, 256, 128}, {128, 200, 128, 384, 128}, {64, 128, 256, 384, 64}};
  for (const auto& p : parts) {
    CAPTURE(p.first_row, p.first_col);
    const int rows = p.end_row - p.first_row;
    const int cols = p.end_col - p.first_col;
    auto made = find(source, quantization, kUp, 200, 384, weight_loading::recipe);
    made.recipe->first_row = p.first_row;
    made.recipe->first_col = p.first_col;
    made.num_rows = rows;
    made.num_cols = cols;
    made.block_rows = std::min(made.block_rows, p.block_rows);
    made.block_cols = std::min(made.block_cols, cols);

    weight_matrix cut = whole;
    cut.num_rows = rows;
    cut.num_cols = cols;
    const auto size = kernels::size_of(whole.type);
    std::vector<unsigned char> codes;
    for (int row = 0; row < rows; ++row) {
      const auto* from = static_cast<const unsigned char*>(whole.data)
                         + ((p.first_row + row) * 384 + p.first_col) * size;
      codes.insert(codes.end(), from, from + cols * size);
    }
    cut.data = codes.data();
    std::vector<float> scales;
    if (scaled) {
      cut.block_rows = made.block_rows;
      cut.block_cols = made.block_cols;
      const int across = (384 + whole.block_cols - 1) / whole.block_cols;
      for (int row = p.first_row; row < p.end_row; row += cut.block_rows)
        for (int col = p.first_col; col < p.end_col; col += cut.block_cols)
          scales.push_back(whole.scales[row / whole.block_rows * across + col / whole.block_cols]);
      cut.scales = scales.data();
    }
    CHECK(same(gpu()->place(made.view()), gpu()->place(cut)));
  }
}
