"""How a record becomes preference pairs: one function and one row of `METHODS` for each method of the stage `select`.

    lppc          Algorithm 1 of LPO (arXiv 2508.14947): the record's answer is chosen, and every sample of the policy is the rejected
                  answer of a pair of its own, whatever its quality
    verify-math   only samples whose final number is wrong are rejected (exact comparison, megatron_patch/evaluation/answers.py). Chosen is
                  the record's answer or, on request, the first sample that is right: then both sides are samples, of easier prompts
    perturb       needs no samples: rejected answers are the chosen one with noise (perturb.py)
    scores        both sides are samples: the one with the best score against those with the worst

Whatever the method, left out and counted are empty samples, those equal to the chosen text (nothing to prefer), repeats, those that a
server ended for a reason of its own (content_filter...), and those that spell out a control token such as <|im_start|>: it stays text and
would be tokenised in pieces, which is not what the model sampled. Which tokens are control tokens the model's tokenizer says, so
`candidates` marks such samples ("control_token"); ordinary added tokens, audio tokens say, are none. A server's samples come without
marks where no tokenizer was known: in them the turn markers of Qwen's template are looked for.

Texts are compared without the white space around them. Rejected answers that came with the data stay and come first, where the chosen
answer stays too. A sample cut at the length limit can be rejected ("rejected_ended" says so, and build_pairs writes no end token), but
never chosen.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.evaluation.answers import same_answer
from megatron_patch.evaluation.error_rates import is_closer_than
from toolkits.lpo_data_preprocessing.perturb import RATIO, perturbed
from toolkits.lpo_data_preprocessing.records import Record, Tally, get_field, get_texts
from toolkits.lpo_data_preprocessing.samples import aligned

TURN_MARKER = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")


@dataclass(frozen=True)
class Options:
    """What a method may be told; which method knows what is in its row of `METHODS`."""

    max_pairs: int | None = None
    """Rejected answers of a record; None: the method's own number."""
    min_edit_distance: float = 0
    """From the chosen text, in characters (code points); below 1: as a fraction of the chosen text's characters."""
    chosen: str = "answer"
    """"answer" (the record's) or "sampled" (the first right sample)."""
    n: int = 1
    """Noisy answers per record."""
    noise_ratio: float = RATIO
    """Of the units (characters, words), above 0 and at most 1."""
    noise_seed: int = 1
    score_field: str = "score"
    """Of a candidate; or of the record, a list with one score per candidate."""


@dataclass(frozen=True)
class Rejected:
    """A rejected answer to be."""

    text: str
    ended: bool
    """Whether it is complete, not cut at the length limit."""
    score: float | None = None


class LeftOut(Exception):
    """A record gives no pair; the argument is the reason it is counted under."""


