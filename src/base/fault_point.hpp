#pragma once

#include "troupe/base/error.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

/// Named places in the code where a drill may make something go wrong. In a process that no drill
/// has armed, passing one costs one branch on a constant false. A drill arms processes by naming
/// a fault board in their environment (`TROUPE_FAULT_BOARD`, a file that all of them map); they
/// read it whenever they pass a point, so that faults begin and end while they run.
///
/// What a fault means is the point's business: see `point`.
namespace troupe::faults {

/// Where. `to_string` gives the name used in drills ("frame.send").
enum class point : std::uint8_t {
  frame_send, ///< a tensor frame leaves: drop delay duplicate reorder corrupt truncate wrong_epoch
  message_receive, ///< an actor takes a control message of a peer: drop delay duplicate reorder
  message_reply,   ///< the effect is there and the answer leaves: drop
  connect,         ///< a control connection is dialled (the peer is its address): fail
  compute,         ///< a stage or expert group begins a computation: busy_loop, deadlock, delay,
                   ///< device_error and the other failures of a device
  activation,      ///< what it computed: poison (NaN), flip_bit
  kv_pages,        ///< before a stage reads its KV pages: flip_bit
  allocation,      ///< memory for tensors or KV: fail
  journal_write,   ///< no_space, io_error, short_write
  process_spawn,   ///< a parent starts a child (the peer is the child's name): fail, delay
  process_init,    ///< a process begins: exit, crash, deadlock
  worker_loading,  ///< steps of a recovery, for a second fault in each: exit, crash, deadlock
  worker_loaded,
  worker_activated,   ///< a standby was told whom to replace
  worker_serving,     ///< the first micro-batch in a new epoch
  node_exit_seen,     ///< a node has seen a worker's exit and not yet acted on it
  controller_fencing, ///< the controller has raised the epoch and not yet told anybody
  frontend_replaying, ///< a scheduler is about to send again what was in flight
};
inline constexpr std::size_t num_points = 18;

/// What happens there.
enum class kind : std::uint8_t {
  none,
  drop,
  delay,
  duplicate,
  reorder, ///< held back until the next one has passed
  corrupt, ///< a byte is changed after the checksum was made
  truncate,
  wrong_epoch,
  fail,
  busy_loop, ///< computes for ever and gets nowhere
  deadlock,  ///< blocks for ever
  poison,    ///< a NaN
  flip_bit,
  no_space,
  io_error,
  short_write,
  exit,              ///< ends with exit code 3
  crash,             ///< SIGSEGV
  device_error,      ///< an illegal access on a GPU, after which the process cannot use it any more
  device_misaligned, ///< the same, by an access to an address that does not fit its size
  device_trap,       ///< by an instruction that stops the kernel
  device_assert,     ///< by an assertion that does not hold
};
inline constexpr std::size_t num_kinds = 22;

std::string_view to_string(point where);
std::string_view to_string(kind what);
std::optional<point> point_named(std::string_view name);
std::optional<kind> kind_named(std::string_view name);

/// A fault to be carried out now.
struct fault {
  kind what = kind::none;
  std::uint32_t delay_ms = 0; ///< of delay
  std::uint64_t random = 0;   ///< for choosing a byte or bit; from the rule's seed
};

namespace detail {
extern std::atomic<bool> armed;
std::optional<fault> look_up(point where, std::string_view peer);
bool look_up_cut(std::string_view peer);
} // namespace detail

/// What is to go wrong here now, if anything. `peer` is the process at the other end, where there
/// is one. Any thread; takes no lock.
inline std::optional<fault> hit(point where, std::string_view peer = {}) {
  if (!detail::armed.load(std::memory_order_relaxed)) [[likely]]
    return std::nullopt;
  return detail::look_up(where, peer);
}

/// True when a drill has cut the way from `peer` to this process: whatever has come from it is
/// to be ignored, without an error, as if it had never arrived.
inline bool is_cut_off(std::string_view peer) {
  if (!detail::armed.load(std::memory_order_relaxed)) [[likely]]
    return false;
  return detail::look_up_cut(peer);
}

/// Carries out `exit` (code 3), `crash`, `deadlock`, `busy_loop` and `delay` on the spot. False
/// for every other kind: what it means is for the point to know.
bool carry_out(const fault& f);

/// Carries out what is to go wrong here; for points at which a process dies or hangs. Kinds that
/// `carry_out` does not know are ignored.
inline void suffer(point where, std::string_view peer = {}) {
  if (auto f = hit(where, peer)) [[unlikely]]
    carry_out(*f);
}

/// Arms this process if the environment names a board, disarms it if not. Call in main, before
/// threads start. Fails when the board cannot be mapped or is of another version.
expected<void> arm();

/// One rule on the board. Of several that match at a pass, the first that strikes is carried
/// out. Whether the n-th pass of a rule is struck, and `fault::random` then, follow from its seed
/// and n alone; passes of all processes count together. Globs know `*` only.
struct rule {
  std::string process; ///< glob on the process' name ("node-1/*"), as of identity.hpp
  std::string peer;    ///< glob; empty: any
  point where = point::frame_send;
  kind what = kind::none;
  double probability = 1;
  std::uint32_t count = 0; ///< ends after so many faults, all processes together; 0: never
  std::uint32_t delay_ms = 0;
  std::uint64_t seed = 1; ///< which passes are hit and what `fault::random` is
};

/// The drill's side: creates the board and writes rules on it. One writer.
class board {
public:
  static constexpr std::size_t max_rules = 64;

  /// Creates the file, in place of an older one.
  static expected<board> create(const std::filesystem::path& file);
  board(board&& other) noexcept;
  board& operator=(board&& other) noexcept;
  ~board();

  /// The variable that arms a child process: its name and its value, the file's absolute path.
  static constexpr const char* variable = "TROUPE_FAULT_BOARD";
  std::string value() const;

  /// Puts a rule in force; its number. Fails with resource_exhausted when the board is full, with
  /// invalid_request for names that are too long (63 bytes).
  expected<std::size_t> add(const rule& r);

  /// Cuts the way from processes matching `from` to those matching `to` (globs). A partition
  /// between two is two cuts. Undone by `remove`.
  expected<std::size_t> cut(const std::string& from, const std::string& to);

  void remove(std::size_t number);
  void clear();

  /// How often a rule has struck; of a removed rule, until its place is used again. The
  /// messages that a cut has kept away are not counted.
  std::uint64_t num_hits(std::size_t number) const;

private:
  struct mapping;
  explicit board(std::unique_ptr<mapping> mapped);
  std::unique_ptr<mapping> mapped_;
};

} // namespace troupe::faults
