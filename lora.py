"""Everything that is added to a base model: NF4 loading, LoRA, heads, and adapters on disk.

Source: LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023), section VI-C of the paper: the base in 4-bit
NormalFloat, LoRA on all linear layers but the very last one, which is a new full layer (CLS) or the LM head
in full precision (LM). The base is built without memory; its safetensors are streamed in, tensor by tensor.
Modules have transformers' names (...ForSequenceClassification, ...ForCausalLM), so adapters are peft's files.

    python lora.py MODEL [--family cls|lm] [--quantize nf4|none]      prints the modules and what trains
    python lora.py merge RUN OUT [BASE]      a finished run as an ordinary model directory of transformers

Does not train (train.py) and does not know prompts or data.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, constants, errors, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_LMS
from transformers.pytorch_utils import Conv1D

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for kernels we do not need
warnings.filterwarnings("ignore", "Detected pickle protocol")  # of .bin files that are read, or refused
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries: what becomes of them is an error
import bitsandbytes.functional as bnb  # noqa: E402
from bitsandbytes import matmul_4bit  # noqa: E402

LORA = ("r", "lora_alpha", "lora_dropout", "target_modules")  # peft's names
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODELS = {  # name: (hub id [choice.T9], compute dtype of section VI-C, billion parameters)
    "mistral": ("mistralai/Mistral-7B-Instruct-v0.2", "fp16", 7.2),
    "phi-2": ("microsoft/phi-2", "bf16", 2.8),
    "stablelm": ("stabilityai/stablelm-tuned-alpha-3b", "fp16", 3.6),
    "flan-t5": ("google/flan-t5-xl", "bf16", 2.8),
}
SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what a machine without a GPU can train
DRIVER = Path("/proc/driver/nvidia/version")
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", id)  # glibc keeps what is freed; elsewhere a no-op
WINDOWS = ("window", "window_size", "window_len", "chunk_size")  # ends of what configs call it
NOT_IN_MODULES = (  # tensors of older checkpoints that are computed, or stored once more
    "rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias",
    "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")


# ---- NF4 (QLoRA section 3) ----


class NF4Linear(nn.Module):
    """x W^T + b, the frozen W in 4-bit NormalFloat and its scales quantized once more (double quantization).

    Source: QLoRA, equations 5 and 6. W is dequantized for each product, and again in backward.
    Shapes: x (..., D_in) -> (..., D_out), in the dtype of x.
    """

    weight = None  # T5 casts the input of `wo` to the dtype of its weight, if there is one

    def __init__(self, weight, bias, device):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, self.state = bnb.quantize_4bit(  # [nf4.5]
            weight.to(device), blocksize=64, compress_statistics=True, quant_type="nf4")
        self.register_buffer("packed", packed, persistent=False)
        self.bias = bias

    def forward(self, x):
        return matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=self.bias)  # [nf4.6]

    def dequantize(self):
        """W (D_out, D_in) in the compute dtype."""
        return bnb.dequantize_4bit(self.packed, self.state)


def is_linear(module):
    """Whether a module is a product with its weight: other subclasses of nn.Linear, routers, do more."""
    return type(module).__name__ in ("Linear", "FalconLinear", "NF4Linear")


# ---- LoRA layer (LoRA eq. 3) ----


def dropout(x, p):
    """x with a share p of its entries 0, to the nearest 65,536th, and the rest scaled up to keep the mean.

    On a CPU 16 random bits decide on an entry, four entries a number: 2 to 4 times as fast as F.dropout.
    """
    if x.is_cuda:
        return F.dropout(x, p)
    cut = min(round(p * 65536), 65535)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape)
    torch.ge(keep, cut - 32768, out=keep)  # 0 or 1 in place: a bool tensor is slow to convert
    factor = torch.tensor(65536 / (65536 - cut), dtype=x.dtype)
    if x.element_size() == 2:  # an integer 1 times the bits of the factor is the factor
        return x * keep.mul_(factor.view(torch.int16)).view(x.dtype)
    return x * keep.to(x.dtype).mul_(factor)


class SharedDropout(nn.Module):
    """Dropout for all layers of one parent: those that read the same tensor (q, k, v; gate, up) get one mask.

    Each of them alone sees ordinary dropout; the mask is drawn once.
    """

    def __init__(self, p, parent):
        super().__init__()
        self.p, self.source, self.dropped = p, None, None
        parent.register_forward_hook(self.release, always_call=True)

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if self.source is not x:
            self.source, self.dropped = x, dropout(x, self.p)
        return self.dropped

    def release(self, *_):
        """Forgets the tensors when the parent is done: they live no longer than autograd needs them."""
        self.source = self.dropped = None


def cast_together(model, dtype):
    """Lets a pass through a model cast its LoRA weights in one buffer, and its backward add to .grad at once.

    It is as exact, sums are in fp32, and saves three launches for each weight, a sixth of all.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    weights = [weight for layer in layers for weight in (layer.lora_A, layer.lora_B)]

    def parts(flat):
        pairs = zip(flat.split([weight.numel() for weight in weights]), weights, strict=True)
        return [part.view_as(weight) for part, weight in pairs]

    def add(flat):
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch._foreach_add_([weight.grad for weight in weights], parts(flat.grad))

    def cast(*_):
        flat = torch.cat([weight.detach().flatten() for weight in weights])
        if torch.is_grad_enabled():
            flat.requires_grad_().register_post_accumulate_grad_hook(add)
        halves = parts(flat.to(dtype))
        for k, layer in enumerate(layers):
            layer.cast = halves[2 * k: 2 * k + 2]

    def release(*_):
        for layer in layers:
            layer.cast = None

    if layers:  # else T5's encoder, of which nothing is a target
        model.register_forward_pre_hook(cast)
        model.register_forward_hook(release, always_call=True)


