#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "troupe/config/cluster_config.hpp"

namespace fs = std::filesystem;
namespace config = troupe::config;

namespace {

/// A file name beside the demo model; the file itself does not exist.
const std::string file_name = TROUPE_SOURCE_DIR "/configs/c.yaml";

const std::string model_line = "model: {path: models/troupe-mini}\n";

/// The lines of an error, with the long file name cut down to "c.yaml".
std::vector<std::string> problems_of(const troupe::expected<config::cluster_config>& result) {
  if (result)
    return {};
  std::vector<std::string> lines;
  std::istringstream stream(result.error().cause);
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with(file_name))
      line.replace(0, file_name.size(), "c.yaml");
    lines.push_back(line);
  }
  return lines;
}

std::vector<std::string> problems_in(const std::string& text,
                                     const std::vector<std::string>& settings = {}) {
  const auto result = config::parse(text, file_name, settings);
  if (!result)
    CHECK(result.error().code == troupe::error_code::invalid_config);
  return problems_of(result);
}

struct refusal {
  std::string text;    // after the model's line, which is line 1
  std::string problem; // the only one
};

void check_refusals(const std::vector<refusal>& table) {
  for (const refusal& row : table) {
    INFO(row.text);
    const auto found = problems_in(model_line + row.text);
    REQUIRE(found.size() == 1);
    CHECK(found.front() == row.problem);
  }
}

} // namespace

TEST_CASE("a file with nothing but the model gets every default") {
  const auto loaded = config::parse(model_line, file_name);
  REQUIRE(loaded);
  CHECK(loaded->cluster == "local");
  CHECK(loaded->model.path == fs::path(TROUPE_SOURCE_DIR "/configs/models/troupe-mini"));
  CHECK(loaded->model.name == "troupe-mini");
  CHECK(loaded->model.arithmetic == config::numerics::exact);
  CHECK(loaded->model.head == config::head_format::stored);
  REQUIRE(loaded->nodes.size() == 1);
  CHECK(loaded->nodes[0].name == "node-0");
  CHECK(loaded->nodes[0].host == "localhost");
  CHECK(loaded->nodes[0].launch == config::launch_mode::local);
  REQUIRE(loaded->nodes[0].devices.size() == 1);
  CHECK(loaded->nodes[0].devices[0].name() == "cpu:0");
  CHECK(loaded->parallel.data == 1);
  CHECK(loaded->parallel.pipeline == 1);
  CHECK(loaded->parallel.tensor == 1);
  CHECK(loaded->parallel.expert_groups == 0);
  CHECK(loaded->parallel.expert_replicas == 1);
  CHECK(loaded->serving.listen_host == "127.0.0.1");
  CHECK(loaded->serving.listen_port == 8000);
  CHECK(loaded->serving.max_batch_tokens == 2048);
  CHECK(loaded->serving.max_batch_sequences == 256);
  CHECK(loaded->serving.prefill_chunk_tokens == 512);
  CHECK(loaded->serving.kv_tokens == 65536);
  CHECK(loaded->serving.page_tokens == 16);
  CHECK(loaded->serving.max_queue == 1024);
  CHECK(loaded->serving.max_context == 0);
  CHECK(loaded->serving.request_timeout_s == 600);
  CHECK(loaded->serving.threads == 0);
  CHECK(loaded->recovery.heartbeat_ms == 100);
  CHECK(loaded->recovery.hang_ms == 800);
  CHECK(loaded->recovery.max_restarts == 5);
  CHECK(loaded->recovery.within_s == 60);
  CHECK(loaded->recovery.spares == 0);
  CHECK(loaded->recovery.deadline_ms == 30000);
  CHECK(loaded->network.bind == "127.0.0.1");
}

