"""The scripts on a simulated CUDA card: shapes, dtypes, devices and bytes of every tensor, but no values.

    python tests/fake_cuda.py steps MODELS_DIR DATA_DIR        tiny models: training, scores and decoding
    python tests/fake_cuda.py table [--models M ...] [--families cls lm] [--gigabytes 24 48 80]

A line of the table is the share of one of four GPUs in a step of the paper's recipe, 32 prompts, at full
size (NF4, 185 tokens of which 50 are shared, 28 labels or a response of 6 tokens), with what
`--micro_batch_tokens auto` chooses on such a card: that number, the peak of the step, and the kernels
launched for a micro-batch.

torch's FakeTensorMode runs the scripts themselves. A torch without CUDA lacks two things for that: a guard
that switches devices (below, in C++, it does nothing; so g++ is needed) and CUDA's choice of kernels for
attention and RMSNorm, which is a rule here. It finds tensors on two devices, products of two dtypes, waits
of the host and what is alive when. It knows nothing of values, speed, NCCL and holes in the memory; 0.7 GB
of each card are left to CUDA itself.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve()
SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceType, c10::Stream;
struct OneDevice : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  const Device only{DeviceType::CUDA, 0};
  Device getDevice() const override { return only; }
  Device exchangeDevice(Device) const override { return only; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, only); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, only); }
};
static c10::impl::DeviceGuardImplRegistrar one(DeviceType::CUDA, new OneDevice());
namespace at {
struct CUDAHooks : CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def load_guard():
    """Compiles the source above once, and loads it: before torch is imported."""
    root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    key = zlib.crc32(f"{SOURCE}{root}{(root / 'version.py').stat().st_mtime}".encode())
    library = HERE.parent / "__pycache__" / f"one_device-{key:08x}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            Path(work, "guard.cpp").write_text(SOURCE)
            subprocess.run(
                ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", "guard.cpp",
                 f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib", "-o", "guard.so"],
                cwd=work, check=True)
            Path(work, "guard.so").rename(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_guard()
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import masking_utils  # noqa: E402

import data  # noqa: E402
import infer  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402
from prompts import METHODS  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear")}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# ---- The card ----


class Card(TorchDispatchMode):
    """Every operation passes here: launches and waits of the host are counted, and bytes until it is full."""

    def __init__(self, gigabytes):
        super().__init__()
        self.bytes, self.alive, self.peak, self.storages = int(gigabytes * 1e9), 0, 0, {}
        self.launches, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"):
            self.waits += args[0].is_cuda
            return getattr(args[0], "of_all", False) if args[0].dtype == torch.bool else 0
        if name in PRODUCTS and len({a.dtype for a in args if isinstance(a, torch.Tensor)}) > 1:
            raise TypeError(f"{name} of {[a.dtype for a in args if isinstance(a, torch.Tensor)]}")
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        on_card = [one for one in tensors if one.is_cuda]
        if "_foreach_" in name or name == "aten::cat":  # a kernel takes about 64 tensors
            self.launches += -(-len(args[0]) // 64) * args[0][0].is_cuda
        else:
            self.launches += bool(on_card) and not func.is_view and "empty" not in name
        crosses = name in ("aten::_to_copy", "aten::to") and args[0].is_cuda != tensors[0].is_cuda
        self.waits += crosses and not (kwargs or {}).get("non_blocking")
        for tensor in tensors:
            tensor.of_all = name == "aten::all"
        for tensor in on_card:
            self.hold(tensor.untyped_storage())
        self.need(self.scratch(name, args))
        return out

    def scratch(self, name, args):
        """What a kernel takes beside its results."""
        if name == "bitsandbytes::gemm_4bit":  # the weight, for a product of more than a few rows
            return args[2][0] * args[2][1] * args[0].element_size()
        if "attention_backward" in name:  # gradients in fp32, and of keys that are shared
            return 4 * args[1].numel() + 4 * args[1].numel() * (args[1].shape[1] > args[2].shape[1])
        return 0

    def need(self, more):
        if self.alive + more > self.bytes:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.peak = max(self.peak, self.alive + more)

    def hold(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.free(key, size))
            self.alive += size

    def free(self, key, size):
        if self.storages.pop(key, None) is not None:
            self.alive -= size


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """CUDA's choice: the flash kernel without a mask, else the memory-efficient one, which has no groups."""
    part = (query, key, value)
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(*part, dropout_p, is_causal, scale=scale)[0]
    if key.shape[1] != query.shape[1]:
        raise TypeError("the memory-efficient kernel knows no groups")
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, query.new_zeros(()), -1e4)
        if attn_mask.dtype != query.dtype:
            raise TypeError(f"a mask of {attn_mask.dtype} for a query of {query.dtype}")
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        *part, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