@dataclass
class Selection:
    """One record on its way through a method."""

    record: Record
    where: str
    """"file:line", which opens errors."""
    options: Options
    tally: Tally
    candidates: list[Record] = field(default_factory=list)

    def read_candidates(self) -> None:
        """Check the record's candidates and keep those that say what the model sampled."""
        for candidate in check_candidates(self.record, self.where):
            if reason := why_unusable(candidate):
                self.leave_out(reason, 1)
            else:
                self.candidates.append(candidate)

    def answer(self) -> str:
        """The record's own chosen text."""
        return get_field(self.record, "chosen", str, self.where)

    def given(self) -> list[Rejected]:
        """Rejected answers that came with the data, or from a selection before this one: complete unless "rejected_ended" says no."""
        texts = get_texts(self.record, "rejected", self.where) if "rejected" in self.record else []
        ended = aligned(self.record, "rejected_ended", bool, len(texts), self.where) or [True] * len(texts)
        return [Rejected(text, end) for text, end in zip(texts, ended, strict=True)]

    def leave_out(self, reason: str, count: int) -> None:
        """Count answers left out by design."""
        if count:
            self.tally.left_out[reason] += count

    def pairs(self, chosen: str, rejected: list[Rejected], limit: int | None = None) -> Record:
        """The record with `chosen` against those of `rejected` that make a pair, at most `max_pairs` (else `limit`) of them.

        Scores that the data had belong to other answers and go.
        """
        kept, seen = list[Rejected](), set[str]()
        for answer in rejected:
            if reason := self._why_not(answer.text.strip(), chosen.strip(), seen):
                self.tally.left_out[reason] += 1
            else:
                seen.add(answer.text.strip())
                kept.append(answer)
        limit = limit if self.options.max_pairs is None else self.options.max_pairs
        if limit is not None:
            self.leave_out("over_max_pairs_per_prompt", len(kept) - min(limit, len(kept)))
            kept = kept[:limit]
        if not kept:
            raise LeftOut("no_candidate_left")
        rest = {name: value for name, value in self.record.items() if name not in ("candidates", "chosen_score", "rejected_scores")}
        return rest | {"chosen": chosen, "rejected": [a.text for a in kept], "rejected_ended": [a.ended for a in kept]} | _scores(kept)

    def _why_not(self, text: str, chosen: str, seen: set[str]) -> str | None:
        if not text:
            return "empty_candidate"
        if text == chosen:
            return "equal_to_chosen"
        if text in seen:
            return "duplicate_candidate"
        distance = self.options.min_edit_distance
        limit = distance if distance >= 1 else distance * len(chosen) - 1e-9  # 0.07 of 100 is 7.000000000000001
        return "too_close_to_chosen" if is_closer_than(math.ceil(limit), text, chosen) else None


def _scores(kept: list[Rejected]) -> Record:
    return {"rejected_scores": [answer.score for answer in kept]} if kept[0].score is not None else {}


def check_candidates(record: Record, where: str) -> list[Record]:
    """The record's candidates, each {"text": str, "finish_reason": str}; ValueError naming `where`."""
    candidates = get_field(record, "candidates", list, where)
    for i, candidate in enumerate(candidates):
        if not isinstance(candidate, dict) or not isinstance(candidate.get("text"), str):
            raise ValueError(f"{where}: candidate {i} has no text")
        if not isinstance(candidate.get("finish_reason"), str):
            raise ValueError(f"{where}: candidate {i} has finish_reason {candidate.get('finish_reason')!r}, expected a text ('stop'...)")
    return candidates


def why_unusable(candidate: Record) -> str | None:
    """The reason under which a candidate is left out because it is not an answer as the model would give it; None if it is one."""
    if candidate["finish_reason"] not in ("stop", "length"):
        return "finish_reason_" + re.sub(r"\W", "_", candidate["finish_reason"])[:40]
    return "control_token" if candidate.get("control_token") or TURN_MARKER.search(candidate["text"]) else None


def _sampled(candidates: list[Record]) -> list[Rejected]:
    return [Rejected(candidate["text"], candidate["finish_reason"] == "stop") for candidate in candidates]


def select_lppc(selection: Selection) -> Record:
    """Every answer but the chosen one is rejected; those given with the data first, then samples in their order."""
    selection.read_candidates()
    return selection.pairs(selection.answer(), selection.given() + _sampled(selection.candidates))


def select_verify_math(selection: Selection) -> Record:
    """Wrong answers are rejected. A cut sample is wrong, whatever number it happens to end in."""
    selection.read_candidates()
    if selection.options.chosen == "sampled":
        return _both_sampled(selection)
    answers = selection.given() + _sampled(selection.candidates)
    wrong = [answer for answer in answers if not _is_right(answer, selection)]
    selection.leave_out("right_candidate", len(answers) - len(wrong))
    return selection.pairs(selection.answer(), wrong)


