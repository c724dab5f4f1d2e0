"""lora.py: expected values come from transformers, peft and formulas; checkpoints are tiny and random."""

import json
import math
import re
import shutil
import weakref
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import lora

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
             pad_token_id=None, tie_word_embeddings=False)
GROUPED = SIZES | dict(num_key_value_heads=2)
T5_SIZES = dict(vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
                pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
CONFIGS = {
    "mistral": ("Mistral", GROUPED),
    "llama": ("Llama", SIZES),
    "llama_tied": ("Llama", SIZES | dict(tie_word_embeddings=True)),
    "phi": ("Phi", SIZES),
    "neox": ("GPTNeoX", SIZES),
    "t5": ("T5", T5_SIZES | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5_tied": ("T5", T5_SIZES),
    "gemma": ("Gemma", GROUPED | dict(head_dim=16, tie_word_embeddings=True)),
}
DECODERS = ["mistral", "llama", "phi", "neox"]
ALL = [*DECODERS, "t5"]
N_LABELS = 5


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Writes a checkpoint once and returns its directory: of the whole LM or of the bare backbone."""
    made = {}

    def write(name, sharded=False, bare=False):
        if (name, sharded, bare) not in made:
            torch.manual_seed(0)
            family, sizes = CONFIGS[name]
            config = getattr(transformers, f"{family}Config")(**sizes)
            kind = "Model" if bare else "ForConditionalGeneration" if family == "T5" else "ForCausalLM"
            model = getattr(transformers, family + kind)(config)
            for parameter in model.parameters():  # biases and norms are not 0 and 1
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
            if name == "t5":  # transformers 5 ties it whatever the config says
                if not bare:
                    model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 64) * 0.1)
                config.tie_word_embeddings = False
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory, max_shard_size="60KB" if sharded else "5GB")
            made[name, sharded, bare] = str(directory)
        return made[name, sharded, bare]

    return write


def auto_lm(name):
    return AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM


def reference(directory, auto, **options):
    """transformers' own model, in fp32."""
    return auto.from_pretrained(directory, dtype=torch.float32, **options).eval()


def ours(directory, family="cls", quantize="none", dtype=torch.float32, **options):
    """Our model with LoRA layers whose B is not 0, dropout off unless asked for."""
    torch.manual_seed(1)
    model = lora.build_model(directory, family, N_LABELS, quantize, dtype)
    model.last_layer_trains = options.pop("last_layer_trains", model.last_layer_trains)
    lora.add_lora(model, **(dict(r=4, lora_alpha=8, lora_dropout=0.0) | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    return model


def some_rows(lengths=(9, 13, 6), end=None, seed=3):
    """Right-padded (input_ids, lengths), the pad being any token at all; rows end with `end`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    ids = torch.randint(3, 320, (len(lengths), int(lengths.max())), generator=generator)
    if end is not None:
        ids[torch.arange(len(ids)), lengths - 1] = end
    return ids, lengths


def lm_logits(model, name, ids):
    inputs = {"decoder_input_ids": ids} if name.startswith("t5") else {}
    return model(input_ids=ids, **inputs).logits


def assert_close(found, expected, tolerance=1e-5):
    """The largest difference, relative to the largest expected value, is below the tolerance."""
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    assert difference < tolerance, f"max difference {difference:.2e}"


# ---- The loader ----


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", [*ALL, "llama_tied", "t5_tied"])
@torch.no_grad()
def test_logits_of_the_loaded_model_equal_from_pretrained(checkpoint_of, name, sharded):
    """Tolerance 1e-5 in fp32. GPT-NeoX's head is embed_out on disk; T5's may be separate or the embedding."""
    directory = checkpoint_of(name, sharded)
    stored = set().union(*(load_file(path) for path in Path(directory).glob("*.safetensors")))
    assert (len(list(Path(directory).glob("*.safetensors"))) > 1) == sharded
    assert (name == "neox") == ("embed_out.weight" in stored)
    assert name.endswith("_tied") != bool({"embed_out.weight", "lm_head.weight"} & stored)
    ids = some_rows((9, 9))[0]
    expected = lm_logits(reference(directory, auto_lm(name)), name, ids)
    assert_close(lm_logits(lora.load_base(directory, "lm", "none"), name, ids), expected)
    backbone, states = lora.load_base(directory, "cls", "none"), reference(directory, AutoModel)
    inputs = {"decoder_input_ids": ids} if name.startswith("t5") else {}
    assert_close(backbone(input_ids=ids, **inputs)[0], states(input_ids=ids, **inputs)[0])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_checkpoint_of_the_bare_backbone_loads_for_cls_and_is_refused_for_lm(checkpoint_of, name):
    directory = checkpoint_of(name, bare=True)
    ids = some_rows((9, 9))[0]
    inputs = {"decoder_input_ids": ids} if name.startswith("t5") else {}
    expected = reference(directory, AutoModel)(input_ids=ids, **inputs)[0]
    assert_close(lora.load_base(directory, "cls", "none")(input_ids=ids, **inputs)[0], expected)
    if name != "t5":  # whose head may be the embedding
        with pytest.raises(ValueError, match="lacks . tensors, such as lm_head."):
            lora.load_base(directory, "lm", "none")


@pytest.mark.parametrize("family, sizes", [
    ("Qwen2", GROUPED), ("Gemma", GROUPED | dict(head_dim=16)), ("Gemma2", GROUPED | dict(head_dim=16)),
    ("StableLm", GROUPED), ("Falcon", SIZES), ("OPT", SIZES), ("Bloom", SIZES)])
@torch.no_grad()
def test_other_decoders_load_too(tmp_path, family, sizes):
    """Each computes some buffers instead of storing them. Tolerance 1e-5."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    ids = some_rows((9, 9))[0]
    expected = lm_logits(reference(tmp_path, AutoModelForCausalLM), "", ids)
    assert_close(lm_logits(lora.load_base(str(tmp_path), "query", "none"), "", ids), expected)


def rewrite(directory, target, change):
    """A copy of a single-file checkpoint whose tensors went through change(tensors)."""
    target.mkdir(exist_ok=True)
    tensors = load_file(f"{directory}/model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(Path(directory, "config.json").read_text())
    return str(target)


@pytest.mark.parametrize("name, stale", [
    ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}),
    ("neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
              "gpt_neox.layers.1.attention.bias": (1, 1, 8, 8),
              "gpt_neox.layers.1.attention.masked_bias": ()}),
    ("t5", {"encoder.embed_tokens.weight": (320, 64), "decoder.embed_tokens.weight": (320, 64),
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)}),
])
@torch.no_grad()
def test_buffers_that_older_checkpoints_hold_are_ignored(checkpoint_of, tmp_path, name, stale):
    def add(tensors):
        tensors.update({key: torch.full(shape, 7.0) for key, shape in stale.items()})

    directory, ids = checkpoint_of(name), some_rows((9, 9))[0]
    expected = lm_logits(lora.load_base(directory, "lm", "none"), name, ids)
    changed = lora.load_base(rewrite(directory, tmp_path / "old", add), "lm", "none")
    assert torch.equal(lm_logits(changed, name, ids), expected)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_nf4_logits_equal_those_of_the_dequantized_weights(checkpoint_of, name):
    """[nf4.6] The head stays in full precision. Tolerance 1e-5 in fp32."""
    directory, ids = checkpoint_of(name, sharded=True), some_rows((9, 9))[0]
    quantized, plain = lora.load_base(directory, "lm", "nf4"), reference(directory, auto_lm(name))
    layers = {key: m for key, m in quantized.named_modules() if isinstance(m, lora.NF4Linear)}
    linear = {key for key, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers.keys() == linear - {"lm_head"}
    for key, module in layers.items():
        plain.get_submodule(key).weight.copy_(module.dequantize())
    assert_close(lm_logits(quantized, name, ids), lm_logits(plain, name, ids))
    for rows in (ids[:1], ids[:1, :1]):  # bitsandbytes has another kernel for one token
        assert_close(lm_logits(quantized, name, rows), lm_logits(plain, name, rows))


def test_a_dequantized_weight_is_its_nf4_code_times_its_twice_quantized_scale():
    """[nf4.5] The 16 values are those of QLoRA's appendix E; scales are within 1/127 of a block's largest."""
    nf4 = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0])
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    module = lora.NF4Linear(weight, None, "cpu")
    assert module.packed.numel() == weight.numel() // 2 and module.packed.dtype == torch.uint8
    codes = torch.stack([module.packed.flatten() >> 4, module.packed.flatten() & 15], 1).view(-1, 64).long()
    blocks, found = weight.view(-1, 64), module.dequantize().view(-1, 64)
    exact = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(codes, (blocks[:, :, None] / exact[:, :, None] - nf4).abs().argmin(-1))
    scale = (found * nf4[codes]).sum(1) / (nf4[codes] ** 2).sum(1)
    assert_close(found, nf4[codes] * scale[:, None], 1e-6)
    assert module.state.nested and ((scale - exact[:, 0]).abs() < exact[:, 0] / 127 + 1e-3).all()


