"""A table of what people fine-tune: each family as transformers and peft have it, by small random configs.

    python -m pytest -q tests/test_families.py

Windows are of 16 tokens, shorter than the shared prefix and far shorter than the prompts. Expected values are
of transformers' models and peft's, row by row without padding; tolerances are of fp32.
"""

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_lora import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import data
import infer
import lora
import train

SIZES = dict(vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             tie_word_embeddings=False)
GROUPED = SIZES | dict(num_key_value_heads=2)
HEADS, WINDOW = GROUPED | dict(head_dim=8), dict(sliding_window=16)
MIXED = dict(layer_types=["sliding_attention", "full_attention"]) | WINDOW
FAMILIES = {
    "llama": ("Llama", GROUPED), "llama 3": ("Llama", GROUPED | dict(rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
    "dynamic rope": ("Llama", GROUPED | dict(max_position_embeddings=32, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})),
    "mistral": ("Mistral", HEADS | WINDOW), "qwen2": ("Qwen2", GROUPED), "qwen3": ("Qwen3", HEADS),
    "qwen2 window": ("Qwen2", GROUPED | WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    "gemma": ("Gemma", HEADS), "gemma2": ("Gemma2", HEADS | MIXED | dict(query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3Text", HEADS | MIXED | dict(query_pre_attn_scalar=8)),
    "phi": ("Phi", SIZES), "phi3": ("Phi3", GROUPED | WINDOW), "neox": ("GPTNeoX", SIZES),
    "gpt2": ("GPT2", SIZES | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "opt": ("OPT", SIZES | dict(ffn_dim=48, word_embed_proj_dim=16, dropout=0.0)),
    "xglm": ("XGLM", dict(vocab_size=160, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
                          dropout=0.0, attention_dropout=0.0)),
    "stablelm": ("StableLm", GROUPED), "olmo2": ("Olmo2", GROUPED), "olmo3": ("Olmo3", GROUPED | MIXED),
    "smollm3": ("SmolLM3", GROUPED), "falcon": ("Falcon", SIZES | dict(new_decoder_architecture=False)),
    "bloom": ("Bloom", SIZES | dict(tie_word_embeddings=True)),
    "cohere": ("Cohere", GROUPED | dict(logit_scale=0.5)),
    "granite": ("Granite", GROUPED | dict(logits_scaling=3.0)),
    "gpt-neo": ("GPTNeo", SIZES | dict(window_size=16, num_layers=2, num_heads=4, attention_types=[
        [["global", "local"], 1]])),
    "gpt-oss": ("GptOss", HEADS | MIXED | dict(num_local_experts=4, num_experts_per_tok=2)),
    "llama 4": ("Llama4Text", HEADS | dict(
        intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16,
        layer_types=["chunked_attention", "full_attention"])),
    "t5": ("T5", dict(vocab_size=160, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=2)),
}
PREFIX, LENGTHS = 20, (30, 37, 41, 52, 66)


class Ids:
    """A tokenizer of responses as decode wants one: what is written stays token ids."""

    eos_token_id = 2

    def __call__(self, text, **_):
        return {"input_ids": [5] * 9 if isinstance(text, str) else [[5] * 9 for _ in text]}

    def batch_decode(self, rows, **_):
        return [tuple(row) for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Writes a family's checkpoint once: (directory, our lm model with LoRA, peft's twin of it)."""
    done = {}

    def make(family):
        if family not in done:
            torch.manual_seed(0)
            name, options = FAMILIES[family]
            auto = AutoModelForSeq2SeqLM if name == "T5" else AutoModelForCausalLM
            plain = auto.from_config(getattr(transformers, f"{name}Config")(**options))
            for parameter in plain.parameters():  # biases and norms are not 0 and 1
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
            directory = tmp_path_factory.mktemp("family")
            plain.save_pretrained(directory)
            model = with_lora(directory, "lm")
            lora.save_adapter(model, directory / "adapter", "x", "lm")
            base = auto.from_pretrained(directory, dtype=torch.float32)
            twin = peft.PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
            done[family] = directory, model, twin.eval()
        return done[family]

    return make


def with_lora(directory, family):
    (directory / "adapter").mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = lora.build_model(str(directory), family, 3, "none")
    lora.add_lora(model, r=2, lora_alpha=4, lora_dropout=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05)
    return model.eval()


def some_annotations():
    """Five prompts that begin alike, with responses of two to four tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 160, (n,), generator=generator).numpy().astype(np.int32) for n in LENGTHS]
    rows = [np.concatenate([rows[0][:PREFIX], row[PREFIX:]]) for row in rows]
    ids, offsets = data.flatten(rows)
    labels = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 1]], np.float32)
    encoded = data.Encoded(ids, offsets, np.arange(5), labels, [])
    responses = [[7, 9, 2], [11, 2], [12, 7, 5, 2], [9, 2], [30, 31, 2]]
    encoded.response_ids, encoded.response_offsets = data.flatten(responses)
    encoded.response_index = np.arange(5)
    return encoded