class LoRALinear(nn.Module):
    """h = W0 x + (alpha / r) B A x, with W0 frozen.

    Source: LoRA (Hu et al. 2021), equation 3; the factor alpha / r from its section 4.1.
    Shapes: x (..., D_in) -> (..., D_out); lora_A (r, D_in); lora_B (D_out, r), both in fp32.
    """

    weight = None  # as in NF4Linear

    def __init__(self, base, r, lora_alpha, dropout, device):
        super().__init__()
        self.base = base
        self.scaling, self.dropout, self.cast = lora_alpha / r, dropout, None
        drawn = nn.init.kaiming_uniform_(torch.empty(r, base.in_features), a=math.sqrt(5))  # on the CPU:
        self.lora_A = nn.Parameter(drawn.to(device))  # the same on unlike devices
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # B A = 0 at the start

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        h, (A, B) = self.base(rows), self.cast or (self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        h.addmm_(F.linear(self.dropout(x).reshape(rows.shape), A), B.t(), alpha=self.scaling)  # [lora.3]
        return h.view(*x.shape[:-1], -1)


def add_lora(model, r=2, lora_alpha=32, lora_dropout=0.05, target_modules=None, name="the model"):
    """Freezes the base and puts a LoRALinear around its linear layers; returns the names of their last parts.

    All linear layers but the last are taken, or those whose name ends in one of target_modules.
    If model.last_layer_trains, the last one becomes an fp32 copy that trains, not tied to the embeddings.
    Raises: ValueError if r or lora_dropout is out of range or a target matches no linear layer.
    """
    if r < 1 or not 0 <= lora_dropout < 1:
        raise ValueError(f"--lora_r {r} must be at least 1, --lora_dropout {lora_dropout} from 0 to below 1")
    model.requires_grad_(False)
    linear = {key: module for key, module in model.named_modules()
              if is_linear(module) and key.split(".")[0] not in model.last_layer}
    present = {key.split(".")[-1] for key in linear}
    targets = set(target_modules or present)  # [choice.T3]
    if not targets or (missing := sorted(targets - present)):
        what = f"--target_modules {missing} match no" if targets else "there is no"
        raise ValueError(f"{what} linear layer of {name}; it has {sorted(present)}")
    first, dropouts = next(model.parameters()), {}
    for key, module in linear.items():
        parent, _, child = key.rpartition(".")
        if child in targets:
            if parent not in dropouts:
                dropouts[parent] = SharedDropout(lora_dropout, model.get_submodule(parent))
            model.set_submodule(key, LoRALinear(module, r, lora_alpha, dropouts[parent], first.device))
    for part in model.modules() if first.dtype != torch.float32 else ():
        if isinstance(part, PreTrainedModel):
            cast_together(part, first.dtype)
    for key in model.last_layer if model.last_layer_trains else ():
        train_in_fp32(last := copy.deepcopy(model.get_submodule(key)), first.device)
        last.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        model.set_submodule(key, last)
    model.lora = dict(zip(LORA, (r, lora_alpha, lora_dropout, sorted(targets)), strict=True))
    return sorted(targets)


# ---- Attention, and a prefix that many rows share ----


def grouped_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """softmax(scaling Q K^T + mask) V as plain products: what a CPU is given.

    PyTorch's fused CPU kernel takes 2 to 4 times as long at prompts of this length, most of it in backward.
    Query heads that share a key are rows of one product, so keys and values are not repeated for them.
    Shapes: query (B, H, T, D); key, value (B, G, S, D), G a divisor of H; mask (B, 1, T, S), which is added
    -> (B, T, H, D).
    """
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    weights = ((query * scaling).reshape(B, G, -1, D) @ key.transpose(2, 3)).view(B, H, T, S)
    weights = F.dropout(torch.softmax(weights.add_(attention_mask), dim=-1), dropout)
    return (weights.view(B, G, -1, S) @ value).view(B, H, T, D).transpose(1, 2), None


def packing(attend):
    """attend, which then also takes a prefix and the B rows behind it as one sequence (B is 1 outside).

    Such a sequence is known by its mask of one row, (1, 1, T, prefix + T): the prefix attends to itself, then
    each row to the prefix and itself. Keys and values of grouped queries stay grouped.
    """
    def attention(module, query, key, value, mask, scaling, dropout=0.0, **more):
        if mask is None or mask.shape[2] == query.shape[2]:
            return attend(module, query, key, value, mask, scaling=scaling, dropout=dropout, **more)
        T, prefix = mask.shape[2], mask.shape[3] - mask.shape[2]
        shared = [x[:, :, :prefix] for x in (query, key, value)]
        rows = [x[0, :, prefix:].unflatten(1, (-1, T)).transpose(0, 1) for x in (query, key, value)]
        rows[1:] = (torch.cat([s.expand(len(r), -1, -1, -1), r], 2) for s, r in zip(shared[1:], rows[1:]))
        if (query.is_cuda and query.dtype != torch.float32 and query.shape[-1] in range(8, 257, 8)
                and torch.cuda.get_device_capability(query.device)[0] >= 8):  # flash aligns the ends
            states = [torch.ops.aten._scaled_dot_product_flash_attention(*part, dropout, True, scale=scaling)
                      [0].transpose(1, 2) for part in (shared, rows)]
        else:
            own = torch.full_like(mask[0, 0, :1, :1], torch.finfo(mask.dtype).min).expand(prefix, prefix)
            states = [attend(module, *part, added, scaling=scaling, dropout=dropout)[0]
                      for part, added in ((shared, own.triu(1)[None, None]), (rows, mask))]
        return torch.cat([states[0], states[1].flatten(0, 1)[None]], 1), None

    return attention


def decoder_states(backbone, input_ids, prefix=0):
    """Last hidden states of right-padded prompts: a causal model never looks right, so no mask is needed.

    The first `prefix` tokens, if they are the same in all rows, are run once with gradient: in one sequence
    with the rows behind them where the attention can tell them apart, else as one row with a cache.
    Shapes: input_ids (B, T) -> (B, T - prefix, D).
    """
    if not prefix:
        return backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    B, T = input_ids.shape
    if T <= backbone.packs:
        packed = torch.cat([input_ids[0, :prefix], input_ids[:, prefix:].flatten()])
        positions = torch.arange(T, device=packed.device)
        positions = torch.cat([positions[:prefix], positions[prefix:].repeat(B)])
        dtype = backbone.get_input_embeddings().weight.dtype
        mask = torch.full((T - prefix, T), torch.finfo(dtype).min, dtype=dtype, device=packed.device)
        states = backbone(input_ids=packed[None], position_ids=positions[None], use_cache=False,
                          attention_mask=mask.triu(prefix + 1)[None, None]).last_hidden_state
        return states[0, prefix:].unflatten(0, (B, T - prefix))
    cache = backbone(input_ids=input_ids[:1, :prefix], use_cache=True).past_key_values
    for layer in cache.layers:  # autograd sums the gradients of the rows
        layer.keys, layer.values = (x.expand(B, -1, -1, -1) for x in (layer.keys, layer.values))
    return backbone(input_ids=input_ids[:, prefix:], past_key_values=cache, use_cache=True).last_hidden_state


def recompute_layers(model):
    """Keeps no activations inside the layers: backward computes them again, at the price of a forward.

    The shared prefix, whose keys and values are kept, is given up for it.
    """
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model.shares_prefix = False


@torch.no_grad()
def fuse(model):
    """Gives RMSNorms and gated MLPs the forwards below, what a GPU needs, if they compute what theirs do."""
    def norm(self, x):  # one kernel, which keeps its input alone for backward
        return F.rms_norm(x, x.shape[-1:], self.weight, getattr(self, "variance_epsilon", 0) or self.eps)

    def mlp(self, x):  # gate and up are kept; backward computes the product again
        return self.down_proj(checkpoint(lambda gate, up: self.act_fn(gate) * up, self.gate_proj(x),
                                         self.up_proj(x), use_reentrant=False, preserve_rng_state=False))

    weight = model.get_input_embeddings().weight
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and hasattr(module, "weight"):
            fused, width = functools.partial(norm, module), module.weight.numel()
        elif {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            fused, width = functools.partial(mlp, module), module.gate_proj.in_features
        else:
            continue
        x = torch.linspace(-1, 2, width, device=weight.device).to(weight.dtype)[None]
        if (fused(x) - module(x)).norm().item() <= 0.02 * module(x).norm().item():  # not Gemma's 1 + weight
            module.forward = fused


# ---- Heads, by the names of transformers ----


def train_in_fp32(head, device):
    """Moves a head that was drawn on the CPU, the same for unlike devices, and lets it train."""
    for part in head.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(device, torch.float32)))


