/* The most likely split of a text under a unigram model, as SentencePiece finds it, to the last bit of its sums. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "merges.h"
#include "trie.h"

namespace poet::text {

class Unigram {
 public:
  static constexpr std::int32_t unknown = -1, nowhere = -1;

  /* The best way to a place in the text. */
  struct Way {
    float score;
    std::int32_t piece; /* the last one, or unknown */
    std::int32_t begin; /* of it, or nowhere */
  };

  Unigram(const std::vector<Piece>& pieces, float unknown_score);

  /* What a text ends up as: ids of pieces and, for characters that are none, Merges::no_symbol. `ways` is room to work in. */
  void apply(std::string_view text, std::vector<Way>* ways, std::vector<Part>* parts) const;

 private:
  Trie trie_; /* values count pieces */
  std::vector<float> scores_;
  std::vector<std::int32_t> ids_;
  float unknown_score_;
  std::size_t longest_ = 4; /* bytes of a piece, or of a character */
};

}  // namespace poet::text