@pytest.mark.parametrize("name", ["phi", "t5"])
def test_nf4_works_in_bf16_forward_and_backward(checkpoint_of, name):
    """Biases have the compute dtype too. T5 asks its wo for the dtype of its weight, to cast to."""
    ids, lengths = some_rows(end=1)
    model = ours(checkpoint_of(name), quantize="nf4", dtype=torch.bfloat16)
    model(ids, lengths).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    kinds = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}


def spoil(what, directory, target):
    """A damaged copy of a checkpoint."""
    if what == "extra":
        more = {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}
        return rewrite(directory, target, lambda t: t.update(more))
    if what == "missing":
        return rewrite(directory, target, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    rewrite(directory, target, lambda t: None)
    path = target / "model.safetensors"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "shard":
        path.unlink()
        (target / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    elif what in ("bin", "none"):
        path.unlink()
        if what == "bin":
            (target / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")  # would end this process
    return str(target)


@pytest.mark.parametrize("what, error, words", [
    ("extra", ValueError, "model.layers.9.mlp.up_proj.weight, a tensor that LlamaModel does not have"),
    ("missing", ValueError, "lacks 1 tensors, such as layers.1.mlp.up_proj.weight"),
    ("truncated", ValueError, "not a whole file of weights"),
    ("empty", ValueError, "not a whole file of weights"),
    ("bin", ValueError, "not a whole file of weights and nothing else"),
    ("none", FileNotFoundError, "lacks model.safetensors"),
    ("shard", FileNotFoundError, "lacks model-1.safetensors"),
])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_unpickled(
        checkpoint_of, tmp_path, what, error, words, quantize):
    with pytest.raises(error, match=words):
        lora.load_base(spoil(what, checkpoint_of("llama"), tmp_path / "bad"), "cls", quantize)


def test_a_tensor_of_another_shape_is_refused(checkpoint_of, tmp_path):
    def widen(tensors):
        tensors["model.norm.weight"] = torch.ones(65)

    with pytest.raises(ValueError, match=r"norm.weight .*\(65,\).*\(64,\)"):
        lora.load_base(rewrite(checkpoint_of("llama"), tmp_path / "bad", widen), "cls", "nf4")


def test_models_that_cannot_be_used_are_refused_in_one_line_with_status_2(
        checkpoint_of, tmp_path, capsys, monkeypatch):
    """Unknown names, encoders, T5 in fp16, a model beyond this machine's memory, wrong LoRA arguments."""
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    huge = transformers.LlamaConfig(hidden_size=65536, intermediate_size=65536, num_hidden_layers=200)
    huge.save_pretrained(tmp_path / "huge")
    llama, t5 = checkpoint_of("llama"), checkpoint_of("t5")
    capsys.readouterr()  # the bars of writing them
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (
            ([f"{tmp_path}/nowhere"], "finds nothing"), (["no/such_model"], "finds nothing"),
            (["a b"], "finds nothing"), ([f"{tmp_path}/empty"], "finds nothing"),
            ([f"{tmp_path}/broken"], "finds nothing"),
            ([f"{tmp_path}/bert"], "use a decoder-only model or a T5"),
            ([t5, "--dtype", "fp16"], "T5, which overflows in fp16"),
            (["flan-t5", "--dtype", "fp16"], "SmolLM2"), (["mistral"], "SmolLM2"),
            ([f"{tmp_path}/huge"], "SmolLM2"), ([llama, "--lora_r", "0"], "--lora_r 0"),
            ([llama, "--lora_dropout", "1"], "--lora_dropout 1"),
            ([llama, "--target_modules", "qproj"], "qproj")):
        assert lora.main(arguments) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and words in line, line


def test_a_directory_without_tokenizer_is_refused_in_one_line(checkpoint_of):
    with pytest.raises(FileNotFoundError, match="AutoTokenizer finds nothing"):
        lora.load_tokenizer(checkpoint_of("llama"))


# ---- LoRA ----


def test_lora_adds_alpha_over_r_times_b_a_x():
    """[lora.3] rasbt#821 scaled by alpha alone. Expected value in float64 by the formula; tolerance 1e-5."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 32)
    layer = lora.LoRALinear(base, 4, 32, lora.SharedDropout(0.0, base), "cpu")
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 64)
    w, b, a_, b_ = (t.double() for t in (base.weight, base.bias, layer.lora_A, layer.lora_B))
    expected = x.double() @ w.T + b + (32 / 4) * (x.double() @ a_.T @ b_.T)
    assert_close(layer(x).double(), expected)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_output_equals_the_base_layer_before_training(checkpoint_of, name, quantize):
    model, (ids, _) = lora.load_base(checkpoint_of(name), "lm", quantize), some_rows((9, 9))
    expected = lm_logits(model, name, ids)
    lora.add_lora(model)
    assert torch.equal(lm_logits(model.eval(), name, ids), expected)


@pytest.mark.parametrize("name", ALL)
def test_all_linear_layers_but_the_last_get_lora(checkpoint_of, name):
    """[choice.T3] T5's wo too, which the released code left out. Expected names are transformers' own."""
    plain = reference(checkpoint_of(name), auto_lm(name))
    linear = {key for key, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    model = lora.load_base(checkpoint_of(name), "lm", "nf4")
    targets = lora.add_lora(model)
    assert {key for key, m in model.named_modules() if isinstance(m, lora.LoRALinear)} == linear - {"lm_head"}
    assert targets == sorted({key.split(".")[-1] for key in linear} - {"lm_head"})
    trained = {key.split(".")[-1] for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_a_target_that_matches_nothing_is_refused(checkpoint_of):
    """minLoRA attached itself to nothing after a typo, and trained nothing."""
    model = lora.build_model(checkpoint_of("llama"), "cls", N_LABELS, "none")
    with pytest.raises(ValueError, match=r"\['qproj'\] match no linear layer of x; it has \['down_proj', "):
        lora.add_lora(model, target_modules=["q_proj", "qproj"], name="x")
    with pytest.raises(ValueError, match=r"\['score'\] match no"):
        lora.add_lora(model, target_modules=["score"])


def peft_twin(model, directory, name, family, tmp_path, **options):
    """peft's model on transformers' model, filled with our adapter through the files."""
    lora.save_adapter(model, tmp_path, directory, family)
    auto = AutoModelForSequenceClassification if family == "cls" else auto_lm(name)
    base = reference(directory, auto, **({"num_labels": N_LABELS} if family == "cls" else {}))
    return peft.PeftModel.from_pretrained(base, tmp_path, **options)


def class_logits(model, name, ids, lengths):
    """transformers' logits of single rows without padding."""
    return torch.cat([model(input_ids=row[:n][None]).logits for row, n in zip(ids, lengths)])


@pytest.mark.parametrize("name", ["llama", "neox", "t5"])
def test_forward_gradients_and_20_adamw_steps_equal_pefts(checkpoint_of, tmp_path, name):
    """Same start, dropout 0, fp32. Tolerance 1e-5 for logits and gradients, 1e-4 for the weights after."""
    directory = checkpoint_of(name)
    ids, lengths = some_rows(end=1)
    ids = ids.where(ids != 1, 1).where(torch.arange(ids.shape[1]) < lengths[:, None], 5)
    target = (torch.arange(len(ids) * N_LABELS).view(-1, N_LABELS) % 2).float()
    model = ours(directory)
    twin = peft_twin(model, directory, name, "cls", tmp_path, is_trainable=True)
    model.eval(), twin.eval()
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    theirs = {key.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
              .removesuffix(".weight") if "lora_" in key else
              key.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
              for key, p in twin.named_parameters() if p.requires_grad}
    assert own.keys() == theirs.keys()
    ours_adam, their_adam = (torch.optim.AdamW(list(p.values()), lr=1e-2) for p in (own, theirs))
    for step in range(20):
        found, expected = model(ids, lengths), class_logits(twin, name, ids, lengths)
        assert_close(found, expected, 1e-5 if not step else 1e-3)
        for logits, optimizer in ((found, ours_adam), (expected, their_adam)):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, target).backward()
        if not step:
            for key in own:
                assert_close(own[key].grad, theirs[key].grad)
        ours_adam.step()
        their_adam.step()
    for key in own:
        assert_close(own[key], theirs[key], 1e-4)


def test_dropout_keeps_the_mean_and_drops_its_share():
    """Shares and means within 5 standard errors; entries are independent; gradients meet the same mask."""
    torch.manual_seed(0)
    n = 1_000_003
    for p in (0.05, 0.5, 1e-6, 0.999999):
        x = torch.ones(n, requires_grad=True)
        y = lora.dropout(x, p)
        share = max(min(round(p * 65536), 65535) / 65536, 0.0)
        error = 5 * math.sqrt(share * (1 - share) / n)
        assert abs((y == 0).double().mean() - share) <= error
        assert abs(y.double().mean() - 1) <= error / (1 - share) + 1e-6
        y.sum().backward()
        assert torch.equal(x.grad, y)
    dropped = (lora.dropout(torch.ones(4_000_000), 0.25) == 0).double().view(-1, 4)
    correlations = torch.corrcoef(torch.cat([dropped[1:], dropped[:-1]], 1).T) - torch.eye(8)
    assert correlations.abs().max() < 5 / math.sqrt(1_000_000)
    half = lora.dropout(torch.ones(1000, dtype=torch.bfloat16), 0.5)
    assert half.dtype == torch.bfloat16 and set(half.tolist()) == {0.0, 2.0}


def test_the_expectation_of_a_lora_layer_under_dropout_is_its_output_without():
    """Mean of 4,000 draws, within 6 standard errors."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 2)
    layer = lora.LoRALinear(base, 4, 8, lora.SharedDropout(0.3, base), "cpu")
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 64).expand(4000, 64)
    with torch.no_grad():
        draws, expected = layer.train()(x), layer.eval()(x)[0]
    assert draws.std(0).min() > 0.1
    assert ((draws.mean(0) - expected).abs() < 6 * draws.std(0) / math.sqrt(4000)).all()


def record_dropped(model, monkeypatch):
    """Notes in a list what every dropout of the model was asked for and gave, by call."""
    calls, forward = [], lora.SharedDropout.forward

    def note(module, x):
        dropped = forward(module, x)
        calls.append((module, x, dropped))
        return dropped

    monkeypatch.setattr(lora.SharedDropout, "forward", note)
    return calls


def test_layers_that_read_the_same_tensor_share_one_mask_and_others_do_not(checkpoint_of, monkeypatch):
    """q, k and v; gate and up. In T5's cross-attention k and v, but not q."""
    ids, lengths = some_rows(end=1)
    for name in ("llama", "t5"):
        model = ours(checkpoint_of(name), lora_dropout=0.3).train()
        calls = record_dropped(model, monkeypatch)
        model(ids, lengths)
        masks = {}
        for module, x, dropped in calls:
            assert dropped is not x
            masks.setdefault((module, x), set()).add(id(dropped))
        assert all(len(distinct) == 1 for distinct in masks.values())
        groups = sorted(sum(1 for m, x, _ in calls if (m is key[0] and x is key[1])) for key in masks)
        layers = {"llama": [1, 1, 2, 3] * 2, "t5": [1, 1, 2, 3] * 2 + [1, 1, 2, 3, 1, 2, 1] * 2}[name]
        assert groups == sorted(layers)
        assert len({id(dropped) for _, _, dropped in calls}) == len(masks)
        monkeypatch.undo()


def test_no_dropped_tensor_outlives_a_forward_pass_and_each_pass_draws_anew(checkpoint_of):
    ids, lengths = some_rows(end=1)
    model = ours(checkpoint_of("llama"), lora_dropout=0.5).train()
    outputs = [model(ids, lengths) for _ in range(2)]
    assert not torch.allclose(*outputs)
    shared = [m for m in model.modules() if isinstance(m, lora.SharedDropout)]
    assert len(shared) == 4 and all(m.source is None and m.dropped is None for m in shared)
    assert torch.equal(model.eval()(ids, lengths), model(ids, lengths))
    with pytest.raises(IndexError):
        model.train()(ids + 1000, lengths)
    assert all(m.source is None for m in shared)


def test_recomputing_a_block_gives_the_gradient_of_keeping_it(checkpoint_of):
    """torch.utils.checkpoint draws the same masks again. Tolerance 1e-6."""
    model = ours(checkpoint_of("llama"), lora_dropout=0.5).train()
    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 64)
    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False),
                lambda x: checkpoint(block, x, use_reentrant=True)):
        torch.manual_seed(0)
        block.zero_grad()
        run(x.clone().requires_grad_()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters() if p.requires_grad]))
    assert_close(gradients[1], gradients[0], 1e-6)
    assert_close(gradients[2], gradients[0], 1e-6)