class LastTokenClassifier(nn.Module):
    """logits = W h at the last real token of the prompt: a new linear layer on a decoder.

    Source: section IV-B. Names and bias as transformers' MistralForSequenceClassification.
    Shapes: input_ids (B, T) padded on the right; lengths (B,) -> logits (B, L) in fp32.
    """

    last_layer, last_layer_trains = ("score",), True

    def __init__(self, backbone, n_labels, device):
        super().__init__()
        self.config, self.base_model_prefix = backbone.config, backbone.base_model_prefix
        self.fingerprint, self.shares_prefix = backbone.fingerprint, backbone.shares_prefix
        setattr(self, self.base_model_prefix, backbone)
        width = getattr(self.config, "word_embed_proj_dim", self.config.hidden_size)  # OPT-350m narrows
        self.score = nn.Linear(width, n_labels, bias=False)
        nn.init.normal_(self.score.weight, std=getattr(self.config, "initializer_range", 0.02))
        train_in_fp32(self.score, device)

    def forward(self, input_ids, lengths, prefix=0):
        states = decoder_states(getattr(self, self.base_model_prefix), input_ids, prefix)
        rows = torch.arange(len(states), device=states.device)
        return self.score(states[rows, lengths - 1 - prefix].float())  # [cls.head], never by the pad id


