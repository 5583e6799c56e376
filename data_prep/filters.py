"""The quality rules with which C4 was made from Common Crawl (Raffel et al. 2020, section 2.2), for text that has not been through them.

Left out: the list of obscene words (it is not ours to ship), language identification and de-duplication of three-sentence spans.
"""

from __future__ import annotations

import re

TERMINAL = (".", "!", "?", '"', "\u201d")
SMALLEST_LINE_WORDS = 5
SMALLEST_PAGE_SENTENCES = 3
POLICY = re.compile(r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?][\"'\u201d)]*(?:\s|$)")
PREFIX = "C4 filter: "


def clean(text: str) -> tuple[str, str]:
    """The lines of a page that C4's rules keep, and "", or "" and the reason why the page is left out."""
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return "", PREFIX + "lorem ipsum"
    if "{" in text:
        return "", PREFIX + "curly bracket"
    kept = "\n".join(line for line in (raw.strip() for raw in text.split("\n")) if _keeps(line))
    if len(SENTENCE_END.findall(kept)) < SMALLEST_PAGE_SENTENCES:
        return "", PREFIX + f"fewer than {SMALLEST_PAGE_SENTENCES} sentences"
    return kept, ""


def _keeps(line: str) -> bool:
    if not line.endswith(TERMINAL) or line.endswith("..."):
        return False
    if len(line.split()) < SMALLEST_LINE_WORDS:
        return False
    return "javascript" not in line.lower() and not POLICY.search(line)
