"""Packing against a loop that knows nothing of shifts, masks or numpy: one sequence at a time, one token at a time."""

import numpy as np
import pytest
import torch

from megatron_patch.data.packed_batch import PackedBatch, Sample, pack

VOCAB = 50


def sample(prompt, chosen, rejected, name="p", reference=None):
    sequences = tuple(np.array([*prompt, *response], dtype=np.int32) for response in (chosen, rejected))
    scored = tuple(np.array([False] * len(prompt) + [True] * len(response)) for response in (chosen, rejected))
    return Sample(sequences, scored, reference, name)


def random_pairs(rng, count, longest=12):
    def ids():
        return rng.integers(1, VOCAB, rng.integers(1, longest)).tolist()

    return [(ids(), ids(), ids()) for _ in range(count)]


def packed(pairs, multiple_of=1, **options):
    samples = [sample(*pair, name=f"p{i}", **options) for i, pair in enumerate(pairs)]
    return pack(samples, multiple_of=multiple_of, vocab_size=VOCAB, responses_per_sample=2)


def naive(pairs):
    """(row of tokens, starts of sequences, [(position that predicts, token, row of R)]), from lists."""
    row, starts, predictions = [], [0], []
    for p, (prompt, *responses) in enumerate(pairs):
        for which, response in enumerate(responses):
            begin = len(row)
            for t, token in enumerate(prompt + response):
                row.append(token)
                if t >= len(prompt):  # a response token is predicted where the token before it was read
                    predictions.append((begin + t - 1, token, which * len(pairs) + p))
            starts.append(len(row))
    return row, starts, predictions


@pytest.mark.parametrize("seed", range(12))
def test_pack_is_the_naive_loop(seed):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, int(rng.integers(1, 7)))
    row, starts, predictions = naive(pairs)
    batch = packed(pairs)
    assert batch.tokens.tolist() == [row] and batch.tokens.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == starts and batch.cu_seqlens.dtype == torch.int32
    scored = batch.scored
    assert list(zip(scored.positions.tolist(), scored.targets.tolist(), scored.response.tolist(), strict=True)) == predictions
    assert scored.responses == 2 * len(pairs)
    assert batch.lengths.tolist() == [len(chosen) for _, chosen, _ in pairs] + [len(rejected) for _, _, rejected in pairs]
    assert batch.names == tuple(f"p{i}" for i in range(len(pairs))) and batch.samples == len(pairs)


def test_shift_on_one_pair_by_hand():
    # Row: 7 8 | 1 2 9 | 7 8 | 3 9   (9 ends a response). The 1 is predicted by the 8 at position 1, the end by the token before it.
    batch = packed([([7, 8], [1, 2, 9], [3, 9])])
    assert batch.tokens.tolist() == [[7, 8, 1, 2, 9, 7, 8, 3, 9]]
    assert batch.scored.positions.tolist() == [1, 2, 3, 6, 7]
    assert batch.scored.targets.tolist() == [1, 2, 9, 3, 9]
    assert batch.scored.response.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8, 64])
def test_filler_makes_the_row_divisible_and_is_a_sequence_that_nothing_scores(multiple_of):
    rng = np.random.default_rng(multiple_of)
    for count in range(1, 6):
        pairs = random_pairs(rng, count)
        row, starts, predictions = naive(pairs)
        batch = packed(pairs, multiple_of)
        length = batch.tokens.size(1)
        assert length % multiple_of == 0 and length - len(row) < multiple_of
        assert batch.tokens[0, : len(row)].tolist() == row
        assert batch.cu_seqlens.tolist() == starts + [length] * (length > len(row))
        assert len(batch.scored.positions) == len(predictions) and (batch.scored.positions < len(row) - 1).all()
        assert batch.lengths.sum() == len(predictions)


def test_a_row_that_fits_gets_no_filler():
    batch = packed([([1], [2], [3])], multiple_of=4)
    assert batch.tokens.tolist() == [[1, 2, 1, 3]] and batch.cu_seqlens.tolist() == [0, 2, 4]