class T5Classifier(nn.Module):
    """logits = W2 tanh(W1 h + b1) + b2 at the last token of T5's decoder, which reads the prompt too.

    Source: T5ForSequenceClassification of transformers: the decoder's input is the encoder's, shifted right.
    Shapes: input_ids (B, T) padded on the right; lengths (B,) -> logits (B, L) in fp32.
    """

    last_layer, last_layer_trains, shares_prefix = ("classification_head",), True, False

    def __init__(self, backbone, n_labels, device):
        super().__init__()
        self.config, self.transformer, self.fingerprint = backbone.config, backbone, backbone.fingerprint
        width = self.config.d_model
        self.classification_head = nn.ModuleDict({
            "dense": nn.Linear(width, width), "out_proj": nn.Linear(width, n_labels)})
        for layer in self.classification_head.values():
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)
        train_in_fp32(self.classification_head, device)

    def forward(self, input_ids, lengths, prefix=0):
        shifted = F.pad(input_ids[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        states = self.transformer(input_ids=input_ids, attention_mask=real_tokens(input_ids, lengths),
                                  decoder_input_ids=shifted, use_cache=False).last_hidden_state
        h = states[torch.arange(len(states), device=states.device), lengths - 1].float()
        for name, activation in (("dense", torch.tanh), ("out_proj", nn.Identity())):  # [cls.t5]
            h = F.dropout(h, self.config.classifier_dropout, self.training)
            h = activation(self.classification_head[name](h))
        return h


def real_tokens(input_ids, lengths):
    """Attention mask (B, T) of right-padded rows: 1 where a token is real."""
    return (torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]).long()


def response_logits(model, input_ids, lengths, rows, columns, response_ids=None, prefix=0):
    """Logits at the given positions only: of a decoder's sequence, or of T5's response.

    Shapes: input_ids (B, T), a decoder's prompt and response or T5's prompt; lengths (B,) of it; response_ids
    (B, R), T5's response; rows and columns (K,): the K tokens that are predicted -> logits (K, V) in fp32.
    """
    config = model.config
    if not config.is_encoder_decoder:  # a token is predicted by the one before it
        states = decoder_states(model.base_model, input_ids, prefix)[rows, columns - 1 - prefix]
    else:
        shifted = F.pad(response_ids[:, :-1], (1, 0), value=config.decoder_start_token_id)
        mask = real_tokens(input_ids, lengths)
        encoded = model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        states = model.decoder(input_ids=shifted, encoder_hidden_states=encoded, encoder_attention_mask=mask,
                               use_cache=False).last_hidden_state[rows, columns]
        if config.scale_decoder_outputs:  # only where the head is the embedding
            states = states * config.d_model**-0.5
    logits = model.get_output_embeddings()(states).float()
    logits = logits * (getattr(config, "logit_scale", 0) or 1) / (getattr(config, "logits_scaling", 0) or 1)
    cap = getattr(config, "final_logit_softcapping", None)  # Cohere's and Granite's factors, Gemma 2's cap
    return torch.tanh(logits / cap) * cap if cap else logits


# ---- The hub ----


def hub_id(model):
    """The hub id of a short name of MODELS; a hub id or a directory stays what it is."""
    return MODELS[model][0] if model in MODELS else str(model)


def by_turns(work, turns=(True, False)):
    """work() on the first process of each machine, then on the others, which find what it fetched.

    With turns (None,) on all at once. An error is raised where it came first; the other processes end without
    a word: one line in all.
    """
    if not dist.is_initialized():
        return work()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))  # of a slow line, too
    said, rank, error = [False] * dist.get_world_size(), dist.get_rank(), None
    for turn in turns:
        try:
            if turn in (None, int(os.environ.get("LOCAL_RANK", rank)) == 0):
                result = work()
        except (ValueError, OSError) as reason:
            error = reason
        dist.all_gather_object(said, error is not None, group)
        if any(said):
            raise error if error and said.index(True) == rank else SystemExit(2)
    return result


@contextlib.contextmanager
def in_a_line(model, what, revision, *others):
    """Makes a FileNotFoundError that says what to do of an error of the hub, or of `others`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, errors.HTTPError, *others) as error:
        chain, page = [error], f"{constants.ENDPOINT}/{hub_id(model)}"
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        kinds = {kind for one in chain for kind in type(one).__mro__}
        answer = next((one.response for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
        status = getattr(answer, "status_code", 0)
        silent = bool(kinds & {errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled})
        login, cache = f"see its licence at {page}, `hf auth login` or HF_TOKEN", constants.HF_HUB_CACHE
        cached = sorted(path.name[8:].replace("--", "/") for path in Path(cache).glob("models--*"))
        why = f"status {status}" if status else f"{type(chain[-1]).__name__}: {chain[-1]}"[:120]
        reason = next(text for holds, text in (
            (errors.GatedRepoError in kinds or status == 403, f"it is gated or private: {login}"),
            (errors.RevisionNotFoundError in kinds,
             f"--revision {revision} is no branch, tag or commit of {page}"),
            (errors.RepositoryNotFoundError in kinds or status == 401,
             f"the hub finds nothing of this name, or it is private ({login}); or use {sorted(MODELS)}"),
            (silent and constants.HF_HUB_OFFLINE,
             f"HF_HUB_OFFLINE is set, and {cache} finds nothing for {what}, but files of {cached}: fetch it "
             "where there is a network, or give a directory"),
            (silent or status or errors.HTTPError in kinds,
             f"{constants.ENDPOINT} does not give {what} ({why}): the same command goes on later; with "
             "HF_HUB_OFFLINE=1 it uses what is there"),
            (True, f"{what} finds nothing that it knows in the directory or on the hub ({why}); give "
             f"{sorted(MODELS)}, a hub id or a directory")) if holds)
        raise FileNotFoundError(f"--model {model}: {' '.join(reason.split())}") from None


def from_hub(auto, model, revision=None):
    """The config or tokenizer of a model. Raises: FileNotFoundError if there is none."""
    with in_a_line(model, auto.__name__, revision, KeyError, TypeError, AttributeError, ImportError,
                   errors.StrictDataclassError):
        return auto.from_pretrained(hub_id(model), revision=revision, trust_remote_code=False)


def find(model, name, revision=None, needed=True, dry_run=False):
    """Path of a file of the model's directory or repository, fetched if need be; None if there is none.

    With dry_run nothing is fetched, and the hub's record of the file takes the place of a path. Offline, what
    is not needed may be missing. Raises: FileNotFoundError if the hub does not answer.
    """
    hub = hub_id(model)
    if Path(hub).is_dir():
        return str(path) if (path := Path(hub, name)).is_file() else None
    lines = dict(mininterval=15, delay=15, miniters=1, bar_format="{desc}: {n_fmt} of {total_fmt}B\n")
    progress = functools.partial(tqdm, **{} if sys.stderr.isatty() else lines)
    with in_a_line(model, name, revision):
        cached = try_to_load_from_cache(hub, name, revision=revision)
        if not isinstance(cached, str) and (cached or constants.HF_HUB_OFFLINE and not needed):
            return None  # known not to exist, or not known
        with contextlib.suppress(errors.RemoteEntryNotFoundError):
            return hf_hub_download(hub, name, revision=revision, tqdm_class=progress, dry_run=dry_run)
    return None


def commit_of(model, revision=None):
    """The commit that a revision of a hub model stands for, None for a directory."""
    path = find(model, "config.json", revision)
    return Path(path).parent.name if path and not Path(hub_id(model)).is_dir() else None


def load_tokenizer(model_name, revision=None):
    """The model's tokenizer."""
    return from_hub(AutoTokenizer, model_name, revision)


