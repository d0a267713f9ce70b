#include "streams.hpp"

#include "troupe/base/unique_fd.hpp"

#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <fmt/format.h>

using namespace troupe::process_tests;
namespace fs = std::filesystem;

namespace {

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void write_file(const fs::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  REQUIRE(file);
}

/// A model directory of our own: the demo model's files, of which some can be replaced.
class model_copy {
public:
  model_copy() {
    for (const auto& entry : fs::directory_iterator(source_path("configs/models/troupe-mini")))
      fs::create_symlink(entry.path(), path() / entry.path().filename());
  }
  const fs::path& path() const { return directory_.path(); }
  std::string read(const std::string& name) const { return read_file(path() / name); }
  void replace(const std::string& name, const std::string& content) {
    fs::remove(path() / name);
    write_file(path() / name, content);
  }
  json read_json(const std::string& name) const { return json::parse(read(name)); }

  /// The shard that has a tensor.
  std::string shard_of(const std::string& tensor) const {
    return read_json("model.safetensors.index.json").at("weight_map").at(tensor);
  }

private:
  temporary_directory directory_;
};

/// A port on which somebody listens.
class taken_port {
public:
  taken_port() : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(::bind(fd_.get(), reinterpret_cast<sockaddr*>(&address_), sizeof address_) == 0);
    REQUIRE(::listen(fd_.get(), 1) == 0);
    socklen_t size = sizeof address_;
    REQUIRE(::getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&address_), &size) == 0);
  }
  int number() const { return ntohs(address_.sin_port); }

private:
  troupe::unique_fd fd_;
  sockaddr_in address_{};
};

/// `troupe up single.yaml` with `settings` over it has to fail and to name every culprit.
void expect_refusal(const std::string& what, std::vector<std::string> settings,
                    const std::vector<std::string>& culprits, fs::path config = {}) {
  temporary_directory runtime;
  if (config.empty())
    config = source_path("configs/single.yaml");
  std::vector<std::string> arguments{"up", config.string(), "--quiet", "--set",
                                     "serving.listen=127.0.0.1:0"};
  for (const auto& setting : settings)
    arguments.insert(arguments.end(), {"--set", setting});
  auto result = run_troupe(arguments, runtime.path());
  INFO(what << ": exit code " << result.code << " after " << result.seconds << " s:\n"
            << result.output);
  CHECK(result.code == 1);
  for (const auto& culprit : culprits) {
    INFO("to be named: " << culprit);
    CHECK(result.output.find(culprit) != std::string::npos);
  }
  CHECK(processes_under(runtime.path()).empty());
}

} // namespace

TEST_CASE("impossible configs are refused by name") {
  expect_refusal("unknown key", {"serving.lisen=3"}, {"serving.lisen"});
  expect_refusal("wrong type", {"parallel.pipeline=two"}, {"parallel.pipeline", "two"});
  expect_refusal("more stages than layers",
                 {"parallel.pipeline=7", "nodes[0].devices=[cpu, cpu, cpu, cpu, cpu, cpu, cpu]"},
                 {"parallel.pipeline", "7", "6"});
  expect_refusal("expert groups that do not divide the experts",
                 {"parallel.expert_groups=3", "nodes[0].devices=[cpu, cpu, cpu, cpu]"},
                 {"parallel.expert_groups", "3", "16"});
  expect_refusal("missing model", {"model.path=/nonexistent/model"}, {"/nonexistent/model"});

  temporary_directory directory;
  auto file = directory.path() / "bad.yaml";
  write_file(file,
             "cluster: bad\nmodel:\n  path: " + source_path("configs/models/troupe-mini").string()
               + "\nservings:\n  listen: 127.0.0.1:0\n");
  expect_refusal("unknown key in a file", {}, {"bad.yaml:4", "servings"}, file);
  expect_refusal("missing config", {}, {"nowhere.yaml"}, directory.path() / "nowhere.yaml");
}

