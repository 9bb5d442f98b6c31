"""`fp4lab convert`, `export` and `import`, as typed."""

import sys
from pathlib import Path

import pytest

from fp4lab import cli
from fp4lab.checkpoint import open_weights

SHIPPED = Path(__file__).parents[1] / "models/tiny/model.dat"


@pytest.fixture
def fp4lab(monkeypatch, capsys):
    """fp4lab("convert", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.setattr("fp4lab.checkpoint.convert.return_freed_memory", lambda: None)  # it is for the whole process

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fp4lab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_there_and_back(fp4lab, tmp_path):
    """The shipped file to ModelOpt, and imported again: the same bytes. Files are listed with the start of their SHA-256."""
    code, out, err = fp4lab("export", SHIPPED, tmp_path / "mo", "--to", "modelopt")
    assert (code, err) == (0, "")
    assert [line.split()[-1].rpartition("/")[2] for line in out.splitlines()] == [
        *("config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    code, out, _ = fp4lab("import", tmp_path / "mo", tmp_path / "back.dat")
    assert code == 0 and out.startswith("f30dae32880c") and (tmp_path / "back.dat").read_bytes() == SHIPPED.read_bytes()


def test_convert_quantises_and_reports(fp4lab, tmp_path):
    assert fp4lab("export", SHIPPED, tmp_path / "hf", "--to", "hf")[0] == 0
    code, out, err = fp4lab(
        *("convert", tmp_path / "hf", tmp_path / "ct", "--to", "compressed-tensors"),
        *("--rule", "four_over_six", "--ignore", "*.layers.0.*", "--ignore", "*.v_proj"),
    )
    assert (code, err) == (0, "")
    kinds = {line.split()[0]: line.split()[1] for line in out.splitlines() if "_proj" in line.split()[0]}
    assert kinds == dict.fromkeys(("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj"), "5")
    assert "worst of 30:" in out
    weights = open_weights("hf", tmp_path / "ct")
    assert sum(weights.info(n).dtype is None for n in weights.names()) == 30
    weights.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "gguf"], "format 'gguf': expected one of dat, hf"),
        (["--to", "modelopt", "--rule", "fast"], "rule 'fast': expected one of"),
        (["--to", "hf", "--rule", "ct"], "--to hf writes floats"),
        (["--to", "modelopt", "--scales", "float16"], "scales 'float16' are of .dat files"),
        (["--to", "modelopt", "--config", "/nowhere"], "/nowhere: no config.json in it"),
    ],
)
def test_a_wrong_choice_is_one_line(fp4lab, arguments, says, tmp_path):
    code, out, err = fp4lab("convert", SHIPPED, tmp_path / "out", *arguments)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there(fp4lab, tmp_path):
    code, _, err = fp4lab("convert", tmp_path / "no.dat", tmp_path / "out", "--to", "hf")
    assert code == 2 and "no.dat: no such file or folder" in err