def load_config(model_name, revision=None, dtype=None):
    """The config of a decoder or a T5. Raises: ValueError for what is neither, FileNotFoundError."""
    config = from_hub(AutoConfig, model_name, revision)
    kind, packed = config.model_type, getattr(config, "quantization_config", None)
    decoder = kind in CAUSAL_LMS and kind not in MASKED_LMS and not config.is_encoder_decoder
    states = {*(getattr(config, "layer_types", None) or ())}
    states -= {"full_attention", "sliding_attention", "chunked_attention"}
    for wrong, reason in (
            (kind != "t5" and not decoder, f"is of type {kind}; use a decoder-only model or a T5"),
            ({"text_config", "vision_config", "audio_config"} & {*config.sub_configs},
             f"is of type {kind}, not of text alone; use one that is"),
            (packed, f"is quantized already ({packed and packed.get('quant_method')}); use its original"),
            (states, f"has no cache of keys and values in {sorted(states)}; use a transformer"),
            (kind == "t5" and dtype == torch.float16,  # [choice.T5]
             "is a T5, which overflows in fp16; use --dtype bf16 or fp32")):
        if wrong:
            raise ValueError(f"--model {model_name} {reason}")
    return config


# ---- What is judged before the weights are fetched ----


def default_dtype(model):
    """The paper's dtype for its models, else bf16, where this machine has units for bf16.

    Without them a GPU computes in fp16, but for T5, and a CPU in fp32: bf16 would take 4 times as long there.
    """
    dtype, gpu = MODELS.get(str(model), ("", "bf16"))[1], torch.cuda.is_available()
    has_bf16 = gpu and torch.cuda.get_device_capability()[0] >= 8
    if not gpu:
        units = torch.cpu.get_capabilities()  # the last of these is ARM's
        has_bf16 = any(units.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    if dtype == "fp16" or has_bf16:
        return dtype
    return "fp16" if gpu and "t5" not in Path(model).name.lower() else "fp32"


def idle_gpu():
    """Why torch does not use the NVIDIA GPU of this machine; empty if it does, or if there is none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if hidden or torch.cuda.is_available() or not DRIVER.exists():
        return ""
    version = re.search(r"Module\D*([\d.]+)", DRIVER.read_text())
    needs = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    return (f"torch {torch.__version__} {needs} and does not find this machine's GPU (NVIDIA driver "
            f"{version[1] if version else '?'}): update the driver, or install a torch for it (pytorch.org)")


def check_by_name(name, device):
    """Raises ValueError, before anything is downloaded, for a model that this machine is no match for."""
    if name in MODELS and torch.device(device).type == "cpu":
        raise ValueError(f"--model {name} has {MODELS[name][2]} billion parameters and this machine has no "
                         f"GPU: {idle_gpu() or 'use one'}, or a smaller model, such as --model {SMALL_MODEL}")


def check_fits(model, name, quantize, dtype, device):
    """Raises ValueError if this machine's memory cannot hold the weights; the model is still on meta."""
    linear = sum(m.weight.numel() for m in model.modules() if is_linear(m))
    total, size = sum(p.numel() for p in model.parameters()), torch.finfo(dtype).bits / 8
    need = (total - linear) * size + linear * (0.52 if quantize == "nf4" else size)  # 4 bits and the scales
    have, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    if torch.device(device).type == "cuda":
        have, where = torch.cuda.get_device_properties(device).total_memory, "this GPU"
    if need > 0.95 * have:
        raise ValueError(f"--model {name} has {total / 1e9:.1f} billion parameters ({need / 1e9:.1f} GB) but "
                         f"{where} has {have / 1e9:.0f} GB: use a smaller one, such as --model {SMALL_MODEL}")


def key_of(stored, model, family):
    """The parameter that a tensor of a checkpoint is for, None for one that is not needed."""
    prefix, key = model.base_model_prefix + ".", stored.replace("embed_out.", "lm_head.")  # GPT-NeoX
    for one in (key, key.removeprefix(prefix), prefix + key):
        if one in model.wanted:
            return one
    if key.endswith(NOT_IN_MODULES) or family == "cls" and not stored.startswith(prefix):  # of its head
        return None
    raise ValueError(f"the checkpoint has {stored}, a tensor that {type(model).__name__} does not have: use "
                     "another model")


def check_names(names, model, name, family):
    """Raises ValueError if the tensors of a checkpoint are not those of the model."""
    tied = model.last_layer[:model.config.tie_word_embeddings]
    found = {key_of(one, model, family) for one in names} | {f"{head}.weight" for head in tied}
    if missing := sorted(model.wanted - found):
        raise ValueError(f"the checkpoint of {name} lacks {len(missing)} tensors, such as {missing[0]}")


def checkpoint_files(model, revision=None, check=len):
    """Paths of the model's weights, fetched if need be: of safetensors if there are any, else of .bin files.

    check(names of the tensors) comes before they are fetched. Raises: FileNotFoundError if one is not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors"):
        shards, names, index = [name], (), find(model, f"{name}.index.json", revision, needed=False)
        if index or find(model, name, revision, needed=False, dry_run=True):
            break
    if index:
        try:
            names = json.loads(Path(index).read_text())["weight_map"]
            shards = sorted(set(names.values()))
            if odd := [shard for shard in shards if Path(shard).name != shard]:
                raise ValueError(f"{odd} are not files beside it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of weights ({error!r}); restore it") from None
    files = [find(model, shard, revision, dry_run=True) for shard in shards]
    if None in files:
        raise FileNotFoundError(f"--model {model} lacks {shards[files.index(None)]}; use a whole model")
    if size := sum(one.file_size or 0 for one in files if not isinstance(one, str) and one.will_download):
        if not names and name == "model.safetensors":
            with in_a_line(model, name, revision, errors.SafetensorsParsingError):
                names = HfApi().parse_safetensors_file_metadata(
                    hub_id(model), name, revision=revision).tensors
        cache = Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        if size > free:
            raise ValueError(f"--model {model} has {size / 1e9:.1f} GB to fetch, {cache} {free / 1e9:.1f} "
                             "free: make room, or set HF_HOME to a directory on another disk")
        print(f"{len(shards)} files of {hub_id(model)}, {size / 1e9:.2f} GB, are fetched", file=sys.stderr)
    if names:
        check(names)
    return [find(model, shard, revision) for shard in shards]


def empty_base(model_name, family, quantize, dtype, device, revision):
    """Returns (the base without memory, the files of its weights): all is judged before these are fetched."""
    config = load_config(model_name, revision, dtype)
    t5, ends = config.model_type == "t5", [config.eos_token_id]
    auto = AutoModel if family == "cls" else AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json of {model_name} describes no model ({error!r}); restore it") from None
    if model._is_stateful:
        raise ValueError(f"--model {model_name} has no cache of keys and values; use a transformer")
    for key, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # GPT-2's: a linear layer whose weight lies the other way round
            model.set_submodule(key, linear := nn.Linear(module.nx, module.nf, device="meta"))
            linear.transposed = True
    check_fits(model, model_name, quantize, dtype, device)
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"  # Llama 4 names another one
    output = model.get_output_embeddings()
    model.last_layer = tuple(key for key, module in model.named_modules() if output and module is output)[:1]
    model.wanted = {*dict(model.named_parameters()), *(f"{head}.weight" for head in model.last_layer)}
    if find(model_name, "generation_config.json", revision, needed=False):
        ends.append(from_hub(transformers.GenerationConfig, model_name, revision).eos_token_id)
    model.end_tokens = {one for end in ends for one in (end if isinstance(end, list) else [end])} - {None}
    return model, checkpoint_files(model_name, revision,
                                   lambda names: check_names(names, model, model_name, family))


# ---- The streaming loader ----


def stored_tensors(path):
    """Yields (name, tensor) of a file of weights, opened anew for each: what was read leaves the memory.

    Raises: ValueError if the file is truncated, broken, or a pickle of more than weights, which may run code.
    """
    safe = not str(path).endswith(".bin")
    try:
        mapped = safe or zipfile.is_zipfile(path)  # a file of torch before 1.6 is not: it is read whole

        def opened():
            return safe_open(path, "pt") if safe else torch.load(path, "cpu", weights_only=True, mmap=mapped)

        state = opened()
        for name in list(state.keys()):
            again = opened() if mapped else state
            yield name, again.get_tensor(name) if safe else again[name].detach()
    except (SafetensorError, torch.serialization.pickle.UnpicklingError, RuntimeError, EOFError, LookupError,
            AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"{path} is not a whole file of weights and nothing else ({reason}); restore it, or "
                         "use another model") from None


def fill(model, files, name, family, nf4, dtype, device):
    """Streams a checkpoint into an empty base. Raises: ValueError if they do not fit each other."""
    for module in model.modules():  # buffers are computed, not stored: rotary frequencies
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for leaf, buffer in module.named_buffers(recurse=False):
                setattr(module, leaf, torch.empty_like(buffer, device=device))
            model._init_weights(module)
    embeddings, names, beginnings = model.get_input_embeddings(), [], hashlib.sha256()
    head, found = next((f"{key}.weight" for key in model.last_layer), None), set()
    for file in files:
        for stored, tensor in stored_tensors(file):
            start = tensor.flatten()[:64].contiguous().view(torch.uint8).numpy()
            beginnings.update(f"{stored} {tuple(tensor.shape)}".encode() + start.tobytes())
            names.append(stored)
            if (key := key_of(stored, model, family)) is None:
                continue
            found.add(key)
            parent, _, leaf = key.rpartition(".")
            module = model.get_submodule(parent)
            if leaf == "weight" and hasattr(module, "transposed"):
                tensor = tensor.t().contiguous()
            if tensor.shape != (expected := getattr(module, leaf).shape):
                raise ValueError(f"{key} has shape {tuple(tensor.shape)} in the checkpoint of {name}, not "
                                 f"{tuple(expected)}")
            if nf4 and leaf == "weight" and is_linear(module) and key != head:
                model.set_submodule(parent, NF4Linear(tensor.to(dtype), module.bias, device))
            else:
                setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
            malloc_trim(0)
    check_names(names, model, name, family)
    model.set_input_embeddings(embeddings)  # T5: the encoder's and the decoder's are the shared one
    if head and head not in found:
        model.get_output_embeddings().weight = embeddings.weight
    model.last_layer_trains, model.fingerprint = False, beginnings.hexdigest()


def load_base(model_name, family, quantize="nf4", dtype=torch.float32, device="cpu", revision=None):
    """Returns the frozen base with its checkpoint's weights: the backbone for `cls`, with LM head otherwise.

    Host memory stays within a few tensors of what the model itself takes.
    Raises: FileNotFoundError; ValueError if model, machine and checkpoint do not fit each other.
    """
    def work():
        fill(model, files, model_name, family, quantize == "nf4", dtype, device)
        choose_ways(model.requires_grad_(False), model_name, family)

    model, files = by_turns(lambda: empty_base(model_name, family, quantize, dtype, device, revision))
    by_turns(work, (None,))
    fused = sum(p.numel() for p in model.parameters() if p.dim() > 2)
    if fused and os.environ.get("RANK", "0") == "0":
        print(f"{fused / count_parameters(model)[0]:.0%} of the weights of {model_name} are fused experts: "
              "neither quantized nor adapted", file=sys.stderr)
    return model


@torch.no_grad()
def choose_ways(model, name, family):
    """Chooses attention and shared prefix by comparing our forward with transformers' own on two rows.

    Raises: ValueError if they differ whatever is chosen.
    """
    config, t5 = model.config, model.config.is_encoder_decoder
    known, embeddings, own = config.to_dict(), model.get_input_embeddings(), config._attn_implementation
    windows = [size for key, size in known.items() if key.endswith(WINDOWS) and type(size) is int]
    alibi = config.model_type in ("bloom", "mpt") or known.get("alibi")  # counts all padding
    growing = any(kind in str(known.get("rope_parameters")) for kind in ("dynamic", "longrope"))  # reads all
    model.window, model.shares_prefix = min((size for size in windows if size > 0), default=math.inf), False
    if t5 and family == "cls":
        return  # T5Classifier calls it as it is
    device, tolerance = embeddings.weight.device, 1e-3 if embeddings.weight.dtype == torch.float32 else 0.1
    ids = (torch.arange(48, device=device) * 7919 % embeddings.num_embeddings).view(2, 24)
    ids[1, :8], rows, lengths = ids[0, :8], torch.arange(2, device=device), torch.full_like(ids[:, 0], 24)
    attend, masks = (grouped_attention, "eager") if device.type == "cpu" else (sdpa_attention_forward, "sdpa")
    AttentionInterface.register("packing", packing(attend))
    AttentionMaskInterface.register("packing", ALL_MASK_ATTENTION_FUNCTIONS[masks])
    sinks = any(key.endswith("sinks") for key in model.wanted)
    ways = [("packing", model.window, 8), ("packing", 0, 8), ("packing", 0, 0)]  # one pass, two, none
    if not model._supports_attention_backend or sinks or known.get("attn_logit_softcapping"):
        ways = []
    ways += [(own, 0, 8), (own, 0, 0)]

    def differs(prefix):
        try:
            found = (decoder_states(model, ids, prefix)[:, -1] if family == "cls" else
                     response_logits(model, ids, lengths, rows, lengths - int(t5), ids, prefix))
        except RuntimeError:  # of shapes: its attention is not told about the prefix
            return True
        return (found - theirs).norm().item() > tolerance * theirs.norm().item()

    try:
        start = F.pad(ids[:, :-1], (1, 0), value=config.decoder_start_token_id) if t5 else None
        theirs = model(input_ids=ids, **{"decoder_input_ids": start} if t5 else {})[0][:, -1].float()
        for kind, packs, prefix in ways:
            model.set_attn_implementation(kind)
            model.base_model.packs, model.shares_prefix = packs, prefix > 0
            if not (prefix and (t5 or alibi or growing)) and not any(map(differs, {0, prefix})):
                return
        raise ValueError("its logits are not a linear layer on the last states of its decoder")
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"--model {name} of type {config.model_type} cannot be used ({error}); use another "
                         "model, or --method cls or clsp") from None


def build_model(model_name, family, n_labels, quantize="nf4", dtype=torch.float32, device="cpu",
                revision=None):
    """Returns the model of a method's family: base and, for `cls`, its new head."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums of fp16 products in fp32
    base = load_base(model_name, family, quantize, dtype, device, revision)
    if torch.device(device).type == "cuda":
        fuse(base)
    if family != "cls":
        return base
    return (T5Classifier if base.config.model_type == "t5" else LastTokenClassifier)(
        base, n_labels, device).eval()


# ---- Adapters on disk, in peft's format ----


def adapter_state(model):
    """{peft's name: tensor} of all that trains, the head included (peft#577: a head that was not saved)."""
    return {f"base_model.model.{name}{'.weight' if name.endswith(('lora_A', 'lora_B')) else ''}": p.detach()
            for name, p in model.named_parameters() if p.requires_grad}


def write_atomically(path, write):
    """Calls write(temporary path) and renames: a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk: it depends on who writes
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def digest_of(tensors, text=""):
    """sha256 of named tensors with their dtypes and shapes, and of a text, in hex."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(model, directory, base_model, family, revision=None):
    """Writes adapter_model.safetensors and adapter_config.json, as PeftModel.from_pretrained reads them."""
    base = hub_id(base_model)
    lm_task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if family == "cls" else lm_task, "inference_mode": True,
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "revision": revision, **model.lora, "bias": "none",
        "modules_to_save": list(model.last_layer) if model.last_layer_trains else None,
    }
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    write_atomically(Path(directory, "adapter_model.safetensors"),
                     lambda path: save_file(state, path, {"sha256": digest_of(state)}))
    text = json.dumps(config, indent=1)
    write_atomically(Path(directory, "adapter_config.json"), lambda path: path.write_text(text))


