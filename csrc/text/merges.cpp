#include "merges.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <queue>
#include <utility>

#include "utf8.h"

namespace poet::text {
namespace {

constexpr std::size_t few = 40; /* up to here looking at every pair again is faster than a queue */
constexpr std::uint64_t no_pair = ~std::uint64_t{0};

std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
}

std::size_t place_of(std::uint64_t pair) { return static_cast<std::size_t>((pair * 0x9e3779b97f4a7c15u) >> 24); }

std::size_t character_at(const std::string& text, std::size_t at) {
  return static_cast<std::size_t>(character_bytes(static_cast<unsigned char>(text[at])));
}

/* A pair waiting in the queue: still the same two symbols if their lengths still add up. */
struct Candidate {
  std::uint32_t rank;
  std::int32_t left, right, bytes, symbol;
  bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
};

}  // namespace

Merges::Merges(const std::vector<Piece>& pieces) : ascii_(128, no_symbol) {
  index(pieces);
  add_merges(pieces);
}

/* Numbers symbols: pieces, then characters that occur in pieces only. Equal scores get equal ranks. */
void Merges::index(const std::vector<Piece>& pieces) {
  std::vector<float> scores;
  for (const Piece& piece : pieces) scores.push_back(piece.score);
  std::sort(scores.begin(), scores.end(), std::greater<>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  for (const Piece& piece : pieces) {
    const auto symbol = static_cast<std::int32_t>(ids_.size());
    ids_.push_back(piece.id);
    const auto rank = std::lower_bound(scores.begin(), scores.end(), piece.score, std::greater<>());
    ranks_.push_back(static_cast<std::uint32_t>(rank - scores.begin()));
    if (character_at(piece.text, 0) != piece.text.size()) {
      symbols_.emplace(piece.text, symbol);
      continue;
    }
    int bytes = 0;
    singles_.emplace(character(piece.text.data(), &bytes), symbol);
  }
  for (const Piece& piece : pieces) {
    for (std::size_t at = 0; at < piece.text.size(); at += character_at(piece.text, at)) {
      int bytes = 0;
      if (singles_.emplace(character(piece.text.data() + at, &bytes), static_cast<std::int32_t>(ids_.size())).second) {
        ids_.push_back(no_symbol);
        ranks_.push_back(never);
      }
    }
  }
  for (std::uint32_t c = 0; c < ascii_.size(); ++c)
    if (const auto found = singles_.find(c); found != singles_.end()) ascii_[c] = found->second;
}

/* Every way to split a piece into two symbols is a merge that makes it. */
void Merges::add_merges(const std::vector<Piece>& pieces) {
  std::vector<Merge> merges;
  const auto symbol_of = [this](const std::string& text) {
    int bytes = 0;
    if (character_at(text, 0) == text.size()) return character_symbol(character(text.data(), &bytes));
    const auto found = symbols_.find(text);
    return found == symbols_.end() ? no_symbol : found->second;
  };
  for (const auto& [text, symbol] : symbols_) {
    for (std::size_t at = character_at(text, 0); at < text.size(); at += character_at(text, at)) {
      const std::int32_t left = symbol_of(text.substr(0, at)), right = symbol_of(text.substr(at));
      if (left != no_symbol && right != no_symbol) merges.push_back({pair_of(left, right), ranks_[static_cast<std::size_t>(symbol)], symbol});
    }
  }
  table_.assign(std::bit_ceil(2 * merges.size() + 2), Merge{no_pair, never, no_symbol});
  for (const Merge& merge : merges) insert(merge.pair, merge.rank, merge.symbol);
}

void Merges::insert(std::uint64_t pair, std::uint32_t rank, std::int32_t symbol) {
  std::size_t place = place_of(pair) & (table_.size() - 1);
  while (table_[place].pair != no_pair) place = (place + 1) & (table_.size() - 1);
  table_[place] = {pair, rank, symbol};
}

const Merges::Merge* Merges::find(std::int32_t left, std::int32_t right) const {
  if (left < 0 || right < 0) return nullptr;
  const std::uint64_t pair = pair_of(left, right);
  for (std::size_t place = place_of(pair) & (table_.size() - 1);; place = (place + 1) & (table_.size() - 1)) {
    if (table_[place].pair == pair) return &table_[place];
    if (table_[place].pair == no_pair) return nullptr;
  }
}

std::int32_t Merges::character_symbol(std::uint32_t character) const {
  if (character < ascii_.size()) return ascii_[character];
  const auto found = singles_.find(character);
  return found == singles_.end() ? no_symbol : found->second;
}

void Merges::apply(std::string_view word, std::vector<Part>* parts) const {
  parts->clear();
  for (std::size_t at = 0; at < word.size();) {
    int bytes = 0;
    const std::int32_t symbol = character_symbol(character(word.data() + at, &bytes));
    const auto begin = static_cast<std::int32_t>(at);
    parts->push_back({symbol, begin, begin + bytes});
    at += static_cast<std::size_t>(bytes);
  }
  if (parts->size() <= few) {
    apply_to_few(parts);
  } else {
    apply_to_many(parts);
  }
}

void Merges::apply_to_few(std::vector<Part>* parts) const {
  const Merge* merges[few]; /* of each part with the next */
  Part* part = parts->data();
  std::size_t count = parts->size();
  for (std::size_t i = 0; i + 1 < count; ++i) merges[i] = find(part[i].symbol, part[i + 1].symbol);
  for (;;) {
    std::size_t best = count;
    std::uint32_t rank = never;
    for (std::size_t i = 0; i + 1 < count; ++i)
      if (merges[i] != nullptr && merges[i]->rank < rank) best = i, rank = merges[i]->rank;
    if (best == count) break;
    part[best] = {merges[best]->symbol, part[best].begin, part[best + 1].end};
    --count;
    std::copy(part + best + 2, part + count + 1, part + best + 1);
    if (best + 1 < count) std::copy(merges + best + 1, merges + count, merges + best);
    if (best > 0) merges[best - 1] = find(part[best - 1].symbol, part[best].symbol);
    if (best + 1 < count) merges[best] = find(part[best].symbol, part[best + 1].symbol);
  }
  parts->resize(count);
}

void Merges::apply_to_many(std::vector<Part>* parts) const {
  const auto count = static_cast<std::int32_t>(parts->size());
  std::vector<std::int32_t> next(parts->size()), previous(parts->size());
  std::vector<bool> gone(parts->size());
  Part* part = parts->data();
  std::priority_queue<Candidate> queue;
  const auto consider = [&](std::int32_t left, std::int32_t right) {
    if (left < 0 || right >= count) return;
    if (const Merge* merge = find(part[left].symbol, part[right].symbol))
      queue.push({merge->rank, left, right, part[right].end - part[left].begin, merge->symbol});
  };
  for (std::int32_t i = 0; i < count; ++i) {
    next[static_cast<std::size_t>(i)] = i + 1;
    previous[static_cast<std::size_t>(i)] = i - 1;
    consider(i - 1, i);
  }
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const auto left = static_cast<std::size_t>(top.left), right = static_cast<std::size_t>(top.right);
    if (gone[left] || gone[right] || part[right].end - part[left].begin != top.bytes) continue;
    part[left] = {top.symbol, part[left].begin, part[right].end};
    gone[right] = true;
    next[left] = next[right];
    if (next[left] < count) previous[static_cast<std::size_t>(next[left])] = top.left;
    consider(previous[left], top.left);
    consider(top.left, next[left]);
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < parts->size(); i = static_cast<std::size_t>(next[i])) part[kept++] = part[i];
  parts->resize(kept);
}

}  // namespace poet::text
