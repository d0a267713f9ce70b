#include "commands.hpp"

#include "troupe/actors/runtime.hpp"

#include <cstdlib>

#include <fmt/format.h>
#include <unistd.h>

namespace troupe::tools {

int complain(const error& e) {
  bool colours = ::isatty(STDERR_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr;
  fmt::print(stderr, "{}troupe: {}{}\n", colours ? "\033[31m" : "", e.cause,
             colours ? "\033[0m" : "");
  if (!e.cure.empty())
    fmt::print(stderr, "  {}\n", e.cure);
  return EXIT_FAILURE;
}

bool has_colours() {
  return ::isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr;
}

expected<std::string> resolve_endpoint(const std::string& cluster, const std::string& endpoint) {
  if (!endpoint.empty())
    return endpoint.starts_with("http://") ? endpoint : "http://" + endpoint;
  auto state = actors::find_cluster(cluster);
  if (!state)
    return tl::unexpected(state.error());
  return state->endpoint;
}

} // namespace troupe::tools

int main(int argc, char** argv) {
  CLI::App app{
    "Runs DeepSeek-R1-class models as a company of actors: requests survive the death of "
    "any worker.\n\nFirst steps:\n"
    "  troupe up configs/local.yaml        launch a cluster; Ctrl-C ends it\n"
    "  troupe ask \"What is 347 + 86?\"      in a second terminal\n"
    "  troupe status                       what runs where, and what has been recovered\n",
    "troupe"};
  app.set_version_flag("--version", std::string("troupe ") + TROUPE_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  troupe::tools::command run;
  troupe::tools::add_up(app, run);
  troupe::tools::add_down(app, run);
  troupe::tools::add_status(app, run);
  troupe::tools::add_ask(app, run);
  troupe::tools::add_chat(app, run);
  troupe::tools::add_plan(app, run);
  troupe::tools::add_bench(app, run);
  troupe::tools::add_drill(app, run);
  troupe::tools::add_convert(app, run);
  troupe::tools::add_processes(app, run);
  CLI11_PARSE(app, argc, argv);
  return run();
}