@pytest.mark.parametrize("name", ["llama", "neox", "t5"])
def test_recomputed_layers_give_the_same_gradients(checkpoint_of, name):
    """Dropout on: the masks are drawn again. Tolerance 1e-6."""
    (ids, lengths), gradients = some_rows((9, 12)), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ours(checkpoint_of(name), lora_dropout=0.5).train()
        if recompute:
            lora.recompute_layers(model)
        torch.manual_seed(1)
        model(ids, lengths).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert model.shares_prefix == (name != "t5" and not recompute)
    assert_close(*gradients, 1e-6)


@pytest.mark.parametrize("change, sizes", [
    ("Gemma2", {"final_logit_softcapping": 5.0}), ("Cohere", {"logit_scale": 0.5}),
    ("Granite", {"logits_scaling": 4.0})])
@torch.no_grad()
def test_a_model_that_changes_its_logits_gives_them_changed(tmp_path, change, sizes):
    """The LM loss was another one: 5.3 became 7.0 for a tiny Cohere. Tolerance 1e-5."""
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{change}Config")(**small | sizes)
    plain = getattr(transformers, f"{change}ForCausalLM")(config).eval()
    plain.lm_head.weight.data.mul_(50)  # so that a cap is felt
    plain.save_pretrained(tmp_path)
    ids, lengths = torch.arange(3, 15).view(2, 6), torch.tensor([6, 6])
    model = lora.load_base(str(tmp_path), "lm", "none")
    found = lora.response_logits(model, ids, lengths, torch.tensor([0, 1]), torch.tensor([6, 4]))
    assert_close(found, plain(ids).logits[[0, 1], [5, 3]])


