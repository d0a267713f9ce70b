#include "troupe/kernels/cuda/recording.hpp"

#include <algorithm>
#include <cstdio>

namespace troupe::kernels::cuda {

namespace {

/// Each graph keeps some memory of the device; the step that was not met for longest makes room.
constexpr std::size_t kMostSteps = 64;

} // namespace

recorded_steps::~recorded_steps() {
  for (auto& one : entries_) {
    drop_graph(one);
  }
}

void recorded_steps::drop_graph(entry& one) {
  if (one.graph != nullptr) {
    gpu_.synchronise(); // it may be running
    cudaGraphExecDestroy(one.graph);
    one.graph = nullptr;
  }
}

recorded_steps::entry* recorded_steps::find(const step_key& key) {
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const entry& one) {
    return one.key.what == key.what && one.key.num_rows == key.num_rows;
  });
  return found == entries_.end() ? nullptr : &*found;
}

recorded_steps::entry& recorded_steps::add(const step_key& key) {
  if (entries_.size() < kMostSteps) {
    return entries_.emplace_back(entry{key});
  }
  auto& oldest =
    *std::min_element(entries_.begin(), entries_.end(),
                      [](const entry& a, const entry& b) { return a.last_use < b.last_use; });
  drop_graph(oldest);
  oldest = entry{key};
  return oldest;
}

void recorded_steps::compute(const step_key& key, const std::function<void()>& work) {
  auto* known = find(key);
  auto& one = known != nullptr ? *known : add(key);
  one.last_use = ++num_uses_;
  if (known == nullptr || one.cannot_be_recorded) {
    work();
    return;
  }
  if (one.graph == nullptr || one.generation != gpu_.generation()) {
    drop_graph(one);
    if (!record(one, work)) {
      one.cannot_be_recorded = true;
      work();
      return;
    }
  }
  num_repeated_ += 1;
  gpu_.check(cudaGraphLaunch(one.graph, gpu_.stream()), "a recorded step");
}

void recorded_steps::prepare(const step_key& key, const std::function<void()>& work) {
  auto* known = find(key);
  auto& one = known != nullptr ? *known : add(key);
  one.last_use = ++num_uses_;
  if (one.cannot_be_recorded || (one.graph != nullptr && one.generation == gpu_.generation())) {
    return;
  }
  drop_graph(one);
  if (!record(one, work)) {
    // Once the step has been computed it may well be: it is met as a new one then.
    entries_.erase(entries_.begin() + (&one - entries_.data()));
    return;
  }
  // Or its first launch would bring it to the device.
  gpu_.check(cudaGraphUpload(one.graph, gpu_.stream()), "uploading a recorded step");
}

/// False, with a warning, if it cannot be done. Nothing has been computed either way.
bool recorded_steps::record(entry& one, const std::function<void()>& work) {
  const auto stream = gpu_.stream();
  std::string why;
  cudaGraph_t graph = nullptr;
  auto status = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  if (status == cudaSuccess) {
    gpu_.begin_recording();
    work();
    status = cudaStreamEndCapture(stream, &graph);
    why = gpu_.end_recording();
  }
  if (status == cudaSuccess && why.empty()) {
    status = cudaGraphInstantiate(&one.graph, graph, 0);
  }
  if (graph != nullptr) {
    cudaGraphDestroy(graph);
  }
  if (status == cudaSuccess && why.empty()) {
    one.generation = gpu_.generation();
    return true;
  }
  one.graph = nullptr;
  cudaGetLastError();
  if (!has_warned_) {
    has_warned_ = true;
    std::fprintf(stderr, "cuda:%d: a step of %d rows is computed without a graph: %s\n",
                 gpu_.device(), one.key.num_rows,
                 why.empty() ? cudaGetErrorString(status) : why.c_str());
  }
  return false;
}

} // namespace troupe::kernels::cuda