def loss_of(twin, encoded):
    """transformers' mean cross-entropy over the response tokens, row by row."""
    total = 0
    for m in range(5):
        prompt, response = (torch.from_numpy(ids.astype(np.int64))
                            for ids in (encoded.prompt(m), encoded.response(m)))
        if twin.config.is_encoder_decoder:
            total += twin(input_ids=prompt[None], labels=response[None]).loss * len(response)
        else:
            logits = twin(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1: -1]
            total += F.cross_entropy(logits, response, reduction="sum")
    return total / len(encoded.response_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_behind_the_prefix_equal_pefts(made, family):
    """And so its logits. Tolerance 1e-5 for the loss, 1e-4 for gradients: those of 300 tokens.

    Dynamic frequencies depend on the longest row until then, so there every row is read alone, in this order.
    """
    _, model, twin = made(family)
    encoded = some_annotations()
    model.zero_grad()
    objective = train.Objective(model, "lm", 1 if family == "dynamic rope" else 4096)
    prefix = infer.shared_prefix(model, encoded)
    assert prefix == (0 if family in ("bloom", "t5", "dynamic rope") else PREFIX)
    loss = sum(objective.losses(encoded, np.arange(5), prefix)) / objective.terms(encoded, np.arange(5))
    loss.backward()
    expected = loss_of(twin, encoded)
    twin.zero_grad()
    expected.backward()
    assert abs(loss - expected) < 1e-5 * expected
    theirs = {key.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
              for key, parameter in twin.named_parameters() if "lora_" in key}
    own = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert own.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert all((own[key] - theirs[key]).abs().max() < 1e-4 * scale for key in own)


@pytest.mark.parametrize("family, ends", [
    *((family, 1) for family in FAMILIES), ("llama", 81), ("gemma3", 81), ("t5", 81)])
def test_responses_in_a_batch_equal_generate_row_by_row(made, family, ends):
    """Any of several end tokens ends a response, as in generation_config.json of Gemma and Llama 3."""
    _, model, twin = made(family)
    encoded, extra = some_annotations(), set(range(3, 2 + ends))
    model.end_tokens = {2} | extra
    found, _ = infer.generate(model, Ids(), encoded, ["a"], 4096)
    for m, response in enumerate(found):
        ids = torch.from_numpy(encoded.prompt(m).astype(np.int64))[None]
        new = twin.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9,
                            do_sample=False, eos_token_id=[2, *extra], pad_token_id=0)[0]
        new = new[1 if model.config.is_encoder_decoder else ids.shape[1]:].tolist()
        stops = [k for k, token in enumerate(new) if token in model.end_tokens]
        assert response == tuple(new[: stops[0]] if stops else new), m


