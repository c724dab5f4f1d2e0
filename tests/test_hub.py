"""From the hub to a loaded model: a fake hub on the loopback interface, and each way in which it fails.

    python -m pytest -q tests/test_hub.py
"""

import hashlib
import http.server
import json
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_processes import two_processes
from test_train import command

import infer
import lora
import train

NAME = "some/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of repositories as the hub does: {name: {revision: directory}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.commits, self.seen, self.fault = {}, {}, [], lambda method, file: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def got(self, file, method="GET"):
        return [line for line in self.seen if line == (method, file)]

    def handle_error(self, *_):
        pass  # a client that went away


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, headers=(), body=b"", cut=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True

    def do_GET(self):
        hub, match = self.server, re.match(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/([^?]+)", self.path)
        if not match:
            return self.send(404)
        name, revision, file = match.groups()
        hub.seen.append((self.command, file))
        fault, commit = hub.fault(self.command, file), hub.commits.get((name, revision), revision)
        cut = fault if isinstance(fault, int) and fault < 100 else None
        if isinstance(fault, tuple):
            return self.send(fault[0], fault[1])
        if fault is not None and cut is None:
            return self.send(fault)
        if (directory := hub.repositories.get((name, commit))) is None:
            code = "RevisionNotFound" if name in {one for one, _ in hub.repositories} else "RepoNotFound"
            return self.send(404 if code[2] == "v" else 401, {"X-Error-Code": code})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not (path := Path(directory, file)).is_file():
            return self.send(404, headers | {"X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        if part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(body) - 1), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            return self.send(206, headers, body[first: last + 1], cut)
        self.send(200, headers, body, cut)

    do_HEAD = do_GET


def point_to(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the libraries of this process take for the hub, and an empty cache."""
    server, sleep = Hub(), time.sleep
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda s: sleep(min(s, 0.01)))  # between tries
    yield server
    server.shutdown()
    server.server_close()


def publish(hub, directory, name=NAME, commit=COMMIT):
    hub.repositories[name, commit], hub.commits[name, "main"] = directory, commit


def only_bin(directory, target, shards=2, legacy=False):
    """The same checkpoint as older ones are: pickled, fp32, with buffers that are computed today."""
    shutil.copytree(directory, target)
    tensors = {}
    for path in sorted(target.glob("*.safetensors*")):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    for k in range(2):
        tensors |= {f"gpt_neox.layers.{k}.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(),
                    f"gpt_neox.layers.{k}.attention.masked_bias": torch.tensor(-1e9),
                    f"gpt_neox.layers.{k}.attention.rotary_emb.inv_freq": torch.ones(4)}
    names = [f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin" if shards > 1 else "pytorch_model.bin"
             for k in range(shards)]
    places = {key: names[k % shards] for k, key in enumerate(tensors)}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        torch.save(part, target / name, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.fixture
def model_dir(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir / "models" / "mistral", tmp_path / "published")


def run(tiny_dir, out, model=NAME, *more):
    arguments = command(tiny_dir, out, "--max_steps", 2, "--validations", 1, *more)
    arguments[arguments.index("--model") + 1] = model
    return arguments


def told(capsys, words=()):
    """The one line on stderr, beside what is said of the download."""
    lines = [line for line in capsys.readouterr().err.splitlines()
             if line.strip() and not re.search(r"are fetched$|\d+%\||train:", line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines
    return lines[0]


# ---- Checkpoints as they are ----


def test_a_repository_of_bin_files_trains_by_its_short_name_with_its_dtype(
        hub, tiny_dir, tmp_path, monkeypatch, capsys):
    """The paper's StableLM: GPT-NeoX in two shards of FloatStorage and BoolStorage with old buffers."""
    publish(hub, only_bin(tiny_dir / "models" / "neox", tmp_path / "bin"), lora.MODELS["stablelm"][0])
    monkeypatch.setattr(lora, "check_by_name", lambda *_: None)
    arguments = run(tiny_dir, tmp_path / "out", "stablelm")
    for flag in ("--dtype", "fp32"):
        arguments.remove(flag) if flag in arguments else None
    assert train.main(arguments) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["arguments"]["dtype"] == "fp16" and record["arguments"]["model"] == "stablelm"
    assert record["model_commit"] == COMMIT
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "stabilityai/stablelm-tuned-alpha-3b"
    assert "2 files of stabilityai/stablelm-tuned-alpha-3b, 0.00 GB, are fetched" in capsys.readouterr().err


@pytest.mark.parametrize("shards, legacy", [(1, False), (2, False), (1, True)])
@torch.no_grad()
def test_bin_files_give_the_logits_of_safetensors(tiny_dir, tmp_path, shards, legacy):
    """Also one that was written before torch 1.6."""
    directory, ids = tiny_dir / "models" / "neox", torch.arange(3, 15)[None]
    expected = lora.load_base(str(directory), "lm", "none")(ids).logits
    made = only_bin(directory, tmp_path / "bin", shards, legacy)
    assert torch.equal(lora.load_base(str(made), "lm", "none")(ids).logits, expected)


def test_a_pickle_of_more_than_weights_is_refused_in_one_line(tiny_dir, tmp_path, capsys):
    made = only_bin(tiny_dir / "models" / "neox", tmp_path / "bin", 1)
    for content in ({"a": Path("x")}, {"a": 3}, [1]):
        torch.save(content, made / "pytorch_model.bin")
        assert lora.main([str(made)]) == 2
        told(capsys, ["pytorch_model.bin"])
    whole = (made / "pytorch_model.bin").read_bytes()
    (made / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    assert lora.main([str(made)]) == 2
    told(capsys, ["pytorch_model.bin is not a whole file"])


def test_of_two_formats_and_copies_only_what_is_needed_is_fetched(hub, model_dir):
    torch.save({}, model_dir / "pytorch_model.bin")
    for file in ("original/consolidated.00.pth", "consolidated.safetensors", "model.onnx", "tf_model.h5"):
        (model_dir / file).parent.mkdir(exist_ok=True)
        (model_dir / file).write_bytes(b"x")
    publish(hub, model_dir)
    lora.load_tokenizer(NAME)
    lora.load_base(NAME, "cls", "none")
    fetched = {file for method, file in hub.seen if method == "GET"}
    assert fetched <= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                       "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert "model.safetensors" in fetched


# ---- What can be judged without weights ----


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def mixture(directory):
    path = directory / "model.safetensors"
    more = {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.ones(2, 2)}
    save_file(load_file(path) | more, path, {"format": "pt"})


def many_shards(directory):
    mixture(directory)
    names = load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def half(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})


def larger_tokenizer(directory):
    change_config(directory, vocab_size=300)


def no_tokenizer(directory):
    for path in directory.glob("*token*"):
        path.unlink()


def foreign_tokenizer(directory):
    words = {"[UNK]": 0, "</s>": 1, "qqq": 2}
    from tokenizers import Tokenizer, models, pre_tokenizers
    made = Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="</s>"
                                         ).save_pretrained(directory)


@pytest.mark.parametrize("change, words", [
    (lambda d: change_config(d, quantization_config={"quant_method": "gptq", "bits": 4}), ["already (gptq)"]),
    (lambda d: change_config(d, model_type="bert", architectures=["BertForMaskedLM"]), ["type bert"]),
    (lambda d: transformers.Gemma3Config().save_pretrained(d), ["gemma3", "text"]),
    (lambda d: transformers.Lfm2Config(full_attn_idxs=[1]).save_pretrained(d), ["no cache", "conv"]),
    (lambda d: change_config(d, num_hidden_layers=400, intermediate_size=2**24), ["GB", "SmolLM2"]),
    (lambda d: change_config(d, num_hidden_layers=3), ["lacks 9 tensors", "layers.2."]),
    (mixture, ["experts.0.w1.weight"]), (many_shards, ["experts.0.w1.weight"]),
    (half, ["lacks 1 tensors"]), (larger_tokenizer, ["300", "tokenizer", "not of one model"]),
    (no_tokenizer, ["tokenizer"]), (foreign_tokenizer, ["tokenizer", "[UNK]"])])
def test_what_cannot_be_used_is_told_before_its_weights_are_fetched(
        hub, tiny_dir, model_dir, tmp_path, capsys, change, words):
    change(model_dir)
    publish(hub, model_dir)
    assert train.main(run(tiny_dir, tmp_path / "out")) == 2
    told(capsys, words)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_a_disk_without_room_is_told_before_anything_is_fetched(
        hub, model_dir, tmp_path, capsys, monkeypatch):
    publish(hub, model_dir)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert lora.main([NAME]) == 2
    told(capsys, ["to fetch", "free", "HF_HOME"])
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_a_directory_without_tokenizer_files_trains_on_nothing(tiny_dir, tmp_path, capsys):
    for name in ("mistral", "neox", "phi", "t5"):
        model = shutil.copytree(tiny_dir / "models" / name, tmp_path / name)
        no_tokenizer(model)
        assert train.main(run(tiny_dir, tmp_path / "out", str(model))) == 2
        told(capsys, ["okenizer"])


def test_prompts_are_shortened_without_offsets_too():
    """ByT5's tokenizer is of bytes, has no file, and no offsets."""
    import data
    tokenizer = transformers.ByT5Tokenizer()
    for text in ("a long text of bytes", "äöü " * 9, ""):
        short = data.shorten(tokenizer, "say: ", text, " end", 20)
        fits = [text[:k] for k in range(len(text) + 1)
                if len(tokenizer("say: " + text[:k] + " end")["input_ids"]) <= 20]
        assert short == fits[-1]


# ---- The commit ----


def test_a_run_goes_on_and_is_used_with_the_commit_that_it_was_started_with(
        hub, tiny_dir, model_dir, tmp_path):
    publish(hub, model_dir)
    arguments, out = run(tiny_dir, tmp_path / "out"), tmp_path / "out"
    assert train.main(arguments) == 0
    newer = shutil.copytree(model_dir, tmp_path / "newer")
    tensors = {key: tensor + 0.1 for key, tensor in load_file(newer / "model.safetensors").items()}
    save_file(tensors, newer / "model.safetensors", {"format": "pt"})
    publish(hub, newer, commit="f" * 40)
    before = json.loads((out / "metrics_test.json").read_text())["f1_macro"]
    assert infer.main(["--run", str(out)]) == 0
    assert json.loads((out / "metrics_test.json").read_text())["f1_macro"] == before
    for path in out.glob("metrics_*"):
        path.unlink()
    assert train.main(arguments) == 0
    assert json.loads((out / "run.json").read_text())["model_commit"] == COMMIT
    assert {file.name for file in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")} == {COMMIT}
    assert train.main(run(tiny_dir, tmp_path / "new")) == 0
    assert json.loads((tmp_path / "new" / "run.json").read_text())["model_commit"] == "f" * 40


# ---- Failures of the hub ----


def weights(file):
    return file.endswith(".safetensors")


GATED = (403, {"X-Error-Code": "GatedRepo"})


@pytest.mark.parametrize("fault, words", [
    (lambda method, file: GATED, ["/some/model", "licence", "hf auth login", "HF_TOKEN"]),
    (lambda method, file: (401, GATED[1]), ["/some/model", "licence", "hf auth login"]),
    (lambda method, file: 403, ["licence", "hf auth login", "HF_TOKEN"]),
    (lambda method, file: 401, ["finds nothing", "hf auth login", "HF_TOKEN"]),
    (lambda method, file: GATED if weights(file) else None, ["licence", "hf auth login"]),
    (lambda method, file: 503, ["status 503", "the same command goes on"]),
    (lambda method, file: 503 if "index" in file else None, ["status 503", "model.safetensors.index.json"]),
    (lambda method, file: 503 if weights(file) else None, ["status 503", "model.safetensors"]),
    (lambda method, file: 503 if weights(file) and method == "GET" else None, ["status 503", "safetensors"]),
    (lambda method, file: 0 if weights(file) and method == "GET" else None, ["the same command goes on"]),
    (lambda method, file: 429, ["status 429"])])
def test_each_failure_of_the_hub_is_one_line_that_says_what_to_do(hub, model_dir, capsys, fault, words):
    publish(hub, model_dir)
    hub.fault = fault
    assert lora.main([NAME]) == 2
    line = told(capsys, words)
    assert "only pickled" not in line and "not whole" not in line and len(line) < 500


def test_unknown_names_and_revisions_and_a_hub_that_is_not_there_are_one_line(
        hub, model_dir, capsys, monkeypatch):
    publish(hub, model_dir)
    assert lora.main(["some/other"]) == 2
    told(capsys, ["some/other", "finds nothing", "hf auth login"])
    assert lora.main([NAME, "--revision", "v9"]) == 2
    told(capsys, ["--revision v9", "no branch, tag or commit"])
    point_to("http://127.0.0.1:9", monkeypatch)
    assert lora.main([NAME]) == 2
    told(capsys, ["http://127.0.0.1:9", "the same command goes on", "HF_HUB_OFFLINE=1"])


def test_a_broken_download_is_resumed_where_it_broke(hub, model_dir, monkeypatch):
    publish(hub, model_dir)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 33)  # else of 10 MB: what is kept is a whole number
    ranges = []

    def fault(method, file):
        return 99 if method == "GET" and weights(file) and len(hub.got(file)) in (2, 3) else None

    hub.fault, handler = fault, Answer.do_GET

    def note(self):
        ranges.append((self.path.rpartition("/")[2], self.headers.get("Range")))
        handler(self)

    Answer.do_GET, Answer.do_HEAD = note, note
    try:
        assert lora.main([NAME]) == 0
    finally:
        Answer.do_GET, Answer.do_HEAD = handler, handler
    asked = [given for file, given in ranges if weights(file) and given]
    assert "bytes=99-" in asked and "bytes=198-" in asked


def test_ctrl_c_in_a_download_is_one_line(hub, tiny_dir, model_dir, tmp_path, capsys, monkeypatch):
    publish(hub, model_dir)

    def interrupted(model, name, *_, **options):
        if weights(name) and not options["dry_run"]:
            raise KeyboardInterrupt
        return download(model, name, *_, **options)

    download = lora.hf_hub_download
    monkeypatch.setattr(lora, "hf_hub_download", interrupted)
    assert lora.main([NAME]) == train.main(run(tiny_dir, tmp_path / "out")) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if "fetched" not in line]
    assert len(lines) == 2 and all("interrupted: the same command goes on" in line for line in lines)


def test_without_a_network_a_whole_cache_is_used_and_half_a_one_is_told(hub, model_dir, capsys, monkeypatch):
    publish(hub, model_dir)
    assert lora.main([NAME]) == 0
    seen = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lora.main([NAME]) == 0 and len(hub.seen) == seen
    next(Path(constants.HF_HUB_CACHE).rglob("model.safetensors")).unlink()
    capsys.readouterr()
    assert lora.main([NAME]) == 2
    told(capsys, ["HF_HUB_OFFLINE", "model.safetensors", "some/model"])
    assert lora.main(["some/other"]) == 2
    told(capsys, ["HF_HUB_OFFLINE", "finds nothing", "some/model"])


def test_a_download_that_is_piped_says_how_far_it_is(hub, model_dir, capsys, monkeypatch):
    """A line every 15 seconds, and here at once."""
    publish(hub, model_dir)
    asked, bar = [], lora.tqdm
    monkeypatch.setattr(lora, "tqdm", lambda **options: asked.append(options) or bar(
        **options | {"mininterval": 0, "delay": 0}))
    assert lora.main([NAME]) == 0
    assert asked[0]["mininterval"] == asked[0]["delay"] == 15
    assert re.search(r"model.safetensors: [\d.]+M? of [\d.]+MB\n", capsys.readouterr().err)


# ---- Several processes ----


def test_the_first_process_fetches_and_a_failure_is_one_line_in_all(hub, tiny_dir, model_dir, tmp_path):
    publish(hub, model_dir)

    def named(rank, arguments):
        arguments[arguments.index("--model") + 1] = NAME
        sys.modules["os"].environ["LOCAL_RANK"] = str(rank)

    hub.fault = lambda method, file: 403 if weights(file) else None
    ends = two_processes(tiny_dir, tmp_path, named)
    assert [code for code, _ in ends] == [2, 2]
    errors = [line for _, said in ends for line in said.splitlines() if re.search("[eE]rror|Traceback", line)]
    assert len(errors) == 1 and "HF_TOKEN" in errors[0], errors
    hub.fault = lambda *_: None
    hub.seen.clear()
    assert [code for code, _ in two_processes(tiny_dir, tmp_path, named)] == [0, 0]
    assert len(hub.got("model.safetensors")) == 2  # its header, and once the file
