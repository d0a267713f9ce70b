#include "streams.hpp"

#include <fstream>

#include <catch2/catch.hpp>

using namespace troupe::process_tests;
namespace fs = std::filesystem;

namespace {

/// Runs a program to its end and returns what it wrote.
std::string run(const std::string& file, std::vector<std::string> arguments,
                std::chrono::milliseconds limit, const std::string& otherwise) {
  temporary_directory directory;
  program p(file, std::move(arguments), directory.path(), directory.path() / "output");
  auto exit = p.wait(limit);
  INFO(otherwise << "\n" << file << " said:\n" << p.output());
  REQUIRE(exit);
  REQUIRE(exit->text() == "exited with code 0");
  return p.output();
}

/// The Python of an environment that has OpenAI's client. It is made once a build tree.
std::string python_with_openai() {
  const fs::path directory = fs::path(TROUPE_BINARY_DIR).parent_path() / "openai-client";
  const auto python = directory / "bin" / "python";
  const auto complete = directory / "complete";
  if (!fs::exists(complete)) {
    fs::remove_all(directory);
    run("/usr/bin/python3", {"-m", "venv", directory.string()}, 60s,
        "python3 cannot make a virtual environment; on Debian it needs the package python3-venv");
    run(python, {"-m", "pip", "install", "--quiet", "--disable-pip-version-check", "openai"}, 240s,
        "the openai package could not be installed; this test needs PyPI (or a mirror: "
        "PIP_INDEX_URL)");
    std::ofstream(complete) << "openai\n";
  }
  return python;
}

} // namespace

TEST_CASE("OpenAI's own Python client works unmodified") {
  auto python = python_with_openai();
  cluster c("local.yaml");
  auto said = run(python, {source_path("tests/process/openai_client.py"), c.endpoint() + "/v1"},
                  60s, "the client script failed");
  CHECK(said.find("all well") != std::string::npos);
  c.end();
}
