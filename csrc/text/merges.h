/* Byte pair encoding of one word: the adjacent pair whose union has the best score is merged, the leftmost of equals first. */
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace poet::text {

/* A normal piece of the vocabulary. */
struct Piece {
  std::string text; /* a space for every U+2581 */
  std::int32_t id;
  float score;
};

/* A part of a word: a symbol (see Merges) and where it begins and ends. */
struct Part {
  std::int32_t symbol;
  std::int32_t begin;
  std::int32_t end;
};

class Merges {
 public:
  static constexpr std::int32_t no_symbol = -1;

  explicit Merges(const std::vector<Piece>& pieces);

  /* Id of a symbol, or a negative number for a character that occurs in pieces but is none. */
  std::int32_t id(std::int32_t symbol) const { return ids_[static_cast<std::size_t>(symbol)]; }

  /* What a word ends up as. A character that occurs in no piece stays alone, as no_symbol. */
  void apply(std::string_view word, std::vector<Part>* parts) const;

 private:
  static constexpr std::uint32_t never = std::numeric_limits<std::uint32_t>::max();

  struct Merge {
    std::uint64_t pair;
    std::uint32_t rank; /* the lower, the better the score */
    std::int32_t symbol;
  };

  std::int32_t character_symbol(std::uint32_t character) const;
  void index(const std::vector<Piece>& pieces);
  void add_merges(const std::vector<Piece>& pieces);
  void insert(std::uint64_t pair, std::uint32_t rank, std::int32_t symbol);
  const Merge* find(std::int32_t left, std::int32_t right) const;
  void apply_to_few(std::vector<Part>* parts) const;
  void apply_to_many(std::vector<Part>* parts) const;

  std::vector<std::int32_t> ids_;                           /* of symbols */
  std::vector<std::uint32_t> ranks_;                        /* of symbols */
  std::unordered_map<std::string, std::int32_t> symbols_;   /* of pieces of several characters */
  std::unordered_map<std::uint32_t, std::int32_t> singles_; /* of characters */
  std::vector<std::int32_t> ascii_;                         /* singles_ of the first 128 */
  std::vector<Merge> table_;                                /* open addressing, a power of two */
};

}  // namespace poet::text
