"""Records -> tokenised documents, a chunk of lines at a time: the part of stage 4 that several processes can share.

A chunk's outcome is what one process, record after record, would have made of it: the documents before the first mistake, and the mistake.
Everything is asked for in batches; if anything is wrong, the chunk is done again one sample at a time, so that the first mistake is found.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from megatron_patch.data.pair_store import Document
from toolkits.lpo_data_preprocessing.records import content_hash, parse_record
from toolkits.lpo_data_preprocessing.samples import Sample, samples_of
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

SHOWN = 5
"""Exceptions that are named; all are counted."""


@dataclass(frozen=True)
class Chunk:
    """Some lines of the input."""

    lines: list[tuple[int, bytes]]
    """(1-based number, bytes) of each."""
    error: str | None = None
    """Why there is nothing to read behind them."""


@dataclass(frozen=True)
class Settings:
    """What a worker has to know."""

    input: str
    """How errors name the file."""
    tokenizer: str
    response_end: str
    kind: str
    max_length: int
    """Tokens of prompt + response."""
    truncate_prompt: bool
    every_assistant_turn: bool
    """Score every assistant turn of an sft conversation, not its last alone."""
    drop_empty: bool


@dataclass
class Outcome:
    """What became of a chunk."""

    documents: list[Document] = field(default_factory=list)
    """In the order of the input; tokens as int32."""
    records: int = 0
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    without_rejected: int = 0
    template_exceptions: int = 0
    first_exceptions: list[str] = field(default_factory=list)
    """Ids of the first few, with what of the sample is off the template."""
    truncated_prompts: int = 0
    error: str | None = None
    """The mistake at which the chunk ends, with its place."""

    def add(self, other: "Outcome") -> None:
        """Add up the counts."""
        self.dropped.update(other.dropped)
        self.records += other.records
        self.read += other.read
        self.without_rejected += other.without_rejected
        self.except_from_template(other.first_exceptions, other.template_exceptions)
        self.truncated_prompts += other.truncated_prompts


    def except_from_template(self, which: list[str], count: int) -> None:
        """Count what is off the template, and remember the first few."""
        self.template_exceptions += count
        self.first_exceptions = [*self.first_exceptions, *which][:SHOWN]


@dataclass
class _Drafted:
    """A sample on its way."""

    sample: Sample
    rendered: str
    prompt: list[int]
    responses: list[list[int]]
    before: list[list[int]]
    """The prompt as sequences that are not scored and scored by turns; one that is not, unless every assistant turn is."""
    apart: bool
    """Whether that makes other ids of it than the whole prompt has."""


def document_maker(settings: Settings) -> Callable[[Chunk], Outcome]:
    """The function that a worker applies to every chunk; loads the tokenizer."""
    maker = DocumentMaker(ChatTokenizer(settings.tokenizer, response_end=settings.response_end, chat=settings.kind != "text"), settings)
    return maker.outcome


class DocumentMaker:
    """Tokenises the records of one chunk after the other."""

    def __init__(self, tokenizer: ChatTokenizer, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings

    def outcome(self, chunk: Chunk) -> Outcome:
        """All documents of a chunk, or those before its first mistake."""
        outcome = Outcome(error=chunk.error)
        samples = self._samples(chunk.lines, outcome)
        try:
            self._tokenise(samples, whole := Outcome(records=outcome.records, without_rejected=outcome.without_rejected))
            whole.error = outcome.error
            return whole
        except ValueError:
            return self._one_by_one(samples, outcome)

    def _samples(self, lines: Sequence[tuple[int, bytes]], outcome: Outcome) -> list[Sample]:
        """The samples before the first record that cannot be read."""
        samples: list[Sample] = []
        for number, line in lines:
            where = f"{self.settings.input}:{number}"
            try:
                found = list(samples_of(parse_record(line, where), self.settings.kind, where, number))
            except ValueError as error:
                outcome.error = str(error)
                break
            outcome.records += 1
            outcome.without_rejected += not found
            samples += found
        return samples

    def _one_by_one(self, samples: Sequence[Sample], outcome: Outcome) -> Outcome:
        for sample in samples:
            try:
                self._tokenise([sample], outcome)
            except ValueError as error:
                outcome.error = f"{self.settings.input}:{sample.line}: {error}"
                break
        return outcome

    def _tokenise(self, samples: Sequence[Sample], outcome: Outcome) -> None:
        """Tokenise samples and count what does not fit; ValueError, without a place, for an empty answer or a conversation refused."""
        outcome.read += len(samples)
        kept = [draft for draft in self._drafts(self._not_empty(samples, outcome)) if self._fits(draft, outcome)]
        said = [(draft, name, text) for draft in kept if draft.sample.prompt for name, text, _ in draft.sample.responses]
        follows = self.tokenizer.follow_template([(draft.rendered, draft.sample.prompt, text) for draft, _, text in said])
        off = [f"{draft.sample.id} {name}" for (draft, name, _), fine in zip(said, follows, strict=True) if not fine]
        off += [f"{draft.sample.id} earlier turns" for draft in kept if draft.apart]
        outcome.except_from_template(off, len(off))
        outcome.documents += map(_document, kept)

    def _not_empty(self, samples: Sequence[Sample], outcome: Outcome) -> Iterator[Sample]:
        for sample in samples:
            empty = [name for name, text, _ in sample.responses if not text.strip()]
            if empty and not self.settings.drop_empty:
                raise ValueError(f"empty {empty[0]} answer of {sample.id} (--drop-empty leaves such pairs out)")
            if empty:
                outcome.dropped[f"empty_{empty[0]}"] += 1
            else:
                yield sample

    def _drafts(self, samples: Iterator[Sample]) -> Iterator[_Drafted]:
        """Prompts are rendered and tokenised once a record, answers once each."""
        listed = list(samples)
        prompts = {id(sample.prompt): sample.prompt for sample in listed if sample.prompt}
        rendered = dict(zip(prompts, self.tokenizer.render_prompts(list(prompts.values())), strict=True))
        prompt_ids = dict(zip(prompts, self.tokenizer.ids(list(rendered.values())), strict=True))
        responses = list(dict.fromkeys((text, ended) for sample in listed for _, text, ended in sample.responses))
        response_ids = dict(zip(responses, self.tokenizer.responses_ids(responses), strict=True))
        for sample in listed:
            key = id(sample.prompt)
            ids = [response_ids[text, ended] for _, text, ended in sample.responses]
            text, prompt = rendered.get(key, ""), prompt_ids.get(key, [])
            before = self.tokenizer.earlier_turns(sample.prompt, text) if self.settings.every_assistant_turn else [prompt]
            flat = list(chain.from_iterable(before))
            yield _Drafted(sample, text, flat, ids, before, flat != prompt)

    def _fits(self, draft: _Drafted, outcome: Outcome) -> bool:
        """Cut the prompt if asked to; else count the sample as too long."""
        room = self.settings.max_length - max(map(len, draft.responses))
        if len(draft.prompt) <= room:
            return True
        if not self.settings.truncate_prompt or room < 1:
            outcome.dropped[f"too_long_{self._too_long(draft)}"] += 1
            return False
        draft.prompt = draft.prompt[-room:]
        draft.before = [draft.prompt]
        outcome.truncated_prompts += 1
        return True

    def _too_long(self, draft: _Drafted) -> str:
        """The first response that does not fit (with at least one prompt token beside it)."""
        needed = 1 if self.settings.truncate_prompt else len(draft.prompt)
        named = zip(draft.sample.responses, draft.responses, strict=True)
        return next(name for (name, _, _), ids in named if needed + len(ids) > self.settings.max_length)


def _document(draft: _Drafted) -> Document:
    sample = draft.sample
    sequences = (*draft.before, *draft.responses) if sample.prompt else draft.responses
    tokens = np.fromiter(chain.from_iterable(sequences), dtype=np.int32)
    group = content_hash(sample.prompt) if sample.prompt else ""
    return Document(tokens, tuple(map(len, sequences)), sample.id, group, sample.scores, sample.line)