def test_attention_with_sinks_or_a_cap_stays_that_of_transformers(tmp_path):
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Gemma2Config(**small, attn_logit_softcapping=5.0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert lora.load_base(str(tmp_path), "cls", "none").config._attn_implementation != "packing"


def test_a_model_with_alibi_shares_no_prefix(tmp_path):
    """Its distances would count the padding between the prefix and a shorter prompt."""
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    assert not lora.load_base(str(tmp_path), "lm", "none").shares_prefix


def test_a_model_without_a_cache_is_refused(tmp_path):
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no cache of keys and values"):
        lora.load_base(str(tmp_path), "cls", "none")


@pytest.mark.parametrize("change", [
    {"hidden_act": "evil"}, {"hidden_size": -4}, {"num_hidden_layers": "two"}])
def test_a_config_that_describes_no_model_is_one_line(checkpoint_of, tmp_path, change):
    directory = shutil.copytree(checkpoint_of("llama"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, FileNotFoundError), match=str(directory)):
        lora.load_base(str(directory), "cls", "none")


def test_an_index_of_shards_that_are_no_names_is_one_line(checkpoint_of, tmp_path):
    directory = shutil.copytree(checkpoint_of("llama"), tmp_path / "model")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(ValueError, match="no index of weights"):
        lora.load_base(str(directory), "cls", "none")


def test_a_head_that_trains_is_an_fp32_copy_of_its_own(checkpoint_of):
    """The LM head can train in fp32 beside bf16 layers (audit T4); tied embeddings stay as they are."""
    ids, _ = some_rows((9, 9))
    for name in ("llama_tied", "t5"):
        model = ours(checkpoint_of(name), "lm", "nf4", torch.bfloat16, last_layer_trains=True)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight.dtype == torch.float32 and head.weight.requires_grad
        assert embeddings.weight.dtype == torch.bfloat16 and not embeddings.weight.requires_grad
        logits = lm_logits(model, name, ids)  # as in generation
        assert logits.dtype == torch.float32
        logits.sum().backward()
        assert head.weight.grad.abs().sum() > 0
        if name == "llama_tied":
            with torch.no_grad():
                new = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
            assert new.shape == (2, 11)


# ---- Heads ----


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_equal_those_of_transformers_sequence_classification(checkpoint_of, name):
    """[cls.head], [cls.t5]: the same weights, rows without padding there and padded here. Tolerance 1e-5."""
    directory = checkpoint_of(name)
    ids, lengths = some_rows(end=1)
    if name == "t5":  # which looks for one EOS, the last token
        ids = ids.where(torch.arange(ids.shape[1]) < lengths[:, None], 0)
    model = lora.build_model(directory, "cls", N_LABELS, "none")
    twin = reference(directory, AutoModelForSequenceClassification, num_labels=N_LABELS)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("embed_tokens" in key for key in missing)
    assert_close(model(ids, lengths), class_logits(twin, name, ids, lengths))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_attention_equals_that_of_pytorch_with_its_gradients(groups):
    """4 query heads; new tokens behind a prefix, one row padded on the left. Tolerance 1e-5."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(2, groups, 7, 8, generator=generator, requires_grad=True) for _ in "kv")
    seen = torch.ones(5, 7, dtype=torch.bool).tril(2).repeat(2, 1, 1, 1)
    seen[1, :, :, 0] = False
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    own, _ = lora.grouped_attention(None, query, key, value, mask, 0.3)
    repeated = [x.repeat_interleave(4 // groups, 1) for x in (key, value)]
    theirs = F.scaled_dot_product_attention(query, *repeated, attn_mask=seen, scale=0.3)
    assert_close(own, theirs.transpose(1, 2))
    for one, other in zip(torch.autograd.grad(own.square().sum(), (query, key, value)),
                          torch.autograd.grad(theirs.square().sum(), (query, key, value))):
        assert_close(one, other)


def test_a_cpu_uses_grouped_attention_where_the_model_takes_it(checkpoint_of):
    """Falcon and T5 have attentions of their own; a typo in the name would pass unseen, only slower."""
    for name in ALL:
        model = lora.load_base(checkpoint_of(name), "lm")
        assert model.config._attn_implementation == ("sdpa" if name == "t5" else "packing")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_do_not_depend_on_padding_or_batch_mates(checkpoint_of, name, quantize):
    """transformers#24265 pooled at a padding position. Pad is often EOS, and EOS may stand inside a prompt or
    be its last token: positions come from lengths alone. Tolerance 1e-5."""
    model = ours(checkpoint_of(name), quantize=quantize).eval()
    ids, lengths = some_rows((9, 13, 6), end=2)
    ids[:, 2] = 2
    alone = torch.cat([model(row[None, :n], n[None]) for row, n in zip(ids, lengths)])
    for pad in (0, 2, 300):
        padded = F.pad(ids, (0, 4), value=pad)
        padded = padded.where(torch.arange(17) < lengths[:, None], pad)
        assert_close(model(padded, lengths), alone)
    assert_close(model(ids.flip(0), lengths.flip(0)).flip(0), alone)


@pytest.mark.parametrize("name, norms, mlps", [
    ("mistral", 5, 2), ("gemma", 0, 2), ("t5", 12, 0), ("neox", 0, 0)])
def test_fused_modules_give_the_logits_and_gradients_of_those_they_replace(
        checkpoint_of, name, norms, mlps):
    """Dropout on. Gemma's norm multiplies by 1 + weight and stays. Tolerance 1e-5, in fp32."""
    directory, (ids, lengths), results = checkpoint_of(name), some_rows(end=1), []
    for fused in (False, True):
        torch.manual_seed(0)
        model = lora.build_model(directory, "cls", N_LABELS, "none")
        if fused:
            lora.fuse(model.transformer if name == "t5" else model.get_submodule(model.base_model_prefix))
        kinds = [type(m).__name__[-3:] for m in model.modules() if "forward" in vars(m)]
        assert (kinds.count("MLP"), len(kinds)) == (fused * mlps, fused * (norms + mlps))
        lora.add_lora(model, lora_dropout=0.3)
        for key, parameter in model.train().named_parameters():
            if key.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.02)
        torch.manual_seed(1)
        logits = model(ids, lengths)
        logits.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((logits, gradient))
    for plain, fused in zip(*results):
        assert_close(fused, plain)