def load_adapter(model, directory):
    """Fills the trainable parameters from adapter_model.safetensors, ours or peft's; returns its digest_of.

    Raises: FileNotFoundError; ValueError if the file is broken or its tensors are not exactly the model's.
    """
    path = Path(directory, "adapter_model.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; train first, or give the directory of a finished run")
    stored, own = dict(stored_tensors(path)), adapter_state(model)
    digest = digest_of(stored)
    with safe_open(path, "pt") as file:  # peft's has no sha256
        if (file.metadata() or {}).get("sha256", digest) != digest:
            raise ValueError(f"{path} is damaged: its tensors are not those that were written; restore it")
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (stored, own)]
    if odd := sorted(name for name in stored.keys() | own if shapes[0].get(name) != shapes[1].get(name)):
        there, here = (shape.get(odd[0], "missing") for shape in shapes)
        raise ValueError(f"{path} and the model differ in {len(odd)} tensors: {odd[0]} is {there} there, "
                         f"{here} here")
    for name, tensor in own.items():
        tensor.copy_(stored[name])
    return digest


@torch.no_grad()
def merge(model):
    """Puts one nn.Linear of W0 + (alpha / r) B A, dequantized, in the place of every LoRALinear."""
    for key, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            base = module.base
            weight = base.dequantize() if isinstance(base, NF4Linear) else base.weight
            merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            update = module.scaling * module.lora_B @ module.lora_A
            merged.weight = nn.Parameter((weight.float() + update).to(weight.dtype), requires_grad=False)
            merged.bias = base.bias
            model.set_submodule(key, merged)
    return model