@pytest.mark.parametrize("at_least, multiple_of, expected", [(300, 1, 300), (301, 4, 304), (5, 1, 5), (2, 4, 4)])
@pytest.mark.parametrize("pairs", [[], [([1], [2], [3])]])
def test_fixed_rows_are_filled_with_short_sequences_that_nothing_scores(at_least, multiple_of, expected, pairs):
    samples = [sample(*pair, name="p") for pair in pairs]
    batch = pack(samples, multiple_of=multiple_of, vocab_size=VOCAB, responses_per_sample=2, at_least=at_least)
    assert batch.tokens.size(1) == batch.cu_seqlens[-1] == max(expected, 4 * len(pairs))
    lengths = batch.cu_seqlens.diff().tolist()
    assert lengths[: 2 * len(pairs)] == [2, 2] * len(pairs) and all(0 < length <= 128 for length in lengths)
    assert len(batch.scored.positions) == 2 * len(pairs)


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_shared_prompts_are_there_once_and_every_target_is_predicted_from_its_own_past(multiple_of):
    """Walked back from its last token, each response is followed by its whole prompt; three of five pairs have the same one."""
    pairs = random_pairs(np.random.default_rng(3), 5)
    pairs[3:] = [(pairs[1][0], *responses) for _, *responses in pairs[3:]]
    numbers = [0, 1, 2, 1, 1]
    samples = [
        sample(*pair, name=f"p{i}")._replace(prompt=len(pair[0]), prompt_key=numbers[i]) for i, pair in enumerate(pairs)
    ]
    batch = pack(samples, multiple_of=multiple_of, vocab_size=VOCAB, responses_per_sample=2, share_prompts=True)
    row, starts = batch.tokens[0].tolist(), batch.cu_seqlens.tolist()
    ends = starts[1:]
    real = sum(len(prompt) for prompt, *_ in pairs[:3]) + sum(len(response) for _, *responses in pairs for response in responses)
    assert 0 <= len(row) - real < multiple_of and batch.behind.count(-1) == 3 + (len(row) > real)
    before = {start: ends[behind] - 1 for start, behind in zip(starts, batch.behind, strict=False) if behind >= 0}
    begins = {start for start, behind in zip(starts, batch.behind, strict=False) if behind < 0}
    found: dict[int, list[tuple[int, int]]] = {}
    for position, target, response in zip(*(column.tolist() for column in batch.scored[:3]), strict=True):
        found.setdefault(response, []).append((position, target))
    assert len(found) == 10
    for response, predictions in found.items():
        prompt, *responses = pairs[response % 5]
        assert [target for _, target in predictions] == responses[response // 5]
        position, walked = predictions[-1][0], []
        while True:
            walked.append(row[position])
            if position in begins:
                break
            position = before.get(position, position - 1)
        assert walked[::-1] == prompt + responses[response // 5][:-1]
    assert batch.lengths.tolist() == [len(pair[1 + r]) for r in range(2) for pair in pairs]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_context_ranks_share_every_sequence_and_every_scored_token(ranks, count):
    """Rank r has chunks r and 2 ranks - 1 - r of every sequence, in that order; a target stays with the position that predicts it."""
    samples = [sample(*pair, name=f"p{i}") for i, pair in enumerate(random_pairs(np.random.default_rng(count), count))]
    multiple = 2 * ranks if ranks > 1 else 1
    whole = pack(samples, multiple_of=2 * multiple, vocab_size=VOCAB, responses_per_sample=2, sequence_multiple=multiple)
    lengths, row = whole.cu_seqlens.diff().tolist(), whole.tokens[0].tolist()
    assert all(length % multiple == 0 for length in lengths) and len(row) % (2 * multiple) == 0
    found = []
    for rank in range(ranks):
        part = whole.of_context_rank(rank, ranks)
        places = []
        for start, length in zip(whole.cu_seqlens.tolist(), lengths, strict=False):
            chunk = length // (2 * ranks)
            both = (rank, 2 * ranks - 1 - rank) if ranks > 1 else (0, 1)
            places += [start + c * chunk + i for c in both for i in range(chunk)] if ranks > 1 else range(start, start + length)
        assert part.tokens[0].tolist() == [row[place] for place in places]
        assert part.cu_seqlens is whole.cu_seqlens and part.lengths is whole.lengths and part.scored.responses == 2 * count
        found += [(places[p], t, r) for p, t, r in zip(*(column.tolist() for column in part.scored[:3]), strict=True)]
    assert sorted(found) == sorted(zip(*(column.tolist() for column in whole.scored[:3]), strict=True))


def test_another_prompt_under_the_same_key_is_an_error():
    samples = [sample([1, 2, prompt], [3], [4], name=f"p{prompt}")._replace(prompt=3, prompt_key=0) for prompt in (5, 6)]
    with pytest.raises(ValueError, match=r"pair p6: its prompt differs"):
        pack(samples, multiple_of=1, vocab_size=VOCAB, responses_per_sample=2, share_prompts=True)


@pytest.mark.parametrize("responses", [1, 2])
def test_empty_micro_batch_is_one_dummy_sequence(responses):
    batch = pack([], multiple_of=4, vocab_size=VOCAB, responses_per_sample=responses)
    assert batch.tokens.shape == (1, 4) and batch.cu_seqlens.tolist() == [0, 4]
    assert batch.samples == 0 and batch.scored.responses == 0
    for tensor in (batch.scored.positions, batch.scored.targets, batch.scored.response, batch.lengths):
        assert tensor.shape == (0,) and tensor.dtype == torch.int64
    assert batch.reference.shape == (0,) and batch.reference.dtype == torch.float64


def test_reference_follows_the_rows():
    pairs = [([1], [2, 3], [4])] * 3
    samples = [sample(*pair, name=str(i), reference=np.array([-1.0 - i, -10.0 - i])) for i, pair in enumerate(pairs)]
    batch = pack(samples, multiple_of=1, vocab_size=VOCAB, responses_per_sample=2)
    assert batch.reference.dtype == torch.float64 and batch.reference.tolist() == [-1, -2, -3, -10, -11, -12]
    missing = packed(pairs).reference
    assert missing.shape == (6,) and missing.isnan().all()


def test_conversations_score_several_runs_of_one_sequence():
    tokens = np.array([5, 6, 1, 2, 7, 3], dtype=np.int32)
    scored = np.array([False, False, True, True, False, True])
    batch = pack([Sample((tokens,), (scored,), None, "c")], multiple_of=1, vocab_size=VOCAB, responses_per_sample=1)
    assert batch.scored.positions.tolist() == [1, 2, 4] and batch.scored.targets.tolist() == [1, 2, 3]
    assert batch.lengths.tolist() == [3] and batch.scored.response.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "bad, complaint",
    [
        (([1, 2], [], [3]), "empty"),
        (([1, 2], [3], []), "empty"),
        (([], [3], [4]), "prompt is empty"),
        (([1, VOCAB], [3], [4]), f"token id {VOCAB} .* vocabulary of {VOCAB}"),
        (([1], [3], [4, 99]), "token id 99"),
    ],
)
def test_a_bad_pair_is_named(bad, complaint):
    good = sample([1], [2], [3], name="good-1")
    with pytest.raises(ValueError, match=f"bad-7.*{complaint}"):
        pack([good, sample(*bad, name="bad-7")], multiple_of=1, vocab_size=VOCAB, responses_per_sample=2)


def test_to_moves_every_tensor():
    batch = packed([([1], [2, 3], [4])], multiple_of=4).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)] + list(batch.scored[:3])
    assert len(tensors) == 8 and all(tensor.is_meta for tensor in tensors)
    assert isinstance(batch, PackedBatch) and batch.scored.responses == 2 and batch.names == ("p0",)