TEST_CASE("every key arrives in its own field") {
  const auto loaded =
    config::parse("cluster: big\n"
                  "model: {path: models/troupe-mini, numerics: fast, head: int8, name: m}\n"
                  "nodes:\n"
                  "  - {name: a, host: 127.0.0.7, devices: [cpu, cpu]}\n"
                  "  - {name: b, host: gpu-7.example, launch: join}\n"
                  "parallel: {data: 2, pipeline: 3, tensor: 1, expert_groups: 4,\n"
                  "           expert_replicas: 5}\n"
                  "serving:\n"
                  "  listen: '[::1]:0'\n"
                  "  max_batch_tokens: 11\n"
                  "  max_batch_sequences: 12\n"
                  "  prefill_chunk_tokens: 10\n"
                  "  kv_tokens: 96\n"
                  "  page_tokens: 8\n"
                  "  max_queue: 13\n"
                  "  max_context: 90\n"
                  "  request_timeout_s: 14\n"
                  "  draft_tokens: 2\n"
                  "  threads: 15\n"
                  "recovery: {heartbeat_ms: 21, hang_ms: 220, max_restarts: 23,\n"
                  "           within_s: 24, startup_s: 25, spares: 0, deadline_ms: 2500}\n"
                  "network: {bind: 'fd00::1', port: 26}\n",
                  file_name);
  REQUIRE(problems_of(loaded) == std::vector<std::string>{});
  CHECK(loaded->cluster == "big");
  CHECK(loaded->model.name == "m");
  REQUIRE(loaded->nodes.size() == 2);
  CHECK(loaded->nodes[0].host == "127.0.0.7");
  CHECK(loaded->nodes[0].devices.at(1).name() == "cpu:1");
  CHECK(loaded->nodes[1].launch == config::launch_mode::join);
  CHECK(loaded->nodes[1].devices.size() == 1);
  CHECK(loaded->parallel.data == 2);
  CHECK(loaded->parallel.pipeline == 3);
  CHECK(loaded->parallel.expert_groups == 4);
  CHECK(loaded->parallel.expert_replicas == 5);
  CHECK(loaded->serving.listen_host == "::1");
  CHECK(loaded->serving.listen_port == 0);
  CHECK(loaded->serving.max_batch_tokens == 11);
  CHECK(loaded->serving.max_batch_sequences == 12);
  CHECK(loaded->serving.prefill_chunk_tokens == 10);
  CHECK(loaded->serving.kv_tokens == 96);
  CHECK(loaded->serving.page_tokens == 8);
  CHECK(loaded->serving.draft_tokens == 2);
  CHECK(loaded->model.arithmetic == config::numerics::fast);
  CHECK(loaded->model.head == config::head_format::int8);
  CHECK(loaded->serving.max_queue == 13);
  CHECK(loaded->serving.max_context == 90);
  CHECK(loaded->serving.request_timeout_s == 14);
  CHECK(loaded->serving.threads == 15);
  CHECK(loaded->recovery.heartbeat_ms == 21);
  CHECK(loaded->recovery.hang_ms == 220);
  CHECK(loaded->recovery.max_restarts == 23);
  CHECK(loaded->recovery.within_s == 24);
  CHECK(loaded->recovery.deadline_ms == 2500);
  CHECK(loaded->recovery.startup_s == 25);
  CHECK(loaded->network.bind == "fd00::1");
  CHECK(loaded->network.port == 26);
  CHECK(loaded->where("parallel.pipeline") == file_name + ":6:31");
  CHECK(loaded->where("nodes[1].devices") == file_name + ":5:5");
  CHECK(loaded->where("drill.name") == file_name);
}

TEST_CASE("how GPUs add up rows is chosen where there are GPUs that do") {
  const auto file = [](const std::string& devices, const std::string& parallel) {
    return model_line + "nodes: [{devices: [" + devices + "]}]\nparallel: {" + parallel + "}";
  };
  const std::string gpus = "'cuda:0', 'cuda:1'";
  const auto sums_of = [&](const std::string& parallel) {
    const auto loaded = config::parse(file(gpus, parallel), file_name);
    REQUIRE(loaded);
    return loaded->parallel.sums;
  };
  CHECK(sums_of("tensor: 2") == config::all_reduce::automatic);
  CHECK(sums_of("tensor: 2, all_reduce: auto") == config::all_reduce::automatic);
  CHECK(sums_of("tensor: 2, all_reduce: peer") == config::all_reduce::peer);
  CHECK(sums_of("tensor: 2, all_reduce: nccl") == config::all_reduce::nccl);
  CHECK(sums_of("tensor: 1, all_reduce: auto") == config::all_reduce::automatic);

  const auto refusal = [&](const std::string& devices, const std::string& parallel) {
    const auto found = problems_in(file(devices, parallel));
    REQUIRE(found.size() == 1);
    return found.front();
  };
  const std::string begin = "c.yaml:3:35: parallel.all_reduce: ";
  CHECK(refusal(gpus, "tensor: 2, all_reduce: NCCL")
        == begin + "\"NCCL\" is not known; write one of: auto, peer, nccl");
  CHECK(refusal(gpus, "tensor: 1, all_reduce: nccl")
        == begin + "there is nothing to add up where parallel.tensor is 1; write auto");
  CHECK(refusal("cpu, cpu", "tensor: 2, all_reduce: peer")
        == begin + "CPUs have one way to add up; write auto");
}

