"""Quantising a checkpoint as it is read: what is chosen, shared scales, the report of errors, memory."""

import subprocess
import sys

import pytest
import torch
from small import floats, hf_folder

from fp4lab.checkpoint.convert import RECIPES, recipe_for
from fp4lab.checkpoint.quantise import Quantised, Recipe, TensorError
from fp4lab.checkpoint.weights import MemoryWeights
from fp4lab.errors import UserError
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.nvfp4 import PackedTensor, pack, scale_of_amax, unpack

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["self_attn.o_proj"],
    ["mlp.down_proj"],
]


@pytest.mark.parametrize("rule", ["ct", "nearest", "torchao", "four_over_six"])
@pytest.mark.parametrize("divide", [True, False])
def test_one_second_level_a_group(rule, divide):
    """Of the group's largest magnitude, whichever member is read first; codes are the codec's with that scale."""
    values = floats()
    q = Quantised(MemoryWeights(values), Recipe(rule), divide)
    for i in (1, 0):
        for group in GROUPS:
            names = [f"model.layers.{i}.{m}.weight" for m in group]
            amax = max(values[n].abs().max().float() for n in names)
            want = scale_of_amax(amax, rule, divide or rule == "ct")
            for name in reversed(names):
                got = q.get(name)
                assert torch.equal(got.global_scale, want), name
                assert got.divide is (divide or rule == "ct")
                again = pack(values[name], rule, "tensor", global_scale=want, divide=got.divide)
                assert torch.equal(got.codes, again.codes)
                assert (
                    q.info(name).levels == got.levels and q.info(name).divide == got.divide and q.info(name).shape == got.shape
                )


def test_what_is_chosen():
    """Projections; not the embedding, norms, the head, or what is ignored."""
    values = floats(tied=False)
    q = Quantised(MemoryWeights(values), Recipe(ignore=("model.layers.0.*", "*.down_proj")), False)
    packed = {n for n in q.names() if isinstance(q.get(n), PackedTensor)}
    assert packed == q.chosen == {f"model.layers.1.{m}.weight" for g in GROUPS[:3] for m in g}
    assert q.names() == list(values)
    assert all(q.info(n).dtype is None for n in packed) and q.info(EMBEDDING).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_the_head(tied):
    """keep: as it is. nvfp4: packed, from the embedding where it is tied. A packed one can be made floats."""
    values = floats(tied=tied)
    assert (HEAD in Quantised(MemoryWeights(values), Recipe(), False).names()) is not tied
    q = Quantised(MemoryWeights(values), Recipe(head="nvfp4"), False)
    got = q.get(HEAD)
    assert isinstance(got, PackedTensor) and torch.equal(
        got.codes, pack(values[EMBEDDING if tied else HEAD], "nearest", "tensor").codes
    )
    assert isinstance(q.get(EMBEDDING), torch.Tensor)
    packed = Quantised(MemoryWeights({**values, HEAD: got}), Recipe(head="float"), False)
    assert packed.info(HEAD).dtype == torch.bfloat16 and torch.equal(packed.get(HEAD), unpack(got, torch.bfloat16))


def test_what_is_packed_is_never_packed_again():
    name = "model.layers.0.mlp.down_proj.weight"
    p = pack(torch.randn(32, 64), "native")
    errors: list[TensorError] = []
    q = Quantised(MemoryWeights({name: p, HEAD: p}), Recipe("four_over_six", head="nvfp4"), True, errors.append)
    assert q.get(name) is p and q.get(HEAD) is p and errors == []


def test_the_errors():
    values = {"a.x_proj.weight": torch.randn(3000, 32), "b.x_proj.weight": torch.zeros(2, 16)}
    errors: list[TensorError] = []
    q = Quantised(MemoryWeights(values), Recipe(), False, errors.append)
    for name, x in values.items():
        lost = unpack(q.get(name)) - x
        e = errors[-1]
        assert (e.name, e.shape) == (name, tuple(x.shape))
        assert e.relative_error == pytest.approx(float(lost.norm() / x.norm()) if x.any() else 0.0, rel=1e-4)
        assert e.max_abs_error == float(lost.abs().max())
    assert 0.08 < errors[0].relative_error < 0.11