def save_merged(run, out, base=None, dtype=None, device="cpu"):
    """Writes a finished run as a model that transformers loads without peft; returns the dtype of it.

    Raises: ValueError if `run` is none, `out` holds something, or the base is another one or elsewhere.
    """
    run, out = Path(run), Path(out)
    files = ["run.json" if (run / "run.json").exists() else "config.json", "adapter_config.json",
             "metrics_test.json"]
    try:
        record, adapter, result = (json.loads((run / name).read_bytes()) for name in files)
        given, names, cls = record["arguments"], result["labels"], adapter["task_type"] == "SEQ_CLS"
        base, dtype = base or adapter["base_model_name_or_path"], dtype or given["dtype"]
        quantize, revision, changed = given["quantize"], given["revision"], [adapter[key] for key in LORA]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not a finished run ({error!r})") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: give another name, or remove it")
    model = build_model(base, "cls" if cls else "lm", len(names), quantize, DTYPES[dtype], device, revision)
    if record.get("model_fingerprint", model.fingerprint) != model.fingerprint:
        raise ValueError(f"the weights of {base} are not those that {run} began with: merge RUN OUT BASE")
    model.last_layer_trains = bool(adapter["modules_to_save"])
    add_lora(model, *changed)
    load_adapter(model, run)
    tokenizer, config = load_tokenizer(base, revision), load_config(base, revision)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.pad_token_id, config.dtype = tokenizer.pad_token_id, DTYPES[dtype]
    config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    config.problem_type = "multi_label_classification" if cls else None
    config.tie_word_embeddings &= cls or not model.last_layer_trains
    auto = (transformers.AutoModelForSequenceClassification if cls else
            AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM)
    with torch.device("meta"):
        merged = auto.from_config(config)
    state = merge(model).to(DTYPES[dtype]).state_dict()
    turned = [f"{key}.weight" for key, module in merged.named_modules() if isinstance(module, Conv1D)]
    merged.load_state_dict(state | {key: state[key].t().contiguous() for key in turned}, assign=True)
    work = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of a command that was killed
    for part in (merged, tokenizer):
        part.save_pretrained(work)
    os.replace(work, out)
    return dtype