TEST_CASE("the shipped cluster files load") {
  const std::string folder = TROUPE_SOURCE_DIR "/configs/";
  for (const std::string name : {"local", "single", "two-nodes", "standby", "replicas",
                                 "spare-node", "one-pipeline-two-nodes", "experts-two-nodes"}) {
    const auto loaded = config::load(folder + name + ".yaml");
    REQUIRE(problems_of(loaded) == std::vector<std::string>{});
    CHECK(loaded->cluster == name);
    CHECK(loaded->model.name == "troupe-mini");
    CHECK(fs::exists(loaded->model.path / "config.json"));
    CHECK(loaded->serving.listen_host == "127.0.0.1");
    CHECK(loaded->serving.listen_port == 8000);
  }
}

TEST_CASE("the commented keys of local.yaml are real and show their defaults") {
  std::ifstream stream(TROUPE_SOURCE_DIR "/configs/local.yaml");
  std::ostringstream text;
  for (std::string line; std::getline(stream, line);) {
    // "  # key: value   # what it does" is a key, other comments have no such form.
    const auto mark = line.find("  # ");
    const auto colon = line.find(": ", mark);
    const bool is_key = mark != std::string::npos && line.find_first_not_of(' ') == mark + 2
                        && colon != std::string::npos
                        && line.substr(mark + 4, colon - mark - 4).find(' ') == std::string::npos;
    if (is_key)
      line.erase(mark + 2, 2);
    text << line << '\n';
  }
  const auto all = config::parse(text.str(), file_name);
  REQUIRE(problems_of(all) == std::vector<std::string>{});
  CHECK(all->positions.size() == 1 + (1 + 4) + (2 + 4) + (1 + 6) + (1 + 12) + (1 + 13) + (1 + 2));
  const auto plain = config::load(TROUPE_SOURCE_DIR "/configs/local.yaml");
  REQUIRE(plain);
  CHECK(all->model.name == plain->model.name);
  CHECK(all->parallel.sums == plain->parallel.sums);
  CHECK(all->serving.max_batch_tokens == plain->serving.max_batch_tokens);
  CHECK(all->serving.max_batch_sequences == plain->serving.max_batch_sequences);
  CHECK(all->serving.prefill_chunk_tokens == plain->serving.prefill_chunk_tokens);
  CHECK(all->serving.kv_tokens == plain->serving.kv_tokens);
  CHECK(all->serving.page_tokens == plain->serving.page_tokens);
  CHECK(all->serving.max_queue == plain->serving.max_queue);
  CHECK(all->serving.request_timeout_s == plain->serving.request_timeout_s);
  CHECK(all->serving.threads == plain->serving.threads);
  CHECK(all->recovery.heartbeat_ms == plain->recovery.heartbeat_ms);
  CHECK(all->recovery.hang_ms == plain->recovery.hang_ms);
  CHECK(all->recovery.max_restarts == plain->recovery.max_restarts);
  CHECK(all->recovery.within_s == plain->recovery.within_s);
  CHECK(all->recovery.startup_s == plain->recovery.startup_s);
  CHECK(all->recovery.deadline_ms == plain->recovery.deadline_ms);
  CHECK(all->recovery.spares == plain->recovery.spares);
  CHECK(all->recovery.standbys == plain->recovery.standbys);
  CHECK(all->recovery.node_grace_ms == plain->recovery.node_grace_ms);
  CHECK(all->recovery.suspicion == plain->recovery.suspicion);
  CHECK(all->recovery.resend_ms == plain->recovery.resend_ms);
  CHECK(all->recovery.dispatch_timeout_ms == plain->recovery.dispatch_timeout_ms);
  CHECK(all->recovery.level == plain->recovery.level);
  CHECK(all->serving.retain_s == plain->serving.retain_s);
  CHECK(all->parallel.data == plain->parallel.data);
  CHECK(all->parallel.expert_replicas == plain->parallel.expert_replicas);
  CHECK(all->network.bind == plain->network.bind);
  CHECK(all->network.port == plain->network.port);
}

