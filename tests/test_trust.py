"""What others write stays data: keys in answers, pickles, code of models, IDs that look like paths.

    python -m pytest -q tests/test_trust.py

Elsewhere: .bin weights in test_lora.py; redirects, blob ids and a NUL in test_data.py; single answers that
hold the key in test_api.py.
"""

import ast
import contextlib
import csv
import json
import os
import shutil
import urllib.parse
from pathlib import Path

import pytest
import torch
from test_api import KEY, quick, reply, serve  # noqa: F401
from test_train import command

import data
import infer
import lora
import train

ROOT = Path(train.__file__).parent


# ---- The key ----


def test_after_a_whole_run_the_key_is_in_no_file_and_on_no_screen(
        tiny_dir, tmp_path, serve, capfd, caplog, monkeypatch):  # noqa: F811
    """The server says it in answers, escaped, in error pages, headers, and in a line that is no header."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)
    faults = [
        (500, {"Retry-After": KEY, "Set-Cookie": f"a={KEY}"}, {"error": {"message": KEY, KEY: 1}}),
        (500, {}, f'{{"error": {{"message": "{escaped}"}}}}'.encode()),
        (503, {}, f"<html>{KEY} {{\"key\": \"{escaped}\"}}".encode()), (429, {"Location": KEY}, b""),
        (200, {f"X: 1\r\nno header {KEY}\r\nY": "2"}, {**reply(KEY), "model": KEY})]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda prompt, n: faults[min(n, len(faults)) - 1])
    arguments = ["--method", "q1s", "--model", "gpt-4", "--api_base", server.base, "--limit", "4"]
    arguments += ["--data_dir", f"{tiny_dir}/goemotions", "--out", str(tmp_path / "out")]
    assert infer.main(arguments) == 0
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}" and len(server.seen) > 4
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 4  # config, answers, predictions, metrics
    for text in (*(path.read_text() for path in files), *capfd.readouterr(), caplog.text):
        assert KEY not in text and escaped.replace("\\", "") not in text.replace("\\", "")


# ---- Pickles and code of others ----


class Bomb:
    """What unpickling would run."""

    def __reduce__(self):
        return os._exit, (77,)  # ends the tests, so it cannot go unseen


def test_a_pickled_optimizer_state_is_a_broken_checkpoint_and_is_never_unpickled(tmp_path, capsys):
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters)
    for name in ("step-00000001.safetensors", "optimizer.pt", "step-00000002.pt"):
        torch.save({"state": Bomb()}, tmp_path / name)
    with pytest.raises(ValueError, match="no checkpoint .* is whole"):
        train.load_checkpoint(tmp_path, optimizer, infer.ALONE)
    assert "step-00000001.safetensors is broken" in capsys.readouterr().err


def test_a_pickle_in_the_place_of_an_adapter_is_refused(tmp_path):
    torch.save({"state": Bomb()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="not a whole file of weights"):
        lora.load_adapter(torch.nn.Linear(2, 2), tmp_path)


def test_no_script_trusts_remote_code_or_can_unpickle():
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
                assert ast.unparse(node.value) == str(node.arg == "weights_only"), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"pickle", "dill", "joblib", "marshal"} & {one.name for one in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("np", "load"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only" in {one.arg for one in node.keywords}, path
            assert not (isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__")), path


@pytest.mark.parametrize("model_type", ["mistral", "of_another"])
def test_code_that_a_models_config_names_is_never_run(tiny_dir, tmp_path, model_type):
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_dir / "models" / "mistral", model)
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((model / name).read_text()) | {"auto_map": dict.fromkeys(classes, "evil.Evil")}
        config |= {"model_type": model_type} if name == "config.json" else {}
        (model / name).write_text(json.dumps(config))
    assert lora.load_tokenizer(str(model)).vocab_size > 1000
    for family in ("cls", "lm"):
        with contextlib.nullcontext() if model_type == "mistral" else pytest.raises(FileNotFoundError):
            lora.load_base(str(model), family)
    assert not ran.exists()


# ---- Where things come from, and where they go ----


def test_corpora_come_over_https_from_two_hosts_and_carry_their_blob_ids():
    files = [file for corpus in data.CORPORA.values() for file in corpus.files.values()]
    hosts = {urllib.parse.urlsplit(address)[:2] for address, _ in files}
    assert hosts == {("https", "storage.googleapis.com"), ("https", "raw.githubusercontent.com")}
    assert all(len(blob_id) == 40 for _, blob_id in files)


ODD = ("../up", "/etc/passwd", "a/../../b", "..", "two\nlines", "CON:\\x", "-rf ~", "%00$(touch x)")


def test_ids_and_label_names_never_become_paths_and_a_revision_is_passed_on_and_kept(
        tiny_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "cwd" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "deep")
    labels = ("../sad/x", "/joy", "up..")
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        rows = [[f"{name}{k}", user, f"text {name}{k}", k % 2, 1, int(k % 3 == 0), data.SPLITS[k % 3]]
                for k, name in enumerate(ODD * 3) for user in ODD]
        csv.writer(file).writerows([["text_id", "user_id", "text", *labels, "split"], *rows])
    asked, from_hub, find = [], lora.from_hub, lora.find
    monkeypatch.setattr(lora, "from_hub", lambda auto, name, revision=None: (
        asked.append(revision), from_hub(auto, name, revision))[1])
    monkeypatch.setattr(lora, "find", lambda model, name, revision=None, **more: (
        asked.append(revision), find(model, name, revision, **more))[1])
    before, out = {*tmp_path.rglob("*")}, tmp_path / "out"
    arguments = command(tiny_dir, out, "--max_steps", 2, "--revision", "v1.0")
    arguments[arguments.index("--dataset") + 1] = str(tmp_path / "mine.csv")
    assert train.main(arguments) == 0
    assert infer.main(["--run", str(out), "--text", "../x", "--users", *ODD]) == 0
    assert asked and {*asked} == {"v1.0"}
    names = {".lock", "run.json", "log.jsonl", "adapter_model.safetensors", "adapter_config.json"}
    names |= {f"{kind}_{split}.json{lines}" for kind, lines in (("metrics", ""), ("predictions", "l"))
              for split in ("val", "test")}
    assert {*tmp_path.rglob("*")} - before == {out, *(out / name for name in names)}
    config = json.loads((out / "run.json").read_text())
    assert config["arguments"]["revision"] == "v1.0" and "model_commit" in config
