"""Samples and micro-batches against plain lists: what was written is what a step packs, once an epoch, also after a resume."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from megatron_patch.data.batch_plan import BatchPlan, PairOrder, Shared
from megatron_patch.data.pair_dataset import MicroBatchStream, RowShape, SampleSet, parse_weighted_prefixes
from megatron_patch.data.pair_store import PairStore, PairStoreWriter, write_reference_logps

VOCAB = 90


def random_documents(rng, kind, count):
    def ids(least=1):
        return rng.integers(1, VOCAB, rng.integers(least, 8)).tolist()

    if kind == "pairs":
        return [[ids(), ids(), ids()] for _ in range(count)]
    if kind == "sft":
        return [[ids() for _ in range(2 * int(rng.integers(1, 4)))] for _ in range(count)]
    return [[ids(2) for _ in range(int(rng.integers(1, 4)))] for _ in range(count)]


def write(prefix, kind, documents, tokenizer="tok"):
    with PairStoreWriter(prefix, kind) as writer:
        for i, document in enumerate(documents):
            writer.add(document, id=f"{prefix.name}-{i}")
        writer.commit(tokenizer={"fingerprint": tokenizer}, template={"fingerprint": "tpl"}, sources=[])
    return str(prefix)


def write_reference(prefix, weights="w"):
    store = PairStore(prefix)
    logps = -np.random.default_rng(len(store)).uniform(1, 50, (len(store), 2))
    write_reference_logps(prefix, logps, store_fingerprint=store.fingerprint, weights_fingerprint=weights, dtype="float32")
    return logps


def plain(kind, document):
    """[(tokens, scored)] of the sequences that the model should see, from lists."""
    if kind == "pairs":
        prompt, *responses = document
        return [(prompt + response, [False] * len(prompt) + [True] * len(response)) for response in responses]
    tokens = [t for part in document for t in part]
    if kind == "sft":
        return [(tokens, [bool(i % 2) for i, part in enumerate(document) for _ in part])]
    return [(tokens, [False] + [True] * (len(tokens) - 1))]


@pytest.mark.parametrize("kind", ["pairs", "sft", "text"])
@pytest.mark.parametrize("sizes", [[6], [4, 5]])
def test_samples_are_the_documents_of_all_stores_end_to_end(tmp_path, kind, sizes):
    rng = np.random.default_rng(len(sizes))
    stores = [random_documents(rng, kind, size) for size in sizes]
    prefixes = [write(tmp_path / f"s{i}", kind, documents) for i, documents in enumerate(stores)]
    samples = SampleSet(prefixes, kind)
    everything = [(s, d, document) for s, documents in enumerate(stores) for d, document in enumerate(documents)]
    assert len(samples) == len(everything) and samples.sizes == sizes
    assert samples.responses_per_sample == (2 if kind == "pairs" else 1)
    for number, (store, document, parts) in enumerate(everything):
        assert samples.locate(number) == (store, document)
        sample, expected = samples[np.int64(number)], plain(kind, parts)
        assert [s.tolist() for s in sample.sequences] == [tokens for tokens, _ in expected]
        assert [s.tolist() for s in sample.scored] == [scored for _, scored in expected]
        assert sample.reference is None
        assert sample.name == f"s{store}-{document} ({prefixes[store]})"
        assert samples.lengths[number].tolist() == [len(tokens) for tokens, _ in expected]
        assert samples.scored_lengths[number].tolist() == [sum(scored) for _, scored in expected]
    assert samples.tokens.dtype == np.int64
    assert samples.tokens.tolist() == [sum(len(tokens) for tokens, _ in plain(kind, parts)) for _, _, parts in everything]
    with pytest.raises(IndexError):
        samples[len(samples)]


@pytest.mark.parametrize("kind", ["pairs", "sft", "text"])
def test_every_kind_can_be_packed(tmp_path, kind):
    documents = random_documents(np.random.default_rng(3), kind, 4)
    samples = SampleSet([write(tmp_path / "s", kind, documents)], kind)
    batch = make_stream(samples, batch=4).batch([np.arange(4)])
    expected = [plain(kind, document) for document in documents]
    per_sample = samples.responses_per_sample
    assert batch.lengths.tolist() == [sum(expected[p][r][1]) for r in range(per_sample) for p in range(4)]
    assert batch.tokens.size(1) == -(-samples.tokens.sum() // 2) * 2


def test_another_tokenizer_is_refused(tmp_path):
    prefix = write(tmp_path / "s", "pairs", [[[1], [2], [3]]], tokenizer="abc")
    SampleSet([prefix], "pairs", tokenizer="abc")
    with pytest.raises(ValueError, match=r"s\.json: made with another tokenizer \(fingerprint abc\).*\(def\)"):
        SampleSet([prefix], "pairs", tokenizer="def")


def test_another_kind_is_refused(tmp_path):
    prefix = write(tmp_path / "s", "sft", [[[1], [2]]])
    with pytest.raises(ValueError, match=r"s\.json: store of kind 'sft', 'pairs' is needed"):
        SampleSet([prefix], "pairs")


def test_reference_comes_with_its_pair_and_must_be_of_these_weights(tmp_path):
    rng = np.random.default_rng(0)
    prefixes = [write(tmp_path / name, "pairs", random_documents(rng, "pairs", size)) for name, size in (("a", 3), ("b", 2))]
    with pytest.raises(ValueError, match=r"a\.ref\.json"):
        SampleSet(prefixes, "pairs", with_reference=True)
    logps = np.concatenate([write_reference(prefix) for prefix in prefixes])
    samples = SampleSet(prefixes, "pairs", with_reference=True, weights_fingerprint="w")
    for number in range(5):
        np.testing.assert_array_equal(samples[number].reference, logps[number])
    batch = make_stream(samples, batch=5).batch([np.array([4, 0])])
    assert batch.reference.tolist() == [logps[4, 0], logps[0, 0], logps[4, 1], logps[0, 1]]
    with pytest.raises(ValueError, match=r"a\.ref\.json: reference log-probs of another weights: made for w, needed for v"):
        SampleSet(prefixes, "pairs", with_reference=True, weights_fingerprint="v")
    SampleSet(prefixes, "pairs", with_reference=True, weights_fingerprint=None)


def test_a_token_outside_the_vocabulary_names_pair_and_store(tmp_path):
    prefix = write(tmp_path / "s", "pairs", [[[1], [2], [3]], [[1], [VOCAB], [3]]])
    stream = make_stream(SampleSet([prefix], "pairs"), batch=2)
    with pytest.raises(ValueError, match=rf"s-1 \(.*/s\).*token id {VOCAB}"):
        next(stream.from_position(0))


def make_stream(samples, batch, rank=0, ranks=1, max_tokens=10_000, slots_multiple=1, weights=None, shuffle=True, seed=11):
    order = PairOrder(samples.sizes, seed=seed, weights=weights, shuffle=shuffle)
    plan = BatchPlan(order, samples.tokens, batch=batch, ranks=ranks, max_tokens=max_tokens, multiple_of=slots_multiple)
    return MicroBatchStream(samples, plan, rank=rank, vocab_size=VOCAB, shape=RowShape(2))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(1)
    prefixes = [write(folder / name, "pairs", random_documents(rng, "pairs", size)) for name, size in (("a", 13), ("b", 8))]
    return SampleSet(prefixes, "pairs")


def steps(stream, consumed, count):
    """Names seen in each of ``count`` steps, counting micro-batches as the loop does: by the plan's M."""
    batches = stream.from_position(consumed)
    batch = stream.plan.batch
    return [[b.names for b in islice(batches, len(stream.plan.step(consumed + k * batch)))] for k in range(count)]


