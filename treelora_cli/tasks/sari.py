"""SARI (Xu, Napoles, Pavlick, Chen and Callison-Burch 2016): how well a text was simplified.

SARI = (F1 of what was added + F1 of what was kept + precision of what was deleted) / 3, each the
mean over n-grams of one to four words. As in the authors' released program, precisions are means
over distinct n-grams; the recall of what was kept is taken over all occurrences, as in the
Hugging Face metric that TRACE uses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from treelora_cli.tasks.text import mteval_words

_LONGEST = 4
_MARKER_LINES = 4
_CUE_LINE = re.compile(r".{1,60}[:：]\s*")
_INLINE_CUE = re.compile(
    r"(?:paragraph|text|source|input|sentence|original|absatz|satz|文本)[:：]\s*(?=\S)",
    re.IGNORECASE,
)

Ngram = tuple[str, ...]


def sari(
    source: str, prediction: str, references: Sequence[str], *, undefined: float = 0.0
) -> float:
    """Return the SARI of one prediction, 0 to 1.

    Args:
        source: the text that was to be simplified.
        prediction: the simplified text.
        references: one or more good simplifications.
        undefined: the value of 0/0, where nothing was or should have been added, kept or
            deleted: 0 in the authors' program, 1 in the Hugging Face metric.
    """
    words = [mteval_words(text) for text in (source, prediction, *references)]
    total = 0.0
    for length in range(1, _LONGEST + 1):
        grams = [_ngrams(found, length) for found in words]
        total += sum(_operations(grams[0], grams[1], grams[2:], undefined))
    return total / (3 * _LONGEST)


def _ngrams(words: Sequence[str], length: int) -> Counter[Ngram]:
    return Counter(tuple(words[at : at + length]) for at in range(len(words) - length + 1))


def _operations(
    source: Counter[Ngram],
    output: Counter[Ngram],
    references: Sequence[Counter[Ngram]],
    undefined: float,
) -> tuple[float, float, float]:
    """Return F1 of additions, F1 of keeps and precision of deletions for one n-gram length."""
    wanted: Counter[Ngram] = sum(references, Counter())
    # Counts of source and output are raised to the number of references instead of dividing the
    # references' counts, which keeps everything in whole numbers.
    before = _times(source, len(references))
    after = _times(output, len(references))

    kept = before & after
    to_keep = before & wanted
    well_kept = kept & to_keep
    keep_precision = _ratio(_shares(well_kept, kept), len(kept), undefined)
    keep_recall = _ratio(well_kept.total(), to_keep.total(), undefined)

    deleted = before - after
    well_deleted = deleted - wanted
    delete_precision = _ratio(_shares(well_deleted, deleted), len(deleted), undefined)

    added = set(output) - set(source)
    to_add = set(wanted) - set(source)
    well_added = added & to_add
    add_precision = _ratio(len(well_added), len(added), undefined)
    add_recall = _ratio(len(well_added), len(to_add), undefined)
    return (
        _f1(add_precision, add_recall),
        _f1(keep_precision, keep_recall),
        delete_precision,
    )


def _times(counts: Counter[Ngram], factor: int) -> Counter[Ngram]:
    return Counter({gram: count * factor for gram, count in counts.items()})


def _shares(good: Counter[Ngram], of: Counter[Ngram]) -> float:
    # Summed in a fixed order: a set's order would change the last bit between runs.
    return sum(count / of[gram] for gram, count in good.items())


def _ratio(part: float, whole: int, undefined: float) -> float:
    return part / whole if whole else undefined


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def source_text(prompt: str) -> str:
    """Return the text to be simplified: the prompt without its instruction and its last cue.

    Taken off are everything up to the first cue among the first four lines (a short line that
    ends in a colon, or ``Paragraph:``, ``Text:`` and the like before the text), and a short last
    line that ends in a colon (``Simplification:``). A prompt without cues, or with nothing left
    between them, is returned as it is.
    """
    lines = prompt.rstrip().split("\n")
    end = len(lines) - 1 if _CUE_LINE.fullmatch(lines[-1]) else len(lines)
    for at in range(min(_MARKER_LINES, end)):
        if _CUE_LINE.fullmatch(lines[at]):
            text = "\n".join(lines[at + 1 : end]).strip()
            return text or prompt
        inline = _INLINE_CUE.match(lines[at])
        if inline is not None:
            return "\n".join([lines[at][inline.end() :], *lines[at + 1 : end]]).strip()
    return "\n".join(lines[:end]).strip() or prompt