TEST_CASE("unknown and duplicate keys") {
  check_refusals({
    {"nods: []\n", "c.yaml:2:1: nods: unknown key; did you mean nodes?"},
    {"serving:\n  max_batch_token: 7\n",
     "c.yaml:3:3: serving.max_batch_token: unknown key; did you mean max_batch_tokens?"},
    {"serving: {maxQueue: 7}\n",
     "c.yaml:2:11: serving.maxQueue: unknown key; did you mean max_queue?"},
    {"serving: {page-tokens: 8}\n",
     "c.yaml:2:11: serving.page-tokens: unknown key; did you mean page_tokens?"},
    {"pipeline: 2\n", "c.yaml:2:1: pipeline: unknown key; did you mean parallel.pipeline?"},
    {"nodes: [{nmae: a}]\n", "c.yaml:2:10: nodes[0].nmae: unknown key; did you mean name?"},
    {"network: {zzzzzz: 1}\n",
     "c.yaml:2:11: network.zzzzzz: unknown key; the keys here are bind, port"},
    {"\"a b\\n\": 1\n", "c.yaml:2:1: \"a b\\n\": unknown key; the keys here are cluster, model, "
                        "network, nodes, parallel, recovery, serving"},
    {"network:\n  <<: {bind: 127.0.0.1}\n",
     "c.yaml:3:3: network.<<: merge keys are not supported; repeat the keys instead"},
    {"cluster: a\ncluster: b\n",
     "c.yaml:3:1: cluster: the key is there twice, first in line 2; keep one of the two"},
    {"parallel:\n  data: 1\n\n  data: 1\n",
     "c.yaml:5:3: parallel.data: the key is there twice, first in line 3; keep one of the two"},
  });
}

TEST_CASE("wrong types") {
  const std::string range = "; a whole number from 1 to 256 is needed";
  check_refusals({
    {"parallel: {data: two}\n", "c.yaml:2:18: parallel.data: \"two\" is text" + range},
    {"parallel: {data: yes}\n", "c.yaml:2:18: parallel.data: \"yes\" is text" + range},
    {"parallel: {data: true}\n", "c.yaml:2:18: parallel.data: true is a truth value" + range},
    {"parallel: {data: \"2\"}\n",
     "c.yaml:2:18: parallel.data: \"2\" is text, because of the quotes" + range},
    {"parallel: {data: !!str 2}\n",
     "c.yaml:2:18: parallel.data: \"2\" is text, because of the quotes" + range},
    {"parallel: {data: 3.5}\n", "c.yaml:2:18: parallel.data: 3.5 is not a whole number" + range},
    {"parallel: {data: 1e2}\n", "c.yaml:2:18: parallel.data: 1e2 is not a whole number" + range},
    {"parallel: {data: 0x2}\n", "c.yaml:2:18: parallel.data: \"0x2\" is text" + range},
    {"parallel: {data: 2k}\n", "c.yaml:2:18: parallel.data: \"2k\" is text" + range},
    {"parallel: {data: [2]}\n", "c.yaml:2:18: parallel.data: a list is written here" + range},
    {"parallel: {data: {a: 2}}\n", "c.yaml:2:18: parallel.data: a mapping is written here" + range},
    {"parallel:\n  data:\n", "c.yaml:3:3: parallel.data: nothing is written here" + range},
    {"parallel: 2\n",
     "c.yaml:2:11: parallel: 2 is a number; a mapping of keys to values is needed"},
    {"parallel: [2]\n",
     "c.yaml:2:11: parallel: a list is written here; a mapping of keys to values is needed"},
    {"cluster: 5\n",
     "c.yaml:2:10: cluster: 5 is a number; text is needed: write \"5\" in quotes if "
     "that is meant"},
    {"cluster: [a]\n", "c.yaml:2:10: cluster: a list is written here; text is needed"},
    {"cluster:\n", "c.yaml:2:1: cluster: nothing is written here; text is needed"},
    {"cluster: ''\n",
     "c.yaml:2:10: cluster: the text is empty; write a value or leave the key out"},
    {"nodes: node-0\n", "c.yaml:2:8: nodes: \"node-0\" is text; a list is needed"},
    {"nodes: {name: a}\n", "c.yaml:2:8: nodes: a mapping is written here; a list is needed"},
    {"nodes: [a]\n", "c.yaml:2:9: nodes[0]: \"a\" is text; a mapping of keys to values is needed"},
    {"nodes:\n  -\n  - {name: a}\n",
     "c.yaml:4:3: nodes[0]: nothing is written here; write for instance {name: node-0}"},
    {"nodes: [{devices: cpu}]\n",
     "c.yaml:2:19: nodes[0].devices: \"cpu\" is text; a list is needed"},
    {"nodes: [{devices: [cpu, 1]}]\n", "c.yaml:2:25: nodes[0].devices[1]: 1 is a number; text is "
                                       "needed: write \"1\" in quotes if that is meant"},
  });
}