@pytest.mark.parametrize("layout", [{}, {"max_tokens": 60}, {"max_tokens": 60, "slots_multiple": 4}])
def test_resumed_stream_is_the_tail_of_the_uninterrupted_one(pairs, layout):
    whole = steps(make_stream(pairs, batch=6, **layout), 0, 14)
    for done in (1, 3, 4, 9):
        assert steps(make_stream(pairs, batch=6, **layout), 6 * done, 14 - done) == whole[done:]
    names = [name for step in whole for batch in step for name in batch]
    assert len(names) == 84 == 4 * len(pairs) and set(Counter(names).values()) == {4}


def test_ranks_share_a_step_without_overlap(pairs):
    alone = steps(make_stream(pairs, batch=6), 0, 7)
    ranks = [steps(make_stream(pairs, batch=6, rank=r, ranks=3, max_tokens=80), 0, 7) for r in range(3)]
    for k in range(7):
        together = [name for rank in ranks for batch in rank[k] for name in batch]
        assert sorted(together) == sorted(name for batch in alone[k] for name in batch)
        assert len({len(rank[k]) for rank in ranks}) == 1, "ranks must agree on the number of micro-batches"


def test_repeated_is_the_same_full_pass_every_time(pairs):
    stream = make_stream(pairs, batch=len(pairs), max_tokens=70, shuffle=False)
    slots = len(stream.plan.step(0))
    assert slots > 2
    names = [batch.names for batch in islice(stream.repeated(), 3 * slots)]
    assert names[:slots] == names[slots : 2 * slots] == names[2 * slots :]
    assert sorted(n for batch in names[:slots] for n in batch) == sorted(pairs[i].name for i in range(len(pairs)))