def _both_sampled(selection: Selection) -> Record:
    selection.leave_out("given_rejected", len(selection.given()))
    answers = _sampled(selection.candidates)
    ended = [answer for answer in answers if answer.ended]
    selection.leave_out("cut_candidate", len(answers) - len(ended))
    right = [answer.text for answer in ended if _is_right(answer, selection)]
    if not right:
        raise LeftOut("no_right_candidate")
    selection.leave_out("right_candidate", len(right) - 1)
    return selection.pairs(right[0], [answer for answer in ended if not _is_right(answer, selection)])


def _is_right(answer: Rejected, selection: Selection) -> bool:
    """Whether an answer is complete and has the final number of the record's answer."""
    try:
        return answer.ended and same_answer(answer.text, selection.answer())
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(selection.where) else f"{selection.where}: {error}") from None


def select_perturb(selection: Selection) -> Record:
    """`n` noisy versions of the chosen answer are rejected, after those given with the data."""
    chosen, id, options = selection.answer(), get_field(selection.record, "id", str, selection.where), selection.options
    if not chosen.strip():
        raise ValueError(f"{selection.where}: an empty chosen answer cannot be perturbed")
    noisy = [perturbed(chosen, options.noise_ratio, options.noise_seed, id, number) for number in range(options.n)]
    return selection.pairs(chosen, selection.given() + [Rejected(text, True) for text in noisy])


def select_scores(selection: Selection) -> Record:
    """The first of the best samples against the worst ones, worst first (of equals the first sampled); one pair unless told otherwise."""
    selection.leave_out("given_rejected", len(selection.given()))
    scored = list(_scored(selection))
    if len(scored) < 2:
        raise LeftOut("fewer_than_two_scores")
    if len({answer.score for answer in scored}) == 1:
        raise LeftOut("tied_scores")
    complete = [answer for answer in scored if answer.ended]
    if not complete:
        raise LeftOut("every_candidate_cut")
    best = max(complete, key=_score)
    worse = sorted((answer for answer in scored if _score(answer) < _score(best)), key=_score)
    selection.leave_out("not_below_best", len(scored) - 1 - len(worse))
    return selection.pairs(best.text, worse, limit=1) | {"chosen_score": best.score}


def _score(answer: Rejected) -> float:
    assert answer.score is not None
    return answer.score


def _scored(selection: Selection) -> Iterator[Rejected]:
    """Samples with a score; those without one and those that are no use are counted."""
    name, where = selection.options.score_field, selection.where
    candidates = check_candidates(selection.record, where)
    aligned = selection.record.get(name)
    if aligned is not None and (not isinstance(aligned, list) or len(aligned) != len(candidates)):
        raise ValueError(f"{where}: field {name!r} needs one score per candidate ({len(candidates)}), got {aligned!r:.80}")
    for i, (candidate, answer) in enumerate(zip(candidates, _sampled(candidates), strict=True)):
        score = candidate.get(name) if aligned is None else aligned[i]
        if reason := why_unusable(candidate):
            selection.leave_out(reason, 1)
        elif score is None:
            selection.leave_out("no_score", 1)
        else:
            yield Rejected(answer.text, answer.ended, _finite(score, f"{where}: the score ({name!r}) of candidate {i}"))


def _finite(value: Any, what: str) -> float:
    """A number; neither true nor "0.5" is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{what} must be a finite number, got {value!r:.80}")
    return float(value)


@dataclass(frozen=True)
class Method:
    """One way to make pairs."""

    select: Callable[[Selection], Record]
    """Raises LeftOut for a record without a pair, ValueError for a bad one."""
    options: tuple[str, ...] = ()
    """Fields of `Options` that it looks at, besides `max_pairs`."""


METHODS = {
    "lppc": Method(select_lppc, ("min_edit_distance",)),
    "verify-math": Method(select_verify_math, ("min_edit_distance", "chosen")),
    "perturb": Method(select_perturb, ("n", "noise_ratio", "noise_seed")),
    "scores": Method(select_scores, ("score_field", "min_edit_distance")),
}