TEST_CASE("broken models are refused by name") {
  SECTION("truncated safetensors") {
    model_copy model;
    auto name = std::string("model-00002-of-00002.safetensors");
    auto content = model.read(name);
    model.replace(name, content.substr(0, content.size() - 1000));
    expect_refusal("truncated", {"model.path=" + model.path().string()}, {name});
    model.replace(name, content.substr(0, 100));
    expect_refusal("truncated in its header", {"model.path=" + model.path().string()}, {name});
  }
  SECTION("an index that names a missing shard") {
    model_copy model;
    auto index = model.read_json("model.safetensors.index.json");
    index["weight_map"]["model.layers.2.mlp.experts.7.up_proj.weight"] =
      "model-00003-of-00002.safetensors";
    model.replace("model.safetensors.index.json", index.dump());
    expect_refusal("missing shard", {"model.path=" + model.path().string()},
                   {"model-00003-of-00002.safetensors"});
  }
  SECTION("a tensor of another shape than the config says") {
    model_copy model;
    auto config = model.read_json("config.json");
    config["q_lora_rank"] = 96;
    model.replace("config.json", config.dump());
    expect_refusal("shape", {"model.path=" + model.path().string()}, {"q_a_proj", "96", "128"});
  }
  SECTION("a scale that is not a number") {
    model_copy model;
    const std::string tensor = "model.layers.4.mlp.experts.9.down_proj.weight_scale_inv";
    auto shard = model.shard_of(tensor);
    auto content = model.read(shard);
    // safetensors: the header's size as u64, the header as JSON, then the tensors.
    std::uint64_t header_size = 0;
    std::memcpy(&header_size, content.data(), sizeof header_size);
    auto header = json::parse(content.substr(8, header_size));
    REQUIRE(header.at(tensor).at("dtype") == "F32");
    auto at = 8 + header_size + header.at(tensor).at("data_offsets").at(0).get<std::uint64_t>();
    float not_a_number = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(content.data() + at, &not_a_number, sizeof not_a_number);
    model.replace(shard, content);
    expect_refusal("NaN", {"model.path=" + model.path().string()}, {tensor});
    expect_refusal("NaN in an expert group",
                   {"model.path=" + model.path().string(), "parallel.expert_groups=2",
                    "nodes[0].devices=[cpu, cpu, cpu]"},
                   {tensor});
  }
}

TEST_CASE("a port that is taken is named") {
  const taken_port taken;
  auto place = fmt::format("127.0.0.1:{}", taken.number());
  expect_refusal("port taken", {"serving.listen=" + place}, {place});
  expect_refusal("the controller's", {fmt::format("network.port={}", taken.number())}, {place});
}

TEST_CASE("of two clusters with the same name the second is refused, and the first runs on") {
  cluster c("single.yaml");
  auto second = run_troupe({"up", source_path("configs/single.yaml"), "--quiet", "--set",
                            "serving.listen=127.0.0.1:0", "--set", "cluster=" + c.name()},
                           c.runtime_directory());
  INFO(second.output);
  CHECK(second.code == 1);
  CHECK(second.output.find(c.name()) != std::string::npos);
  CHECK(second.output.find("running already") != std::string::npos);
  CHECK(c.launcher().wait(0ms) == std::nullopt);
  auto got = stream_completion(c.endpoint(), golden_request(golden()[3]));
  CHECK(got.difference(golden()[3]) == "");
  // The refused one must not have taken the state away from the other commands either.
  auto status = run_troupe({"status", c.name(), "--json"}, c.runtime_directory());
  INFO(status.output);
  CHECK(status.code == 0);
  CHECK(json::parse(status.output, nullptr, false).value("cluster", "") == c.name());
  c.end();
}

TEST_CASE("troupe down ends a cluster, and says so when there is none") {
  cluster c("local.yaml");
  auto down = run_troupe({"down", c.name()}, c.runtime_directory());
  INFO(down.output);
  CHECK(down.code == 0);
  auto exit = c.launcher().wait(5s);
  REQUIRE(exit);
  CHECK(exit->text() == "exited with code 0");
  CHECK(processes_under(c.runtime_directory()).empty());
  auto again = run_troupe({"down", c.name()}, c.runtime_directory());
  INFO(again.output);
  CHECK(again.code == 1);
  CHECK(again.output.find("no cluster") != std::string::npos);
}

TEST_CASE("nothing outlives a launcher that is killed") {
  cluster c("local.yaml");
  // The launcher, the controller, the frontend, the node and its four workers.
  CHECK(processes_under(c.runtime_directory()).size() == 8);
  golden_load load(c.endpoint(), 8);
  std::this_thread::sleep_for(200ms);
  c.end_by_killing_the_launcher(2s);
  load.finish();
  CHECK_FALSE(load.problems().empty()); // its clients were told
  // The name is free again.
  auto status = run_troupe({"status", c.name()}, c.runtime_directory());
  CHECK(status.code == 1);
}

