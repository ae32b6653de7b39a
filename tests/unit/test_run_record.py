"""Whose checkpoints they are, from the origins that both runs noted."""

import copy

import pytest

from megatron_patch.run_record import of_another_run

NOTED = {
    "revision": "0123",
    "weights": {"path": "Qwen2.5-7B", "fingerprint": "ab"},
    "stores": [
        {"use": "training", "prefix": "data/a", "fingerprint": "01"},
        {"use": "training", "prefix": "data/b", "fingerprint": "02"},
        {"use": "validation", "prefix": "data/held-out", "fingerprint": "03"},
    ],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda now: now.update(revision="4567"), None),
        (lambda now: now["weights"].update(path="moved"), None),
        (lambda now: now["stores"][0].update(prefix="moved"), None),
        (lambda now: now["stores"].pop(2), None),  # what is evaluated may change
        (lambda now: now["weights"].update(fingerprint="cd"), "it began with other weights (Qwen2.5-7B)"),
        (lambda now: now["stores"][1].update(fingerprint="04"), "it was trained on other stores (data/a, data/b)"),
        (lambda now: now["stores"].pop(1), "it was trained on other stores (data/a, data/b)"),
        (lambda now: now["stores"].reverse(), "it was trained on other stores (data/a, data/b)"),
    ],
)
def test_what_makes_another_run(change, said):
    now = copy.deepcopy(NOTED)
    change(now)
    assert of_another_run(NOTED, now) == said
