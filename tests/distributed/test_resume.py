"""A run that is interrupted and resumed is the run that was not interrupted.

The judge is the uninterrupted run. The pairs are those that the ranks really fed to the model, not those of the plan.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint.hf_files import weights_fingerprint
from megatron_patch.checkpoint.saved import tracked_step
from megatron_patch.data.pair_store import PairStore
from megatron_patch.run_record import starts
from tests.distributed import harness
from tests.distributed.materials import BATCH, PAIRS, Bench, tensors

ADAM_UNDER_DO = ("--use-distributed-optimizer",)
SAVES = ("--save-interval", 5)


def batches(save: Path, ranks: int) -> dict[int, list[str]]:
    """Step -> sorted names of the pairs in it, from what every rank fed to its model (each replica once)."""
    steps: dict[int, Counter] = {}
    for rank in range(ranks):
        seen: dict[int, Counter] = {}
        for row in map(json.loads, Path(f"{save}.batches.{rank}").read_text().splitlines()):
            seen.setdefault(row["step"], Counter()).update(row["names"])
        for step, names in seen.items():
            steps[step] = steps.get(step, Counter()) + names
    copies = {step: sum(names.values()) // BATCH for step, names in steps.items()}  # TP and PP ranks feed the same pairs
    assert all(count % copies[step] == 0 for step, names in steps.items() for count in names.values())
    return {step: sorted(name for name, count in names.items() for _ in range(count // copies[step])) for step, names in steps.items()}


def whole(bench: Bench, layout: str, *flags: object, data: Path | None = None) -> Path:
    """Ten steps without interruption, with checkpoints after 5 and 10."""
    return bench.train(layout, data or bench.reference(), *SAVES, *flags, alter="recorded")


def resumed(bench: Bench, layout: str, start: Path, *flags: object, data: Path | None = None) -> Path:
    """Steps 6 to 10 from the checkpoint that ``start`` left after step 5, in a folder that looks as if the run had been killed later."""
    save = bench.folder(f"resumed-{layout}")
    save.mkdir()
    shutil.copytree(start / "iter_0000005", save / "iter_0000005")
    (save / "latest_checkpointed_iteration.txt").write_text("5")
    killed_while_writing = (start / "metrics.jsonl").read_text().splitlines(keepends=True)[:8]
    (save / "metrics.jsonl").write_text("".join(killed_while_writing)[:-20])
    run = bench.attempt(layout, save, data or bench.reference(), *SAVES, "--load", save, *flags, alter="recorded")
    assert run.ok, run.output[-4000:]
    return save


# PP2 with a tied embedding, and many buckets: buckets of a size that upstream pads, which it forgets when it cuts out parameters.
SAME_LAYOUT = [
    pytest.param("dp2-do", (), id="dp2-distributed-optimizer"),
    pytest.param("dp2", (), id="dp2"),
    pytest.param("tp2-sp", ("--bf16", *ADAM_UNDER_DO), id="tp2-sp-bf16-distributed-optimizer"),
    pytest.param("one", (), id="one", marks=pytest.mark.ci),
    pytest.param("pp2", ADAM_UNDER_DO, id="pp2-tied-distributed-optimizer"),
    pytest.param("dp2-do", ("--ddp-bucket-size", 10000), id="dp2-distributed-optimizer-many-buckets", marks=pytest.mark.full),
    pytest.param("vpp2", (), id="vpp2", marks=pytest.mark.full),
    pytest.param("cp2-do", (), id="cp2-distributed-optimizer", marks=pytest.mark.full),
]


def test_share_prompt_may_not_change(bench: Bench) -> None:
    """It decides the order of pairs: the rest of the epoch would leave some out and repeat others."""
    start = whole(bench, "one")
    run = bench.attempt("one", bench.folder("share-prompt-changed"), bench.reference(), "--load", start, "--share-prompt")
    (error,) = run.errors
    assert run.codes == [2] and "--share-prompt" in error and "began with False, not True" in error


@pytest.mark.parametrize("changed", [("--seed", 99), ("--pair-data", 2, "STORE", 1, "STORE")])
def test_what_orders_the_pairs_may_not_change(bench: Bench, changed: tuple[object, ...]) -> None:
    store = bench.reference()
    mixed = ("--pair-data", 1, store, 1, store)
    start = bench.train("one", store, "--train-iters", 2, "--save-interval", 2, *mixed, alter="recorded")
    given = [store if word == "STORE" else word for word in changed]
    run = bench.attempt("one", bench.folder(f"order-changed-{changed[0]}"), store, "--load", start, *mixed, *given)
    (error,) = run.errors
    assert run.codes == [2] and str(changed[0]) in error and "would leave pairs out and repeat others" in error
    alone = bench.attempt("one", bench.folder(f"other-stores-{changed[0]}"), store, "--load", start, "--seed", 99, "--train-iters", 3)
    assert alone.ok, alone.output[-4000:]  # of other stores there is nothing to leave out


def test_an_epoch_is_an_epoch_whatever_the_batch(bench: Bench) -> None:
    """Half of the 48 pairs in steps of 8, the rest in steps of 12: each once."""
    save, data = bench.folder("epoch"), bench.reference()
    flags = [word for word in bench.flags(data, "--epochs", 1, "--save-interval", 3, "--save", save) if word not in ("--train-iters", 10)]
    flags[flags.index("--global-batch-size") + 1 : flags.index("--global-batch-size") + 1] = [8]
    first = bench.launch("one", harness.TRAIN, [*flags, "--exit-interval", 3], save.with_suffix(".log"))
    assert tracked_step(save) == 3, first.output[-4000:]
    again = [*flags, "--load", save, "--global-batch-size", 12]
    run = bench.launch("one", harness.TRAIN, again, save.with_suffix(".log"))
    assert run.ok and "[xpo] --epochs 1: 5 steps in all, since the 3 done took 24 samples" in run.output, run.output[-4000:]
    assert [row["consumed_samples"] for row in harness.metrics(save)] == [8, 16, 24, 36, 48]


@pytest.mark.parametrize(("layout", "flags"), SAME_LAYOUT)
def test_same_layout_is_bit_equal(bench: Bench, layout: str, flags: tuple[object, ...]) -> None:
    """Losses, gradient norms and learning rates of steps 6 to 10, every exported tensor, the pairs of every step."""
    data = bench.reference("tied", "one", *flags[:1]) if "--bf16" in flags else None
    uninterrupted = whole(bench, layout, *flags, data=data)
    again = resumed(bench, layout, uninterrupted, *flags, data=data)
    judge, rows = harness.metrics(uninterrupted), harness.metrics(again)
    assert [row["iteration"] for row in rows] == list(range(1, 11)), "each step once"
    for name in ("loss", "grad_norm", "learning_rate", "consumed_samples", "logps/chosen"):
        assert [row[name] for row in rows] == [row[name] for row in judge], name
    original, exported = tensors(uninterrupted / "hf"), tensors(again / "hf")
    assert not [name for name, tensor in original.items() if not torch.equal(tensor, exported[name])]
    ranks = 1 if layout == "one" else 2
    assert batches(again, ranks) == {step: names for step, names in batches(uninterrupted, ranks).items() if step > 5}
    assert json.loads((again / "run_state.json").read_text()) == {"state": "finished", "iteration": 10}


RESHARDED = [
    pytest.param("tp2", "pp2", (), id="tp2-pp2"),
    pytest.param("one", "dp2", ADAM_UNDER_DO, id="dp1-dp2-distributed-optimizer"),
    pytest.param("tp2", "pp2", ADAM_UNDER_DO, id="tp2-pp2-distributed-optimizer", marks=pytest.mark.full),
    pytest.param("one", "dp2", (), id="dp1-dp2", marks=pytest.mark.full),
    pytest.param("dp2", "one", ADAM_UNDER_DO, id="dp2-dp1-distributed-optimizer", marks=pytest.mark.full),
    pytest.param("pp2", "tp2-sp", ADAM_UNDER_DO, id="pp2-tp2-sp-distributed-optimizer", marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("before", "after", "flags"), RESHARDED)
def test_resharded_run_goes_on(
    bench: Bench, before: str, after: str, flags: tuple[object, ...], record_property: Callable[[str, object], None]
) -> None:
    """The same pairs in the same steps, losses to 1e-5 relative; measured: loss 2.2e-7, gradient norm 4.7e-7."""
    uninterrupted = whole(bench, before, *flags)
    again = resumed(bench, after, uninterrupted, *flags)
    judge, rows = harness.metrics(uninterrupted), harness.metrics(again)
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    difference = {name: max(abs(r[name] / j[name] - 1) for r, j in zip(rows, judge, strict=True)) for name in ("loss", "grad_norm")}
    record_property("worst", difference)
    assert difference["loss"] <= 1e-5, difference
    ranks = {"one": 1}
    seen = batches(again, ranks.get(after, 2))
    assert seen == {step: names for step, names in batches(uninterrupted, ranks.get(before, 2)).items() if step > 5}


@pytest.mark.parametrize("layout", ["dp2", pytest.param("vpp2", marks=pytest.mark.ci), pytest.param("tp2-sp", marks=pytest.mark.ci)])
def test_every_pair_of_an_epoch_is_seen_once(bench: Bench, layout: str) -> None:
    """100 pairs in ten steps over 48: two whole epochs, the batch across their border included, and four pairs of a third."""
    seen = batches(whole(bench, layout), 2)
    assert sorted(seen) == list(range(1, 11)) and {len(names) for names in seen.values()} == {BATCH}
    everything = Counter(name for names in seen.values() for name in names)
    assert set(everything) == {f"p{i:03d}" for i in range(PAIRS)}
    assert Counter(everything.values()) == {2: PAIRS - 4, 3: 4}
    first_epoch = Counter(name for step in range(1, 5) for name in seen[step])
    assert max(first_epoch.values()) == 1 and set(everything) - set(first_epoch) <= set(seen[5])


def test_a_run_s_origins_are_recorded(bench: Bench) -> None:
    """Beside its checkpoints at every start, and in each of them; scripts/show_run.py reads them."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    save = resumed(bench, "one", whole(bench, "one"))
    first, store = starts(save)[0], PairStore(bench.reference())
    assert first["settings"]["global_batch_size"] == BATCH and first["versions"]["megatron-core"].startswith("0.19.")
    assert first["stores"][0]["fingerprint"] == store.fingerprint and first["stores"][0]["samples"] == PAIRS
    assert first["weights"]["fingerprint"] == weights_fingerprint(bench.models["tied"]) == first["stores"][0]["reference"]["weights"]
    kept = json.loads(load_common_state_dict(str(save / "iter_0000010"))["args"].origins)
    assert kept == {name: first[name] for name in ("revision", "versions", "weights", "stores")}
