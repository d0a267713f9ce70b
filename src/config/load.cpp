#include "troupe/config/cluster_config.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <system_error>

#include <fmt/format.h>

#include "troupe/config/address.hpp"
#include "troupe/config/document.hpp"
#include "troupe/config/report.hpp"
#include "troupe/config/section.hpp"
#include "troupe/config/settings.hpp"

namespace troupe::config {

namespace {

namespace fs = std::filesystem;

constexpr std::uint32_t max_nodes = 256;
constexpr std::uint32_t max_devices = 64; // of one node

constexpr std::string_view not_yet = "is not supported yet in this build";

/// Names end up in file names, actor ids and metric labels.
bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= 63 && text.front() != '.' && text.front() != '-'
         && std::ranges::all_of(text, [](unsigned char c) {
              return std::isalnum(c) || c == '-' || c == '_' || c == '.';
            });
}

void read_name(section& from, std::string_view key, std::string& target) {
  std::string text;
  if (!from.read_text(key, text))
    return;
  if (is_name(text))
    target = std::move(text);
  else
    from.refuse(key, fmt::format("{} is not a name; up to 63 letters, digits, '-', '_' and '.' are "
                                 "needed, a letter, digit or '_' first",
                                 in_quotes(text)));
}

constexpr std::string_view random_prefix = "random:";

/// Looks the config.json of a made-up model up in the same places.
tl::expected<fs::path, std::string> find_file(const std::string& text, const fs::path& file) {
  std::error_code failure;
  const fs::path here = fs::current_path(failure);
  std::vector<fs::path> places{(here / file).parent_path() / text};
  if (fs::path(text).is_relative())
    places.push_back(here / text);
  for (const fs::path& place : places)
    if (fs::is_regular_file(place, failure))
      return place.lexically_normal();
  return tl::unexpected(
    fmt::format("there is no file {} to make a model up from; name a config.json "
                "behind {}",
                in_quotes(text), random_prefix));
}

/// Looks a model up beside the cluster file, then in the current directory: a directory, or the
/// config.json of a made-up model named as "random:FILE".
tl::expected<fs::path, std::string> find_model(const std::string& text, const fs::path& file) {
  if (text.starts_with(random_prefix)) {
    auto found = find_file(text.substr(random_prefix.size()), file);
    if (!found)
      return found;
    return fs::path(std::string(random_prefix) + found->string());
  }
  std::vector<fs::path> places;
  std::error_code failure;
  const fs::path here = fs::current_path(failure);
  places.push_back((here / file).parent_path() / text);
  if (fs::path(text).is_relative())
    places.push_back(here / text);
  std::string tried;
  for (const fs::path& place : places) {
    const fs::path candidate = place.lexically_normal();
    const fs::file_status status = fs::status(candidate, failure);
    if (fs::is_directory(status))
      return candidate;
    if (fs::exists(status))
      return tl::unexpected(fmt::format("{} is not a directory; name the directory that holds "
                                        "config.json",
                                        in_quotes(candidate.string())));
    const std::string shown = in_quotes(candidate.string());
    if (tried.find(shown) == std::string::npos)
      tried += (tried.empty() ? "" : " and ") + shown;
  }
  return tl::unexpected(fmt::format("there is no directory {} (looked for {}); name the directory "
                                    "that holds config.json",
                                    in_quotes(text), tried));
}

void read_model(section from, model_settings& model, const fs::path& file) {
  std::string path;
  if (from.read_text("path", path)) {
    if (auto found = find_model(path, file)) {
      model.path = std::move(*found);
      const bool slash = !model.path.has_filename(); // "models/mini/"
      model.name = (slash ? model.path.parent_path() : model.path).filename().string();
      if (path.starts_with(random_prefix))
        model.name = model.path.stem().string();
    } else {
      from.refuse("path", found.error());
    }
  } else if (!from.has("path")) {
    from.refuse("path", "is missing; name the directory of a Hugging Face model");
  }
  constexpr std::array<std::pair<std::string_view, numerics>, 2> choices = {
    {{"exact", numerics::exact}, {"fast", numerics::fast}}};
  from.read_choice<numerics>("numerics", model.arithmetic, choices);
  constexpr std::array<std::pair<std::string_view, head_format>, 2> heads = {
    {{"stored", head_format::stored}, {"int8", head_format::int8}}};
  from.read_choice<head_format>("head", model.head, heads);
  from.read_text("name", model.name);
  from.done();
}

std::optional<device> parse_device(std::string_view text, std::size_t place) {
  if (text == "cpu")
    return device{device_kind::cpu, static_cast<std::uint32_t>(place)};
  constexpr std::string_view cuda = "cuda:";
  if (!text.starts_with(cuda))
    return std::nullopt;
  text.remove_prefix(cuda.size());
  device result{device_kind::cuda, 0};
  const auto [rest, failure] =
    std::from_chars(text.data(), text.data() + text.size(), result.index);
  if (failure != std::errc{} || rest != text.data() + text.size() || result.index >= max_devices)
    return std::nullopt;
  return result;
}

void read_devices(section& from, std::vector<device>& devices, report& problems) {
  const value_ptr list = from.read_list("devices");
  if (!list)
    return;
  if (list->items.size() > max_devices) {
    from.refuse("devices", fmt::format("{} devices are too many; a node has at most {}",
                                       list->items.size(), max_devices));
    return;
  }
  devices.clear();
  for (std::size_t i = 0; i < list->items.size(); ++i) {
    const std::string path = fmt::format("{}[{}]", from.path_of("devices"), i);
    const value& item = *list->items[i];
    const auto text = from.item_text(item, path);
    if (!text)
      continue;
    const auto parsed = parse_device(*text, i);
    if (!parsed)
      problems.add(item.at, path,
                   fmt::format("{} is not a device; write cpu once for every worker, or cuda:0 to "
                               "cuda:{}",
                               in_quotes(*text), max_devices - 1));
    else if (parsed->kind == device_kind::cuda && std::ranges::count(devices, *parsed) > 0)
      problems.add(item.at, path, fmt::format("{} is there twice; name every GPU once", *text));
    if (parsed)
      devices.push_back(*parsed);
  }
}

void read_node(section from, node& target, report& problems) {
  read_name(from, "name", target.name);
  if (from.read_text("host", target.host) && !is_host(target.host))
    from.refuse("host", fmt::format("{} is neither a host name nor an address; write for instance "
                                    "localhost",
                                    in_quotes(target.host)));
  read_devices(from, target.devices, problems);
  constexpr std::array<std::pair<std::string_view, launch_mode>, 3> choices = {
    {{"local", launch_mode::local}, {"ssh", launch_mode::ssh}, {"join", launch_mode::join}}};
  from.read_choice<launch_mode>("launch", target.launch, choices);
  if (target.launch == launch_mode::ssh)
    from.refuse("launch", fmt::format("ssh {}; write local or join", not_yet));
  if (target.launch == launch_mode::local && is_host(target.host) && !is_this_machine(target.host))
    from.refuse("host", fmt::format("{} is not this machine, and launch: local starts the node "
                                    "here; write localhost, or launch: join",
                                    in_quotes(target.host)));
  from.done();
}

void read_nodes(section& root, cluster_config& config, report& problems) {
  const value_ptr list = root.read_list("nodes");
  if (!list)
    return;
  if (list->items.size() > max_nodes) {
    root.refuse("nodes", fmt::format("{} nodes are too many; at most {} are possible",
                                     list->items.size(), max_nodes));
    return;
  }
  config.nodes.clear();
  std::map<std::string, std::size_t> names;
  for (std::size_t i = 0; i < list->items.size(); ++i) {
    const std::string path = fmt::format("nodes[{}]", i);
    const value_ptr& item = list->items[i];
    node& made = config.nodes.emplace_back(node{.name = fmt::format("node-{}", i)});
    if (item->kind == value_kind::nothing) {
      problems.add(item->at, path, "nothing is written here; write for instance {name: node-0}");
      continue;
    }
    read_node(section(problems, config.positions, item, path, item->at), made, problems);
    const auto [first, is_new] = names.try_emplace(made.name, i);
    if (!is_new) {
      const map_entry* name = item->find("name");
      problems.add(name ? name->content->at : item->at, path + ".name",
                   fmt::format("{} is the name of nodes[{}] too; give every node its own",
                               in_quotes(made.name), first->second));
    }
  }
}

/// Hidden states travel as the devices compute them, and CPUs and GPUs do not round alike.
void check_device_kinds(section& root, const cluster_config& config) {
  const device* first = nullptr;
  for (const node& each : config.nodes)
    for (const device& one : each.devices) {
      first = first == nullptr ? &one : first;
      if (one.kind != first->kind)
        return root.refuse("nodes", fmt::format("{} of {} and {} of {} do not compute alike; write "
                                                "only GPUs or only CPUs",
                                                first->name(), config.nodes.front().name,
                                                one.name(), each.name));
    }
}

bool has_gpus(const cluster_config& config) {
  return std::ranges::any_of(config.nodes, [](const node& each) {
    return !each.devices.empty() && each.devices.front().kind == device_kind::cuda;
  });
}

void read_parallel(section from, parallel_settings& parallel, bool has_gpus) {
  from.read_number("data", parallel.data, 1, 256);
  from.read_number("pipeline", parallel.pipeline, 1, 256);
  from.read_number("tensor", parallel.tensor, 1, 8);
  constexpr std::array<std::pair<std::string_view, all_reduce>, 3> ways = {
    {{"auto", all_reduce::automatic}, {"peer", all_reduce::peer}, {"nccl", all_reduce::nccl}}};
  from.read_choice<all_reduce>("all_reduce", parallel.sums, ways);
  if (parallel.sums != all_reduce::automatic && parallel.tensor == 1)
    from.refuse("all_reduce", "there is nothing to add up where parallel.tensor is 1; write auto");
  else if (parallel.sums != all_reduce::automatic && !has_gpus)
    from.refuse("all_reduce", "CPUs have one way to add up; write auto");
  from.read_number("expert_groups", parallel.expert_groups, 0, 1024);
  from.read_number("expert_replicas", parallel.expert_replicas, 1, 16);
  from.done();
}

void read_serving(section from, serving_settings& serving) {
  std::string listen;
  if (from.read_text("listen", listen)) {
    if (const auto parsed = parse_endpoint(listen)) {
      serving.listen_host = parsed->host;
      serving.listen_port = parsed->port;
    } else {
      from.refuse("listen", parsed.error());
    }
  }
  constexpr std::uint32_t million = 1'000'000;
  from.read_number("max_batch_tokens", serving.max_batch_tokens, 1, million);
  from.read_number("max_batch_sequences", serving.max_batch_sequences, 1, million);
  const bool has_chunk =
    from.read_number("prefill_chunk_tokens", serving.prefill_chunk_tokens, 1, million);
  const bool has_kv = from.read_number("kv_tokens", serving.kv_tokens, 1, 1000 * million);
  from.read_number("page_tokens", serving.page_tokens, 1, 4096);
  from.read_number("max_queue", serving.max_queue, 1, million);
  const bool has_context = from.read_number("max_context", serving.max_context, 1, 100 * million);
  from.read_number("request_timeout_s", serving.request_timeout_s, 1, 7 * 24 * 3600);
  from.read_number("retain_s", serving.retain_s, 0, 7 * 24 * 3600);
  from.read_number("threads", serving.threads, 0, 4096);
  from.read_number("draft_tokens", serving.draft_tokens, 0, 3);

  // Defaults give way to what is written; only what is written can be wrong.
  if (serving.prefill_chunk_tokens > serving.max_batch_tokens) {
    if (has_chunk)
      from.refuse("prefill_chunk_tokens",
                  fmt::format("{} does not fit into max_batch_tokens, which is {}; write at most "
                              "that",
                              serving.prefill_chunk_tokens, serving.max_batch_tokens));
    serving.prefill_chunk_tokens = serving.max_batch_tokens;
  }
  if (const std::uint32_t rest = serving.kv_tokens % serving.page_tokens; rest != 0) {
    const std::uint32_t down = serving.kv_tokens - rest;
    if (has_kv)
      from.refuse(
        "kv_tokens",
        fmt::format("{} is not a multiple of page_tokens, which is {}; write for instance "
                    "{}",
                    serving.kv_tokens, serving.page_tokens,
                    down == 0 ? serving.page_tokens : down));
    serving.kv_tokens = down;
  }
  if (has_context && serving.max_context > serving.kv_tokens)
    from.refuse("max_context",
                fmt::format("{} is more than kv_tokens, which is {}; one sequence has to fit into "
                            "the cache",
                            serving.max_context, serving.kv_tokens));
  from.done();
}

void read_recovery(section from, recovery_settings& recovery) {
  constexpr std::uint32_t hour_ms = 3'600'000;
  from.read_number("heartbeat_ms", recovery.heartbeat_ms, 1, hour_ms);
  from.read_number("hang_ms", recovery.hang_ms, 1, hour_ms);
  from.read_number("startup_s", recovery.startup_s, 1, 7 * 24 * 3600);
  from.read_number("max_restarts", recovery.max_restarts, 0, 1'000'000);
  from.read_number("within_s", recovery.within_s, 1, 7 * 24 * 3600);
  from.read_number("spares", recovery.spares, 0, 64);
  from.read_number("standbys", recovery.standbys, 0, 64);
  from.read_number("node_grace_ms", recovery.node_grace_ms, 0, hour_ms);
  from.read_number("suspicion", recovery.suspicion, 1, 100);
  from.read_number("resend_ms", recovery.resend_ms, 10, hour_ms);
  from.read_number("dispatch_timeout_ms", recovery.dispatch_timeout_ms, 1, hour_ms);
  constexpr std::array<std::pair<std::string_view, protection>, 2> levels = {
    {{"full", protection::full}, {"off", protection::off}}};
  from.read_choice<protection>("protection", recovery.level, levels);
  from.read_number("deadline_ms", recovery.deadline_ms, 1, hour_ms);

  // One late heartbeat must not look like a hang.
  if (recovery.hang_ms / 2 < recovery.heartbeat_ms)
    from.refuse(from.has("hang_ms") ? "hang_ms" : "heartbeat_ms",
                fmt::format("hang_ms is {} and heartbeat_ms is {}; hang_ms must be at least twice "
                            "heartbeat_ms",
                            recovery.hang_ms, recovery.heartbeat_ms));
  if (recovery.deadline_ms <= recovery.hang_ms)
    from.refuse(from.has("deadline_ms") ? "deadline_ms" : "hang_ms",
                fmt::format("deadline_ms is {} and hang_ms is {}; deadline_ms must be the larger, "
                            "or nothing comes back in time",
                            recovery.deadline_ms, recovery.hang_ms));
  from.done();
}

void read_network(section from, const std::vector<node>& nodes, network_settings& network) {
  from.read_number("port", network.port, 0, 65535);
  const bool is_given = from.read_text("bind", network.bind);
  if (is_given && !is_ip_address(network.bind))
    from.refuse("bind", fmt::format("{} is not an IP address; write for instance 127.0.0.1",
                                    in_quotes(network.bind)));
  else if (is_wildcard(network.bind))
    from.refuse("bind", fmt::format("{} is no address that others can be told to reach this host "
                                    "at; write the one that it has in their network",
                                    in_quotes(network.bind)));
  else if (is_this_machine(network.bind))
    for (const auto& other : nodes)
      if (other.launch == launch_mode::join && is_host(other.host) && !is_this_machine(other.host))
        from.refuse("bind", fmt::format("{} on {} cannot reach {}; write the address that this "
                                        "host has in their network",
                                        other.name, other.host, in_quotes(network.bind)));
  from.done();
}

expected<cluster_config> parse_text(std::string_view text, const fs::path& file,
                                    std::span<const std::string> settings) {
  cluster_config config;
  config.file = file.string();
  report problems(config.file, settings);
  auto document = read_document(text);
  if (!document) {
    problems.add(document.error().at, "", "not valid YAML: " + document.error().what);
    return tl::unexpected(problems.to_error());
  }
  const value_ptr root = with_settings(std::move(*document), settings, problems);
  if (root->kind != value_kind::map && root->kind != value_kind::nothing) {
    problems.add(root->at, "",
                 "the file is not a mapping; write KEY: VALUE, beginning with model: "
                 "{path: ...}");
    return tl::unexpected(problems.to_error());
  }
  section top(problems, config.positions, root, "", position{1, 1});
  read_name(top, "cluster", config.cluster);
  read_model(top.child("model"), config.model, file);
  read_nodes(top, config, problems);
  check_device_kinds(top, config);
  if (has_gpus(config) && !config.positions.contains("model.numerics"))
    config.model.arithmetic = numerics::fast;
  read_parallel(top.child("parallel"), config.parallel, has_gpus(config));
  read_serving(top.child("serving"), config.serving);
  read_recovery(top.child("recovery"), config.recovery);
  read_network(top.child("network"), config.nodes, config.network);
  top.done();
  if (!problems.empty())
    return tl::unexpected(problems.to_error());
  return config;
}

expected<std::string> read_file(const fs::path& file) {
  const auto refuse = [&](std::string_view what) {
    return fail(error_code::invalid_config, fmt::format("{}: {}", file.string(), what));
  };
  std::error_code failure;
  const fs::file_status status = fs::status(file, failure);
  if (status.type() == fs::file_type::not_found)
    return refuse("there is no such file; name a cluster file, such as configs/local.yaml");
  if (failure)
    return refuse(fmt::format("cannot be looked at: {}", failure.message()));
  if (fs::is_directory(status))
    return refuse("is a directory; name a cluster file in it, such as local.yaml");
  // Anything else (a pipe, a terminal) might never end.
  if (!fs::is_regular_file(status))
    return refuse("is not a regular file; write the cluster file to disk first");
  std::ifstream stream(file, std::ios::binary);
  if (!stream)
    return refuse(fmt::format("cannot be opened: {}", std::strerror(errno)));
  std::string text(max_document_bytes + 1, '\0');
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (stream.bad())
    return refuse(fmt::format("cannot be read: {}", std::strerror(errno)));
  text.resize(static_cast<std::size_t>(stream.gcount()));
  return text;
}

} // namespace

expected<cluster_config> parse(std::string_view text, const std::filesystem::path& file,
                               std::span<const std::string> settings) {
  try {
    return parse_text(text, file, settings);
  } catch (const std::exception& broken) {
    return fail(error_code::internal, fmt::format("{}: {}", file.string(), broken.what()));
  }
}

expected<cluster_config> load(const std::filesystem::path& file,
                              std::span<const std::string> settings) {
  try {
    return read_file(file).and_then(
      [&](const std::string& text) { return parse_text(text, file, settings); });
  } catch (const std::exception& broken) {
    return fail(error_code::internal, fmt::format("{}: {}", file.string(), broken.what()));
  }
}

} // namespace troupe::config
