"""Files and folders under their name whole or not at all, with writers that are really killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp4lab.checkpoint.atomic import whole_file, whole_folder
from fp4lab.errors import UserError

WRITER = """
import sys, time
from pathlib import Path
from fp4lab.checkpoint.atomic import whole_file, whole_folder
kind, path, beats = sys.argv[1], sys.argv[2], int(sys.argv[3])
with (whole_file if kind == "file" else whole_folder)(path, overwrite=True) as part:
    for i in range(beats):
        with open(part if kind == "file" else part / f"{i}.bin", "ab") as f:
            f.write(b"new" * 1000)
        print(i, flush=True)
        time.sleep(0.01)
print("done", flush=True)
"""


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_killed_writer_leaves_the_name_as_it_was(kind, existing, tmp_path):
    """SIGKILL after some writes: old content or none under the name; the next writer clears what was left."""
    target = tmp_path / "out"
    if existing and kind == "file":
        target.write_bytes(b"old")
    elif existing:
        target.mkdir()
        (target / "a").write_bytes(b"old")
    child = subprocess.Popen([sys.executable, "-c", WRITER, kind, target, "1000"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while child.stdout.readline() != "3\n":
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(parts(tmp_path)) == 1, "what the killed one wrote"
    if not existing:
        assert not target.exists()
    elif kind == "file":
        assert target.read_bytes() == b"old"
    else:
        assert [p.name for p in target.iterdir()] == ["a"]
    done = subprocess.run([sys.executable, "-c", WRITER, kind, target, "2"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("done\n") and parts(tmp_path) == []
    if kind == "file":
        assert target.read_bytes() == b"new" * 2000
    else:
        assert sorted(p.name for p in target.iterdir()) == ["0.bin", "1.bin"]


def test_the_part_of_a_living_writer_is_left_alone(tmp_path):
    with whole_file(tmp_path / "out") as part:
        part.write_bytes(b"first")
        with whole_file(tmp_path / "out") as other:
            other.write_bytes(b"second")
        assert part.exists() and (tmp_path / "out").read_bytes() == b"second"
    assert (tmp_path / "out").read_bytes() == b"first"
    with whole_folder(tmp_path / "dir") as part, whole_folder(tmp_path / "dir2"):
        assert part.exists()
    assert parts(tmp_path) == []


@pytest.mark.parametrize("what", [whole_file, whole_folder])
def test_an_error_leaves_nothing(what, tmp_path):
    with pytest.raises(RuntimeError), what(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_unless_allowed(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/a").write_text("old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dir", "link"):
        for what in (whole_file, whole_folder):
            with pytest.raises(UserError, match=f"{name} exists already"), what(tmp_path / name, overwrite=False):
                pass
    with pytest.raises(UserError, match="does not exist; create it first"), whole_file(tmp_path / "no/such/file"):
        pass
    with whole_folder(tmp_path / "empty") as part:
        (part / "b").write_text("new")
    assert (tmp_path / "empty/b").read_text() == "new"
    with whole_folder(tmp_path / "dir", overwrite=True) as part:
        (part / "b").write_text("new")
    assert [p.name for p in (tmp_path / "dir").iterdir()] == ["b"]
    assert parts(tmp_path) == []


def test_names_that_are_patterns(tmp_path):
    """`*` and `[` in a name are themselves: the parts of other names are not touched."""
    other = tmp_path / ".ab.x.part"
    other.write_text("of another")
    with whole_file(tmp_path / "a*") as part:
        part.write_text("1")
    with whole_file(tmp_path / "[ab]") as part:
        part.write_text("2")
    assert other.exists() and (tmp_path / "a*").read_text() == "1"


def test_the_name_is_never_gone(tmp_path):
    """A reader that looks all the time while a folder is replaced again and again always finds one."""
    target = tmp_path / "out"
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom fp4lab.checkpoint.atomic import whole_folder\n"
            "for i in range(200):\n"
            "    with whole_folder(sys.argv[1], overwrite=True) as part:\n"
            "        [(part / n).write_text(str(i)) for n in 'ab']\n"
            "    print(i, flush=True)\n",
            target,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    looks = 0
    deadline = time.monotonic() + 60
    while writer.poll() is None and time.monotonic() < deadline:
        os.close(os.open(target, os.O_RDONLY))  # fails when there is a moment without the name
        looks += 1
    assert writer.wait() == 0 and looks > 100