class RMSNorm(torch.autograd.Function):
    """What CUDA's fused kernel keeps: its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], device=x.device))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(ctx.saved_tensors[0]), None


def numpy(tensor, **_):
    if tensor.is_cuda or tensor.requires_grad or tensor.dtype == torch.bfloat16:
        raise TypeError(f"numpy() of a tensor on {tensor.device}, {tensor.dtype}, {tensor.requires_grad}")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def tensors_of(path):
    """lora.stored_tensors: the names and shapes are those of the file."""
    with safe_open(path, "np") as file:
        for name in file.keys():
            part = file.get_slice(name)
            yield name, torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()])


class Simulation:
    """Inside, torch has one CUDA card."""

    def __init__(self, gigabytes=80.0, capability=(9, 0)):
        self.card, self.before = Card(gigabytes), []
        self.fake, card = FakeTensorMode(allow_non_fake_inputs=True), self.card
        state, real_tensor = torch.zeros(16, dtype=torch.uint8), torch.tensor
        properties = SimpleNamespace(total_memory=card.bytes, major=capability[0], minor=capability[1])
        self.patches = [(torch.cuda, name, lambda *_, value=value: value() if callable(value) else value)
                        for name, value in {
            "is_available": True, "device_count": 1, "set_device": None, "get_rng_state": state,
            "set_rng_state": None, "get_device_capability": capability, "get_device_properties": properties,
            "memory_allocated": lambda: card.alive, "memory_reserved": lambda: card.alive,
            "max_memory_allocated": lambda: card.peak, "get_device_name": "simulated",
            "mem_get_info": lambda: (card.bytes - card.alive, card.bytes),
            "reset_peak_memory_stats": lambda: setattr(card, "peak", card.alive)}.items()]
        self.patches += [
            (F, "scaled_dot_product_attention", attention), (lora, "stored_tensors", tensors_of),
            (F, "rms_norm", lambda x, shape, weight, eps: RMSNorm.apply(x, weight)),
            (torch, "tensor", lambda value, dtype=None, device="cpu", **_: torch.empty(
                (made := real_tensor(value, dtype=dtype)).shape, dtype=made.dtype, device=device)),
            (torch.Tensor, "numpy", numpy), (FakeTensor, "tolist", lambda t: numpy(t.cpu()).tolist()),
            (torch, "from_numpy", lambda array: torch.empty(
                array.shape, dtype=getattr(torch, str(array.dtype)))),
            (FakeTensorMode, "avoid_device_init", True), (masking_utils, "is_tracing", lambda *_: False)]

    def __enter__(self):
        self.before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in self.patches]
        for owner, name, value in self.patches:
            setattr(owner, name, value)
        self.fake.__enter__()
        self.card.__enter__()
        return self.card

    def __exit__(self, *error):
        self.card.__exit__(*error)
        self.fake.__exit__(*error)
        for owner, name, value in self.before:
            setattr(owner, name, value) if value is not None else delattr(owner, name)


# ---- What runs on it ----


def one_step(model, family, encoded, tokens, dtype):
    """A train_step, of 32 annotations or of all; returns the Objective."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    objective = train.Objective(model, family, 10**9, infer.Processes(0, 1, CUDA))
    objective.tokens_per_batch = tokens or train.fit_micro_batch(objective, encoded, 32)[0]
    rows, prefix = np.arange(len(encoded.prompt_index))[:32], infer.shared_prefix(model, encoded)
    train.train_step(train.Learner(objective, optimizer, dtype == "fp16"), encoded, rows, prefix)
    return objective


def steps(models, data_dir):
    """Each architecture, from the file of weights to the prediction; returns whether all went well.

    A child process for each: torch does not survive many models on a card that is not there.
    """
    args = train.parse_args(["--method", "clsp", "--model", f"{models}/mistral", "--data_dir", data_dir,
                             "--dtype", "fp32", "--limit", "12"])
    infer.complete(args)
    task, splits, _ = infer.load_splits(args)
    codes = []
    for name, method, dtype in (("mistral", "clsp", "fp16"), ("phi", "lmp", "bf16"), ("neox", "clsp", "fp16"),
                                ("t5", "lmp", "bf16")):
        if not (child := os.fork()):
            args.method, args.model, args.dtype = method, f"{models}/{name}", dtype
            try:
                waits = architecture(args, task, splits)
                print(f"{name} {method} {dtype}: {waits} waits in a step of micro-batches", flush=True)
                os._exit(0)
            finally:  # without a last word of torch
                if sys.exc_info()[0]:
                    sys.excepthook(*sys.exc_info())
                os._exit(1)
        codes.append(os.waitpid(child, 0)[1])
    return not any(codes)


