#pragma once

#include "drill_cluster.hpp"

#include "troupe/base/fault_point.hpp"
#include "troupe/drill/outcome.hpp"
#include "troupe/drill/timetable.hpp"

#include <optional>
#include <string>
#include <vector>

namespace troupe::tools::drills {

/// Makes faults happen in a cluster, by signals and by rules on its fault board, and undoes them.
class fault_injector {
public:
  fault_injector(cluster& target, faults::board& board) : cluster_(target), board_(board) {}

  /// Makes the event happen now. What could not be done is in the note.
  drill::injection inject(const drill::event& what, const drill::planned_event& when);

  /// Undoes what is due; fills in `until_ns` and `hits` of those injections.
  void undo_due(std::vector<drill::injection>& injections, bool all = false);
  bool has_open() const { return !open_.empty(); }

  /// True when every process that was ended in this run has a successor, or is not needed any more.
  bool all_replaced(const drill::topology& now) const;
  /// Forgets the processes that were ended: a new run begins.
  void begin_run();

  /// The last process of that name that this run ended; 0 if it ended none.
  int ended_pid(const std::string& name) const;

private:
  struct ended_process {
    std::string name;
    int pid = 0;
  };
  struct open_fault {
    std::size_t injection = 0; ///< in order of injecting within the run
    std::int64_t due_ns = 0;
    std::vector<std::size_t> rules;
    std::uint32_t count = 0; ///< of hits after which a rule is over
    std::vector<int> stopped;
    std::optional<ended_process> ends; ///< who cannot go on once a rule has struck
  };

  std::string send(const drill::resolved_target& to, int signal_number);
  std::string partition(const drill::fault_spec& fault, const drill::resolved_target& to,
                        open_fault& open);
  std::string cut_journal(const drill::resolved_target& to, std::uint64_t seed);
  std::string add_rule(faults::rule rule, open_fault& open);

  cluster& cluster_;
  faults::board& board_;
  std::size_t num_injected_ = 0;
  std::string previous_;
  std::vector<open_fault> open_;
  std::vector<ended_process> ended_;
};

} // namespace troupe::tools::drills
