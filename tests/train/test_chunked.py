"""step=chunked where codes are all that is kept of a linear: no float of its size exists, and nothing is missing."""

import pytest
import torch
from oracle import SHAPES, hf_model, shape_of, store_of, weights_of

from fp4lab.model.paths import fp2_model, valueless
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.loss import cross_entropy

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))


def trained(name: str, codes_alone: bool, steps: int = 4, **options):
    store = store_of(shape_of(name), weights_of(hf_model(name)), torch.float32, keep_dense=False)
    model = fp2_model(store, torch.float32, torch.float32, codes_alone=codes_alone)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adamw = ChunkedAdamW(parameters, store.packed, AdamWOptions(chunk_rows=5, **options))
    losses = []
    for _ in range(steps):
        loss = cross_entropy(model, model.hidden(IDS[:, :-1]), IDS[:, 1:])
        losses.append(loss.item())
        loss.backward()
        adamw.step(1e-2)
    return losses, adamw, parameters


@pytest.mark.parametrize("master", ["packed", "packed_stochastic"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_codes_alone_train_the_same_bits(name, master):
    losses, ours, parameters = trained(name, True, master=master)
    expected, theirs, whole = trained(name, False, master=master)
    assert losses == expected and losses[-1] < losses[0]
    for n, image in theirs.stored().items():
        assert all(torch.equal(x, y) for x, y in zip(image.tensors(), ours.stored()[n].tensors(), strict=True)), n
    for n, p in parameters.items():
        assert valueless(p) == (n in ours.stored()), n
        assert p.shape == whole[n].shape and (valueless(p) or torch.equal(p, whole[n]))
    held = sum(p.untyped_storage().nbytes() for n, p in parameters.items() if n in ours.stored())
    assert held == 4 * len(ours.stored())


def test_the_records_say_which_path_updates():
    _, adamw, _ = trained(next(iter(SHAPES)), True, steps=1, kernels=False)
    assert adamw.describe() == "updates are plain torch operations: step.kernels=false"
    _, adamw, _ = trained(next(iter(SHAPES)), True, steps=1, kernels=True)
    if not torch.cuda.is_available():
        assert adamw.describe() == "updates are plain torch operations: the device is no GPU with Triton"
