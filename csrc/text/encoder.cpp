#include "encoder.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <limits>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "utf8.h"

namespace poet::text {
namespace {

constexpr int joint_bits = 19;
constexpr std::size_t least_bytes = 4096; /* for a thread: some 50 us of work */

}  // namespace

/* Workspaces for as long as a call lasts: calls from several threads get different ones. The threads of one call get those that they had in
   the call before, in the same order, since these are still in the caches of their processors. */
class Encoder::Lease {
 public:
  Lease(const Encoder* encoder, std::size_t count) : encoder_(encoder), workspaces_(count) {
    const std::lock_guard lock(encoder->mutex_);
    auto& idle = encoder->idle_;
    const std::size_t kept = std::min(count, idle.size());
    std::move(idle.end() - static_cast<std::ptrdiff_t>(kept), idle.end(), workspaces_.begin());
    idle.resize(idle.size() - kept);
  }
  ~Lease() {
    const std::lock_guard lock(encoder_->mutex_);
    try {
      std::move(workspaces_.begin(), workspaces_.end(), std::back_inserter(encoder_->idle_));
    } catch (const std::bad_alloc&) { /* the next call makes new ones */
    }
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Workspace* get(std::size_t number) {
    if (!workspaces_[number]) workspaces_[number] = std::make_unique<Workspace>();
    return workspaces_[number].get();
  }

 private:
  const Encoder* encoder_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;
};

Encoder::Encoder(Model model, Normalizer normalizer)
    : model_(std::move(model)),
      normalizer_(std::move(normalizer)),
      merges_(model_.unknown_score ? std::vector<Piece>{} : model_.pieces),
      joints_(std::size_t{1} << joint_bits) {
  if (model_.unknown_score) {
    unigram_.emplace(model_.pieces, *model_.unknown_score);
  } else {
    add_joints();
  }
  model_.pieces = {};
}

std::size_t Encoder::joint_of(std::uint32_t left, std::uint32_t right) {
  return static_cast<std::size_t>((std::uint64_t{left} << 32 | right) * 0x9e3779b97f4a7c15u >> (64 - joint_bits));
}

void Encoder::add_joints() {
  for (const Piece& piece : model_.pieces) {
    std::uint32_t left = 0;
    for (std::size_t at = 0; at < piece.text.size();) {
      int bytes = 0;
      const std::uint32_t right = character(piece.text.data() + at, &bytes);
      if (at > 0 && !(model_.split_at_every_space && right == ' ')) {
        if (left < 128 && right < 128) {
          ascii_joints_[left << 7 | right] = true;
        } else {
          joints_[joint_of(left, right)] = true;
        }
      }
      left = right;
      at += static_cast<std::size_t>(bytes);
    }
  }
}

inline bool Encoder::joined(std::uint32_t left, std::uint32_t right) const {
  return (left | right) < 128 ? ascii_joints_[left << 7 | right] : joints_[joint_of(left, right)];
}

/* What one of several threads encodes. On cache lines of its own: `ids` grows with every word. */
struct alignas(64) Encoder::Share {
  std::size_t begin = 0, end = 0; /* of its texts */
  std::vector<std::int32_t> ids;
  std::exception_ptr error;
};

/* Consecutive texts, of about as many bytes in each share; no more shares than texts, and none not worth a thread. */
std::vector<Encoder::Share> Encoder::share_out(const std::vector<std::string_view>& texts, int threads) {
  std::size_t bytes = 0, seen = 0, next = 0;
  for (const std::string_view text : texts) bytes += text.size();
  const std::size_t most = std::min(texts.size(), bytes / least_bytes);
  std::vector<Share> shares(std::clamp<std::size_t>(most, 1, static_cast<std::size_t>(std::max(threads, 1))));
  for (std::size_t i = 0; i < texts.size(); seen += texts[i++].size())
    while (next < shares.size() && next * bytes <= seen * shares.size()) shares[next++].begin = i;
  while (next < shares.size()) shares[next++].begin = texts.size();
  for (std::size_t i = 0; i < shares.size(); ++i) shares[i].end = i + 1 < shares.size() ? shares[i + 1].begin : texts.size();
  return shares;
}

void Encoder::encode(const std::vector<std::string_view>& texts, int threads, std::vector<std::int32_t>* ids, std::int64_t* ends) const {
  std::vector<Share> shares = share_out(texts, threads);
  Lease lease(this, shares.size());
  if (shares.size() == 1) {
    encode_some(texts.data(), texts.size(), lease.get(0), ids, ends);
    return;
  }
  const auto run = [&](std::size_t number) noexcept {
    Share& share = shares[number];
    try {
      encode_some(texts.data() + share.begin, share.end - share.begin, lease.get(number), &share.ids, ends + share.begin);
    } catch (...) {
      share.error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(shares.size() - 1);
  std::size_t started = 1;
  try {
    for (; started < shares.size(); ++started) others.emplace_back(run, started);
  } catch (const std::exception&) { /* no more threads to be had: this one does what is left */
  }
  run(0);
  for (std::size_t number = started; number < shares.size(); ++number) run(number);
  for (std::thread& thread : others) thread.join();
  for (const Share& share : shares) {
    if (share.error) std::rethrow_exception(share.error);
    for (std::size_t i = share.begin; i < share.end; ++i) ends[i] += static_cast<std::int64_t>(ids->size());
    ids->insert(ids->end(), share.ids.begin(), share.ids.end());
  }
}

void Encoder::encode_some(const std::string_view* texts, std::size_t count, Workspace* workspace, std::vector<std::int32_t>* ids,
                          std::int64_t* ends) const {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < count; ++i) bytes += texts[i].size();
  ids->reserve(ids->size() + bytes / 3);
  for (std::size_t i = 0; i < count; ++i) {
    encode_text(texts[i], workspace, ids);
    ends[i] = static_cast<std::int64_t>(ids->size());
  }
}

void Encoder::encode_text(std::string_view text, Workspace* workspace, std::vector<std::int32_t>* ids) const {
  normalizer_.run(text, &workspace->normalized);
  const std::string_view normalized = workspace->normalized;
  if (normalized.size() > std::numeric_limits<std::int32_t>::max()) throw std::length_error("a text of more than 2 GiB");
  const auto start = static_cast<std::ptrdiff_t>(ids->size());
  if (unigram_) {
    unigram_->apply(normalized, &workspace->ways, &workspace->parts);
    for (const Part& part : workspace->parts) add(normalized, part, part.symbol, ids);
  } else {
    encode_words(normalized, workspace, ids);
  }
  if (!model_.byte_ids.empty()) return;
  const std::int32_t unknown = model_.unknown_id; /* a run of them is one, also across words, but not across texts */
  ids->erase(std::unique(ids->begin() + start, ids->end(), [unknown](auto a, auto b) { return a == unknown && b == unknown; }), ids->end());
}

void Encoder::encode_words(std::string_view text, Workspace* workspace, std::vector<std::int32_t>* ids) const {
  while (!text.empty()) {
    std::int32_t id = 0;
    std::size_t length = model_.user_defined.empty() ? 0 : model_.user_defined.match(text, &id);
    if (length > 0) {
      ids->push_back(id);
    } else {
      length = word_length(text);
      encode_word(text.substr(0, length), workspace, ids);
    }
    text.remove_prefix(length);
  }
}

/* Length of the word that the text begins with. */
std::size_t Encoder::word_length(std::string_view text) const {
  int bytes = 0;
  std::uint32_t left = character(text.data(), &bytes);
  std::size_t at = static_cast<std::size_t>(bytes);
  const bool symbols = !model_.user_defined.empty();
  while (at < text.size()) {
    const std::uint32_t right = character(text.data() + at, &bytes);
    std::int32_t id = 0;
    if (!joined(left, right) || (symbols && model_.user_defined.match(text.substr(at), &id) > 0)) break;
    left = right;
    at += static_cast<std::size_t>(bytes);
  }
  return at;
}

void Encoder::encode_word(std::string_view word, Workspace* workspace, std::vector<std::int32_t>* ids) const {
  if (word.size() > WordCache::longest) {
    merge_word(word, workspace, ids);
    return;
  }
  bool found = false;
  WordCache::Entry& entry = workspace->cache.look_up(word, &found);
  if (found && entry.count > 0) {
    ids->insert(ids->end(), entry.ids.data(), entry.ids.data() + entry.count);
    return;
  }
  const std::size_t before = ids->size();
  merge_word(word, workspace, ids);
  const std::size_t count = ids->size() - before;
  if (count > WordCache::most) return;
  std::copy(ids->begin() + static_cast<std::ptrdiff_t>(before), ids->end(), entry.ids.begin());
  entry.count = static_cast<std::int32_t>(count);
}

void Encoder::merge_word(std::string_view word, Workspace* workspace, std::vector<std::int32_t>* ids) const {
  merges_.apply(word, &workspace->parts);
  for (const Part& part : workspace->parts) add(word, part, part.symbol < 0 ? Merges::no_symbol : merges_.id(part.symbol), ids);
}

/* The id of a part of a text or, if it has none, what stands for its character. */
void Encoder::add(std::string_view text, const Part& part, std::int32_t id, std::vector<std::int32_t>* ids) const {
  if (id >= 0) {
    ids->push_back(id);
  } else {
    add_unknown(text.substr(static_cast<std::size_t>(part.begin), static_cast<std::size_t>(part.end - part.begin)), ids);
  }
}

void Encoder::add_unknown(std::string_view character, std::vector<std::int32_t>* ids) const {
  if (model_.byte_ids.empty()) {
    ids->push_back(model_.unknown_id);
    return;
  }
  for (const char byte : character == " " ? space_mark : character) ids->push_back(model_.byte_ids[static_cast<unsigned char>(byte)]);
}

}  // namespace poet::text