def architecture(args, task, splits):
    """Loads, trains, validates and predicts; returns how often a step waits for the card."""
    tokenizer = lora.load_tokenizer(args.model)
    encoded = infer.encode_split(args, tokenizer, task, splits, "train", lambda *_: None)
    family = METHODS[args.method].family
    with Simulation() as card:
        model, _ = infer.build(args, len(task.label_names), CUDA)
        objective = one_step(model, family, encoded, None, args.dtype)
        before, processes = card.waits, objective.processes
        one_step(model, family, encoded, 300, args.dtype)
        waits = card.waits - before
        objective.mean_loss(encoded, infer.shared_prefix(model, encoded))
        if family == "cls":
            infer.predict_scores(model, encoded, 1000, processes)
        else:
            infer.generate(model, tokenizer, encoded, task.label_names[:2], 1000, processes)
    return waits


CONFIGS = {
    "mistral": ("Mistral", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=None)),
    "phi-2": ("Phi", dict(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
        num_attention_heads=32, partial_rotary_factor=0.4, resid_pdrop=0.1)),
    "stablelm": ("GPTNeoX", dict(
        vocab_size=50688, hidden_size=4096, intermediate_size=16384, num_hidden_layers=16,
        num_attention_heads=32)),
    "flan-t5": ("T5", dict(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False)),
}


def write_holes(directory, name, family):
    """A directory with the config of a model of the paper, and its weights as a file of holes, in bf16."""
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config.save_pretrained(directory)
    end = {"cls": "Model", "lm": "ForConditionalGeneration" if kind == "T5" else "ForCausalLM"}[family]
    with torch.device("meta"):
        model = getattr(transformers, kind + end)(config)
    header, at = {}, 0
    for key, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        header[key] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(Path(directory, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def prompts(rows, length=185, prefix=50, response=6):
    """The Encoded of so many distinct prompts."""
    ids = np.ones((rows, length), np.int32)
    ids[:, prefix:] += 1 + np.arange(rows, dtype=np.int32)[:, None]
    encoded = data.Encoded(ids.ravel(), np.arange(rows + 1) * length, np.arange(rows, dtype=np.int32),
                           np.zeros((rows, 28), np.float32), [str(row) for row in range(rows)])
    encoded.response_ids, encoded.response_offsets = np.ones(response, np.int32), np.array([0, response])
    encoded.response_index = np.zeros(rows, np.int64)
    return encoded


def lines(name, family, sizes, checkpointing):
    """The lines of the table of one model and family."""
    dtype = lora.MODELS[name][1]
    with tempfile.TemporaryDirectory() as directory:
        write_holes(directory, name, family)
        encoded = prompts(32)
        if family == "cls":
            encoded.response_index = None
        with Simulation() as card:
            model = lora.build_model(directory, family, 28, "nf4", lora.DTYPES[dtype], CUDA)
            lora.add_lora(model)
            if checkpointing:
                lora.recompute_layers(model)
            weights = card.alive
            for size in sizes:
                card.bytes = int((size - 0.7) * 1e9)
                tokens = one_step(model, family, encoded, None, dtype).tokens_per_batch
                card.peak, card.launches = card.alive, 0
                objective = one_step(model, family, encoded, tokens, dtype)
                if objective.tokens_per_batch < tokens:
                    raise MemoryError(f"{name} {family} on {size} GB: {tokens} tokens are too many")
                lengths = encoded.lengths + 6 * (family == "lm" and objective.decoder)
                prefix = infer.shared_prefix(model, encoded)
                n = len(data.micro_batches(lengths, np.arange(32), tokens, prefix))
                print(f"| {name} {family} | {size:.0f} | {weights / 1e9:.1f} | {tokens:,} | {n} x "
                      f"{32 / n:.3g} | {card.peak / 1e9:.1f} | {card.launches // n:,} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("steps", "table", "lines"))
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--families", nargs="+", choices=("cls", "lm"), default=["cls", "lm"])
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[24, 48, 80])
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.what == "steps":
        return int(not steps(*args.paths))
    elif args.what == "lines":
        lines(args.models[0], args.families[0], args.gigabytes, args.checkpointing)
    else:
        print("| model | card GB | weights GB | tokens | micro-batches x prompts | peak GB | launches each |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name, family in ((name, family) for name in args.models for family in args.families):
            subprocess.run(  # a process each: torch does not survive many models on a card that is not there
                [sys.executable, str(HERE), "lines", "--models", name, "--families", family, "--gigabytes",
                 *map(str, args.gigabytes), *["--checkpointing"] * args.checkpointing], check=True)


if __name__ == "__main__":
    code = main() or 0
    sys.stdout.flush()
    os._exit(code)  # the guard outlives torch