def test_micro_batches_respect_the_limit_up_to_the_filler(pairs):
    stream = make_stream(pairs, batch=7, max_tokens=64)
    for batch in islice(stream.from_position(0), 40):
        assert batch.tokens.size(1) % 2 == 0 and batch.tokens.size(1) < 64 + 2


def same_prompt_pairs(prefix, count):
    """Random pairs of four prompts, and one pair whose prompt was cut."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (5, 9, 9, 2)]
    with PairStoreWriter(prefix, "pairs") as writer:
        for i in range(count):
            prompt = prompts[i % 4][1 if i == 9 else 0 :]
            responses = [rng.integers(1, VOCAB, rng.integers(1, 8)).tolist() for _ in range(2)]
            writer.add([prompt, *responses], id=f"p{i}", group=str(i % 4))
        writer.commit(tokenizer={"fingerprint": "tok"}, template={"fingerprint": "tpl"}, sources=[])
    return str(prefix)


def test_prompt_keys_are_equal_for_equal_prompts(tmp_path):
    samples = SampleSet([same_prompt_pairs(tmp_path / "a", 12), same_prompt_pairs(tmp_path / "b", 6)], "pairs")
    keys = samples.prompt_keys()
    same = [[0, 4, 8], [1, 5], [9], [2, 6, 10], [3, 7, 11], [12, 16], [13, 17], [14], [15]]
    assert sorted(sorted(np.flatnonzero(keys == key).tolist()) for key in np.unique(keys)) == sorted(same)
    np.testing.assert_array_equal(samples.prompt_keys(np.array([16, 3, 9])), keys[[16, 3, 9]])


SHAPES = [RowShape(), RowShape(4), RowShape(8, 2), RowShape(4, at_least=64), RowShape(2, share_prompts=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_work_is_that_of_the_packed_rows(tmp_path, shape):
    samples = SampleSet([same_prompt_pairs(tmp_path / "a", 12), same_prompt_pairs(tmp_path / "b", 6)], "pairs")
    prompts = samples.prompts()
    shared = Shared(samples.prompt_keys(), prompts, prompts) if shape.share_prompts else None
    order = PairOrder(samples.sizes, seed=3, keys=shared and shared.keys)
    plan = BatchPlan(order, shape.tokens(samples), batch=9, ranks=2, max_tokens=64, shared=shared)
    for consumed in (0, 9, 18):
        work, rows = MicroBatchStream(samples, plan, 0, VOCAB, shape).work(consumed)
        tokens, squares, scored, padded = [], [], [], 0
        for slot in plan.step(consumed):
            for rank, share in enumerate(slot):
                parts = [
                    MicroBatchStream(samples, plan, rank, VOCAB, shape, context).batch(slot) for context in range(shape.context_ranks)
                ]
                padded += sum(part.tokens.size(1) for part in parts)
                scored.append(sum(len(part.scored.positions) for part in parts))
                if shape.share_prompts:  # one prompt a key, and responses that see it
                    met = {samples[n].prompt_key: samples[n].prompt for n in share}
                    behind = [(len(s) - samples[n].prompt, samples[n].prompt) for n in share for s in samples[n].sequences]
                    tokens.append(sum(met.values()) + sum(length for length, _ in behind))
                    squares.append(sum(n * n for n in met.values()) + sum((p + n) ** 2 - p * p for n, p in behind))
                else:
                    lengths = [len(s) for n in share for s in samples[n].sequences]
                    tokens.append(sum(lengths))
                    squares.append(sum(n * n for n in lengths))
        assert [column.tolist() for column in work] == [tokens, squares, scored]
        assert rows == padded
    if shape.share_prompts:
        assert all(len(np.unique(shared.keys[share])) <= 3 for slot in plan.step(0) for share in slot), "prompts are kept together"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["a"], (["a"], None)),
        (["a", "b/c"], (["a", "b/c"], None)),
        (["0.7", "a", "3e-1", "b"], (["a", "b"], [0.7, 0.3])),
        (["1", "a"], (["a"], [1.0])),
    ],
)
def test_prefixes_with_and_without_weights(words, expected):
    assert parse_weighted_prefixes(words) == expected


@pytest.mark.parametrize("words", ["", "0.5", "0.5 a b", "a 0.5", "0.5 0.5 a b", "a 0.5 b 0.5", "0.5 a 1"])
def test_half_given_weights_are_refused(words):
    with pytest.raises(ValueError, match="data prefixes"):
        parse_weighted_prefixes(words.split())
