"""What a run says it was made of."""

import subprocess

import pytest

from fp4lab.supervise.manifest import DIFF_BYTES, manifest, run_id


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one committed file, as the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], check=True, capture_output=True)
    return tmp_path


def made_of() -> dict:
    manifest.cache_clear()
    try:
        return manifest()
    finally:
        manifest.cache_clear()


def test_a_clean_tree(repository):
    found = made_of()
    assert len(found["git_commit"]) == 40 and found["git_dirty"] is False and found["git_diff"] == ""
    assert found["versions"]["torch"] and found["host"]["cores"] >= 1


def test_uncommitted_changes_can_be_applied_again(repository):
    (repository / "a.txt").write_text("two: 你\n")
    found = made_of()
    assert found["git_dirty"] is True and "+two: 你" in found["git_diff"]
    subprocess.run(["git", "checkout", "-q", "a.txt"], check=True)
    subprocess.run(["git", "apply"], input=found["git_diff"].encode(), check=True)
    assert (repository / "a.txt").read_text() == "two: 你\n"


def test_large_changes_are_cut_and_say_so(repository):
    (repository / "a.txt").write_text("你" * DIFF_BYTES)
    diff = made_of()["git_diff"]
    assert len(diff.encode()) < DIFF_BYTES + 100 and diff.endswith("bytes in all]")


def test_no_repository_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = made_of()
    assert (found["git_commit"], found["git_dirty"], found["git_diff"]) == (None, None, None)


def test_an_agents_id_is_taken_once(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen1")
    ids = [run_id() for _ in range(3)]
    assert ids[0] == "chosen1" and len(set(ids)) == 3