TEST_CASE("numbers out of range") {
  check_refusals({
    {"parallel: {data: 0}\n",
     "c.yaml:2:18: parallel.data: 0 is out of range; a whole number from 1 to 256 is needed"},
    {"parallel: {data: -1}\n",
     "c.yaml:2:18: parallel.data: -1 is out of range; a whole number from 1 to 256 is needed"},
    {"parallel: {pipeline: 257}\n",
     "c.yaml:2:22: parallel.pipeline: 257 is out of range; a whole number from 1 to 256 is needed"},
    {"serving: {max_queue: 99999999999999999999}\n",
     "c.yaml:2:22: serving.max_queue: 99999999999999999999 is out of range; a whole number from 1 "
     "to 1000000 is needed"},
    {"serving: {max_batch_tokens: 4294967297}\n",
     "c.yaml:2:29: serving.max_batch_tokens: 4294967297 is out of range; a whole number from 1 to "
     "1000000 is needed"},
    {"serving: {prefill_chunk_tokens: 2049}\n",
     "c.yaml:2:33: serving.prefill_chunk_tokens: 2049 does not fit into max_batch_tokens, which is "
     "2048; write at most that"},
    {"serving: {kv_tokens: 100}\n",
     "c.yaml:2:22: serving.kv_tokens: 100 is not a multiple of page_tokens, which is 16; write for "
     "instance 96"},
    {"serving: {kv_tokens: 64, max_context: 65}\n",
     "c.yaml:2:39: serving.max_context: 65 is more than kv_tokens, which is 64; one sequence has "
     "to fit into the cache"},
    {"recovery: {hang_ms: 150}\n", "c.yaml:2:21: recovery.hang_ms: hang_ms is 150 and heartbeat_ms "
                                   "is 100; hang_ms must be at least "
                                   "twice heartbeat_ms"},
    {"recovery: {heartbeat_ms: 500}\n", "c.yaml:2:26: recovery.heartbeat_ms: hang_ms is 800 and "
                                        "heartbeat_ms is 500; hang_ms must be at "
                                        "least twice heartbeat_ms"},
    {"recovery: {deadline_ms: 800}\n", "c.yaml:2:25: recovery.deadline_ms: deadline_ms is 800 and "
                                       "hang_ms is 800; deadline_ms must be "
                                       "the larger, or nothing comes back in time"},
  });
}

TEST_CASE("defaults give way to what is written beside them") {
  const auto loaded =
    config::parse(model_line + "serving: {max_batch_tokens: 7, page_tokens: 48}\n", file_name);
  REQUIRE(loaded);
  CHECK(loaded->serving.prefill_chunk_tokens == 7);
  CHECK(loaded->serving.kv_tokens == 65520); // 1365 pages of 48
}

