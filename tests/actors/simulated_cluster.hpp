#pragma once

#include "deterministic.hpp"
#include "fake_boundary.hpp"
#include "simulated_model.hpp"

#include "troupe/actors/cluster_supervisor.hpp"
#include "troupe/actors/scheduler.hpp"
#include "troupe/recovery/journal.hpp"
#include "troupe/recovery/node_policy.hpp"

#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

/// A whole cluster in one thread and virtual time, for any order of events and any faults. Real are
/// the cluster supervisor with its membership and journal, the decisions of nodes, the schedulers
/// and the stages; made up are what carries out a node's decisions (its processes are objects), the
/// roots of workers, the computation, the gateway, and everything between processes.
namespace troupe::test {

using std::chrono::milliseconds;

struct simulation_options {
  std::uint32_t num_nodes = 2;
  std::uint32_t num_devices = 2; ///< of each node
  std::uint32_t num_stages = 2;
  std::uint32_t num_replicas = 1;
  std::uint32_t num_standbys = 0; ///< of each node
  bool on_gpus = false;           ///< hidden rows stay there where they can; deaths take their time
  std::uint32_t max_restarts = 1000;
  double loss = 0;     ///< chance that a message of the data path is lost
  double repeat = 0;   ///< chance that it comes again late
  double refusal = 0;  ///< chance that a process cannot be started
  int num_mishaps = 0; ///< how many of those there are at most
};

class simulated_cluster;
class simulated_node;

/// A worker process. Dead ones stay dead; `alive` is what everybody around it asks.
struct simulated_process {
  std::uint32_t pid = 0;
  simulated_node* node = nullptr;
  std::string name; ///< what it believes to be
  std::uint64_t incarnation = 0;
  bool alive = true;
  caf::actor root;
  std::map<std::pair<std::uint32_t, std::uint32_t>, actors::stage_local> stages; ///< replica, index
  std::vector<caf::actor> links;                                                 ///< to schedulers
  /// What its device is writing, by stage: done when the process dies, or some time after.
  std::map<std::pair<std::uint32_t, std::uint32_t>, simulated_writes> in_work;
};
using process_ptr = std::shared_ptr<simulated_process>;

/// Carries out what a node decides with objects for processes. One object a node process.
class simulated_node {
public:
  simulated_node(simulated_cluster& cluster, std::string name, std::uint64_t incarnation);

  caf::behavior behave(caf::event_based_actor* self);

  const std::string& name() const { return name_; }
  std::uint64_t incarnation() const { return incarnation_; }
  /// Nothing gets from or to this host.
  bool is_cut_off() const { return *cut_; }
  void cut_off(bool on) { *cut_ = on; }
  const std::shared_ptr<bool>& cut() const { return cut_; }
  const caf::actor& connection() const { return controller_; }
  std::shared_ptr<simulated_kv> kv(const std::string& actor) const;
  const std::shared_ptr<fake_blocks>& blocks() const { return blocks_; }

  caf::actor handle;
  bool is_dead = false;

private:
  using policy = recovery::node_policy;

  struct child {
    process_ptr process;
    caf::actor handle;
  };

  void dial();
  void exited(std::uint32_t pid, bool by_pulse, bool is_gone);

  void carry_out(policy::effects todo);
  void carry_out(const policy::start_process& what);
  void carry_out(const policy::kill_process& what);
  void carry_out(policy::assign& what);
  void carry_out(const policy::send_view& what);
  void carry_out(const policy::keep_memory& what);
  void carry_out(const policy::drop_memory& what);
  void carry_out(const policy::note& what);
  void carry_out(proto::NodeHello& hello);
  void carry_out(proto::WorkerChanged& change);

  simulated_cluster& cluster_;
  std::string name_;
  std::uint64_t incarnation_;
  std::shared_ptr<bool> cut_ = std::make_shared<bool>(false);
  caf::event_based_actor* self_ = nullptr;
  caf::actor controller_;
  policy policy_;
  std::map<std::string, child> children_; ///< by the policy's name for the process
  std::map<std::string, std::shared_ptr<simulated_kv>> kv_;
  std::shared_ptr<fake_blocks> blocks_ = std::make_shared<fake_blocks>(); ///< of its keepers
};

/// What requests have come to.
struct request_log {
  std::map<schedule::request_id, std::vector<std::int32_t>> tokens;
  std::map<schedule::request_id, schedule::finish_reason> finished;
  std::map<schedule::request_id, error> errors;
};

/// How much of its journal a controller finds.
enum class journal_state { whole, old, none };

class simulated_cluster : public deterministic_system {
public:
  simulated_cluster(const simulation_options& options, std::uint64_t seed);
  ~simulated_cluster();

  /// One thing happens: an actor takes a message, or, when all is quiet, time passes.
  void step();

