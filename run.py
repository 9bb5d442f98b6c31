"""The door: one run, or a grid of them.

python run.py                                             the shipped model, one optimizer step
python run.py -m step.chunk_rows=16,32,64 seq_len=8,32    six runs and a table
python run.py +experiment=pretrain_tiny                   the shipped model from scratch

Keys, types and meanings: src/fp4lab/config.py; choices: conf/.
"""

import sys

import hydra

from fp4lab import config, launch
from fp4lab.events import STATUSES

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg) -> float | None:
    return launch.job(cfg)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as e:  # the run under way is recorded as interrupted
        print(f"\ninterrupted {e}".rstrip(), file=sys.stderr)
        sys.exit(STATUSES["interrupted"])
    sys.exit(launch.exit_code())
