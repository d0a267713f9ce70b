#include "troupe/model/chat_template.hpp"

#include "troupe/model/jinja_interpreter.hpp"
#include "troupe/model/jinja_parser.hpp"
#include "troupe/model/text_file.hpp"
#include "troupe/model/unicode.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <limits>
#include <optional>
#include <utility>

namespace troupe::model {

using nlohmann::json;
using nlohmann::ordered_json;

namespace {

constexpr std::size_t max_source_bytes = std::size_t{1} << 20U;
constexpr int max_json_depth = 90;

template <class Json>
jinja::value from_json(const Json& j, jinja::budget& cost, int depth = 0) {
  if (depth > max_json_depth)
    jinja::raise(
      fmt::format("the conversation is nested more than {} levels deep", max_json_depth));
  cost.take(1);
  switch (j.type()) {
  case Json::value_t::boolean: return jinja::value::boolean(j.template get<bool>());
  case Json::value_t::number_integer: return jinja::value::integer(j.template get<std::int64_t>());
  case Json::value_t::number_unsigned: {
    const auto u = j.template get<std::uint64_t>();
    if (u > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      jinja::raise(fmt::format("the conversation holds {}, a number beyond 64 bits", u));
    return jinja::value::integer(static_cast<std::int64_t>(u));
  }
  case Json::value_t::number_float: return jinja::value::real(j.template get<double>());
  case Json::value_t::string: {
    const auto& text = j.template get_ref<const std::string&>();
    cost.take_bytes(text.size());
    if (find_invalid_utf8(text) != std::string_view::npos)
      jinja::raise("the conversation holds text that is not valid UTF-8");
    return jinja::value::text(text);
  }
  case Json::value_t::array: {
    std::vector<jinja::value> items;
    items.reserve(j.size());
    for (const auto& item : j)
      items.push_back(from_json(item, cost, depth + 1));
    return jinja::value::list(std::move(items));
  }
  case Json::value_t::object: {
    std::vector<std::pair<std::string, jinja::value>> entries;
    entries.reserve(j.size());
    for (const auto& [key, item] : j.items())
      entries.emplace_back(key, from_json(item, cost, depth + 1));
    return jinja::value::dict(std::move(entries));
  }
  default: return jinja::value::none();
  }
}

/// The text of a template and what it is called in errors.
struct template_source {
  std::string text;
  std::string origin;
};

/// A model's templates: one for every conversation, and one that some models have for those with
/// tools.
struct template_sources {
  std::optional<template_source> standard;
  std::optional<template_source> with_tools;
};

/// chat_template of tokenizer_config.json: a string, or a list of {name, template}.
expected<template_sources> templates_in(const ordered_json& config, const std::string& path) {
  template_sources sources;
  const auto found = config.find("chat_template");
  if (found == config.end() || found->is_null())
    return sources;
  const std::string origin = path + ": chat_template";
  if (found->is_string())
    sources.standard = {found->get<std::string>(), origin};
  if (found->is_array()) {
    for (const auto& entry : *found) {
      if (!entry.is_object() || !entry.contains("template") || !entry["template"].is_string())
        continue;
      const ordered_json name = entry.value("name", ordered_json());
      if (name == "default")
        sources.standard = {entry["template"].get<std::string>(), origin + " \"default\""};
      else if (name == "tool_use")
        sources.with_tools = {entry["template"].get<std::string>(), origin + " \"tool_use\""};
    }
  }
  if (!sources.standard)
    return fail(
      error_code::invalid_model,
      fmt::format("{} is neither a string nor a list with a template named \"default\"", origin));
  return sources;
}

/// The templates beside tokenizer_config.json, as transformers saves them; they come first.
expected<template_sources> templates_of(const std::filesystem::path& model_dir,
                                        const ordered_json& config) {
  const auto read = [](const std::filesystem::path& path,
                       std::optional<template_source>& source) -> expected<void> {
    auto text = read_text_file(path);
    if (!text)
      return tl::unexpected(std::move(text.error()));
    if (*text)
      source = {std::move(**text), path.string()};
    return {};
  };
  template_sources sources;
  if (auto done = read(model_dir / "chat_template.jinja", sources.standard); !done)
    return tl::unexpected(std::move(done.error()));
  if (!sources.standard)
    return templates_in(config, (model_dir / "tokenizer_config.json").string());
  if (auto done =
        read(model_dir / "additional_chat_templates" / "tool_use.jinja", sources.with_tools);
      !done)
    return tl::unexpected(std::move(done.error()));
  return sources;
}

} // namespace

struct chat_template::state {
  jinja::node_ptr root;
};

chat_template::chat_template(std::unique_ptr<const state> s) : state_(std::move(s)) {}
chat_template::~chat_template() = default;
chat_template::chat_template(chat_template&&) noexcept = default;
chat_template& chat_template::operator=(chat_template&&) noexcept = default;

expected<chat_template> chat_template::parse(std::string_view source, std::string_view origin) {
  if (source.size() > max_source_bytes)
    return fail(error_code::invalid_model,
                fmt::format("{}: {} bytes are too many for a template (at most {})", origin,
                            source.size(), max_source_bytes));
  if (const std::size_t bad = find_invalid_utf8(source); bad != std::string_view::npos)
    return fail(error_code::invalid_model,
                fmt::format("{}: not valid UTF-8 at offset {}", origin, bad));
  try {
    return chat_template(std::make_unique<const state>(state{jinja::parse_template(source)}));
  } catch (const jinja::failure& f) {
    return fail(error_code::invalid_model, fmt::format("{}, line {}: {}", origin, f.line, f.text));
  } catch (const std::exception& e) {
    return fail(error_code::internal, fmt::format("{}: {}", origin, e.what()));
  }
}

template <class Json>
expected<std::string>
chat_template::render_variables(const std::vector<std::pair<std::string, const Json*>>& variables,
                                std::optional<std::int64_t> unix_s) const {
  try {
    jinja::budget cost;
    std::vector<std::pair<std::string, jinja::value>> values;
    for (const auto& [name, v] : variables)
      values.emplace_back(name, from_json(*v, cost));
    const std::time_t now = unix_s ? static_cast<std::time_t>(*unix_s) : std::time(nullptr);
    return jinja::render(*state_->root, std::move(values), cost, now);
  } catch (const jinja::failure& f) {
    if (f.by_template)
      return fail(error_code::invalid_request, f.text,
                  "change the messages to what the model's chat template takes");
    return fail(
      error_code::invalid_request,
      fmt::format("the chat template cannot render these messages (line {}): {}", f.line, f.text));
  } catch (const std::exception& e) {
    return fail(error_code::internal, fmt::format("chat template: {}", e.what()));
  }
}

template <class Json>
expected<std::string> chat_template::render_members(const Json& context) const {
  if (!context.is_object())
    return fail(error_code::invalid_request, "the variables of a chat template are not an object");
  std::vector<std::pair<std::string, const Json*>> variables;
  for (const auto& [name, v] : context.items())
    variables.emplace_back(name, &v);
  return render_variables(variables);
}

expected<std::string> chat_template::render(const ordered_json& context) const {
  return render_members(context);
}

expected<std::string> chat_template::render(const json& context) const {
  return render_members(context);
}

expected<chat_renderer> chat_renderer::load(const std::filesystem::path& model_dir) {
  const std::string config_path = (model_dir / "tokenizer_config.json").string();
  auto config_text = read_text_file(config_path);
  if (!config_text)
    return tl::unexpected(std::move(config_text.error()));
  try {
    ordered_json config = ordered_json::object();
    if (*config_text) {
      config = ordered_json::parse(**config_text, nullptr, false);
      if (config.is_discarded() || !config.is_object())
        return fail(error_code::invalid_model, fmt::format("{} is not a JSON object", config_path));
    }
    const auto sources = templates_of(model_dir, config);
    if (!sources)
      return tl::unexpected(sources.error());
    if (!sources->standard)
      return fail(error_code::not_found,
                  fmt::format("the model in {} has no chat template", model_dir.string()),
                  "use completions, or add a chat_template.jinja");
    auto standard = chat_template::parse(sources->standard->text, sources->standard->origin);
    if (!standard)
      return tl::unexpected(std::move(standard.error()));
    std::optional<chat_template> with_tools;
    if (sources->with_tools) {
      auto parsed = chat_template::parse(sources->with_tools->text, sources->with_tools->origin);
      if (!parsed)
        return tl::unexpected(std::move(parsed.error()));
      with_tools = std::move(*parsed);
    }
    ordered_json tokens = ordered_json::object();
    for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                            "cls_token", "mask_token"}) {
      const auto found = config.find(key);
      if (found == config.end())
        continue;
      const ordered_json content =
        found->is_object() ? found->value("content", ordered_json()) : *found;
      if (content.is_string())
        tokens[key] = content;
    }
    chat_renderer renderer(std::move(*standard), std::move(with_tools), std::move(tokens));
    renderer.try_tools();
    return renderer;
  } catch (const std::exception& e) {
    return fail(error_code::invalid_model, fmt::format("{}: {}", config_path, e.what()));
  }
}