def test_four_over_six_errs_less():
    values = floats()
    sums = {}
    for rule in ("ct", "nearest", "four_over_six"):
        errors: list[TensorError] = []
        q = Quantised(MemoryWeights(values), Recipe(rule), False, errors.append)
        for name in q.chosen:
            q.get(name)
        sums[rule] = sum(e.relative_error for e in errors) / len(errors)
    assert sums["four_over_six"] < 0.95 * min(sums["ct"], sums["nearest"]), sums


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"rule": "fast"}, "rule 'fast': expected one of ct, torchao"),
        ({"levels": "two"}, "levels 'two': expected one of single, tensor, row"),
        ({"head": "fp8"}, "head 'fp8': expected one of keep, nvfp4, float"),
        ({"rule": "stochastic"}, "is for training"),
        ({"rule": "ct", "levels": "single"}, "'ct' always has a second-level scale"),
        ({"rule": "native", "levels": "tensor"}, "'native' has no second-level scale"),
        ({"levels": "row"}, "one second-level scale a tensor"),
    ],
)
def test_choices_that_do_not_exist_or_fit(choices, says):
    with pytest.raises(UserError, match=says):
        recipe_for("modelopt", **choices)


def test_the_recipes_of_the_formats():
    assert recipe_for("dat") == RECIPES["dat"] == Recipe("torchao", "single", head="nvfp4")
    assert recipe_for("dat", rule="ct").levels == "tensor" and recipe_for("modelopt", rule="native").levels == "single"
    assert recipe_for("compressed-tensors", levels="single").rule == "nearest"
    with pytest.raises(UserError, match="format 'hf' holds floats"):
        recipe_for("hf")


def test_what_is_ignored():
    """The head too, as other tools' recipes name it. A pattern of nothing is a slip: what it meant to keep would be packed."""
    weights = MemoryWeights(floats())
    kept = Quantised(weights, recipe_for("dat", ignore=("lm_head", "*.layers.1.*")), False)
    assert HEAD not in kept.names() and {n.split(".")[2] for n in kept.chosen} == {"0"}
    assert Quantised(weights, recipe_for("modelopt", ignore=("lm_head",)), False).chosen == set(
        Quantised(weights, recipe_for("modelopt"), False).chosen
    )
    with pytest.raises(UserError, match=r"ignore 'layers.0': no module is called so; expected .* model\.layers\.0\."):
        Quantised(weights, recipe_for("dat", ignore=("*_proj", "layers.0")), False)


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(UserError, match=r"a.x_proj.weight \[4, 20\]: rows are not whole blocks of 16; add --ignore 'a.x_proj'"):
        Quantised(MemoryWeights({"a.x_proj.weight": torch.randn(4, 20)}), Recipe(), False)


PEAK = """
import sys, threading, time
from pathlib import Path
from fp4lab.checkpoint.convert import convert, recipe_for, return_freed_memory
from fp4lab.checkpoint.export import Target
import torch
return_freed_memory()
torch.set_num_threads(1)
form, *sources = sys.argv[1:]
for source in sources:
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    seen, stop = [], threading.Event()
    def watch():
        while not stop.is_set():
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    convert(Path(source), Target(Path(source + "_out"), form), recipe_for(form, head="keep"))
    stop.set()
    thread.join()
    print(max(seen), before)
"""


def test_memory_is_not_that_of_the_model(tmp_path):
    """Six times the layers, 120 MiB more of tensors of 8 MiB: the process' peak grows by less than two of them."""
    sources = []
    for layers in (1, 6):
        values = {EMBEDDING: torch.randn(64, 2048).bfloat16()}
        one = torch.randn(2048, 2048).bfloat16()
        values |= {
            f"model.layers.{i}.mlp.{m}.weight": one.clone()
            for i in range(layers)
            for m in ("gate_proj", "up_proj", "down_proj")
        }
        sources.append(hf_folder(tmp_path / f"hf{layers}", values))
    (small, _), (large, _) = peaks("modelopt", *sources)
    assert large < small + 16, (small, large)


def test_memory_is_that_of_one_tensor(tmp_path):
    """bf16 to the .dat format's fp16 makes no second copy of the largest tensor, the embedding."""
    embedding = torch.randn(16384, 2048).bfloat16()  # 64 MiB
    one = {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 2048).bfloat16()}
    warm = hf_folder(tmp_path / "warm", {EMBEDDING: embedding[:64].clone(), **one})
    source = hf_folder(tmp_path / "hf", {EMBEDDING: embedding, **one})
    _, (peak, before) = peaks("dat", warm, source)
    assert peak - before < 1.6 * 64, (before, peak)


def peaks(form, *sources) -> list[tuple[float, float]]:
    """Of one process that converts them one after another: resident MiB at the highest, and before each."""
    done = subprocess.run([sys.executable, "-c", PEAK, form, *sources], capture_output=True, text=True, check=True)
    return [(int(a) / 2**20, int(b) / 2**20) for a, b in (line.split() for line in done.stdout.splitlines())]
