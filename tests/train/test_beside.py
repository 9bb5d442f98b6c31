"""Without a GPU there are no streams, and work is done where it is asked for. tests/gpu/test_beside.py has the rest."""

import torch

from fp4lab.train.beside import Beside


def test_on_a_cpu_work_is_done_at_once():
    beside, done = Beside(torch.device("cpu"), 2), []
    assert len(beside) == 0
    beside.run(lambda: done.append(1), torch.zeros(3))
    assert done == [1]
    beside.join()