TEST_CASE("a cluster that is stopped while it works ends cleanly") {
  cluster c("local.yaml");
  golden_load load(c.endpoint(), 2);
  std::this_thread::sleep_for(200ms);
  c.end();
  load.finish();
}

namespace {

/// The command in "run `troupe node ...` on", without its first word.
std::vector<std::string> join_arguments(const std::string& said) {
  const auto begin = said.find("run `troupe ");
  REQUIRE(begin != std::string::npos);
  const auto first = begin + std::strlen("run `troupe ");
  std::istringstream words{said.substr(first, said.find('`', first) - first)};
  std::vector<std::string> result;
  for (std::string word; words >> word;)
    result.push_back(word);
  return result;
}

/// A config of two stages, of which node-1, who is to join, has the second.
fs::path joined_config(const temporary_directory& directory) {
  auto file = directory.path() / "joined.yaml";
  write_file(file,
             "cluster: joined\nmodel: {path: " + source_path("configs/models/troupe-mini").string()
               + "}\n"
                 "nodes:\n"
                 "  - {name: node-0, devices: [cpu]}\n"
                 "  - {name: node-1, host: localhost, launch: join, devices: [cpu]}\n"
                 "parallel: {pipeline: 2}\n"
                 "serving: {listen: '127.0.0.1:0'}\n");
  return file;
}

} // namespace

TEST_CASE("a node that does not join in time is named") {
  temporary_directory here;
  const auto result =
    run_troupe({"up", joined_config(here).string(), "--set", "recovery.startup_s=1"}, here.path());
  INFO(result.output);
  CHECK(result.code == 1);
  CHECK(result.output.find("not ready after 1 s: waited for node-1 (has not joined)")
        != std::string::npos);
  CHECK(result.output.find("recovery.startup_s") != std::string::npos);
}

TEST_CASE("a node joins by the command that is printed, and again after its death") {
  temporary_directory here;
  temporary_directory there; // another host's files
  const auto config = joined_config(here);
  const int port = taken_port{}.number(); // and free again
  program up{troupe_program(),
             {"up", config.string(), "--set", fmt::format("network.port={}", port)},
             here.path(),
             here.path() / "up.log"};
  const auto says = [&](const std::string& what) {
    return eventually([&] { return up.output().find(what) != std::string::npos; }, 30s);
  };
  REQUIRE(says("on localhost\n"));
  const auto arguments = join_arguments(up.output());
  CHECK(arguments.back() == fmt::format("127.0.0.1:{}", port));
  auto node =
    std::make_unique<program>(troupe_program(), arguments, there.path(), there.path() / "node.log");
  INFO(up.output() << node->output());
  REQUIRE(says("is ready after"));
  const auto endpoint =
    json::parse(read_file(here.path() / "troupe/joined/state.json")).value("endpoint", "");
  const auto node_1 = [&]() -> json {
    auto answer = troupe::http::fetch({"GET", endpoint + "/v1/cluster", {}, {}}, 2s);
    auto status = answer ? json::parse(answer->body, nullptr, false) : json();
    return status.is_object() ? status["nodes"][1] : json{{"state", "unknown"}};
  };
  CHECK(run_golden_crowd(endpoint).empty());
  CHECK(fs::exists(there.path() / "troupe/node-1/node-1-worker-0.log"));

  node->signal(SIGKILL);
  REQUIRE(eventually([&] { return node_1()["state"] != "up"; }, 10s));
  CHECK(run_golden_crowd(endpoint).empty()); // its stage has moved
  auto elsewhere = arguments;
  elsewhere.insert(elsewhere.end(), {"--bind", "127.0.0.2"});
  node = std::make_unique<program>(troupe_program(), elsewhere, there.path(),
                                   there.path() / "again.log");
  const auto is_back = [&] {
    const auto now = node_1();
    return now["state"] == "up" && now["workers"][0]["state"] == "running";
  };
  INFO(node->output());
  REQUIRE(eventually(is_back, 30s));
  CHECK(run_golden_crowd(endpoint).empty());

  up.signal(SIGTERM);
  const auto ended = up.wait(15s);
  REQUIRE(ended);
  CHECK(ended->status == 0);
  node->signal(SIGTERM);
  REQUIRE(node->wait(15s));
  CHECK(processes_under(there.path()).empty());
}