TEST_CASE("names, addresses and devices") {
  const std::string needed = "; HOST:PORT is needed, such as 127.0.0.1:8000";
  check_refusals({
    {"cluster: a/b\n",
     "c.yaml:2:10: cluster: \"a/b\" is not a name; up to 63 letters, digits, '-', "
     "'_' and '.' are needed, a letter, digit or '_' first"},
    {"cluster: ..\n", "c.yaml:2:10: cluster: \"..\" is not a name; up to 63 letters, digits, '-', "
                      "'_' and '.' are needed, a letter, digit or '_' first"},
    {"serving: {listen: localhost}\n",
     "c.yaml:2:19: serving.listen: \"localhost\" has no port" + needed},
    {"serving: {listen: 8000}\n", "c.yaml:2:19: serving.listen: 8000 is a number; text is needed: "
                                  "write \"8000\" in quotes if that is meant"},
    {"serving: {listen: ':8000'}\n", "c.yaml:2:19: serving.listen: \":8000\" has no host (0.0.0.0 "
                                     "stands for every interface)"
                                       + needed},
    {"serving: {listen: 'a:65536'}\n",
     "c.yaml:2:19: serving.listen: \"a:65536\" has the impossible "
     "port \"65536\" (0 to 65535)"
       + needed},
    {"serving: {listen: 'a:-1'}\n", "c.yaml:2:19: serving.listen: \"a:-1\" has the impossible port "
                                    "\"-1\" (0 to 65535)"
                                      + needed},
    {"serving: {listen: '127.0.0.256:1'}\n",
     "c.yaml:2:19: serving.listen: \"127.0.0.256:1\" has the "
     "impossible host \"127.0.0.256\""
       + needed},
    {"serving: {listen: '::1:80'}\n", "c.yaml:2:19: serving.listen: \"::1:80\" has an IPv6 address "
                                      "without [brackets] or more than one "
                                      "port"
                                        + needed},
    {"serving: {listen: '[::1]'}\n", "c.yaml:2:19: serving.listen: \"[::1]\" has no port" + needed},
    {"network: {bind: eth0}\n",
     "c.yaml:2:17: network.bind: \"eth0\" is not an IP address; write for "
     "instance 127.0.0.1"},
    {"nodes: []\n",
     "c.yaml:2:8: nodes: the list is empty; give at least one item or leave the key out"},
    {"nodes:\n",
     "c.yaml:2:1: nodes: the list is empty; give at least one item or leave the key out"},
    {"nodes:\n  - {name: a, devices: []}\n",
     "c.yaml:3:24: nodes[0].devices: the list is empty; give "
     "at least one item or leave the key out"},
    {"nodes:\n  - {name: a}\n  - {name: b}\n  - {name: a}\n",
     "c.yaml:5:12: nodes[2].name: \"a\" is the name of nodes[0] too; give every node its own"},
    {"nodes: [{name: node-1}, {}]\n",
     "c.yaml:2:25: nodes[1].name: \"node-1\" is the name of nodes[0] too; give every node its own"},
    {"nodes: [{devices: [cpu, gpu]}]\n", "c.yaml:2:25: nodes[0].devices[1]: \"gpu\" is not a "
                                         "device; write cpu once for every worker, or "
                                         "cuda:0 to cuda:63"},
    {"nodes: [{devices: ['cuda:64']}]\n", "c.yaml:2:20: nodes[0].devices[0]: \"cuda:64\" is not a "
                                          "device; write cpu once for every worker, "
                                          "or cuda:0 to cuda:63"},
    {"nodes: [{host: 'a b', launch: join}]\n", "c.yaml:2:16: nodes[0].host: \"a b\" is neither a "
                                               "host name nor an address; write for instance "
                                               "localhost"},
    {"nodes: [{host: gpu-7.example}]\n", "c.yaml:2:16: nodes[0].host: \"gpu-7.example\" is not "
                                         "this machine, and launch: local starts the "
                                         "node here; write localhost, or launch: join"},
    {"nodes: [{name: far, host: gpu-7.example, launch: join}]\n",
     "c.yaml:1:1: network.bind: far on gpu-7.example cannot reach \"127.0.0.1\"; write the address "
     "that "
     "this host has in their network"},
    {"nodes: [{name: far, host: 10.0.0.7, launch: join}]\nnetwork: {bind: 127.0.0.2}\n",
     "c.yaml:3:17: network.bind: far on 10.0.0.7 cannot reach \"127.0.0.2\"; write the address "
     "that "
     "this host has in their network"},
    {"network: {bind: 0.0.0.0}\n",
     "c.yaml:2:17: network.bind: \"0.0.0.0\" is no address that "
     "others can be told to reach this host at; write the one that it "
     "has in their network"},
    {"nodes: [{launch: rsh}]\n",
     "c.yaml:2:18: nodes[0].launch: \"rsh\" is not known; write one of: local, ssh, join"},
  });
}

TEST_CASE("GPUs are named, and the devices of a cluster are of one kind") {
  const auto loaded = config::parse(
    model_line + "nodes: [{devices: ['cuda:1', 'cuda:0']}, {devices: ['cuda:0']}]\n", file_name);
  REQUIRE(loaded);
  CHECK(loaded->nodes[0].devices[0].name() == "cuda:1");
  CHECK(loaded->nodes[0].devices[1].kind == config::device_kind::cuda);
  check_refusals({
    {"nodes: [{devices: ['cuda:1', 'cuda:1']}]\n",
     "c.yaml:2:30: nodes[0].devices[1]: cuda:1 is there twice; name every GPU once"},
    {"nodes: [{name: a, devices: ['cuda:1']}, {name: b, devices: [cpu]}]\n",
     "c.yaml:2:8: nodes: cuda:1 of a and cpu:0 of b do not compute alike; write only GPUs or only "
     "CPUs"},
  });
}