def test_a_fused_mlp_has_the_gradient_of_the_plain_one_and_does_not_keep_its_activation():
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=10, num_attention_heads=2)
    made = []
    for act in (torch.nn.SiLU(), torch.nn.GELU(approximate="tanh")):
        plain = transformers.models.llama.modeling_llama.LlamaMLP(config).double()
        plain.act_fn = act
        act.register_forward_hook(lambda _, inputs, out: made.append(weakref.ref(out)))
        x, results = torch.randn(5, 8, dtype=torch.double, requires_grad=True), []
        plain.get_input_embeddings = lambda: torch.nn.Embedding(1, 1, dtype=torch.double)
        for fused in (False, True):
            if fused:
                lora.fuse(plain)
            out = plain(x)
            assert (made[-1]() is None) == fused
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *plain.parameters()))))
        assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_weights_that_are_cast_together_have_the_gradients_of_those_that_are_cast_alone(checkpoint_of, name):
    """Exactly, over two micro-batches and a step; in fp32 nothing is cast."""
    (ids, lengths), results, seen = some_rows(end=1), [], []

    def hooks(model):
        return [m._forward_pre_hooks for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]

    for together in (True, False):
        model = ours(checkpoint_of(name), dtype=torch.bfloat16)
        layers = [module for module in model.modules() if isinstance(module, lora.LoRALinear)]
        trained = [p for p in model.parameters() if p.requires_grad]
        for hook in hooks(model) if not together else ():
            hook.clear()
        layers[-1].register_forward_hook(lambda layer, *_: seen.append(layer.cast is not None))
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in range(2):
            optimizer.zero_grad(set_to_none=step == 0)
            for part in (ids, ids.flip(0)):
                model(part, lengths).square().sum().backward()
            gradients = [p.grad.clone() for p in trained]
            optimizer.step()
        results.append((*gradients, *trained))
        assert all(layer.cast is None for layer in layers)
    assert seen == [True] * 4 + [False] * 4 and not any(hooks(ours(checkpoint_of(name))))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("name", DECODERS)
