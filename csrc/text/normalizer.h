/* A SentencePiece model's normalization: its character map, spaces, the prefix or suffix. */
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "symbols.h"

namespace poet::text {

struct NormalizerOptions {
  bool add_dummy_prefix;
  bool remove_extra_whitespaces;
  bool whitespace_as_suffix; /* the dummy goes behind the text */
};

class Normalizer {
 public:
  /* `charsmap` is the model's precompiled_charsmap, empty for none: the size of a double array in bytes, the array, and the strings that
     its values point into. Throws std::invalid_argument if that is not what it is. */
  Normalizer(std::string_view charsmap, Symbols protected_symbols, NormalizerOptions options);

  /* The normalized text with every U+2581 as a space. */
  void run(std::string_view text, std::string* out) const;

 private:
  std::string_view replace_prefix(std::string_view text, std::size_t* consumed) const;
  void replace_all(std::string_view text, std::string* out) const;
  bool begins_character(std::uint32_t at) const;
  const char* longest_match(std::string_view text, std::size_t* length) const;

  std::vector<std::uint32_t> trie_;
  std::string strings_;
  Symbols protected_;
  NormalizerOptions options_;
};

/* Turn every U+2581 into a space. */
void spaces_for_marks(std::string* text);

}  // namespace poet::text
