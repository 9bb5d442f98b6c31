"""What we write, loaded by others; what others write, loaded here; and what they say of the same tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import floats, hf_folder, read_all, same_codes

from fp4lab.chat.generate import greedy
from fp4lab.chat.template import render
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.checkpoint import open_weights
from fp4lab.checkpoint.convert import convert, recipe_for
from fp4lab.checkpoint.export import Target
from fp4lab.checkpoint.public import COMPRESSED_TENSORS, MODELOPT, WEIGHT, declaration
from fp4lab.model.config import HEAD, Qwen3Config
from fp4lab.model.paths import bridge_model, noste_model
from fp4lab.model.store import build_store
from fp4lab.nvfp4 import PackedTensor, pack, unpack

SHIPPED = Path(__file__).parents[2] / "models/tiny"
IDS = torch.tensor([[4071, 12, 700, 4072, 33, 5, 6, 900]])

ct = pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")


def their_model(path: Path):
    """As anybody loads it, compressed-tensors' config found in config.json; its first forward decodes the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    assert model(IDS % model.config.vocab_size).logits.isfinite().all()
    return model


def same_in_fp32(model, config: dict):
    """transformers' model in fp32 with the weights that `model` has."""
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    plain.pop("dtype")
    copy = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**plain)).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(weights[name])
    return copy