def test_a_shared_prefix_run_once_gives_the_same_states_and_gradients(checkpoint_of, name):
    """Gradients within 2.8e-5 relative (PERFORMANCE, technique 5), states within 1e-5, in fp32."""
    model = ours(checkpoint_of(name))
    ids, lengths = some_rows()
    ids[:, :4] = ids[0, :4]
    backbone, results = getattr(model, model.base_model_prefix), []
    for prefix in (0, 4):
        states = lora.decoder_states(backbone, ids, prefix)
        model.zero_grad()
        logits = model(ids, lengths, prefix)
        logits.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((states[:, 4 - prefix:], logits, gradient))
    for plain, shared in zip(*results):
        assert_close(shared, plain)
    plain, shared = results[0][2], results[1][2]
    assert (plain - shared).norm() / plain.norm() < 2.8e-5


@pytest.mark.parametrize("name", [*ALL, "t5_tied"])
def test_response_loss_and_gradients_equal_transformers_labels_with_minus_100(checkpoint_of, name):
    """Mean cross-entropy over response tokens, with and without a shared prefix. Tolerance 1e-5."""
    model = ours(checkpoint_of(name), "lm", last_layer_trains=name == "llama").eval()
    prompts, prompt_lengths = some_rows((9, 11, 7))
    responses, response_lengths = some_rows((3, 2, 4), seed=4)
    prompts[:, :4] = prompts[0, :4]
    rows = torch.repeat_interleave(torch.arange(3), response_lengths)
    inside = torch.cat([torch.arange(int(n)) for n in response_lengths])
    if name.startswith("t5"):
        ids, lengths, columns = prompts, prompt_lengths, inside
        labels = responses.where(torch.arange(4) < response_lengths[:, None], -100)
    else:
        lengths, columns = prompt_lengths + response_lengths, inside + prompt_lengths[rows]
        ids, labels = torch.zeros(3, 13).long(), torch.full((3, 13), -100)
        for k in range(3):
            p, r = int(prompt_lengths[k]), int(response_lengths[k])
            ids[k, :p], ids[k, p: p + r] = prompts[k, :p], responses[k, :r]
            labels[k, p: p + r] = responses[k, :r]
    expected = model(input_ids=ids, attention_mask=lora.real_tokens(ids, lengths), labels=labels).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, trained)
    for prefix in (0, 4) if model.shares_prefix else (0,):
        logits = lora.response_logits(model, ids, lengths, rows, columns, responses, prefix)
        loss = F.cross_entropy(logits, responses[rows, inside])
        assert abs(loss - expected) < 1e-5
        for found, wanted in zip(torch.autograd.grad(loss, trained), gradients):
            assert_close(found, wanted)


# ---- Adapters ----


@pytest.mark.parametrize("name, family", [
    ("llama", "cls"), ("neox", "cls"), ("t5", "cls"), ("llama", "lm"), ("t5", "lm"), ("phi", "lm+head")])
