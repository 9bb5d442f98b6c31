"""Recorded cgroup folders."""

import pytest

from fp4lab.telemetry.cgroup import cgroup_oom_kills, kernel_oom_kills, levels, limited, usage

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path):
    """/top/job: the job has no limit of its own, its parent 100 MiB."""
    for name, held, most in (("top", 60, str(100 * MIB)), ("top/job", 50, "max")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "memory.current").write_text(f"{held * MIB}\n")
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (tmp_path / "self").write_text("0::/top/job\n")
    return levels(tmp_path, tmp_path / "self")


def test_the_limit_may_lie_above(chain):
    assert [p.name for p in chain] == ["job", "top"] and [p.name for p in limited(chain)] == ["top"]
    assert usage(chain) == (60, 100)
    (chain[0] / "memory.max").write_text(f"{55 * MIB}")
    assert usage(chain) == (50, 55)  # nearer to its limit


def test_max_is_no_limit(chain):
    (chain[1] / "memory.max").write_text("max\n")
    assert limited(chain) == [] and usage(chain) == (50, None)


def test_oom_kills(chain, tmp_path):
    assert cgroup_oom_kills(chain) == 2
    (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 7\n")
    assert kernel_oom_kills(tmp_path / "vmstat") == 7
    assert kernel_oom_kills(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["", "4:memory:/job\n", "0::/nowhere\n"])
def test_version_1_or_none_is_unknown(tmp_path, text):
    (tmp_path / "self").write_text(text)
    chain = levels(tmp_path, tmp_path / "self")
    assert chain == [] and usage(chain) == (None, None) and cgroup_oom_kills(chain) is None
    assert levels(tmp_path, tmp_path / "absent") == []