def our_paths(path: Path):
    """A and C over the weights of `path`, in fp32."""
    weights = open_weights("hf", path)
    shape = Qwen3Config.from_json(path / "config.json")
    store = build_store(
        shape,
        set(weights.names()),
        weights.get,
        device="cpu",
        dtype=torch.float32,
        quantise=pack,
        keep_dense=False,
        source=str(path),
    )
    weights.close()
    return bridge_model(store, torch.float32), noste_model(store, torch.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped model as compressed-tensors."""
    out = tmp_path_factory.mktemp("oracle") / "ct"
    convert(SHIPPED / "model.dat", Target(out, "compressed-tensors"))
    return out


@torch.no_grad()
def test_transformers_gives_our_logits(exported):
    """Of the shipped model, exported: every linear and the head are decoded to the bits that we decode, so the logits in fp32
    differ by the order of sums alone; the tokenizer and its chat template load too."""
    theirs = their_model(exported)
    parameters = dict(theirs.named_parameters())
    packed = {n: v for n, v in read_all(exported).items() if isinstance(v, PackedTensor)}
    assert len(packed) == 43 and HEAD in packed
    for name, p in packed.items():
        assert torch.equal(parameters[name].float(), unpack(p)), name
    expected = same_in_fp32(theirs, json.loads((exported / "config.json").read_text()))(IDS).logits[0]
    for path in our_paths(exported):
        logits = path.logits(path.hidden(IDS))[0]
        assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-5), float((logits - expected).abs().max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def test_transformers_answers_as_we_do(exported):
    """Its template, its stop token, its greedy decoding, over the exported folder: our answers, word for word and ended."""
    theirs = same_in_fp32(their_model(exported), json.loads((exported / "config.json").read_text()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ours, path = Tokenizer.load(SHIPPED / "tokenizer.json"), our_paths(exported)[0]
    for prompt in ("你是誰", "談談UFO", "hi"):
        asked = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert ids["input_ids"][0].tolist() == ours.encode(render(asked))
        said = theirs.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert said == [*greedy(path, ours.encode(render(asked)), 48, {ours.im_end}, "cpu"), ours.im_end]


@torch.no_grad()
@pytest.mark.parametrize("rule", ["ct", "four_over_six"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_quantise(rule, tied, tmp_path):
    """Two-level scales, head kept: they decode in bfloat16 throughout, which is the whole difference."""
    hf = hf_folder(tmp_path / "hf", floats(tied=tied), tie_word_embeddings=tied)
    (hf / "generation_config.json").unlink()
    convert(hf, Target(tmp_path / "ct", "compressed-tensors"), recipe_for("compressed-tensors", rule=rule))
    model = their_model(tmp_path / "ct")
    parameters, checked = dict(model.named_parameters()), 0
    for name, p in read_all(tmp_path / "ct").items():
        if isinstance(p, PackedTensor):
            want = unpack(p)
            assert (parameters[name].float() - want).abs().max() <= want.abs().max() * 2**-7, name
            checked += 1
        else:
            assert torch.equal(parameters[name], p), name
    assert checked == 14 and (HEAD in parameters) is not tied


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that compressed-tensors itself quantised and wrote through transformers; and the floats of the start."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import NVFP4A16
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    folder = tmp_path_factory.mktemp("theirs")
    values = floats(tied=False)
    hf = hf_folder(folder / "hf", values, tie_word_embeddings=False)
    (hf / "generation_config.json").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    scheme = QuantizationScheme(**NVFP4A16, targets=["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="nvfp4-pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_global_scale"):
            w = module.weight.data
            module.weight_global_scale.data = generate_gparam(w.amin(), w.amax()).reshape(1)
            blocks = w.unflatten(-1, (-1, 16))
            scale, _ = calculate_qparams(
                blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=module.weight_global_scale.data
            )
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="nvfp4-pack-quantized")
    compressor.compress_model(model)
    out = folder / "out"
    out.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((hf / "config.json").read_text())
    compressor.update_config(str(out))
    return out, values


def test_what_compressed_tensors_writes_is_read_with_equal_codes(theirs):
    """Codes and block scales are what our rule `ct` gives with their global scale; all other tensors are the floats."""
    out, values = theirs
    got = read_all(out)
    assert got.keys() == values.keys()
    packed = 0
    for name, value in got.items():
        if isinstance(value, PackedTensor):
            ours = pack(values[name], "ct", "tensor", global_scale=value.global_scale)
            assert same_codes(value, ours) and value.divide, name
            packed += 1
        else:
            assert torch.equal(value, values[name])
    assert packed == 14


def test_what_compressed_tensors_writes_is_written_again(theirs, tmp_path):
    """To the byte, whatever its library put into header and config."""
    out, _ = theirs
    assert convert(out, Target(tmp_path / "again", "compressed-tensors")).same_files
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def without_negative_zeros(codes: torch.Tensor) -> torch.Tensor:
    low, high = codes & 15, codes >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


def test_their_compressor_round_trips_our_codes(exported):
    """Their decompress of our bytes, and their compress of that, give our bytes back, but that a -0 comes back as 0."""
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4A16

    scheme = QuantizationScheme(**NVFP4A16, targets=["Linear"])
    tensors = load_file(exported / "model.safetensors")
    modules = [k.removesuffix(".weight_packed") for k in tensors if k.endswith(".weight_packed")]
    assert len(modules) == 43
    for module in modules:
        ours = {k: tensors[f"{module}.{k}"] for k in ("weight_packed", "weight_scale", "weight_global_scale")}
        floats_ = NVFP4PackedCompressor.decompress(ours, scheme)
        again = NVFP4PackedCompressor.compress(floats_, scheme)
        assert torch.equal(again["weight_packed"], without_negative_zeros(ours["weight_packed"])), module
        assert torch.equal(again["weight_scale"].view(torch.uint8), ours["weight_scale"].view(torch.uint8)), module


def test_their_converter_maps_modelopt_as_we_do(tmp_path):
    """compressed-tensors' own ModelOpt converter on our ModelOpt file gives the tensors of our compressed-tensors file."""
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter

    hf = hf_folder(tmp_path / "hf")
    convert(hf, Target(tmp_path / "mo", "modelopt"), recipe_for("modelopt", rule="four_over_six"))
    convert(tmp_path / "mo", Target(tmp_path / "ct", "compressed-tensors"))
    converter = ModelOptNvfp4Converter(targets=[r"re:.*_proj$"])
    theirs = converter.process(load_file(tmp_path / "mo/model.safetensors"))
    ours = load_file(tmp_path / "ct/model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value.view(torch.uint8).flatten(), theirs[key].reshape(value.shape).view(torch.uint8).flatten()), key


@pytest.mark.parametrize("activations", [False, True])
def test_our_declaration_is_theirs(activations):
    """Parsed by compressed-tensors, it is its own preset NVFP4A16 (or NVFP4), written out."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16

    inline, own = declaration(COMPRESSED_TENSORS, ["lm_head"], activations)
    scheme = QuantizationScheme(**(NVFP4 if activations else NVFP4A16), targets=["Linear"], format="nvfp4-pack-quantized")
    preset = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="nvfp4-pack-quantized",
        quantization_status="compressed",
    )
    assert own is None and QuantizationConfig.model_validate(inline) == preset
    written = {k: v for k, v in json.loads(json.dumps(preset.to_dict(), default=str)).items() if k in inline}
    assert written == inline


def test_what_engines_ask_of_a_modelopt_file():
    """vLLM refuses a file without these keys (its ModelOptNvFp4Config), and takes `modelopt` for the name of the format."""
    for activations, algorithm in ((False, "W4A16_NVFP4"), (True, "NVFP4")):
        inline, own = declaration(MODELOPT, ["lm_head"], activations)
        assert own["quantization"].keys() == {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"}
        assert own["quantization"]["quant_algo"] == inline["quant_algo"] == algorithm
        assert own["producer"]["name"] == inline["quant_method"] == "modelopt"
        assert ("input_activations" in inline["config_groups"]["group_0"]) is activations


def test_modelopts_arithmetic():
    """Decoded as ModelOpt does: code * scale * scale_2 (NVFP4QTensor.dequantize), for what our rule writes."""
    x = torch.randn(16, 64) * 0.02
    p = pack(x, "nearest", "tensor")
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack((p.codes & 15, p.codes >> 4), -1).flatten(1).long()
    theirs = table[codes].unflatten(-1, (-1, 16)) * (p.block_scale.float() * p.global_scale).unsqueeze(-1)
    assert torch.equal(theirs.flatten(1), unpack(p)) and p.global_scale == x.abs().max() / (6 * 448)
    assert WEIGHT == ".weight"
