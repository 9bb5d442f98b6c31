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
        (["--to", "modelopt", "--rule", "fast"], "rule 'fast': expected one of ct, torchao, native, nearest, four_over_six"),
        (["--to", "modelopt", "--rule", "ct", "--levels", "tensor"], "--rule ct and --levels tensor: nothing of"),
        (["--to", "modelopt", "--ignore", "*.layer.0.*"], "'*.layer.0.*': no module is called so; expected a name"),
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
    assert code == 2 and err.startswith(f"fp4lab: {tmp_path}/no.dat: no such file or folder")


def test_one_file_of_a_folder_is_not_taken_for_a_dat_file(fp4lab, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    code, _, err = fp4lab("convert", tmp_path / "model.safetensors", tmp_path / "out", "--to", "dat")
    assert code == 2 and "model.safetensors: one file of a Hugging Face folder; give the folder" in err


def test_what_exists_names_the_option(fp4lab, tmp_path):
    (tmp_path / "out.dat").touch()
    code, _, err = fp4lab("export", SHIPPED, tmp_path / "out.dat", "--to", "dat")
    assert code == 2 and "--overwrite" in err
    assert fp4lab("export", SHIPPED, tmp_path / "out.dat", "--to", "dat", "--overwrite")[0] == 0


@pytest.mark.parametrize("form", ["dat", "modelopt"])
def test_files_are_held_against_their_manifest(form, fp4lab, tmp_path):
    out = tmp_path / "out"
    assert fp4lab("inspect", tmp_path, "--verify")[0] == 2
    assert fp4lab("export", SHIPPED, out, "--to", form)[0] == 0
    code, said, _ = fp4lab("inspect", out, "--verify")
    assert code == 0 and said.endswith("every file is as it was written\n")
    file = out if form == "dat" else out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, said, _ = fp4lab("inspect", out, "--verify")
    assert code == 1 and f"{file.name} has another SHA-256" in said and "1 files differ" in said
    manifest = out / "fp4lab_manifest.json" if form == "modelopt" else tmp_path / "out.manifest.json"
    for text in ("{}", '{"files": {"x": 1}}', "no json"):
        manifest.write_text(text)
        code, _, err = fp4lab("inspect", out, "--verify")
        assert code == 2 and str(manifest) in err


def test_progress_where_no_terminal_shows_a_bar(fp4lab, monkeypatch, tmp_path):
    """Lines, the first after PROGRESS_S; a log of a long conversion is not silent."""
    monkeypatch.setattr(cli, "PROGRESS_S", 0.0)
    code, _, err = fp4lab("export", SHIPPED, tmp_path / "out", "--to", "modelopt")
    assert code == 0 and err.splitlines()[-1].startswith("100% of 6 MiB: lm_head")
    assert fp4lab("export", SHIPPED, tmp_path / "again", "--to", "modelopt", "--quiet")[2] == ""
