#include "troupe/recovery/relocation.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <sstream>
#include <tuple>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::recovery {

namespace {

std::uint64_t bytes_of(const proto::ActorPlan& actor) {
  return actor.kv_bytes() + actor.weight_bytes();
}

/// The GPUs of a worker, out of "cuda:0,cuda:1"; none on CPUs.
std::vector<std::string> gpus_of(const proto::WorkerPlan& worker) {
  std::vector<std::string> result;
  if (!worker.device().starts_with("cuda:"))
    return result;
  std::istringstream devices{worker.device()};
  for (std::string one; std::getline(devices, one, ',');)
    result.push_back(one);
  return result;
}

/// Memory of a host or a GPU, less what is given out.
class room {
public:
  room() = default; ///< nobody knows how much: there is always enough
  explicit room(std::uint64_t bytes) : free_(static_cast<std::int64_t>(bytes / 10 * 9)) {}

  bool has(std::uint64_t bytes) const {
    return bytes == 0 || !free_ || *free_ >= static_cast<std::int64_t>(bytes);
  }
  void take(std::uint64_t bytes) {
    if (free_)
      *free_ -= static_cast<std::int64_t>(bytes);
  }

private:
  std::optional<std::int64_t> free_;
};

/// What runs where while places are given out.
class floor_plan {
public:
  floor_plan(const proto::ClusterView& view, const std::set<std::string>& lost) {
    for (const auto& node : view.nodes()) {
      auto& n = nodes_[node.name()];
      n.usable = node.state() == proto::RUNNING;
      if (node.memory_bytes() != 0)
        n.host = room{node.memory_bytes()};
      for (const auto& [device, bytes] : node.gpu_bytes())
        n.gpus[device] = room{bytes};
    }
    for (const auto& worker : view.workers()) {
      bool is_lost = lost.count(worker.plan().name()) != 0;
      if (is_lost || worker.state() == proto::FAILED)
        continue;
      auto& n = nodes_[worker.plan().node()];
      if (!n.usable)
        continue;
      auto& p = places_.emplace_back(place{&worker, gpus_of(worker.plan()), {}});
      for (const auto& actor : worker.plan().actors())
        settle(p, actor);
    }
  }

  /// The name of the place for `actor`, taken; empty if there is none.
  std::string take(const proto::ActorPlan& actor, bool may_pack) {
    place* best = nullptr;
    for (auto& p : places_) {
      if (!fits(p, actor) || has_copy_of(p, actor) || (!may_pack && !p.actors.empty()))
        continue;
      if (best == nullptr || p.actors.size() < best->actors.size())
        best = &p;
    }
    if (best == nullptr)
      return {};
    settle(*best, actor);
    return best->worker->plan().name();
  }

  bool has_other_copy(const proto::ActorPlan& actor) const {
    return std::any_of(places_.begin(), places_.end(),
                       [&](const place& p) { return has_copy_of(p, actor); });
  }

private:
  struct node {
    bool usable = false;
    room host;
    std::map<std::string, room> gpus;
  };
  struct place {
    const proto::WorkerView* worker;
    std::vector<std::string> gpus; ///< none: it computes in the memory of its host
    std::vector<const proto::ActorPlan*> actors;
  };

  bool fits(const place& p, const proto::ActorPlan& actor) {
    auto& n = nodes_[p.worker->plan().node()];
    if (p.gpus.empty())
      return n.host.has(bytes_of(actor));
    return std::all_of(p.gpus.begin(), p.gpus.end(), [&](const auto& device) {
      return n.gpus[device].has(actor.device_bytes());
    });
  }

  void settle(place& p, const proto::ActorPlan& actor) {
    auto& n = nodes_[p.worker->plan().node()];
    p.actors.push_back(&actor);
    if (p.gpus.empty())
      n.host.take(bytes_of(actor));
    for (const auto& device : p.gpus)
      n.gpus[device].take(actor.device_bytes());
  }

  static bool has_copy_of(const place& p, const proto::ActorPlan& actor) {
    return actor.kind() == proto::EXPERT_GROUP
           && std::any_of(p.actors.begin(), p.actors.end(), [&](const auto* a) {
                return a->kind() == proto::EXPERT_GROUP && a->index() == actor.index();
              });
  }

  std::map<std::string, node> nodes_;
  std::vector<place> places_;
};

const proto::WorkerView* worker_named(const proto::ClusterView& view, const std::string& name) {
  for (const auto& worker : view.workers())
    if (worker.plan().name() == name)
      return &worker;
  return nullptr;
}

const proto::WorkerView* holder_of(const proto::ClusterView& view, const std::string& actor) {
  for (const auto& worker : view.workers())
    for (const auto& a : worker.plan().actors())
      if (a.id() == actor)
        return &worker;
  return nullptr;
}

/// Also true of a worker without GPUs.
bool knows_gpus_of(const proto::ClusterView& view, const proto::WorkerPlan& worker) {
  const auto gpus = gpus_of(worker);
  return std::all_of(view.nodes().begin(), view.nodes().end(), [&](const auto& node) {
    return node.name() != worker.node()
           || std::all_of(gpus.begin(), gpus.end(),
                          [&](const auto& device) { return node.gpu_bytes().contains(device); });
  });
}

} // namespace