@torch.no_grad()
def test_our_adapter_loads_in_peft_and_theirs_in_ours(checkpoint_of, tmp_path, name, family):
    """Equal logits, head included; tolerance 1e-5."""
    directory, (ids, lengths) = checkpoint_of(name), some_rows((9, 9), end=1)
    family, head = family.split("+")[0], "+" in family
    model = ours(directory, family, last_layer_trains=head or family == "cls").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    twin = peft_twin(model, directory, name, family, tmp_path).eval()

    def logits(network, is_peft):
        if family == "lm":
            return lm_logits(network, name, ids)
        return class_logits(network, name, ids, lengths) if is_peft else network(ids, lengths)

    expected = logits(model, False)
    assert_close(logits(twin, True), expected)
    for key, parameter in twin.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    twin.save_pretrained(tmp_path / "theirs")
    lora.load_adapter(model, tmp_path / "theirs")
    assert (logits(twin, True) - expected).abs().max() > 1e-3
    assert_close(logits(model, False), logits(twin, True))


@pytest.mark.parametrize("name, family, head", [
    ("llama", "cls", ["score.weight"]), ("llama", "lm", []), ("t5", "lm", []),
    ("t5", "cls", [f"classification_head.{part}.{leaf}" for part in ("dense", "out_proj")
                   for leaf in ("weight", "bias")])])
def test_an_adapter_file_holds_exactly_these_keys(checkpoint_of, tmp_path, name, family, head):
    """The head is saved with the adapter (peft#577, #876, #1070)."""
    if name == "llama":
        parts = [f"self_attn.{leaf}" for leaf in "qkvo"] + [f"mlp.{leaf}" for leaf in ("gate", "up", "down")]
        linear = [f"model.layers.{k}.{part}_proj" for k in range(2) for part in parts]
    else:
        attention = [("encoder", "layer.0.SelfAttention"), ("decoder", "layer.0.SelfAttention"),
                     ("decoder", "layer.1.EncDecAttention")]
        linear = [f"{part}.block.{k}.{where}.{leaf}" for k in range(2) for part, where in attention
                  for leaf in "qkvo"]
        linear += [f"{part}.block.{k}.layer.{n}.DenseReluDense.{leaf}" for k in range(2)
                   for part, n in (("encoder", 1), ("decoder", 2)) for leaf in ("wi_0", "wi_1", "wo")]
        linear = [("transformer." if family == "cls" else "") + key for key in linear]
    model = ours(checkpoint_of(name), family)
    lora.save_adapter(model, tmp_path, "flan-t5", family)
    expected = {f"base_model.model.{key}.lora_{side}.weight" for key in linear for side in "AB"}
    expected |= {f"base_model.model.{key}" for key in head}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/flan-t5-xl"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)


@pytest.mark.parametrize("what, error, words", [
    ("truncated", ValueError, "not a whole file of weights"),
    ("empty", ValueError, "not a whole file of weights"),
    ("missing", ValueError, r"in 1 tensors: base_model.model.score.weight is missing there, \(5, 64\) here"),
    ("extra", ValueError, r"in 1 tensors: other is \(1,\) there, missing here"),
    ("shape", ValueError, r"score.weight is \(7, 64\) there, \(5, 64\) here"),
    ("none", FileNotFoundError, "train first")])
def test_a_damaged_adapter_gives_one_error_and_changes_nothing(checkpoint_of, tmp_path, what, error, words):
    model = ours(checkpoint_of("llama"))
    lora.save_adapter(model, tmp_path, "x", "cls")
    path, score = tmp_path / "adapter_model.safetensors", "base_model.model.score.weight"
    tensors = {key: tensor + 1 for key, tensor in load_file(path).items()}
    if what == "missing":
        del tensors[score]
    if what == "extra":
        tensors["other"] = torch.ones(1)
    if what == "shape":
        tensors[score] = torch.ones(7, 64)
    save_file(tensors, path)
    if what in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: 3000 if what == "truncated" else 0])
    if what == "none":
        path.unlink()
    before = {key: tensor.clone() for key, tensor in lora.adapter_state(model).items()}
    with pytest.raises(error, match=words) as raised:
        lora.load_adapter(model, tmp_path)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in lora.adapter_state(model).items())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        lora.write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- Merge and counts ----


@pytest.mark.parametrize("quantize, dtype, tolerance", [
    ("none", "fp32", 1e-5), ("nf4", "fp32", 1e-5), ("nf4", "bf16", 0.05)])
@pytest.mark.parametrize("name", ["phi", "t5"])
@torch.no_grad()
def test_a_merged_model_gives_the_same_logits(checkpoint_of, name, quantize, dtype, tolerance):
    """Plain linear layers in the compute dtype, biases kept. In bf16 the merged weight is rounded once."""
    model = ours(checkpoint_of(name), quantize=quantize, dtype=lora.DTYPES[dtype])
    ids, lengths = some_rows(end=1)
    expected = model.eval()(ids, lengths)
    lora.merge(model)
    assert not any(isinstance(m, (lora.LoRALinear, lora.NF4Linear)) for m in model.modules())
    assert_close(model(ids, lengths), expected, tolerance)
    kinds = {m.weight.dtype for key, m in model.named_modules()
             if isinstance(m, torch.nn.Linear) and key.split(".")[0] not in model.last_layer}
    assert kinds == {lora.DTYPES[dtype]}


@pytest.mark.parametrize("name", ALL)
def test_parameter_counts_are_the_true_ones_in_4_bit(checkpoint_of, name):
    """[choice.T10] The released code printed half of them in 4-bit, where two weights share a byte."""
    plain = reference(checkpoint_of(name), AutoModel)
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    expected = sum(p.numel() for p in plain.parameters())
    trainable = sum(4 * (m.in_features + m.out_features) for m in linear)
    trainable += 64 * 64 + 64 + 64 * N_LABELS + N_LABELS if name == "t5" else 64 * N_LABELS
    for quantize, quantized in (("none", 0), ("nf4", sum(m.weight.numel() for m in linear))):
        model = ours(checkpoint_of(name), quantize=quantize)
        assert lora.count_parameters(model) == (expected, quantized, trainable)


