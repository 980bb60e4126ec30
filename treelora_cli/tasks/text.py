"""Cutting text into words for the metrics, in any script."""

from __future__ import annotations

import re
import unicodedata

# Written without spaces between words, so each character counts as a word of its own:
# CJK ideographs with their extensions and compatibility forms, kana, Thai, Lao, Khmer, Burmese.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_SINGLE = re.compile(f"([{_SPACELESS}])")
_ASCII_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Return the lower-case words of a text: runs of letters, digits and their marks.

    On ASCII text this is exactly rouge-score's default tokenizer, which drops every other
    letter; here ``Führerausweis`` is one word and each Chinese character is one. Text is
    brought to NFC first, so composed and decomposed letters are the same.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _ASCII_WORD.findall(lowered)
    composed = unicodedata.normalize("NFC", lowered)
    spaced = "".join(char if _in_word(char) else " " for char in composed)
    return _SINGLE.sub(r" \1 ", spaced).split()


def _in_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")


_MTEVAL_RULES = (
    # Every ASCII mark but the apostrophe, comma, hyphen and full stop stands alone.
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    # A comma or full stop stands alone unless digits are on that side of it.
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    # A hyphen after a digit stands alone.
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


def mteval_words(text: str) -> list[str]:
    """Return lower-case words and marks by the rules of mteval-v13a (sacreBLEU's ``13a``).

    Characters of scripts without spaces are words of their own here, which 13a does not do.
    """
    line = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in _ENTITIES.items():
        line = line.replace(entity, char)
    line = f" {line} "
    for rule, replacement in _MTEVAL_RULES:
        line = rule.sub(replacement, line)
    return _SINGLE.sub(r" \1 ", line).split()
