"""Records to a store: ids against the tokenizer, every drop under its reason, every mistake by its place."""

import hashlib

import pytest
from toolkit_helpers import files, record, write_jsonl

from megatron_patch.data.pair_store import PairStore
from toolkits.lpo_data_preprocessing.build_pairs import main
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer


def command(folder, tokenizer, *more):
    return ["--input", str(folder / "in.jsonl"), "--output", str(folder / "s"), "--tokenizer", str(tokenizer), *map(str, more)]


def build(folder, tokenizer, records, *more) -> PairStore:
    write_jsonl(folder / "in.jsonl", records)
    assert main(command(folder, tokenizer, *more)) == 0
    return PairStore(folder / "s", verify="sha256")


def test_pairs(tiny_qwen, tmp_path):
    records = [record(0, rejected=["1", "2 <|im_end|>"], rejected_ended=[True, False]), record(1, rejected=["3"])]
    store, chat = build(tmp_path, tiny_qwen, records), ChatTokenizer(tiny_qwen)
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert store.kind == "pairs" and store.columns.id == ["r0-0", "r0-1", "r1-0"] and store.columns.source_line.tolist() == [1, 1, 2]
    assert store.columns.group.tolist() == [0, 0, 2]
    for i, (source, text, ended) in enumerate([(0, "1", True), (0, "2 <|im_end|>", False), (1, "3", True)]):
        prompt, chosen, rejected = (part.tolist() for part in store[i])
        assert prompt == chat.prompt_ids(records[source]["prompt"])
        assert chat.decode(chosen) == records[source]["chosen"] + "<|im_end|>" and chosen[-1] == end
        assert chat.decode(rejected) == text + ("<|im_end|>" if ended else "")
        assert (rejected[-1] == end) == ended and rejected.count(end) == ended


def test_manifest(tiny_qwen, tmp_path):
    store, chat = build(tmp_path, tiny_qwen, [record(0, rejected=["1", "a\n<|im_end|>"])], "--max-length", 300), ChatTokenizer(tiny_qwen)
    manifest = store.manifest
    assert manifest["tokenizer"]["fingerprint"] == chat.fingerprint
    assert manifest["template"] == {
        "fingerprint": chat.template_fingerprint, "response_end": "<|im_end|>", "exceptions": 1, "first_exceptions": ["r0-1 rejected"],
    }  # fmt: skip
    assert manifest["limits"] == {"max_length": 300} and manifest["dropped"] == {}
    assert manifest["sources"] == [
        {"path": str(tmp_path / "in.jsonl"), "sha256": hashlib.sha256((tmp_path / "in.jsonl").read_bytes()).hexdigest(), "records": 1}
    ]


def test_what_is_off_the_template_is_named(tiny_qwen, tmp_path, capsys):
    """The first few of all chunks and kinds, in the order of the input, however many processes."""
    rows = [record(i, "x" * 3000, rejected=["\n<|im_end|>" if i % 50 == 7 else "1"]) for i in range(400)]
    for workers in (1, 2):
        store = build(tmp_path, tiny_qwen, rows, "--workers", workers, "--overwrite")
        first = [f"r{i}-0 rejected" for i in (7, 57, 107, 157, 207)]
        assert (store.manifest["template"]["exceptions"], store.manifest["template"]["first_exceptions"]) == (8, first)
        assert f"note      responses off the template: 8 (first: {', '.join(first)})" in capsys.readouterr().out


def test_same_input_same_fingerprint(tiny_qwen, tmp_path):
    prints = []
    for name in "ab":
        (tmp_path / name).mkdir()
        prints.append(build(tmp_path / name, tiny_qwen, [record(0, rejected=["1"])]).fingerprint)
    assert prints[0] == prints[1]


def test_scores(tiny_qwen, tmp_path):
    store = build(tmp_path, tiny_qwen, [record(0, rejected=["1", "2"], chosen_score=1, rejected_scores=[0.5, 0.25])])
    assert store.columns.scores.tolist() == [[1, 0.5], [1, 0.25]]


def test_sft(tiny_qwen, tmp_path):
    records = [record(0), record(1, rejected=["never looked at"])]
    store, chat = build(tmp_path, tiny_qwen, records, "--kind", "sft"), ChatTokenizer(tiny_qwen)
    assert len(store) == 2 and store.columns.id == ["r0", "r1"]
    assert [part.tolist() for part in store[1]] == [chat.prompt_ids(records[1]["prompt"]), chat.response_ids(records[1]["chosen"])]


GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_every_assistant_turn_is_the_mask_of_transformers(tiny_qwen, tmp_path):
    chat = ChatTokenizer(tiny_qwen)
    chat.tokenizer.chat_template = GENERATION
    chat.tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [("system", "Be brief."), ("user", "12+10?"), ("assistant", "22"), ("user", "and 1 more?"), ("assistant", "23\nof course")]
    prompts = [[*turns, ("user", "thanks")], turns[1:2], turns[:4]]
    records = [record(i, "x", "35 pens") | {"prompt": [{"role": r, "content": c} for r, c in p]} for i, p in enumerate(prompts)]
    store = build(tmp_path, tmp_path / "tokenizer", records, "--kind", "sft", "--every-assistant-turn")
    assert store.manifest["template"]["exceptions"] == 0 and [len(store[i]) for i in range(3)] == [6, 2, 4]
    for i, item in enumerate(records):
        conversation = [*item["prompt"], {"role": "assistant", "content": item["chosen"]}]
        judge = chat.tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        ids = [token for part in store[i] for token in part.tolist()]
        mask = [j % 2 for j, part in enumerate(store[i]) for _ in part]
        newline = len(judge["input_ids"]) - len(ids)  # after the last turn, which is not part of a response
        assert newline == 1 and ids == judge["input_ids"][:-1] and mask == judge["assistant_masks"][:-1]
        assert judge["assistant_masks"][-1] == 0


def test_earlier_turns_off_the_template_are_counted(tiny_qwen, tmp_path):
    question, spelled = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "\n<|im_start|>user"}
    records = [record(0), record(1) | {"prompt": [question, spelled, question]}]
    store = build(tmp_path, tiny_qwen, records, "--kind", "sft", "--every-assistant-turn")
    assert store.manifest["template"]["exceptions"] == 1 and len(store[1]) == 4
    assert store.manifest["template"]["first_exceptions"] == ["r1 earlier turns"]


def test_every_assistant_turn_needs_a_template_that_keeps_turns(tiny_qwen, tmp_path, fails):
    chat = ChatTokenizer(tiny_qwen)
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("message.content", "message.content.split('</think>')[-1]")
    chat.tokenizer.save_pretrained(tmp_path / "tokenizer")
    question, thought = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>a</think>b"}
    write_jsonl(tmp_path / "in.jsonl", [record(0), record(1) | {"prompt": [question, thought, question]}])
    flags = ["--kind", "sft", "--every-assistant-turn"]
    assert "in.jsonl:2: the chat template writes message 1" in fails(main, *command(tmp_path, tmp_path / "tokenizer", *flags))
    assert "--every-assistant-turn is for --kind sft" in fails(main, *command(tmp_path, tiny_qwen, "--every-assistant-turn"))
    assert "cannot be truncated" in fails(main, *command(tmp_path, tiny_qwen, *flags, "--truncate-prompt"))


def test_text(tiny_qwen, tmp_path):
    texts = ["Ana has 12 pens.", "<|im_end|> é", "9" * 50]
    store = build(tmp_path, tiny_qwen, [{"text": text} for text in texts], "--kind", "text", "--max-length", 40)
    chat = ChatTokenizer(tiny_qwen, response_end="<|endoftext|>")
    assert store.kind == "text" and store.columns.id == ["line-1", "line-2"] and store.manifest["dropped"] == {"too_long_text": 1}
    for document, text in zip((store[0], store[1]), texts, strict=False):
        (ids,) = document
        assert chat.decode(ids.tolist()) == text + "<|endoftext|>" and ids[-1] == chat.end_id
        assert "<|im_end|>" not in [chat.tokenizer.convert_ids_to_tokens(int(token)) for token in ids]
    assert store.manifest["scored_tokens"] == store.manifest["tokens"] == sum(len(store[i][0]) for i in range(2))


LONG = "9" * 200  # digits stand alone: 200 tokens


def test_too_long_is_dropped_under_its_reason(tiny_qwen, tmp_path, capsys):
    records = [record(0, chosen=LONG, rejected=["1"]), record(1, rejected=[LONG, "2"]), record(2, LONG, rejected=["3"])]
    store = build(tmp_path, tiny_qwen, records, "--max-length", 120, "--max-drop-fraction", 0.8)
    assert store.columns.id == ["r1-1"]
    assert store.manifest["dropped"] == {"too_long_chosen": 2, "too_long_rejected": 1}
    out = capsys.readouterr().out
    assert "4 pairs read, 1 kept, 3 dropped" in out and "too_long_chosen" in out


def test_the_limit_is_exact(tiny_qwen, tmp_path, fails):
    store = build(tmp_path, tiny_qwen, [record(0, rejected=["1"])])
    total = int(store.lengths[0][:2].sum())  # the chosen answer is the longer one
    assert len(build(tmp_path, tiny_qwen, [record(0, rejected=["1"])], "--max-length", total, "--overwrite")) == 1
    line = fails(main, *command(tmp_path, tiny_qwen, "--max-length", total - 1, "--overwrite"))
    assert "1 of 1 pairs dropped" in line and "too_long_chosen 1" in line
    assert len(PairStore(tmp_path / "s")) == 1  # the store that was there is untouched


