#include "troupe/model/expert_group_model.hpp"

#include "troupe/model/rows.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace troupe::model {

expert_group_model::expert_group_model(std::shared_ptr<tensor_source> source,
                                       const model_config& config, expert_range experts,
                                       std::int32_t first_layer, kernels::ops& ops)
  : ops_(ops),
    store_(std::move(source), config, ops),
    experts_(experts),
    first_layer_(first_layer),
    hidden_size_(config.hidden_size) {}

expected<std::unique_ptr<expert_group_model>>
expert_group_model::load(std::shared_ptr<tensor_source> source, const model_config& config,
                         expert_range experts, kernels::ops& ops, bool with_mtp) {
  return load(std::move(source), config, experts, 0, config.num_layers + (with_mtp ? 1 : 0), ops);
}

expected<std::unique_ptr<expert_group_model>>
expert_group_model::load(std::shared_ptr<tensor_source> source, const model_config& config,
                         expert_range experts, std::int32_t first_layer, std::int32_t end_layer,
                         kernels::ops& ops) {
  if (experts.first < 0 || experts.first >= experts.end || experts.end > config.num_experts)
    return fail(error_code::invalid_config,
                fmt::format("experts [{}, {}) are asked for, but the model has {}", experts.first,
                            experts.end, config.num_experts),
                "lower the number of expert groups");
  const auto num_layers = config.num_layers + config.num_mtp_layers;
  if (first_layer < 0 || first_layer > end_layer || end_layer > num_layers)
    return fail(error_code::invalid_config,
                fmt::format("layers [{}, {}) are asked for, but the model has {}", first_layer,
                            end_layer, num_layers));
  std::unique_ptr<expert_group_model> model(
    new expert_group_model(std::move(source), config, experts, first_layer, ops));
  model->layers_.resize(end_layer - first_layer);
  const auto hidden = config.hidden_size;
  const auto inner = config.moe_intermediate_size;
  for (auto layer = first_layer; layer < end_layer; ++layer) {
    if (!config.is_moe_layer(layer))
      continue;
    for (auto expert = experts.first; expert < experts.end; ++expert) {
      const auto prefix = fmt::format("model.layers.{}.mlp.experts.{}.", layer, expert);
      auto weights = load_mlp(model->store_, prefix, hidden, inner);
      if (!weights)
        return tl::unexpected(std::move(weights.error()));
      model->layers_[layer - first_layer].push_back(*weights);
    }
  }
  return model;
}

expected<void> expert_group_model::run(std::int32_t layer, const kernels::rows_view& x,
                                       std::span<const kernels::expert_task> tasks,
                                       const kernels::rows_view& out) {
  const auto index = layer - first_layer_;
  const auto num_layers = static_cast<std::int32_t>(layers_.size());
  if (index < 0 || index >= num_layers || layers_[index].empty())
    return fail(error_code::invalid_request,
                fmt::format("layer {} has no experts in this group", layer));
  if (x.num_cols != hidden_size_ || out.num_cols != hidden_size_
      || static_cast<std::size_t>(out.num_rows) < tasks.size())
    return fail(error_code::invalid_request,
                fmt::format("{} expert tasks with rows of {} do not fit an output of {} rows of {}",
                            tasks.size(), x.num_cols, out.num_rows, out.num_cols));
  const auto num_experts = experts_.end - experts_.first;
  std::int32_t previous = 0;
  for (const auto& task : tasks) {
    if (task.expert < previous || task.expert >= num_experts || task.row < 0
        || task.row >= x.num_rows)
      return fail(error_code::invalid_request,
                  fmt::format("an expert task asks for row {} of {} and local expert {} of {}",
                              task.row, x.num_rows, task.expert, num_experts),
                  "tasks must be in range and sorted by expert");
    previous = task.expert;
  }
  if (!tasks.empty())
    ops_.experts(
      x, tasks, layers_[index],
      slice_rows(out, ops_.activation_type(), 0, static_cast<std::int32_t>(tasks.size())));
  return {};
}

expected<void> expert_group_model::rehearse(std::int32_t max_rows, std::int32_t top_k) {
  const auto layer = std::find_if(layers_.begin(), layers_.end(),
                                  [](const auto& experts) { return !experts.empty(); });
  if (layer == layers_.end())
    return {};
  const auto num_experts = experts_.end - experts_.first;
  const auto num_tasks = max_rows * std::min(top_k, num_experts);
  const row_buffer x(ops_, ops_.activation_type(), max_rows, hidden_size_);
  const row_buffer out(ops_, ops_.activation_type(), num_tasks, hidden_size_);
  if (x.view(1).data == nullptr || out.view(1).data == nullptr)
    return fail(error_code::resource_exhausted,
                fmt::format("there is no memory for a dispatch of {} rows and {} tasks", max_rows,
                            num_tasks));
  std::vector<kernels::expert_task> tasks(num_tasks);
  for (std::int32_t i = 0; i < num_tasks; ++i)
    tasks[i] = {i % max_rows, static_cast<std::int32_t>(std::int64_t{i} * num_experts / num_tasks)};
  const auto index = static_cast<std::int32_t>(layer - layers_.begin());
  return run(first_layer_ + index, x.view(max_rows), tasks, out.view(num_tasks));
}

} // namespace troupe::model
