#include "troupe/model/conversion_plan.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <map>
#include <string_view>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::model {

namespace {

using kernels::element_type;

constexpr std::array<std::string_view, 10> kQuantizedModules{
  "q_a_proj",           "q_b_proj", "q_proj",    "k_proj",  "v_proj",
  "kv_a_proj_with_mqa", "o_proj",   "gate_proj", "up_proj", "down_proj"};

/// Tensors that belong to a quantized "P.weight" and are gone when it is expanded.
constexpr std::array<std::string_view, 3> kCompanions{"weight_scale_inv", "weight_scale",
                                                      "input_scale"};

/// Tensors that only integer formats have.
constexpr std::array<std::string_view, 2> kIntegerTensors{"qweight", "weight_packed"};

/// The number behind `key` in a name ("layers.12." gives 12); -1 if there is none.
std::int32_t number_behind(std::string_view name, std::string_view key) {
  const auto at = name.find(key);
  if (at == std::string_view::npos)
    return -1;
  std::int32_t value = -1;
  const auto* begin = name.data() + at + key.size();
  const auto [end, problem] = std::from_chars(begin, name.data() + name.size(), value);
  return problem == std::errc{} && end != name.data() + name.size() && *end == '.' ? value : -1;
}

std::string_view last_part(std::string_view name) {
  const auto dot = name.rfind('.');
  return dot == std::string_view::npos ? name : name.substr(dot + 1);
}

std::string_view all_but_last_part(std::string_view name) {
  const auto dot = name.rfind('.');
  return dot == std::string_view::npos ? std::string_view{} : name.substr(0, dot);
}

template <std::size_t Size>
bool is_among(std::string_view what, const std::array<std::string_view, Size>& list) {
  return std::find(list.begin(), list.end(), what) != list.end();
}

tl::unexpected<error> wrong(const checkpoint& source, const std::string& tensor,
                            const std::string& what, std::string cure) {
  return fail(error_code::invalid_model,
              fmt::format("{}: tensor \"{}\" {}", source.file_of(tensor), tensor, what),
              std::move(cure));
}

stored_tensor make_output(std::string name, std::string dtype, std::size_t element_bytes,
                          std::vector<std::int64_t> shape) {
  std::uint64_t num_bytes = element_bytes;
  for (const auto dim : shape)
    num_bytes *= static_cast<std::uint64_t>(dim);
  return {std::move(name), std::move(dtype), std::move(shape), num_bytes};
}

/// Why a matrix cannot be quantized; empty if it can.
std::string misfit(const planned_tensor& tensor, const integer_format& format) {
  if (format.group_size > 0 && tensor.num_cols % format.group_size != 0)
    return fmt::format("{} columns are no multiple of {}", tensor.num_cols, format.group_size);
  if (format.bits == 4 && tensor.num_rows % 8 != 0)
    return fmt::format("{} rows do not fill words of 8", tensor.num_rows);
  return {};
}

std::vector<stored_tensor> quantized_outputs(const planned_tensor& tensor,
                                             const integer_format& format) {
  const std::int64_t rows = tensor.num_rows;
  const std::int64_t cols = tensor.num_cols;
  const std::int64_t groups = format.num_groups(tensor.num_cols);
  const auto stem = std::string(all_but_last_part(tensor.name)) + ".";
  if (format.bits == 8)
    return {make_output(stem + "weight_scale", "F32", 4, {rows, groups}),
            make_output(stem + "weight", "I8", 1, {rows, cols})};
  return {make_output(stem + "qweight", "I32", 4, {cols, rows / 8}),
          make_output(stem + "qzeros", "I32", 4, {groups, rows / 8}),
          make_output(stem + "scales", "F16", 2, {groups, rows})};
}

class planner {
public:
  planner(checkpoint& source, const model_config& config, conversion_plan& plan)
    : source_(source), config_(config), plan_(plan) {}

  expected<void> run() {
    for (const auto& name : source_.tensor_names())
      if (auto ok = add(name); !ok)
        return ok;
    cut();
    return {};
  }

private:
  /// Where a tensor goes, and in which order: stage, group, layer, expert, name.
  using place = std::tuple<std::int32_t, std::int32_t, std::int32_t, std::int32_t, std::string>;

