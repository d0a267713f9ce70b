#pragma once

#include <nvtx3/nvToolsExt.h>

namespace troupe::kernels::cuda {

/// A named stretch of time of this thread for profilers (NVTX); next to nothing where none listens.
/// A step that is repeated shows as one stretch, since the host does nothing inside.
class trace {
public:
  explicit trace(const char* name) { nvtxRangePushA(name); }
  ~trace() { nvtxRangePop(); }
  trace(const trace&) = delete;
  trace& operator=(const trace&) = delete;
};

} // namespace troupe::kernels::cuda