TEST_CASE("GPUs compute fast where the file does not say, CPUs exactly") {
  const auto arithmetic_of = [](const std::string& text, const std::vector<std::string>& settings) {
    const auto loaded = config::parse(text, file_name, settings);
    REQUIRE(loaded);
    return loaded->model.arithmetic;
  };
  const std::string gpus = "nodes: [{devices: ['cuda:0']}]\n";
  const std::string exact = "model: {path: models/troupe-mini, numerics: exact}\n";
  const std::string fast = "model: {path: models/troupe-mini, numerics: fast}\n";
  CHECK(arithmetic_of(model_line, {}) == config::numerics::exact);
  CHECK(arithmetic_of(model_line + gpus, {}) == config::numerics::fast);
  CHECK(arithmetic_of(exact + gpus, {}) == config::numerics::exact);
  CHECK(arithmetic_of(fast + gpus, {}) == config::numerics::fast);
  CHECK(arithmetic_of(model_line + gpus, {"model.numerics=exact"}) == config::numerics::exact);
  const std::string cpus = "nodes: [{devices: [cpu]}]\n";
  const std::vector<std::string> on_gpus{"nodes[0].devices=['cuda:0']"};
  CHECK(arithmetic_of(model_line + cpus, on_gpus) == config::numerics::fast);
  CHECK(arithmetic_of(exact + cpus, on_gpus) == config::numerics::exact);
}

TEST_CASE("what cannot run yet is refused by name") {
  check_refusals({
    {"nodes: [{host: far, launch: ssh}]\n",
     "c.yaml:2:29: nodes[0].launch: ssh is not supported yet in this build; write local or join"},
  });
  CHECK(
    problems_in("model: {path: 'random:a.json'}")
    == std::vector<std::string>{"c.yaml:1:15: model.path: there is no file \"a.json\" to make a "
                                "model up from; name a config.json behind random:"});
}

TEST_CASE("all problems come at once, in the order of the file, settings last") {
  const auto found = problems_in("serving: {threads: many}\n"
                                 "colour: red\n"
                                 "parallel:\n"
                                 "  pipeline: 0\n"
                                 "  pipeline: 1\n"
                                 "model: {numerics: medium, head: 8 bit}\n",
                                 {"recovery.spares=x", "cluster=a b"});
  CHECK(
    found
    == std::vector<std::string>{
      "c.yaml:1:20: serving.threads: \"many\" is text; a whole number from 0 to 4096 is needed",
      "c.yaml:2:1: colour: unknown key; the keys here are cluster, model, network, nodes, "
      "parallel, "
      "recovery, serving",
      "c.yaml:4:13: parallel.pipeline: 0 is out of range; a whole number from 1 to 256 is needed",
      "c.yaml:5:3: parallel.pipeline: the key is there twice, first in line 4; keep one of the two",
      "c.yaml:6:1: model.path: is missing; name the directory of a Hugging Face model",
      "c.yaml:6:19: model.numerics: \"medium\" is not known; write one of: exact, fast",
      "c.yaml:6:33: model.head: \"8 bit\" is not known; write one of: stored, int8",
      "--set recovery.spares=x: recovery.spares: \"x\" is text; a whole number from 0 to 64 is "
      "needed",
      "--set cluster=a b: cluster: \"a b\" is not a name; up to 63 letters, digits, '-', '_' and "
      "'.' "
      "are needed, a letter, digit or '_' first"});
  CHECK(problems_in("").front()
        == "c.yaml:1:1: model.path: is missing; name the directory of a Hugging Face model");
}

TEST_CASE("a flood of problems is cut short") {
  std::string text = model_line;
  for (int i = 0; i < 80; ++i)
    text += "zzzzzzzzzz" + std::to_string(i) + ": 1\n";
  const auto found = problems_in(text);
  REQUIRE(found.size() == 51);
  CHECK(found.back() == "and 30 more problems");
}

TEST_CASE("settings replace and extend what the file says") {
  const std::string text =
    model_line + "nodes: [{name: a}, {name: b}]\nparallel: {data: nonsense}\n";
  const std::vector<std::string> settings = {"serving.listen=127.0.0.1:1",
                                             "serving.listen=[::1]:0",
                                             "parallel.data=2",
                                             "nodes[1].devices=[cpu, cpu, cpu]",
                                             "model.name=7",
                                             "recovery={hang_ms: 900}",
                                             "nodes[0].name=x=y",
                                             "nodes[0].name=z"};
  const auto loaded = config::parse(text, file_name, settings);
  REQUIRE(problems_of(loaded) == std::vector<std::string>{});
  CHECK(loaded->serving.listen_host == "::1");
  CHECK(loaded->serving.listen_port == 0);
  CHECK(loaded->parallel.data == 2);
  CHECK(loaded->nodes.at(0).name == "z");
  CHECK(loaded->nodes.at(1).devices.size() == 3);
  CHECK(loaded->model.name == "7");
  CHECK(loaded->recovery.hang_ms == 900);
  CHECK(loaded->where("parallel.data") == "--set parallel.data=2");
  CHECK(loaded->where("nodes[1].name") == file_name + ":2:27");
}

