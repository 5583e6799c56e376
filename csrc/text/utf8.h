/* Valid UTF-8, which is all that these kernels are ever given. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace poet::text {

/* Bytes of the character that begins with this byte. */
inline int character_bytes(unsigned char first) { return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4; }

/* The code point at `at`, and its length. */
inline std::uint32_t character(const char* at, int* bytes) {
  const auto byte = [at](int i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(at[i])); };
  *bytes = character_bytes(static_cast<unsigned char>(*at));
  switch (*bytes) {
    case 1: return byte(0);
    case 2: return (byte(0) & 0x1f) << 6 | (byte(1) & 0x3f);
    case 3: return (byte(0) & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f);
    default: return (byte(0) & 0x07) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
  }
}

/* Whether a string is made of whole characters: as much as the functions above rely on. */
inline bool valid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto first = static_cast<unsigned char>(text[at]);
    const std::size_t end = at + static_cast<std::size_t>(character_bytes(first));
    if ((first & 0xc0) == 0x80 || first > 0xf7 || end > text.size()) return false;
    for (++at; at < end; ++at)
      if ((static_cast<unsigned char>(text[at]) & 0xc0) != 0x80) return false;
  }
  return true;
}

/* SentencePiece writes U+2581 for a space. Inside these kernels it is one byte again: a normalized text has no other spaces. */
inline constexpr std::string_view space_mark = "\xe2\x96\x81";

}  // namespace poet::text
