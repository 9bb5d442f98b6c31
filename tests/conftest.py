"""Shared pieces: a composed config, and torch held to one thread so that parallel tests do not fight."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def compose(monkeypatch):
    """compose("step=dense", ...) -> the plain config dict that a worker gets, as run.py would compose it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from fp4lab import config

    monkeypatch.chdir(ROOT)
    config.register()

    def make(*overrides: str) -> dict:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return {**config.to_dict(hydra_compose("config", overrides=list(overrides))), "overrides": list(overrides)}

    return make
