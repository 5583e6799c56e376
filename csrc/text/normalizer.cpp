#include "normalizer.h"

#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "utf8.h"

namespace poet::text {
namespace {

/* A unit of Darts' double array: a label, an offset to the children, whether a key ends here; or, with its top bit set, a value. */
std::uint32_t offset_of(std::uint32_t unit) { return (unit >> 10) << ((unit >> 6) & 8); }
std::uint32_t label_of(std::uint32_t unit) { return unit & 0x800000ffu; }
std::uint32_t value_of(std::uint32_t unit) { return unit & 0x7fffffffu; }
bool ends_key(std::uint32_t unit) { return unit >> 8 & 1; }

}  // namespace

Normalizer::Normalizer(std::string_view charsmap, Symbols protected_symbols, NormalizerOptions options)
    : protected_(std::move(protected_symbols)), options_(options) {
  if (charsmap.empty()) return;
  if (std::endian::native != std::endian::little) throw std::invalid_argument("the character map is read on little-endian machines only");
  std::uint32_t bytes = 0;
  if (charsmap.size() > sizeof bytes) std::memcpy(&bytes, charsmap.data(), sizeof bytes);
  if (bytes == 0 || bytes % 4 != 0 || bytes >= charsmap.size() - sizeof bytes) throw std::invalid_argument("damaged character map");
  trie_.resize(bytes / 4);
  std::memcpy(trie_.data(), charsmap.data() + sizeof bytes, bytes);
  strings_ = charsmap.substr(sizeof bytes + bytes);
  if (strings_.back() != '\0') throw std::invalid_argument("damaged character map");
  if (!valid_utf8(strings_)) throw std::invalid_argument("damaged character map: its strings are not UTF-8");
}

/* Whether a character of the strings begins at `at`: what follows up to the next zero is UTF-8 then. */
bool Normalizer::begins_character(std::uint32_t at) const {
  return at < strings_.size() && (static_cast<unsigned char>(strings_[at]) & 0xc0) != 0x80;
}

/* The string for the longest key that the text begins with, nullptr for none. */
const char* Normalizer::longest_match(std::string_view text, std::size_t* length) const {
  const char* found = nullptr;
  std::uint32_t at = offset_of(trie_[0]);
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    at ^= byte;
    if (at >= trie_.size() || label_of(trie_[at]) != byte) break;
    const std::uint32_t unit = trie_[at];
    at ^= offset_of(unit);
    if (at >= trie_.size()) break;
    if (ends_key(unit) && begins_character(value_of(trie_[at]))) {
      found = strings_.data() + value_of(trie_[at]);
      *length = i + 1;
    }
  }
  return found;
}

std::string_view Normalizer::replace_prefix(std::string_view text, std::size_t* consumed) const {
  std::int32_t id = 0;
  *consumed = protected_.match(text, &id);
  if (*consumed == 0 && !trie_.empty()) {
    if (const char* found = longest_match(text, consumed)) return found;
  }
  if (*consumed == 0) *consumed = static_cast<std::size_t>(character_bytes(static_cast<unsigned char>(text[0])));
  return text.substr(0, *consumed);
}

/* Without the dummy; a run of spaces becomes one, and those at the beginning none, if the model asks for it. */
void Normalizer::replace_all(std::string_view text, std::string* out) const {
  bool after_space = options_.remove_extra_whitespaces;
  while (!text.empty()) {
    std::size_t consumed = 0;
    std::string_view piece = replace_prefix(text, &consumed);
    text.remove_prefix(consumed);
    while (after_space && piece.starts_with(' ')) piece.remove_prefix(1);
    if (!piece.empty()) {
      out->append(piece);
      after_space = options_.remove_extra_whitespaces && piece.ends_with(' ');
    }
  }
}

void Normalizer::run(std::string_view text, std::string* out) const {
  out->clear();
  if (options_.remove_extra_whitespaces) {
    std::size_t consumed = 0;
    while (!text.empty() && replace_prefix(text, &consumed) == " ") text.remove_prefix(consumed);
  }
  if (text.empty()) return;
  if (options_.add_dummy_prefix && !options_.whitespace_as_suffix) out->push_back(' ');
  if (trie_.empty() && !options_.remove_extra_whitespaces) {
    out->append(text);
  } else {
    replace_all(text, out);
  }
  spaces_for_marks(out);
  if (options_.remove_extra_whitespaces) out->resize(out->find_last_not_of(' ') + 1);
  if (options_.add_dummy_prefix && options_.whitespace_as_suffix) out->push_back(' ');
}

void spaces_for_marks(std::string* text) {
  std::size_t mark = text->find(space_mark);
  if (mark == std::string::npos) return;
  std::size_t end = mark;
  while (mark != std::string::npos) {
    const std::size_t next = text->find(space_mark, mark + space_mark.size());
    (*text)[end++] = ' ';
    const std::size_t begin = mark + space_mark.size(), stop = next == std::string::npos ? text->size() : next;
    std::memmove(text->data() + end, text->data() + begin, stop - begin);
    end += stop - begin;
    mark = next;
  }
  text->resize(end);
}

}  // namespace poet::text