void chat_renderer::try_tools() {
  const auto tools = tool_trial::tools();
  if (const auto shown = render_chat(tool_trial::question(), tools, true))
    takes_tools_ = tool_trial::shows_tool(*shown);
  // Some templates write calls only where there is no content, others need one. And some copy
  // the arguments, others print them as JSON, which would make a string of what is text already.
  const ordered_json none;
  for (const bool objects : {false, true}) {
    call_style found{objects, false, false, false};
    for (bool call_style::*content : {&call_style::absent, &call_style::null, &call_style::empty}) {
      calls_ = {objects, false, false, false};
      calls_.*content = true;
      const auto text = render_chat(tool_trial::call(calls_), takes_tools_ ? tools : none, false);
      if (!text || !tool_trial::shows_arguments(*text))
        continue;
      found.*content = true;
      calls_as_ = tool_trial::syntax_of(*text);
    }
    calls_ = found;
    if (found.absent || found.null || found.empty)
      return;
  }
  calls_ = {};
}

expected<std::string> chat_renderer::render_chat(const ordered_json& messages,
                                                 const ordered_json& tools,
                                                 bool add_generation_prompt,
                                                 const ordered_json& extra,
                                                 std::optional<std::int64_t> unix_s) const {
  if (!messages.is_array() || messages.empty())
    return fail(error_code::invalid_request, "messages is not a list with at least one message");
  for (std::size_t i = 0; i < messages.size(); ++i)
    if (!messages[i].is_object() || !messages[i].contains("role")
        || !messages[i]["role"].is_string())
      return fail(error_code::invalid_request,
                  fmt::format("messages[{}] is not an object with a role", i));
  auto fitting = with_fitting_calls(messages, calls_);
  if (!fitting)
    return tl::unexpected(std::move(fitting.error()));
  const ordered_json none;
  const ordered_json prompt = add_generation_prompt;
  // Later ones count, so that extra variables can replace the others.
  std::vector<std::pair<std::string, const ordered_json*>> variables;
  const auto set = [&variables](const std::string& name, const ordered_json& v) {
    for (auto& [known, old] : variables) {
      if (known == name) {
        old = &v;
        return;
      }
    }
    variables.emplace_back(name, &v);
  };
  for (const auto& [name, v] : tokens_.items())
    set(name, v);
  set("messages", *fitting ? **fitting : messages);
  set("tools", tools);
  set("documents", none);
  set("add_generation_prompt", prompt);
  if (extra.is_object())
    for (const auto& [name, v] : extra.items())
      set(name, v);
  const auto given = std::find_if(variables.begin(), variables.end(),
                                  [](const auto& v) { return v.first == "tools"; });
  const chat_template& chosen = with_tools_ && !given->second->is_null() ? *with_tools_ : standard_;
  return chosen.render_variables(variables, unix_s);
}

} // namespace troupe::model
