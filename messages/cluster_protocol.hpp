#pragma once

#include "troupe/messages/codec.hpp"
#include "cluster.pb.h"

#include <caf/typed_actor.hpp>

/// Who supervises whom, and what they tell each other.
///
///                      cluster_supervisor            (controller process)
///   node_hello,       ^        |  node_assignment,         ^  frontend_hello,
///   worker_changed,   |        v  cluster_view             |  replay_report, frontend_heartbeat
///   node_heartbeat    |
///                      node_supervisor  (one a host)      gateway + schedulers (frontend)
///   worker_hello,     ^        |  worker_assignment,
///   worker_report     |        v  cluster_view
///                         worker  (one a device)
///
/// The lower one always opens the connection and speaks first; the upper one answers to the
/// sender's handle. When the connection breaks, the lower one dials again and says hello with
/// everything that the upper one may have forgotten. A worker whose node is gone exits.
/// Heartbeats go both ways and carry version numbers, so that what was lost on a connection that
/// seemed to live is said again.
namespace troupe::messages {

using node_hello = wire<proto::NodeHello>;
using node_assignment = wire<proto::NodeAssignment>;
using worker_changed = wire<proto::WorkerChanged>;
using worker_hello = wire<proto::WorkerHello>;
using worker_assignment = wire<proto::WorkerAssignment>;
using worker_report = wire<proto::WorkerReport>;
using frontend_hello = wire<proto::FrontendHello>;
using cluster_view = wire<proto::ClusterView>;
using cluster_plan = wire<proto::ClusterPlan>;
using cluster_status = wire<proto::ClusterStatus>;
using replay_report = wire<proto::ReplayReport>;
using node_heartbeat = wire<proto::NodeHeartbeat>;
using frontend_heartbeat = wire<proto::FrontendHeartbeat>;

/// Asks for the cluster's status.
using status_atom = caf::atom_constant<caf::atom("status")>;

using cluster_supervisor_actor =
  caf::typed_actor<caf::reacts_to<node_hello>, caf::reacts_to<worker_changed>,
                   caf::reacts_to<node_heartbeat>, caf::reacts_to<frontend_hello>,
                   caf::reacts_to<frontend_heartbeat>, caf::reacts_to<replay_report>,
                   caf::replies_to<status_atom>::with<cluster_status>>;

using node_supervisor_actor =
  caf::typed_actor<caf::reacts_to<node_assignment>, caf::reacts_to<cluster_view>,
                   caf::reacts_to<node_heartbeat>, caf::reacts_to<worker_hello>,
                   caf::reacts_to<worker_report>>;

/// The frontend's side of the controller: first the plan, then every view.
using frontend_actor = caf::typed_actor<caf::reacts_to<cluster_plan>, caf::reacts_to<cluster_view>,
                                        caf::reacts_to<frontend_heartbeat>>;

} // namespace troupe::messages
