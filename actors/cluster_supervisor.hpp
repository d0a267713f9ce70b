#pragma once

#include "troupe/actors/local_messages.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/messages/cluster_protocol.hpp"
#include "troupe/recovery/journal.hpp"
#include "troupe/recovery/membership.hpp"

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace troupe::actors {

using cluster_supervisor_local =
  messages::cluster_supervisor_actor::extend<caf::reacts_to<tick_atom>, caf::reacts_to<knock_atom>>;

/// Supervises the nodes and the frontend; lives in the controller process, in a thread of its own
/// since it writes a journal. Hands out plan, views and assignments and owns the epoch; decides
/// nothing itself, see recovery::membership. When it dies, what runs goes on; its successor
/// reads the journal and is told the rest by nodes and frontend.
class cluster_supervisor : public cluster_supervisor_local::base {
public:
  /// Without a journal nothing is written down; without a pulse nobody watches.
  cluster_supervisor(caf::actor_config& config, recovery::membership members,
                     std::optional<recovery::journal> journal = std::nullopt,
                     std::shared_ptr<memory::pulse> pulse = nullptr);

  behavior_type make_behavior() override;

private:
  void apply(const recovery::membership::effects& effects);
  void broadcast();
  void write_journal();

  recovery::membership members_;
  std::optional<recovery::journal> journal_;
  std::string journal_problem_;
  std::shared_ptr<memory::pulse> pulse_;
  std::map<std::string, messages::node_supervisor_actor> nodes_;
  messages::frontend_actor frontend_;
  std::chrono::steady_clock::time_point last_tick_;
};

} // namespace troupe::actors
