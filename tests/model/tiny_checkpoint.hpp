#pragma once

#include "temporary_directory.hpp"

#include "troupe/model/weights.hpp"

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

namespace troupe::model::test {

inline void write_file(const std::filesystem::path& file, const std::string& bytes) {
  std::ofstream out(file, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_file(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

struct blob {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string bytes;
};

/// The bytes of a safetensors file with these tensors, one behind the other.
inline std::string to_safetensors(const std::vector<blob>& blobs, std::size_t header_padding = 0) {
  nlohmann::json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::string data;
  for (const auto& one : blobs) {
    header[one.name] = {{"dtype", one.dtype},
                        {"shape", one.shape},
                        {"data_offsets", {data.size(), data.size() + one.bytes.size()}}};
    data += one.bytes;
  }
  auto text = header.dump();
  text += std::string((8 - text.size() % 8) % 8 + header_padding, ' ');
  const std::uint64_t size = text.size();
  std::string result(8, '\0');
  std::memcpy(result.data(), &size, 8);
  return result + text + data;
}

inline std::string to_bytes(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

/// config.json of a model of a few thousand parameters: two layers, the second with experts.
inline nlohmann::json tiny_config() {
  return nlohmann::json::parse(R"({"model_type": "deepseek_v3", "vocab_size": 32, "hidden_size": 12,
    "intermediate_size": 20, "moe_intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 8, "q_lora_rank": 6, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 5, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "eos_token_id": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}})");
}

/// Random tensors for `config`: projections in FP8 with scales, all else float32.
inline std::vector<blob> tiny_blobs(const model_config& config, std::uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> value(-0.5F, 0.5F);
  std::vector<blob> result;
  for (const auto& spec : list_tensors(config, whole_model(config))) {
    if (spec.name.find("_proj") != std::string::npos && config.fp8) {
      std::string bytes(static_cast<std::size_t>(spec.num_rows) * spec.num_cols, '\0');
      for (auto& byte : bytes)
        byte = static_cast<char>(random() % 0x7f | (random() % 2) << 7);
      result.push_back({spec.name, "F8_E4M3", {spec.num_rows, spec.num_cols}, bytes});
      const auto rows = (spec.num_rows + config.fp8->block_rows - 1) / config.fp8->block_rows;
      const auto cols = (spec.num_cols + config.fp8->block_cols - 1) / config.fp8->block_cols;
      std::vector<float> scales(static_cast<std::size_t>(rows) * cols);
      for (auto& scale : scales)
        scale = 0.001F * (1.0F + value(random));
      result.push_back({spec.name + "_scale_inv", "F32", {rows, cols}, to_bytes(scales)});
      continue;
    }
    std::vector<float> values(static_cast<std::size_t>(std::max(spec.num_rows, 1)) * spec.num_cols);
    for (auto& one : values)
      one = value(random);
    std::vector<std::int64_t> shape{spec.num_rows, spec.num_cols};
    if (spec.num_rows == 0)
      shape.erase(shape.begin());
    result.push_back({spec.name, "F32", shape, to_bytes(values)});
  }
  return result;
}

/// Writes blobs as two shards with an index.
inline void write_sharded(const std::filesystem::path& directory, const std::vector<blob>& blobs) {
  nlohmann::json index;
  index["metadata"] = {{"total_size", 0}};
  const auto middle = blobs.size() / 2;
  const std::vector<blob> first(blobs.begin(), blobs.begin() + middle);
  const std::vector<blob> second(blobs.begin() + middle, blobs.end());
  for (const auto& one : first)
    index["weight_map"][one.name] = "model-00001-of-00002.safetensors";
  for (const auto& one : second)
    index["weight_map"][one.name] = "model-00002-of-00002.safetensors";
  write_file(directory / "model-00001-of-00002.safetensors", to_safetensors(first));
  write_file(directory / "model-00002-of-00002.safetensors", to_safetensors(second));
  write_file(directory / "model.safetensors.index.json", index.dump());
}

} // namespace troupe::model::test
