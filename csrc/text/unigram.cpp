#include "unigram.h"

#include <algorithm>
#include <string>
#include <utility>

#include "utf8.h"

namespace poet::text {
namespace {

constexpr float largest_sum = 100000.0f;

std::vector<std::pair<std::string, std::int32_t>> numbered(const std::vector<Piece>& pieces) {
  std::vector<std::pair<std::string, std::int32_t>> keys;
  keys.reserve(pieces.size());
  for (const Piece& piece : pieces) keys.emplace_back(piece.text, static_cast<std::int32_t>(keys.size()));
  return keys;
}

/* Subtract the sum to `begin` from all sums to later places that are known already, which are places up to `last`. */
void count_from(std::size_t begin, std::size_t last, Unigram::Way* way) {
  const float sum = way[begin].score;
  for (std::size_t i = begin + 1; i <= last; ++i) way[i].score -= sum;
}

}  // namespace

Unigram::Unigram(const std::vector<Piece>& pieces, float unknown_score) : trie_(numbered(pieces)), unknown_score_(unknown_score) {
  for (const Piece& piece : pieces) {
    longest_ = std::max(longest_, piece.text.size());
    scores_.push_back(piece.score);
    ids_.push_back(piece.id);
  }
}

/* SentencePiece adds up scores from the beginning of the text in floats, and of equal sums to a place keeps the first, the one with the
   longest last piece. Once a sum is very low (or, after that, very high), all are counted from there, so that they do not become too coarse. Which of two nearly equal
   splits wins depends on the roundings, so this is the order and the precision here too. */
void Unigram::apply(std::string_view text, std::vector<Way>* ways, std::vector<Part>* parts) const {
  const std::size_t size = text.size();
  ways->assign(size + 1, Way{0.0f, unknown, nowhere});
  Way* const way = ways->data();
  for (std::size_t begin = 0; begin < size;) {
    float sum = way[begin].score;
    if (sum < -largest_sum || sum > largest_sum) {
      count_from(begin, std::min(begin + longest_, size), way);
      sum = 0.0f;
    }
    const std::size_t next = std::min(begin + static_cast<std::size_t>(character_bytes(static_cast<unsigned char>(text[begin]))), size);
    const auto consider = [&](std::size_t end, float score, std::int32_t piece) {
      if (way[end].begin == nowhere || score > way[end].score) way[end] = {score, piece, static_cast<std::int32_t>(begin)};
    };
    std::uint32_t node = Trie::root;
    for (std::size_t end = begin; end < size && trie_.step(&node, static_cast<unsigned char>(text[end]));) {
      ++end;
      const std::int32_t piece = trie_.value(node);
      if (piece != Trie::no_value) consider(end, scores_[static_cast<std::size_t>(piece)] + sum, piece);
    }
    consider(next, unknown_score_ + sum, unknown); /* never better than a piece */
    begin = next;
  }
  parts->clear();
  for (auto end = static_cast<std::int32_t>(size); end > 0; end = way[end].begin) {
    const std::int32_t piece = way[end].piece;
    parts->push_back({piece == unknown ? Merges::no_symbol : ids_[static_cast<std::size_t>(piece)], way[end].begin, end});
  }
  std::reverse(parts->begin(), parts->end());
}

}  // namespace poet::text
