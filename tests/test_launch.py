"""What a sweep leaves with when its runs were another process's."""

import os
import time

from omegaconf import OmegaConf

from fp4lab import launch
from fp4lab.events import STATUSES
from fp4lab.supervise.run import refused


def test_codes_of_runs_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_codes", [])
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    plain = {"task": {"name": "step"}, "guard": {}}
    (tmp_path / "0").mkdir()
    refused(plain, tmp_path / "0", [], {}, "an earlier sweep's")
    os.utime(tmp_path / "0" / "result.json", (time.time() - 60,) * 2)
    callback = launch.CodesFromElsewhere()
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)
    assert launch.exit_code() == 0
    (tmp_path / "1").mkdir()
    refused(plain, tmp_path / "1", [], {}, "this one's")
    callback.on_multirun_end(config)
    assert launch.exit_code() == STATUSES["failed"] == 1


def test_codes_of_our_own_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_codes", [0, 124, 0])
    callback = launch.CodesFromElsewhere()
    callback.on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert launch.exit_code() == 124