def test_prompts_are_cut_from_the_left_and_responses_never(tiny_qwen, tmp_path, capsys):
    records = [record(0, LONG + "?", rejected=["1", "22"]), record(1, chosen=LONG, rejected=["1"])]
    store, chat = build(tmp_path, tiny_qwen, records, "--max-length", 60, "--truncate-prompt"), ChatTokenizer(tiny_qwen)
    prompt, chosen, rejected = (part.tolist() for part in store[0])
    whole = chat.prompt_ids(records[0]["prompt"])
    assert len(prompt) + max(len(chosen), len(rejected)) == 60 and prompt == whole[-len(prompt) :]
    assert chat.decode(chosen) == records[0]["chosen"] + "<|im_end|>"
    assert store.manifest["dropped"] == {"too_long_chosen": 1} and store.manifest["options"]["truncated_prompts"] == 2
    assert "prompts cut from the left: 2" in capsys.readouterr().out


def test_drop_empty(tiny_qwen, tmp_path):
    records = [record(0, rejected=["1", " "]), record(1, chosen="  ", rejected=["2"]), record(2, rejected=["3"])]
    store = build(tmp_path, tiny_qwen, records, "--drop-empty")
    assert store.columns.id == ["r0-0", "r2-0"] and store.manifest["dropped"] == {"empty_chosen": 1, "empty_rejected": 1}


GOOD = record(0, rejected=["1"])


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([GOOD, "{"], (), "in.jsonl:2: not valid JSON"),
        ([GOOD, {"id": "x", "prompt": GOOD["prompt"], "rejected": []}], (), "in.jsonl:2: field 'chosen' is missing"),
        ([{k: v for k, v in GOOD.items() if k != "rejected"}], (), "in.jsonl:1: field 'rejected' is missing"),
        ([GOOD, GOOD | {"id": "x", "chosen": ""}], (), "in.jsonl:2: empty chosen answer of x-0"),
        ([GOOD, GOOD | {"id": "x", "rejected": ["1", ""]}], (), "in.jsonl:2: empty rejected answer of x-1"),
        ([GOOD, GOOD], (), "in.jsonl:2: id 'r0-0' is in the store already"),
        ([GOOD | {"rejected": [1]}], (), "in.jsonl:1: rejected[0] must be text, got int"),
        ([GOOD | {"rejected": "abc"}], (), "in.jsonl:1: field 'rejected' must be a list, got str"),
        ([GOOD | {"rejected_ended": "x"}], (), "in.jsonl:1: field 'rejected_ended' needs one entry per rejected answer (1)"),
        ([GOOD | {"rejected_scores": "1"}], (), "in.jsonl:1: field 'rejected_scores' needs one entry per rejected answer (1)"),
        ([GOOD | {"rejected_scores": [1.0], "chosen_score": "2"}], (), "field 'chosen_score' must hold finite numbers, got '2'"),
        ([GOOD | {"rejected_scores": [True], "chosen_score": 2}], (), "in.jsonl:1: field 'rejected_scores' must hold finite numbers"),
        ([GOOD | {"rejected_ended": []}], (), "in.jsonl:1: field 'rejected_ended' needs one entry per rejected answer (1)"),
        ([GOOD | {"rejected_scores": [1.0]}], (), "in.jsonl:1: field 'chosen_score' is missing"),
        ([GOOD | {"prompt": []}], (), "in.jsonl:1: messages must be a non-empty list"),
        ([GOOD], ("--max-length", 5), "1 of 1 pairs dropped"),
        ([GOOD], ("--max-length", 1), "at least 2 tokens, got 1"),
        ([GOOD], ("--tokenizer", "/nowhere"), "/nowhere: no such folder"),
        ([GOOD], ("--response-end", "<end>"), "has no token '<end>'"),
        ([{"text": ["a"]}], ("--kind", "text"), "in.jsonl:1: field 'text' must be a str, got list"),
        ([{"text": "  "}], ("--kind", "text"), "in.jsonl:1: empty text answer of line-1"),
        ([record(0)], (), "no pairs left (record_without_rejected 1)"),
    ],
)
def test_bad_input(tiny_qwen, tmp_path, fails, records, more, message):
    write_jsonl(tmp_path / "in.jsonl", records)
    assert message in fails(main, *command(tmp_path, tiny_qwen, *more))
    assert files(tmp_path) == ["in.jsonl"]


def test_existing_store_and_interruption(tiny_qwen, tmp_path, fails, monkeypatch, capsys):
    build(tmp_path, tiny_qwen, [GOOD])
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert main(command(tmp_path, tiny_qwen)) == 0 and "finished before with the same plan, kept" in capsys.readouterr().out
    assert "made with another max_length (max_length was 4096, is 64)" in fails(main, *command(tmp_path, tiny_qwen, "--max-length", 64))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatTokenizer, "follow_template", stop)
    with pytest.raises(KeyboardInterrupt):
        main(command(tmp_path, tiny_qwen, "--overwrite"))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
