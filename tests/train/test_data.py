import json
from pathlib import Path

import pytest

from fp4lab.chat.template import render
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.errors import UserError
from fp4lab.train.data import held_out, load_samples, ordered

ROOT = Path(__file__).parents[2]
DIALOGUE = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "I am Tiny."},
    ]
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "models" / "tiny")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def counted(sample, tokenizer) -> str:
    return tokenizer.decode([t for t, m in zip(sample.targets, sample.loss_mask, strict=True) if m])


def test_text_keeps_its_start_and_counts_everywhere(tmp_path, tokenizer):
    line = "A good test fails when the thing is broken."
    ids = tokenizer.encode(line)
    file = write(tmp_path / "a.txt", f"{line}\n\n# not a comment here\n")
    whole, second = load_samples(file, tokenizer, 512)
    assert (whole.ids, whole.targets) == (ids[:-1], ids[1:])
    assert all(whole.loss_mask) and len(whole.loss_mask) == len(ids) - 1
    assert second.source == f"{file}:3"
    short = load_samples(file, tokenizer, 4)[0]
    assert (short.ids, short.targets) == (ids[:4], ids[1:5])
    # T = min(cap, len - 1) at the border
    assert load_samples(file, tokenizer, len(ids) - 1)[0].ids == ids[:-1]


def test_text_of_fewer_than_three_tokens_is_an_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"a\.txt:2: 1 token"):
        load_samples(write(tmp_path / "a.txt", "three tokens here\nhi\n"), tokenizer, 8)


@pytest.mark.parametrize("style", ["official", "training"])
def test_pairs_count_the_answer_and_its_end(tmp_path, tokenizer, style):
    file = write(tmp_path / "a.tsv", "prompt\ttarget\n# note\twith tab\n\n who are you \t I am Tiny. \n")
    (sample,) = load_samples(file, tokenizer, 512, style=style)
    prompt = render([{"role": "user", "content": "who are you"}], style)
    full = tokenizer.encode(prompt + "I am Tiny.<|im_end|>")
    assert (sample.ids, sample.targets) == (full[:-1], full[1:])
    first = len(tokenizer.encode(prompt)) - 1
    assert sample.loss_mask == [at >= first for at in range(len(full) - 1)]
    assert counted(sample, tokenizer) == "I am Tiny.<|im_end|>"
    assert sample.source == f"{file}:4"


def test_pairs_keep_the_end_of_a_long_sample(tmp_path, tokenizer):
    file = write(tmp_path / "a.tsv", "who are you\tI am Tiny.\n")
    full = load_samples(file, tokenizer, 512)[0]
    answer = sum(full.loss_mask)
    (cut,) = load_samples(file, tokenizer, answer + 2)
    assert cut.ids == full.ids[-(answer + 2) :] and sum(cut.loss_mask) == answer
    (tight,) = load_samples(file, tokenizer, 2)  # span clamped to the window
    assert tight.targets == full.targets[-2:] and tight.loss_mask == [True, True]


@pytest.mark.parametrize("line", ["no tab", "\tanswer only", "prompt only\t", "prompt\t  "])
def test_malformed_pair_names_file_and_line(tmp_path, tokenizer, line):
    with pytest.raises(UserError, match=r"a\.tsv:2: expected prompt<TAB>target"):
        load_samples(write(tmp_path / "a.tsv", f"a\tb\n{line}\n"), tokenizer, 8)


def test_header_counts_as_one_only_in_the_first_line(tmp_path, tokenizer):
    assert len(load_samples(write(tmp_path / "a.tsv", "a\tb\nprompt\ttarget\n"), tokenizer, 8)) == 2


