#include "troupe/http/server_exchange.hpp"

#include <exception>
#include <utility>

#include <spdlog/spdlog.h>

#include "troupe/http/server.hpp"

namespace troupe::http {

exchange::exchange(std::shared_ptr<exchange_owner> owner, std::size_t max_queued_chunks)
  : owner_(std::move(owner)), max_queued_chunks_(max_queued_chunks) {}

// Called with the lock held: so a wake can only be posted while the connection
// is open, and the io thread outlives every open connection.
void exchange::wake_owner() {
  if (owner_ && !std::exchange(awake_, true))
    owner_->wake();
}

bool exchange::send(int status, std::string_view content_type, std::string body,
                    header_list extra) {
  std::function<void()> unused; // destroyed after the lock is released
  const std::lock_guard lock{mutex_};
  if (phase_ != phase::fresh)
    return false;
  phase_ = phase::ended;
  head_ = {status, std::string{content_type}, std::move(extra), false};
  data_ = std::move(body);
  end_ = true;
  unused.swap(callback_);
  wake_owner();
  return true;
}

bool exchange::begin_stream(int status, std::string_view content_type, header_list extra) {
  const std::lock_guard lock{mutex_};
  if (phase_ != phase::fresh)
    return false;
  phase_ = phase::streaming;
  head_ = {status, std::string{content_type}, std::move(extra), true};
  wake_owner();
  return true;
}

bool exchange::write(std::string_view piece) {
  const std::lock_guard lock{mutex_};
  if (phase_ != phase::streaming || overflowed_)
    return false;
  // An empty chunk would end the body.
  if (piece.empty())
    return true;
  if (num_queued_ == max_queued_chunks_) {
    overflowed_ = true;
    data_.clear();
    if (owner_)
      owner_->wake(); // a pending wake may wait for the very write that is stuck
    return false;
  }
  ++num_queued_;
  data_.append(piece);
  wake_owner();
  return true;
}

void exchange::end() {
  std::function<void()> unused;
  const std::lock_guard lock{mutex_};
  if (phase_ != phase::streaming)
    return;
  phase_ = phase::ended;
  end_ = true;
  unused.swap(callback_);
  wake_owner();
}

void exchange::dropped() {
  {
    const std::lock_guard lock{mutex_};
    if (phase_ == phase::streaming) {
      phase_ = phase::ended;
      broken_ = true;
      wake_owner();
      return;
    }
  }
  if (send(
        500, "application/json",
        error_json("the server gave no answer to this request", "server_error", "internal_error"),
        {}))
    spdlog::error("http: a request was dropped without an answer; its client gets status 500");
}

void exchange::on_disconnect(std::function<void()> callback) {
  {
    const std::lock_guard lock{mutex_};
    if (phase_ != phase::gone) {
      if (phase_ != phase::ended)
        callback_.swap(callback);
      return;
    }
  }
  callback();
}

bool exchange::alive() const {
  const std::lock_guard lock{mutex_};
  return phase_ != phase::gone && !overflowed_;
}

outgoing exchange::take(std::string& data) {
  data.clear();
  const std::lock_guard lock{mutex_};
  awake_ = false;
  num_queued_ = 0;
  data.swap(data_);
  return {std::exchange(head_, std::nullopt), std::exchange(end_, false),
          std::exchange(broken_, false)};
}

bool exchange::overflowed() const {
  const std::lock_guard lock{mutex_};
  return overflowed_;
}

bool exchange::ended() const {
  const std::lock_guard lock{mutex_};
  return phase_ == phase::ended;
}

void exchange::finish() {
  const std::lock_guard lock{mutex_};
  phase_ = phase::ended;
  owner_.reset();
}

void exchange::client_gone() {
  std::shared_ptr<exchange_owner> owner;
  std::function<void()> callback;
  {
    const std::lock_guard lock{mutex_};
    owner.swap(owner_);
    if (std::exchange(phase_, phase::gone) != phase::ended)
      callback.swap(callback_);
  }
  if (!callback)
    return;
  try {
    callback();
  } catch (const std::exception& e) {
    spdlog::error("http: a disconnect callback threw: {}", e.what());
  }
}

response::response(std::shared_ptr<exchange> exchange) : exchange_(std::move(exchange)) {}

response::~response() {
  exchange_->dropped();
}

bool response::send(int status, std::string_view content_type, std::string body,
                    header_list extra) {
  return exchange_->send(status, content_type, std::move(body), std::move(extra));
}

bool response::begin_stream(int status, std::string_view content_type, header_list extra) {
  return exchange_->begin_stream(status, content_type, std::move(extra));
}

bool response::write(std::string_view piece) {
  return exchange_->write(piece);
}

void response::end() {
  exchange_->end();
}

void response::on_disconnect(std::function<void()> callback) {
  exchange_->on_disconnect(std::move(callback));
}

bool response::alive() const {
  return exchange_->alive();
}

} // namespace troupe::http