def test_the_papers_models_and_dtypes(checkpoint_of):
    """[choice.T9] Mistral 7B is its Instruct version 0.2; [choice.T5] the dtypes of section VI-C."""
    assert {name: entry[:2] for name, entry in lora.MODELS.items()} == {
        "mistral": ("mistralai/Mistral-7B-Instruct-v0.2", "fp16"), "phi-2": ("microsoft/phi-2", "bf16"),
        "stablelm": ("stabilityai/stablelm-tuned-alpha-3b", "fp16"), "flan-t5": ("google/flan-t5-xl", "bf16")}
    with pytest.raises(ValueError, match="T5, which overflows in fp16"):
        lora.load_config(checkpoint_of("t5"), None, torch.float16)
    for name, dtype in (("t5", torch.bfloat16), ("t5", torch.float32), ("mistral", torch.float16)):
        lora.load_config(checkpoint_of(name), None, dtype)


@pytest.mark.parametrize("units, capability, expected", [
    ("avx2", None, ["fp16", "fp32", "fp16", "fp32", "fp32", "fp32"]),
    ("avx512_bf16", None, ["fp16", "bf16", "fp16", "bf16", "bf16", "bf16"]),
    ("bf16", None, ["fp16", "bf16", "fp16", "bf16", "bf16", "bf16"]),
    ("avx2", (9, 0), ["fp16", "bf16", "fp16", "bf16", "bf16", "bf16"]),
    ("amx_bf16", (7, 5), ["fp16", "fp16", "fp16", "fp32", "fp16", "fp32"])])
def test_the_default_dtype_is_the_papers_where_the_machine_has_units_for_it(
        monkeypatch, units, capability, expected):
    """A CPU without them takes 4 times as long in bf16; a T4 emulates it; T5 overflows in fp16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {units: True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    models = [*lora.MODELS, "org/another", "google/flan-t5-base"]
    assert [lora.default_dtype(model) for model in models] == expected


@pytest.mark.parametrize("change, words", [
    ({}, "torch .* is built for CUDA 13.0 and does not find this machine's GPU .NVIDIA driver 535.183.01.:"),
    ({"cuda": None}, "is built without CUDA"), ({"hidden": ""}, None), ({"available": True}, None),
    ({"driver": None}, None)])
def test_a_gpu_that_torch_cannot_use_is_named_with_its_driver(tmp_path, monkeypatch, change, words):
    """The wheel of torch 2.13 is built for CUDA 13.0: with an older driver it finds no GPU."""
    have = {"cuda": "13.0", "hidden": "0", "available": False} | change
    driver = tmp_path / "version"
    if "driver" not in change:
        driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    monkeypatch.setattr(lora, "DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", have["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: have["available"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", have["hidden"])
    assert bool(words) == bool(lora.idle_gpu()) and re.search(words or "", lora.idle_gpu())
    if words:
        with pytest.raises(ValueError, match=words):
            lora.check_by_name("mistral", "cpu")


def test_lora_and_heads_are_drawn_on_the_cpu_whatever_the_device(checkpoint_of):
    """Processes on unlike devices start from the same weights: the generator of the CPU moves alike."""
    config = transformers.AutoConfig.from_pretrained(checkpoint_of("t5"))
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        backbone = torch.nn.Linear(64, 2)
        lora.LoRALinear(backbone, 4, 8, lora.SharedDropout(0.3, backbone), device)
        backbone.fingerprint, backbone.base_model_prefix, backbone.shares_prefix = "", "model", True
        heads = []
        for kind, backbone.config in ((lora.T5Classifier, config),
                                      (lora.LastTokenClassifier, transformers.LlamaConfig(**SIZES))):
            heads.append(kind(backbone, 3, device))
        assert {p.device.type for head in heads for name, p in head.named_parameters()
                if head.last_layer[0] in name} == {device}
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["mistral", "neox"])
def test_activations_near_the_limit_of_fp16_give_the_logits_of_fp32(checkpoint_of, name):
    """[choice.T5] The residual stream is in fp16, up to 65,504; norms, softmax and heads compute in fp32.

    Tolerance 1% of the largest logit. Beyond the limit the logits are not finite, which stops a run.
    """
    ids, lengths = some_rows()
    logits = []
    for dtype, scale in ((torch.float32, 1), (torch.float16, 1), (torch.float16, 2)):
        model = lora.build_model(checkpoint_of(name), "cls", N_LABELS, "none", dtype)
        with torch.no_grad():
            model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel()).view(N_LABELS, -1))
            embedding = model.get_submodule(model.base_model_prefix).get_input_embeddings().weight
            embedding.copy_(embedding.float() * (scale * 6e4 / embedding[ids].abs().max().item()))
            logits.append(model(ids, lengths))
    assert_close(logits[1], logits[0], 0.01 * logits[0].abs().max())
    assert not logits[2].isfinite().all()
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_the_command_prints_modules_what_is_quantized_and_what_trains(checkpoint_of, capsys):
    assert lora.main([checkpoint_of("llama"), "--n_labels", "3", "--lora_r", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * (2 + 7 * 2) + 1 + 1 and lines[-2].split()[:2] == ["score", "Linear"]
    linear, norms = 4 * 64 * 64 + 3 * 64 * 128, 2 * 64
    base, train = 320 * 64 + 2 * (linear + norms) + 64, 2 * 4 * (4 * 128 + 3 * 192) + 3 * 64
    assert lines[-1] == (f"{base:,} parameters in the base, {2 * linear:,} of them in NF4; {train:,} train "
                         f"({100 * train / (base + train):.3f}%)")