  expected<void> add(const std::string& name) {
    const auto part = last_part(name);
    if (is_among(part, kIntegerTensors))
      return wrong(source_, name, "is quantized to integers already",
                   "convert the BF16, FP16, FP32 or FP8 checkpoint that it was made from");
    auto view = source_.tensor(name);
    if (!view)
      return tl::unexpected(std::move(view.error()));
    plan_.source_bytes += view->num_bytes;
    if (is_among(part, kCompanions)
        && source_.contains(fmt::format("{}.weight", all_but_last_part(name))))
      return {};
    planned_tensor tensor;
    tensor.name = name;
    if (part == "weight" && view->shape.size() == 2) {
      if (auto ok = add_matrix(*view, tensor); !ok)
        return ok;
    } else {
      copy(*view, tensor);
    }
    tensors_.emplace(place_of(name), std::move(tensor));
    return {};
  }

  static void copy(const tensor_view& view, planned_tensor& tensor) {
    tensor.treatment = tensor_treatment::copied;
    tensor.outputs = {{tensor.name,
                       std::string(view.dtype),
                       {view.shape.begin(), view.shape.end()},
                       view.num_bytes}};
  }

  expected<void> add_matrix(const tensor_view& view, planned_tensor& tensor) {
    constexpr std::int64_t max_dim = std::numeric_limits<std::int32_t>::max() / 2;
    const auto rows = view.shape[0];
    const auto cols = view.shape[1];
    if (rows < 1 || cols < 1 || rows > max_dim || cols > max_dim)
      return wrong(source_, tensor.name, fmt::format("has shape [{}, {}]", rows, cols),
                   "the checkpoint is damaged: copy it again from its source");
    if (view.type == element_type::i8)
      return wrong(source_, tensor.name, "is quantized to integers already",
                   "convert the BF16, FP16, FP32 or FP8 checkpoint that it was made from");
    tensor.num_rows = static_cast<std::int32_t>(rows);
    tensor.num_cols = static_cast<std::int32_t>(cols);
    const auto module = all_but_last_part(tensor.name);
    const auto is_wanted = view.type && is_among(last_part(module), kQuantizedModules);
    const auto reason = is_wanted ? misfit(tensor, plan_.format) : std::string{};
    if (is_wanted && reason.empty()) {
      tensor.treatment = tensor_treatment::quantized;
      tensor.outputs = quantized_outputs(tensor, plan_.format);
      return {};
    }
    if (!reason.empty())
      plan_.misfits.push_back(fmt::format("{}: {}", tensor.name, reason));
    if (last_part(module) != "embed_tokens")
      plan_.kept_modules.emplace_back(module);
    if (view.type == element_type::f8_e4m3) {
      tensor.treatment = tensor_treatment::expanded;
      tensor.outputs = {make_output(tensor.name, "BF16", 2, {rows, cols})};
    } else {
      copy(view, tensor);
    }
    return {};
  }

  place place_of(const std::string& name) const {
    const auto& ends = plan_.layout.stage_ends;
    const auto last = static_cast<std::int32_t>(ends.size()) - 1;
    const auto layer = number_behind(name, "model.layers.");
    const auto expert = number_behind(name, ".mlp.experts.");
    const auto groups = plan_.layout.expert_groups;
    const bool is_first = layer < 0 && name.find("embed_tokens") != std::string::npos;
    const auto found = std::upper_bound(ends.begin(), ends.end(), layer);
    const auto stage = layer >= 0 ? std::min(static_cast<std::int32_t>(found - ends.begin()), last)
                                  : (is_first ? 0 : last);
    const auto group = groups > 0 && expert >= 0 && expert < config_.num_experts
                         ? expert / (config_.num_experts / groups)
                         : -1;
    const auto order = layer >= 0 ? layer : (is_first ? -1 : std::numeric_limits<int>::max());
    return {stage, group, order, expert, name};
  }