relocation relocate(const proto::ClusterView& view, const std::set<std::string>& lost) {
  relocation result;
  floor_plan floor(view, lost);
  struct homeless {
    const proto::ActorPlan* actor;
    const std::string* from;
  };
  std::vector<homeless> all;
  for (const auto& worker : view.workers())
    if (lost.count(worker.plan().name()) != 0)
      for (const auto& actor : worker.plan().actors())
        all.push_back({&actor, &worker.plan().name()});
  // The largest first, so that the small ones fill what is left; stages before experts.
  std::stable_sort(all.begin(), all.end(), [](const homeless& a, const homeless& b) {
    return std::tuple(a.actor->kind(), ~bytes_of(*a.actor))
           < std::tuple(b.actor->kind(), ~bytes_of(*b.actor));
  });
  for (const auto& h : all) {
    bool redundant = h.actor->kind() == proto::EXPERT_GROUP && floor.has_other_copy(*h.actor);
    auto to = floor.take(*h.actor, false);
    if (to.empty() && !redundant)
      to = floor.take(*h.actor, true);
    if (!to.empty())
      result.moves.push_back({h.actor->id(), *h.from, to});
    else if (redundant)
      result.dropped.push_back(h.actor->id());
    else
      result.problem =
        fmt::format("{} of {} fits on no device that is left", h.actor->id(), *h.from);
  }
  if (!result.problem.empty()) {
    result.moves.clear();
    result.dropped.clear();
  }
  return result;
}

std::vector<move> moves_home(const proto::ClusterView& view, const proto::ClusterPlan& plan) {
  std::vector<move> result;
  for (const auto& home : plan.workers()) {
    const auto* worker = worker_named(view, home.name());
    if (worker == nullptr || worker->state() != proto::IDLE)
      continue;
    bool node_runs = std::any_of(view.nodes().begin(), view.nodes().end(), [&](const auto& node) {
      return node.name() == home.node() && node.state() == proto::RUNNING;
    });
    if (!node_runs)
      continue;
    for (const auto& actor : home.actors()) {
      const auto* holder = holder_of(view, actor.id());
      if (holder == nullptr) {
        result.push_back({actor.id(), "", home.name()});
        continue;
      }
      bool is_packed = false;
      if (holder->plan().actors_size() > 1)
        for (const auto& planned : plan.workers())
          is_packed = is_packed
                      || (planned.name() == holder->plan().name()
                          && planned.actors_size() < holder->plan().actors_size());
      if (is_packed)
        result.push_back({actor.id(), holder->plan().name(), home.name()});
    }
  }
  return result;
}

std::vector<std::string> foresee_losses(const proto::ClusterPlan& plan,
                                        const std::map<std::string, node_memory>& memory) {
  proto::ClusterView view;
  std::map<std::string, std::set<std::string>> workers_of;
  for (const auto& planned : plan.workers()) {
    auto* worker = view.add_workers();
    *worker->mutable_plan() = planned;
    worker->set_state(planned.actors().empty() ? proto::IDLE : proto::RUNNING);
    if (workers_of.count(planned.node()) == 0) {
      auto* node = view.add_nodes();
      node->set_name(planned.node());
      node->set_state(proto::RUNNING);
      if (auto known = memory.find(planned.node()); known != memory.end()) {
        node->set_memory_bytes(known->second.host_bytes);
        node->mutable_gpu_bytes()->insert(known->second.gpu_bytes.begin(),
                                          known->second.gpu_bytes.end());
      }
    }
    workers_of[planned.node()].insert(planned.name());
  }
  std::vector<std::string> lines;
  for (auto& node : *view.mutable_nodes()) {
    node.set_state(proto::FAILED);
    auto found = relocate(view, workers_of[node.name()]);
    node.set_state(proto::RUNNING);
    std::vector<std::string> what;
    for (const auto& m : found.moves) {
      const auto& to = *worker_named(view, m.to);
      what.push_back(fmt::format(
        "{} {} {}{}", m.actor, to.state() == proto::IDLE ? "moves to the spare" : "is packed onto",
        m.to, knows_gpus_of(view, to.plan()) ? "" : " if its GPU has room (not known here)"));
    }
    for (const auto& id : found.dropped)
      what.push_back(id + " is missed by nobody, its group has another copy");
    if (!found.problem.empty())
      what.push_back(found.problem + ": requests wait until it is back");
    else if (what.empty())
      what.emplace_back("nothing runs there");
    lines.push_back(fmt::format("if {} is lost: {}", node.name(), fmt::join(what, "; ")));
  }
  return lines;
}

bool same_actors(const proto::WorkerPlan& a, const proto::WorkerPlan& b) {
  return std::equal(a.actors().begin(), a.actors().end(), b.actors().begin(), b.actors().end(),
                    [](const auto& x, const auto& y) { return x.id() == y.id(); });
}

bool is_covered(const proto::ClusterView& view, const proto::WorkerView& worker) {
  return std::all_of(
    worker.plan().actors().begin(), worker.plan().actors().end(), [&](const auto& actor) {
      if (actor.kind() != proto::EXPERT_GROUP)
        return false;
      return std::any_of(view.workers().begin(), view.workers().end(), [&](const auto& other) {
        return other.plan().name() != worker.plan().name() && other.state() == proto::RUNNING
               && std::any_of(
                 other.plan().actors().begin(), other.plan().actors().end(), [&](const auto& a) {
                   return a.kind() == proto::EXPERT_GROUP && a.index() == actor.index();
                 });
      });
    });
}

} // namespace troupe::recovery