# ---- What is what ----


def count_parameters(model):
    """Returns (parameters of the base, of them quantized, trainable ones): true counts."""
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)  # [choice.T10]
    return frozen + quantized, quantized, sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe(model):
    """Yields lines: each module that stores weights, how, and what trains; then the counts."""
    for name, module in model.named_modules():
        own, nf4 = list(module.parameters(recurse=False)), isinstance(module, NF4Linear)
        if own or nf4:
            kind = "nf4" if nf4 else str(own[0].dtype).removeprefix("torch.")
            trainable = sum(p.numel() for p in own if p.requires_grad)
            train = f"{trainable:,} train" if trainable else "frozen"
            yield f"{name:<70}{type(module).__name__:<16}{kind:<10}{train}"
    total, quantized, trainable = count_parameters(model)
    yield (f"{total:,} parameters in the base, {quantized:,} of them in NF4; {trainable:,} train "
           f"({100 * trainable / (total + trainable):.3f}%)")


def add_arguments(parser):
    """The flags of the model and its adapter."""
    authors = "(default: %(default)s, the authors' config)"
    parser.add_argument("--revision", help="branch, tag or commit of a hub model (default: main)")
    parser.add_argument("--quantize", choices=("nf4", "none"), default="nf4", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: the paper's for its models, else bf16)")
    parser.add_argument("--lora_r", type=int, default=2, help=f"rank {authors}")
    parser.add_argument("--lora_alpha", type=float, default=32, help=f"scale of the update times r {authors}")
    parser.add_argument("--lora_dropout", type=float, default=0.05, help=f"share of dropped inputs {authors}")
    parser.add_argument("--target_modules", nargs="+", help="(default: all linear layers but the last)")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print modules and what trains.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("model", nargs="+",
                        help=f"{', '.join(MODELS)}, a hub id or a directory; or: merge RUN OUT [BASE]")
    parser.add_argument("--family", choices=("cls", "lm"), default="cls", help="(default: %(default)s)")
    parser.add_argument("--n_labels", type=int, default=28, help="(default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.model, *places = args.model
    if len(places) not in ((2, 3) if args.model == "merge" else (0,)):
        parser.error("give one model, or: merge RUN OUT [BASE]")
    dtype = args.dtype or default_dtype(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if places:
            run, out, base = (*places, None)[:3]
            print(f"{out}: {save_merged(run, out, base, args.dtype, device)}; transformers loads it")
            return 0
        check_by_name(args.model, device)
        model = build_model(args.model, args.family, args.n_labels, args.quantize, DTYPES[dtype], device,
                            args.revision)
        add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules, args.model)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    print("\n".join(describe(model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