  /// Virtual time since the beginning.
  milliseconds now() const;
  /// Does something at a later time.
  void after(milliseconds delay, std::function<void()> what);
  std::uint64_t pick(std::uint64_t n);
  bool chance(double p) { return std::uniform_real_distribution<double>()(random) < p; }

  void submit(schedule::request_id id, std::vector<std::int32_t> prompt, std::uint32_t max_tokens);
  void cancel(schedule::request_id id);

  // Faults.
  void start_node(std::uint32_t i);
  void kill_node(std::uint32_t i);
  simulated_node* node(std::uint32_t i) { return nodes_[i].get(); } ///< null: dead
  std::uint32_t num_nodes() const { return static_cast<std::uint32_t>(nodes_.size()); }
  /// `noticed`: when its node sees it; killed by its node for its pulse if `by_pulse`. It is gone
  /// some time later, and what its device had in work is written once more before that.
  void kill(const process_ptr& process, milliseconds noticed, bool by_pulse);
  void break_connection(const caf::actor& connection);
  void break_a_link();
  void start_controller(journal_state state);
  void kill_controller();
  bool has_controller() const { return controller_ != nullptr; }
  std::vector<process_ptr> live_processes() const;

  /// What has gone wrong; empty: nothing so far.
  const std::string& wrong() const { return wrong_; }
  const request_log& log() const { return log_; }
  /// Whether controller, frontend and processes agree on a cluster that serves; else why not.
  std::string not_settled();
  /// Some stage was given up for good, and why a replica may fail its requests.
  bool is_given_up() const { return given_up_; }
  /// Every replica has served once.
  bool has_begun() const { return has_begun_; }
  std::uint64_t epoch() const { return frontend_view_.epoch(); }
  const proto::ClusterPlan& plan() const { return plan_; }
  /// As the frontend sees it.
  const proto::ClusterView& view() const { return frontend_view_; }

  /// A line of the story of this seed, printed when a single seed is run.
  void tell(const std::string& what) const;
  bool verbose = false;

  std::mt19937_64 random;

  // For the actors of the cluster.
  void fail(const std::string& why);
  caf::actor dial_controller(const caf::actor& caller, std::shared_ptr<bool> cut);
  process_ptr start_process(simulated_node& node, const std::string& name,
                            std::uint64_t incarnation);
  void start_stages(const process_ptr& process, const proto::WorkerAssignment& assignment);
  void check_view(const proto::ClusterView& seen, const proto::ClusterView& before,
                  const std::string& who);
  /// Every actor that is spawned passes here, so that none is left at the end.
  template <class Handle>
  Handle track(Handle spawned) {
    spawned_.push_back(caf::actor_cast<caf::actor_addr>(spawned));
    return spawned;
  }
  /// Whether a message of the data path gets through; may come again after `again`, if not zero.
  bool passes(milliseconds& again);
  /// Whether the system starts no process just now.
  bool refuses();
  process_ptr find_process(const std::string& worker, std::uint64_t incarnation) const;
  milliseconds some_time(milliseconds longest) {
    return milliseconds(
      static_cast<std::int64_t>(pick(static_cast<std::uint64_t>(longest.count()) + 1)));
  }

private:
  struct connector;
  struct wire;
  caf::behavior gateway(caf::event_based_actor* self);
  caf::behavior dialer(caf::event_based_actor* self);
  void kill_now(const caf::actor& a);

  simulation_options options_;
  proto::ClusterPlan plan_;
  std::filesystem::path journal_;
  std::uint64_t controller_incarnation_ = 0;
  caf::actor controller_;
  std::vector<caf::actor_addr> spawned_;
  std::vector<caf::actor> connections_;
  std::vector<std::shared_ptr<simulated_node>> nodes_;
  std::vector<std::uint64_t> node_incarnations_;
  std::vector<std::shared_ptr<simulated_node>> dead_nodes_; // their actors may still be dying
  std::vector<process_ptr> processes_;
  std::uint32_t next_pid_ = 1000;
  caf::actor gateway_;
  caf::actor dialer_;
  caf::actor timer_;
  actors::scheduler_client client_;
  std::vector<actors::scheduler_local> schedulers_;
  std::map<std::uint32_t, bool> serving_;
  proto::ClusterView frontend_view_;
  proto::ClusterStatus status_;
  std::uint64_t next_event_ = 0;
  std::map<std::uint64_t, std::function<void()>> events_;
  std::deque<std::uint64_t> due_;
  int num_mishaps_ = 0;
  bool given_up_ = false;
  bool has_begun_ = false;
  std::string wrong_;
  request_log log_;
  std::map<std::pair<std::string, std::uint32_t>, std::uint64_t> sent_epochs_; ///< by sender
};

} // namespace troupe::test
