#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "troupe/base/error.hpp"

namespace troupe::config {

enum class device_kind : std::uint8_t { cpu, cuda };

/// One thing that computes. A worker process has one, or parallel.tensor of them.
struct device {
  device_kind kind = device_kind::cpu;
  std::uint32_t index = 0; ///< cuda: the GPU's number; cpu: the place in the node's list

  /// "cpu:1", "cuda:0".
  std::string name() const;

  friend bool operator==(const device&, const device&) = default;
};

enum class launch_mode : std::uint8_t {
  local, ///< `troupe up` starts the node's processes itself
  ssh,   ///< `troupe up` logs into the host
  join,  ///< somebody starts `troupe node` there and it dials in
};

/// A host, or a part of one: two nodes on localhost with different names are legal.
struct node {
  std::string name;
  std::string host = "localhost";
  std::vector<device> devices = {device{}};
  launch_mode launch = launch_mode::local;
};

enum class numerics : std::uint8_t {
  exact, ///< activations stay in float32
  fast,  ///< on CPUs, activations are rounded before each product; on GPUs, they are bf16
};

enum class head_format : std::uint8_t {
  stored, ///< as the model has it
  int8,   ///< rounded to 8 bit when it is loaded
};

struct model_settings {
  std::filesystem::path path;            ///< absolute; an existing directory
  numerics arithmetic = numerics::exact; ///< where it is not given: `fast` on GPUs
  head_format head = head_format::stored;
  std::string name; ///< as clients see it; by default the last component of path
};

/// What carries rows from GPU to GPU where several compute a stage. The sums have the same bits.
enum class all_reduce : std::uint8_t {
  automatic, ///< peer memory where all GPUs reach each other's, NCCL elsewhere
  peer,
  nccl,
};

struct parallel_settings {
  std::uint32_t data = 1;            ///< replicas of the model
  std::uint32_t pipeline = 1;        ///< stages of a replica
  std::uint32_t tensor = 1;          ///< devices of a stage
  std::uint32_t expert_groups = 0;   ///< 0: the experts live inside the stages
  std::uint32_t expert_replicas = 1; ///< copies of every expert group

  all_reduce sums = all_reduce::automatic; ///< of the devices of a stage
};

struct serving_settings {
  std::string listen_host = "127.0.0.1";    ///< name or address, IPv6 without brackets
  std::uint16_t listen_port = 8000;         ///< 0: any free port
  std::uint32_t max_batch_tokens = 2048;    ///< rows of one micro-batch
  std::uint32_t max_batch_sequences = 256;  ///< sequences of one micro-batch
  std::uint32_t prefill_chunk_tokens = 512; ///< rows of one sequence in one micro-batch
  std::uint32_t kv_tokens = 65536;          ///< positions in the KV cache of a replica; whole pages
  std::uint32_t page_tokens = 16;           ///< positions of one KV page
  std::uint32_t max_queue = 1024;           ///< requests of a replica waiting for admission
  std::uint32_t max_context = 0;            ///< positions of one sequence; 0: what the model allows
  std::uint32_t request_timeout_s = 600;
  std::uint32_t retain_s = 300;   ///< how long an answer can be fetched again
  std::uint32_t threads = 0;      ///< compute threads a worker; 0: its share of the cores
  std::uint32_t draft_tokens = 0; ///< that the model's MTP layer drafts for a sequence in a step
};

enum class protection : std::uint8_t {
  full,
  off, ///< for measuring its cost: no checksums, pulse, retention and token journal
};

struct recovery_settings {
  std::uint32_t heartbeat_ms = 100;
  std::uint32_t hang_ms = 800;    ///< a process without a beat, or work without progress, is dead
  std::uint32_t startup_s = 600;  ///< until everything has to run, nodes that join included
  std::uint32_t max_restarts = 5; ///< of one worker within `within_s`; one more escalates
  std::uint32_t within_s = 60;
  std::uint32_t spares = 0;          ///< devices that the plan leaves free
  std::uint32_t standbys = 0;        ///< warm worker processes of each node
  std::uint32_t node_grace_ms = 500; ///< a node whose connection broke may come back so long
  std::uint32_t suspicion = 8;       ///< phi of the accrual detector above which silence is death
  std::uint32_t resend_ms = 300;     ///< a micro-batch without an answer is sent again
  std::uint32_t dispatch_timeout_ms = 10; ///< an expert call without an answer goes to a copy
  std::uint32_t deadline_ms = 30000;      ///< how long a micro-batch waits for a peer to come back
  protection level = protection::full;
};

struct network_settings {
  std::string bind = "127.0.0.1"; ///< IP address that control and tensor traffic listens on
  std::uint32_t port = 0;         ///< of the controller, for nodes that join; 0: any that is free
};

/// A cluster file, checked. Values that are not in the file have their defaults.
/// A plain value: copy it to wherever it is needed.
struct cluster_config {
  std::string file; ///< as it was named to `load`
  std::string cluster = "local";
  model_settings model;
  std::vector<node> nodes = {node{.name = "node-0"}};
  parallel_settings parallel;
  serving_settings serving;
  recovery_settings recovery;
  network_settings network;

  /// Where each given key stands: "FILE:LINE:COL" or "--set KEY=VALUE".
  std::map<std::string, std::string, std::less<>> positions;

  /// Where to point a reader who has to change `key` ("parallel.pipeline"): the
  /// key's own position, else that of the section it would go into, else the file.
  std::string where(std::string_view key) const;
};

/// Reads and checks the cluster file at `file`, with `settings` ("serving.listen=127.0.0.1:0",
/// "nodes[0].devices=[cpu, cpu]") put over it; a later setting wins. Relative model paths
/// are looked up beside the file first, then in the current directory.
///
/// Fails with invalid_config. The cause then lists every problem found, one a line:
/// "FILE:LINE:COL: KEY: what is wrong with VALUE; what would be right".
/// Lines and columns (in bytes) count from 1. Callable on any thread.
expected<cluster_config> load(const std::filesystem::path& file,
                              std::span<const std::string> settings = {});

/// The same for text that is in memory already; `file` names it and need not exist.
expected<cluster_config> parse(std::string_view text, const std::filesystem::path& file,
                               std::span<const std::string> settings = {});

} // namespace troupe::config