  /// Makes files of the tensors in their order.
  void cut() {
    std::map<std::pair<std::int32_t, std::int32_t>, int> num_files;
    for (auto& [where, tensor] : tensors_) {
      const auto stage = std::get<0>(where);
      const auto group = std::get<1>(where);
      std::uint64_t num_bytes = 0;
      for (const auto& output : tensor.outputs)
        num_bytes += output.num_bytes;
      const auto* open = plan_.shards.empty() ? nullptr : &plan_.shards.back();
      if (open == nullptr || open->stage != stage || open->expert_group != group
          || open->num_bytes + num_bytes > plan_.layout.shard_bytes) {
        const auto number = ++num_files[{stage, group}];
        const auto what = group < 0 ? std::string("trunk") : fmt::format("experts-{}", group);
        plan_.shards.push_back(
          {fmt::format("model-stage-{}-{}-{:05}.safetensors", stage, what, number),
           stage,
           group,
           {},
           0});
      }
      plan_.shards.back().num_bytes += num_bytes;
      plan_.num_bytes += num_bytes;
      plan_.shards.back().tensors.push_back(std::move(tensor));
    }
  }

  checkpoint& source_;
  const model_config& config_;
  conversion_plan& plan_;
  std::map<place, planned_tensor> tensors_;
};

expected<void> check_options(const model_config& config, const integer_format& format,
                             const shard_layout& layout) {
  const auto refuse = [](std::string cause, std::string cure) {
    return fail(error_code::invalid_config, std::move(cause), std::move(cure));
  };
  if ((format.bits != 4 && format.bits != 8) || format.group_size < 0
      || (format.bits == 4 && format.group_size == 0))
    return refuse(fmt::format("{} bits with groups of {} columns are not written", format.bits,
                              format.group_size),
                  "int4 needs groups, such as 64 or 128; int8 takes 0 (rows) as well");
  const auto& ends = layout.stage_ends;
  if (ends.empty() || ends.front() < 1 || ends.back() != config.num_layers
      || std::adjacent_find(ends.begin(), ends.end(), std::greater_equal<>()) != ends.end())
    return refuse(
      fmt::format("{} layers cannot be cut into {} stages", config.num_layers, ends.size()),
      fmt::format("give from 1 to {} stages", config.num_layers));
  const auto groups = layout.expert_groups;
  if (groups < 0 || (groups > 0 && (config.num_experts == 0 || config.num_experts % groups != 0)))
    return refuse(
      fmt::format("{} experts cannot be cut into {} groups", config.num_experts, groups),
      "give a divisor of the number of experts, or 0");
  return {};
}

} // namespace

std::vector<stored_tensor> planned_shard::outputs() const {
  std::vector<stored_tensor> result;
  for (const auto& tensor : tensors)
    result.insert(result.end(), tensor.outputs.begin(), tensor.outputs.end());
  return result;
}

expected<conversion_plan> plan_conversion(checkpoint& source, const model_config& config,
                                          const integer_format& format,
                                          const shard_layout& layout) {
  if (auto ok = check_options(config, format, layout); !ok)
    return tl::unexpected(std::move(ok.error()));
  conversion_plan plan;
  plan.format = format;
  plan.layout = layout;
  if (auto ok = planner(source, config, plan).run(); !ok)
    return tl::unexpected(std::move(ok.error()));
  return plan;
}

std::string quantization_config_of(const conversion_plan& plan) {
  using json = nlohmann::ordered_json;
  const auto& format = plan.format;
  if (format.bits == 4)
    return json{
      {"quant_method", "awq"}, {"bits", 4},         {"group_size", format.group_size},
      {"zero_point", true},    {"version", "gemm"}, {"modules_to_not_convert", plan.kept_modules}}
      .dump();
  const bool by_row = format.group_size == 0;
  json weights = {{"num_bits", 8},
                  {"type", "int"},
                  {"symmetric", true},
                  {"dynamic", false},
                  {"strategy", by_row ? "channel" : "group"},
                  {"group_size", by_row ? json() : json(format.group_size)}};
  json activations;
  if (by_row)
    activations = {{"num_bits", 8},   {"type", "int"},       {"symmetric", true},
                   {"dynamic", true}, {"strategy", "token"}, {"group_size", nullptr}};
  json group = {{"targets", {"Linear"}},
                {"weights", std::move(weights)},
                {"input_activations", std::move(activations)},
                {"output_activations", nullptr}};
  return json{
    {"quant_method", "compressed-tensors"}, {"format", "int-quantized"},
    {"quantization_status", "compressed"},  {"config_groups", {{"group_0", std::move(group)}}},
    {"ignore", plan.kept_modules},          {"kv_cache_scheme", nullptr}}
    .dump();
}

} // namespace troupe::model
