#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/chat_tools.hpp"
#include "troupe/model/tool_call_parser.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe::model {

/// A Hugging Face chat template: the subset of Jinja that those use, with what transformers sets
/// (trim_blocks, lstrip_blocks, its tojson, raise_exception, strftime_now). Immutable: rendering
/// is const and may be done by several threads at once. No template, however made, recurses,
/// runs or grows without limit.
class chat_template {
public:
  /// Fails with invalid_model naming `origin` (a file) and the line of what is wrong or not
  /// supported.
  static expected<chat_template> parse(std::string_view source,
                                       std::string_view origin = "chat template");

  ~chat_template();
  chat_template(chat_template&&) noexcept;
  chat_template& operator=(chat_template&&) noexcept;

  /// Renders with the members of `context` (an object) as variables. With ordered_json the keys
  /// of objects keep their order, as in Python; it decides what `tojson` prints. Fails with
  /// invalid_request where the template refuses the conversation (raise_exception; the cause is
  /// its text), cannot handle it, or does too much work.
  expected<std::string> render(const nlohmann::ordered_json& context) const;
  expected<std::string> render(const nlohmann::json& context) const;

private:
  friend class chat_renderer;
  struct state;
  explicit chat_template(std::unique_ptr<const state> s);
  /// With variables by name. Nothing is copied before its nesting is known to be harmless.
  template <class Json>
  expected<std::string>
  render_variables(const std::vector<std::pair<std::string, const Json*>>& variables,
                   std::optional<std::int64_t> unix_s = {}) const;
  template <class Json>
  expected<std::string> render_members(const Json& context) const;

  std::unique_ptr<const state> state_;
};

/// A model's chat template with the special tokens it writes.
class chat_renderer {
public:
  /// Reads `chat_template.jinja` (and `additional_chat_templates/tool_use.jinja`) or, where there
  /// is none, `chat_template` of tokenizer_config.json; there it is a string or a list of {name,
  /// template}, of which "default" is taken and, for conversations with tools, "tool_use". Fails
  /// with invalid_model for a damaged file or template, also one that needs what is not
  /// supported, and with not_found for a model without template.
  static expected<chat_renderer> load(const std::filesystem::path& model_dir);

  /// Renders a conversation: `messages` as in the OpenAI API, `tools` an array or null, `extra`
  /// an object of further variables (chat_template_kwargs) or null. The text starts with BOS
  /// where the template writes it, so it is to be encoded without adding one. The arguments of
  /// calls may be objects or their text: the template gets what it can print. `unix_s` is the time
  /// for templates that write the date; without it now. Fails as chat_template::render, and with
  /// invalid_request where `messages` is not an array of objects.
  expected<std::string> render_chat(const nlohmann::ordered_json& messages,
                                    const nlohmann::ordered_json& tools, bool add_generation_prompt,
                                    const nlohmann::ordered_json& extra = nullptr,
                                    std::optional<std::int64_t> unix_s = {}) const;

  /// Whether the template shows tools to the model.
  bool takes_tools() const { return takes_tools_; }

  /// How the template writes calls, and the model therefore too; none: in no way that we know.
  tool_syntax calls_as() const { return calls_as_; }

private:
  chat_renderer(chat_template standard, std::optional<chat_template> with_tools,
                nlohmann::ordered_json tokens)
    : standard_(std::move(standard)),
      with_tools_(std::move(with_tools)),
      tokens_(std::move(tokens)) {}

  /// Learns from small conversations what the template does with tools.
  void try_tools();

  chat_template standard_;
  std::optional<chat_template> with_tools_;
  bool takes_tools_ = false;
  call_style calls_;
  tool_syntax calls_as_ = tool_syntax::none;
  nlohmann::ordered_json tokens_; // bos_token, eos_token, ...
};

} // namespace troupe::model