TEST_CASE("settings that are wrong are reported as they were written") {
  struct row {
    std::string setting, problem;
  };
  const std::vector<row> table = {
    {"serving.listen=nowhere",
     "serving.listen: \"nowhere\" has no port; HOST:PORT is needed, such as "
     "127.0.0.1:8000"},
    {"parallel.data=3.5",
     "parallel.data: 3.5 is not a whole number; a whole number from 1 to 256 is needed"},
    {"parallel.data=", "parallel.data: \"\" is text; a whole number from 1 to 256 is needed"},
    {"parallel.dta=3", "parallel.dta: unknown key; did you mean data?"},
    {"nodes[1].name=b",
     "nodes[1].name: there is no item [1]; the list has 0 items, counted from [0]"},
    {"nodes=[{name: a]", "nodes: "},
    {"nodes=[a", "nodes: \"[a\" is text; a list is needed"},
    {"parallel", "\"parallel\" is not of the form KEY=VALUE; write for instance --set "
                 "serving.listen=127.0.0.1:0"},
    {"=3", "\"=3\" is not of the form KEY=VALUE; write for instance --set "
           "serving.listen=127.0.0.1:0"},
    {"a..b=3", "\"a..b=3\" is not of the form KEY=VALUE; write for instance --set "
               "serving.listen=127.0.0.1:0"},
    {"nodes[x].name=3",
     "\"nodes[x].name=3\" is not of the form KEY=VALUE; write for instance --set "
     "serving.listen=127.0.0.1:0"},
  };
  for (const row& r : table) {
    const auto found = problems_in(model_line, {r.setting});
    INFO(r.setting);
    REQUIRE(found.size() == 1);
    const std::string expected = "--set " + r.setting + ": " + r.problem;
    if (r.problem.ends_with(": ")) // the rest is the YAML library's wording
      CHECK(found.front().starts_with(expected));
    else
      CHECK(found.front() == expected);
  }
  CHECK(
    problems_in(model_line, {"cluster=\xff"})
    == std::vector<std::string>{"--set \"cluster=\\xff\": byte 0xFF is not UTF-8; write UTF-8"});
}

TEST_CASE("model paths are looked up beside the file, then in the current directory") {
  const troupe::testing::temporary_directory folder;
  fs::create_directories(folder.path() / "beside");
  const auto file = folder.write("c.yaml", "model: {path: beside/}\n");
  auto loaded = config::load(file);
  REQUIRE(loaded);
  CHECK(loaded->model.name == "beside");
  CHECK(loaded->model.path.is_absolute());

  // The test's current directory is not the folder, so "." parts must lead back to it.
  const std::string here = fs::current_path().filename().string();
  folder.write("c.yaml", "model: {path: ../" + here + "}\n");
  loaded = config::load(file);
  if (fs::current_path().has_relative_path()) {
    REQUIRE(loaded);
    CHECK(loaded->model.path == fs::current_path());
  }
  folder.write("c.yaml", "model: {path: absent}\n");
  CHECK(problems_of(config::load(file))
        == std::vector<std::string>{
          file.string() + ":1:15: model.path: there is no directory \"absent\" (looked for \""
          + (folder.path() / "absent").string() + "\" and \""
          + (fs::current_path() / "absent").string()
          + "\"); name the directory that holds config.json"});
  folder.write("c.yaml", "model: {path: c.yaml}\n");
  CHECK(problems_of(config::load(file)).at(0).find("is not a directory") != std::string::npos);
}

TEST_CASE("files that cannot be read") {
  const troupe::testing::temporary_directory folder;
  CHECK(problems_of(config::load(folder.path() / "none.yaml"))
        == std::vector<std::string>{(folder.path() / "none.yaml").string()
                                    + ": there is no such file; name a cluster file, such as "
                                      "configs/local.yaml"});
  CHECK(problems_of(config::load(folder.path()))
        == std::vector<std::string>{folder.path().string()
                                    + ": is a directory; name a cluster file in it, such as "
                                      "local.yaml"});
  CHECK(
    problems_of(config::load("/dev/zero"))
    == std::vector<std::string>{"/dev/zero: is not a regular file; write the cluster file to disk "
                                "first"});
  const auto big = folder.write("big.yaml", std::string((1U << 20U) + 1, '#'));
  CHECK(problems_of(config::load(big))
        == std::vector<std::string>{big.string()
                                    + ": not valid YAML: 1048577 bytes are too many; at "
                                      "most 1048576 are read"});
}
