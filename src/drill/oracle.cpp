#include "troupe/drill/oracle.hpp"

#include <algorithm>
#include <fstream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::drill {

expected<std::vector<conversation>> load_golden(const std::filesystem::path& model_directory) {
  auto file = model_directory / "golden.json";
  std::ifstream stream(file);
  if (!stream)
    return fail(error_code::not_found, fmt::format("cannot read {}", file.string()),
                "a drill compares answers with known ones; use a model that has them, such as "
                "configs/models/troupe-mini");
  auto all = nlohmann::json::parse(stream, nullptr, false);
  std::vector<conversation> result;
  try {
    for (const auto& entry : all)
      result.push_back({entry.value("question", ""), entry.at("prompt"), entry.at("tokens")});
  } catch (const nlohmann::json::exception& wrong) {
    return fail(error_code::invalid_model, fmt::format("{}: {}", file.string(), wrong.what()));
  }
  if (result.empty())
    return fail(error_code::invalid_model, fmt::format("{} has no conversations", file.string()));
  return result;
}

std::string difference::text() const {
  if (!any())
    return "the same";
  return fmt::format("differs from token {} on: {} lost, {} duplicated, {} wrong", index, lost,
                     duplicated, wrong);
}

difference compare(std::span<const std::int32_t> golden, std::span<const std::int32_t> received) {
  difference result;
  const auto [g, r] = std::ranges::mismatch(golden, received);
  result.index = static_cast<std::size_t>(g - golden.begin());
  golden = golden.subspan(result.index);
  received = received.subspan(result.index);
  if (golden.empty() && received.empty())
    return result;
  const std::size_t rows = golden.size() + 1, columns = received.size() + 1;
  std::vector<std::uint32_t> cost(rows * columns);
  const auto at = [&](std::size_t i, std::size_t j) -> std::uint32_t& {
    return cost[i * columns + j];
  };
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < columns; ++j) {
      if (i == 0 || j == 0)
        at(i, j) = static_cast<std::uint32_t>(i + j);
      else
        at(i, j) = std::min({at(i - 1, j) + 1, at(i, j - 1) + 1,
                             at(i - 1, j - 1) + (golden[i - 1] != received[j - 1] ? 1U : 0U)});
    }
  for (std::size_t i = golden.size(), j = received.size(); i > 0 || j > 0;) {
    if (i > 0 && j > 0 && golden[i - 1] == received[j - 1] && at(i, j) == at(i - 1, j - 1)) {
      --i, --j;
    } else if (i > 0 && at(i, j) == at(i - 1, j) + 1) {
      ++result.lost, --i;
    } else if (j > 0 && at(i, j) == at(i, j - 1) + 1) {
      ++result.duplicated, --j;
    } else {
      ++result.wrong, --i, --j;
    }
  }
  return result;
}

} // namespace troupe::drill