def test_dialogue_counts_every_answer(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", json.dumps(DIALOGUE) + "\n")
    (sample,) = load_samples(file, tokenizer, 512)
    full = tokenizer.encode(render(DIALOGUE["messages"], add_generation_prompt=False))
    assert (sample.ids, sample.targets) == (full[:-1], full[1:])
    assert counted(sample, tokenizer) == "Hello!<|im_end|>I am Tiny.<|im_end|>"


def test_dialogue_without_an_answer_in_the_window_is_dropped_and_counted(tmp_path, tokenizer):
    messages = [*DIALOGUE["messages"], {"role": "user", "content": "thank you " * 20}]
    samples = load_samples(write(tmp_path / "a.jsonl", json.dumps({"messages": messages})), tokenizer, 8)
    assert (len(samples), samples.dropped, samples.cut) == (0, 1, 0)


@pytest.mark.parametrize("name", ["a.txt", "a.tsv"])
def test_samples_that_are_cut_are_counted(name, tmp_path, tokenizer):
    file = write(tmp_path / name, "who are you?\tI am Tiny.\nhi\tI am Tiny.\n")
    long, short = load_samples(file, tokenizer, 512)
    assert len(long) > len(short)
    for seq_len, cut in ((len(long), 0), (len(long) - 1, 1), (len(short) - 1, 2)):
        assert load_samples(file, tokenizer, seq_len).cut == cut


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected {"),
        ('{"messages": "x"}', "expected {"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "expected text"),
    ],
)
def test_malformed_dialogue_names_file_and_line(tmp_path, tokenizer, line, message):
    with pytest.raises(UserError, match=r"a\.jsonl:1: ") as caught:
        load_samples(write(tmp_path / "a.jsonl", line), tokenizer, 8)
    assert message in str(caught.value)


def test_directory_reads_data_files_in_order(tmp_path, tokenizer):
    write(tmp_path / "b.txt", "the second file here\n")
    write(tmp_path / "a.tsv", "a\tb\n")
    write(tmp_path / "README.md", "not data\n")
    sources = [s.source for s in load_samples(tmp_path, tokenizer, 16)]
    assert sources == [f"{tmp_path / 'a.tsv'}:1", f"{tmp_path / 'b.txt'}:1"]


def test_missing_empty_unknown(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"absent\.txt: no such file"):
        load_samples(tmp_path / "absent.txt", tokenizer, 8)
    with pytest.raises(UserError, match="no data files"):
        load_samples(tmp_path, tokenizer, 8)
    with pytest.raises(UserError, match=r"a\.tsv: no samples"):
        load_samples(write(tmp_path / "a.tsv", "# only a comment\n\n"), tokenizer, 8)
    with pytest.raises(UserError, match="unknown kind"):
        load_samples(write(tmp_path / "a.csv", "a,b\n"), tokenizer, 8)
    with pytest.raises(UserError, match="seq_len 0"):
        load_samples(tmp_path / "a.tsv", tokenizer, 0)
    with pytest.raises(UserError, match="'test': expected one of all, train, held_out"):
        load_samples(tmp_path / "a.tsv", tokenizer, 8, split="test")
    (tmp_path / "a.tsv").write_bytes(b"a\tb\nc\t\xff\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 6\)"):
        load_samples(tmp_path / "a.tsv", tokenizer, 8)


def test_line_separators_inside_text_and_windows_line_ends(tmp_path, tokenizer):
    file = tmp_path / "a.tsv"
    file.write_bytes("\ufeffa\tb\u2028c\r\nd\te\r\n".encode())
    samples = load_samples(file, tokenizer, 64)
    assert [counted(s, tokenizer) for s in samples] == ["b\u2028c<|im_end|>", "e<|im_end|>"]
    assert tokenizer.decode(samples[0].ids).startswith("<|im_start|>user\na<|im_end|>")


def test_split_is_a_partition_of_about_a_tenth(tokenizer):
    path = ROOT / "data" / "dialogues"
    by_split = {split: load_samples(path, tokenizer, 256, split=split) for split in ("all", "train", "held_out")}
    sources = {split: {s.source for s in samples} for split, samples in by_split.items()}
    assert sources["train"] | sources["held_out"] == sources["all"]
    assert not sources["train"] & sources["held_out"]
    assert 0.08 < len(sources["held_out"]) / len(sources["all"]) < 0.12
    assert all(samples.dropped == 0 for samples in by_split.values())


def test_held_out_is_pinned():
    """A changed rule would put trained dialogues into the held-out set of the shipped model."""
    picked = [n for n in range(100) if held_out({"messages": [{"role": "user", "content": str(n)}]})]
    assert picked == [5, 8, 11, 36, 39, 40, 47, 51, 57, 73, 78, 84, 97]
    assert not held_out(DIALOGUE)


def test_order(tokenizer):
    samples = load_samples(ROOT / "data" / "samples" / "train-inputs.txt", tokenizer, 32)
    assert ordered(samples, 1, "sequential") == list(samples)
    shuffled = ordered(samples, 1)
    assert shuffled == ordered(samples, 1) != list(samples)
    assert shuffled != ordered(samples, 2) and shuffled != ordered(samples, 1, epoch=1)
    assert sorted(s.source for s in shuffled) == sorted(s.source for s in samples)
    with pytest.raises(UserError, match="'sorted': expected one of random, sequential"):
        ordered(samples, 1, "sorted")