@pytest.mark.parametrize("method", ["cls", "lm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_lower_the_loss_and_do_not_depend_on_the_prefix(made, family, method):
    directory, losses = made(family)[0], []
    encoded = some_annotations()
    for shared in (True, False):
        model = with_lora(directory, method)
        prefix = infer.shared_prefix(model, encoded) if shared else 0
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        learner = train.Learner(train.Objective(model, method, 4096), optimizer)
        losses.append([train.train_step(learner, encoded, np.arange(5), prefix)[0] for _ in range(3)])
        if not prefix:
            break
    assert losses[0][2] < losses[0][0]
    assert_close(torch.tensor(losses[0]), torch.tensor(losses[-1]), 1e-4)


# ---- What a load says, chooses and refuses ----


def written(directory, name, **options):
    """The path of a small random checkpoint, whose generation ends at token 2."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**options))
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    plain.save_pretrained(directory)
    return str(directory)


def test_a_head_with_a_layer_before_it_is_refused_for_lm_and_no_model_is_silently_wrong(tmp_path):
    """modernbert-decoder: its lmp was another model's, exit 0."""
    path = written(tmp_path, "ModernBertDecoder", **HEADS | MIXED | dict(
        cls_token_id=1, sep_token_id=2, global_rope_theta=1e4))
    for family in ("lm", "query"):
        with pytest.raises(ValueError, match="last states of its decoder.*--method cls or clsp"):
            lora.load_base(path, family, "none")
    lora.load_base(path, "cls", "none")


@pytest.mark.parametrize("family, options, words", [
    ("Lfm2", GROUPED | dict(full_attn_idxs=[1]), r"no cache of keys and values in \['conv'\]"),
    ("OpenAIGPT", dict(vocab_size=160, n_embd=32, n_layer=2, n_head=4), "cannot be used"),
    ("Mixtral", GROUPED | dict(num_local_experts=4), "block_sparse_moe.experts.0.w1.weight")])
def test_what_decodes_another_way_or_is_stored_another_way_is_one_line(tmp_path, family, options, words):
    path = written(tmp_path, family, **options)
    for method in ("cls", "lm"):
        with pytest.raises(ValueError, match=words) as raised:
            lora.load_base(path, method, "nf4")
        assert "\n" not in str(raised.value)


def test_a_line_says_which_share_of_the_weights_is_neither_quantized_nor_adapted(tmp_path, capsys):
    """Fused experts: 2 layers of 4 x (32 x 96 + 48 x 32) of all weights, by hand."""
    path = written(tmp_path, "GptOss", **HEADS | MIXED | dict(num_local_experts=4, num_experts_per_tok=2))
    capsys.readouterr()
    model = lora.load_base(path, "cls", "nf4")
    experts = 2 * 4 * (32 * 96 + 48 * 32)
    share = experts / lora.count_parameters(model)[0]
    assert f"{share:.0%} of the weights of {path} are fused experts: neither" in capsys.readouterr().err


def test_end_tokens_are_those_of_the_config_and_of_generation_config_json(tmp_path):
    path = written(tmp_path, "Llama", **GROUPED)
    transformers.GenerationConfig(eos_token_id=[7, 9]).save_pretrained(path)
    assert lora.load_base(path, "lm", "none").end_tokens == {2, 7, 9}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="GenerationConfig finds nothing"):
        lora.load_base(path, "lm", "none")


def test_labels_end_at_any_end_token(tiny_dir):
    tokenizer = lora.load_tokenizer(f"{tiny_dir}/models/mistral")
    sequences = infer.LabelSequences(tokenizer, ("anger", "joy"), ends=(5, 6))
    state = sequences.start
    for token in tokenizer("\nanger", add_special_tokens=False)["input_ids"]:
        state = sequences.allowed(state)[token]
    accepted = sequences.allowed(state)
    assert {5, 6, tokenizer.eos_token_id} < set(accepted) and len(accepted) == 4  # or a comma


def test_constrained_responses_of_a_window_are_those_of_rows_alone(tiny_dir, tmp_path):
    """Forced tokens that are read at once leave padding inside a row, which a window would count."""
    tokenizer = lora.load_tokenizer(f"{tiny_dir}/models/mistral")
    path = written(tmp_path, "Mistral", **HEADS | WINDOW | dict(vocab_size=len(tokenizer)))
    model, encoded = lora.load_base(path, "query", "none"), some_annotations()
    names = ("anger", "annoyance", "disapproval", "joy", "surprise")
    together, _ = infer.generate(model, tokenizer, encoded, names, 4096, constrain=True)
    alone, _ = infer.generate(model, tokenizer, encoded, names, 1, constrain=True)
    assert together == alone and len({*together}) > 1
