#pragma once

#include "troupe/messages/cluster_protocol.hpp"
#include "troupe/recovery/membership.hpp"

#include <map>
#include <string>

namespace troupe::actors {

/// Supervises the nodes and the frontend; lives in the controller process. Hands out plan and
/// views and owns the epoch; decides nothing itself, see recovery::membership. When it dies, what
/// runs goes on; its successor is told by nodes and frontend what there is.
class cluster_supervisor : public messages::cluster_supervisor_actor::base {
public:
  cluster_supervisor(caf::actor_config& config, recovery::membership members);

  behavior_type make_behavior() override;

private:
  void apply(const recovery::membership::effects& effects);
  void broadcast();

  recovery::membership members_;
  std::map<std::string, messages::node_supervisor_actor> nodes_;
  messages::frontend_actor frontend_;
};

} // namespace troupe::actors
