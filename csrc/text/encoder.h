/* Ids of texts under a SentencePiece model: BPE by words, unigram by texts.

   A word of a BPE ends where no piece of the vocabulary holds the two characters on either side next to each other. No merge can then reach
   across, and since merges on one side do not depend on the other, words can be encoded one by one, and the ids of frequent words kept. */
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "merges.h"
#include "normalizer.h"
#include "symbols.h"
#include "unigram.h"
#include "word_cache.h"

namespace poet::text {

struct Model {
  std::vector<Piece> pieces;          /* the normal ones */
  Symbols user_defined;               /* of a BPE; in normalized texts, a space for every U+2581 */
  std::vector<std::int32_t> byte_ids; /* of the 256 bytes, or empty: then unknown characters become unknown_id, a run of them once */
  std::int32_t unknown_id;
  std::optional<float> unknown_score; /* of a unigram model, for a character that is no piece; none for BPE */
  bool split_at_every_space; /* wrong, for tests: words end before every space, as if no piece had two of them */
};

class Encoder {
 public:
  Encoder(Model model, Normalizer normalizer);

  /* Ids of all texts, one after the other, and in `ends` how many there are up to the end of each; on `threads` threads. */
  void encode(const std::vector<std::string_view>& texts, int threads, std::vector<std::int32_t>* ids, std::int64_t* ends) const;

 private:
  /* What one thread needs, on cache lines of its own. */
  struct alignas(64) Workspace {
    WordCache cache;
    std::string normalized;
    std::vector<Part> parts;
    std::vector<Unigram::Way> ways;
  };
  class Lease;
  struct Share;

  void add_joints();
  static std::vector<Share> share_out(const std::vector<std::string_view>& texts, int threads);
  static std::size_t joint_of(std::uint32_t left, std::uint32_t right);
  bool joined(std::uint32_t left, std::uint32_t right) const;
  void encode_some(const std::string_view* texts, std::size_t count, Workspace* workspace, std::vector<std::int32_t>* ids,
                   std::int64_t* ends) const;
  void encode_text(std::string_view text, Workspace* workspace, std::vector<std::int32_t>* ids) const;
  std::size_t word_length(std::string_view text) const;
  void encode_word(std::string_view word, Workspace* workspace, std::vector<std::int32_t>* ids) const;
  void encode_words(std::string_view text, Workspace* workspace, std::vector<std::int32_t>* ids) const;
  void merge_word(std::string_view word, Workspace* workspace, std::vector<std::int32_t>* ids) const;
  void add(std::string_view text, const Part& part, std::int32_t id, std::vector<std::int32_t>* ids) const;
  void add_unknown(std::string_view character, std::vector<std::int32_t>* ids) const;

  Model model_;
  Normalizer normalizer_;
  Merges merges_;
  std::optional<Unigram> unigram_; /* in place of merges_ */
  std::array<bool, 128 * 128> ascii_joints_{}; /* pairs of characters that some piece holds */
  std::vector<bool> joints_;                   /* the same for other characters, by a hash of the pair: a collision makes longer words only */
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace poet::text
