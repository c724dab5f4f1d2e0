"""The README's last lines: what a newcomer changes stands in one place, and all commands follow it."""

import json
from pathlib import Path

import torch

import data
import infer
import lora
import prompts
import train

STEPS = "--dtype fp32 --quantize none --batch_size 8 --max_steps 2 --validations 1 --limit 16 8 8".split()


def trained(tiny_dir, out, method, dataset="goemotions", files="goemotions"):
    """The metrics of a short run on the embedded default."""
    assert train.main(["--method", method, "--model", f"{tiny_dir}/models/mistral", "--dataset", dataset,
                       "--data_dir", f"{tiny_dir}/{files}", *STEPS, "--out", str(out)]) == 0
    return json.loads(Path(out, "metrics_test.json").read_bytes())


def test_a_new_head_is_a_class_that_build_model_names(tiny_dir, tmp_path, monkeypatch):
    class MeanClassifier(lora.LastTokenClassifier):
        def forward(self, input_ids, lengths, prefix=0):
            states = lora.decoder_states(getattr(self, self.base_model_prefix), input_ids, prefix)
            real = torch.arange(states.shape[1], device=states.device) < (lengths - prefix)[:, None]
            return self.score((states * real[..., None]).sum(1).float() / (lengths - prefix)[:, None])

    usual = trained(tiny_dir, tmp_path / "last", "clsp")
    monkeypatch.setattr(lora, "LastTokenClassifier", MeanClassifier)
    own = trained(tiny_dir, tmp_path / "mean", "clsp")
    assert own["log_loss"] != usual["log_loss"]
    assert infer.main(["--run", str(tmp_path / "mean"), "--split", "val"]) == 0


def test_a_new_template_is_a_row_of_methods_and_its_words(tiny_dir, tmp_path, monkeypatch, capsys):
    usual = prompts.build_prompt

    def build_prompt(task, method, text, *more):
        before, text, after = usual(task, method, text, *more)
        return before.replace("Categorize the following text", "Which labels fit this text"), text, after

    monkeypatch.setitem(prompts.METHODS, "clsw", prompts.Method("cls", True, 0))
    for module in (prompts, data, infer):
        monkeypatch.setattr(module, "build_prompt", build_prompt)
    assert prompts.main(["goemotions", "clsw"]) == 0
    assert capsys.readouterr().out.startswith("Which labels fit this text for the specified user by")
    trained(tiny_dir, tmp_path / "run", "clsw")
    assert infer.main(["--run", str(tmp_path / "run"), "--text", "That game hurt.", "--users", "1"]) == 0


def test_a_new_corpus_is_a_row_of_corpora_and_one_of_tasks(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.CORPORA, "mine", data.CORPORA["goemotions"]._replace(paper_stages=[]))
    monkeypatch.setitem(prompts.TASKS, "mine", prompts.TASKS["goemotions"]._replace(item="feeling"))
    assert data.main(["mine", "--data_dir", f"{tiny_dir}/goemotions"]) == 0
    assert prompts.main(["mine", "lmp"]) == 0
    assert "### Feelings:\n- admiration\n" in capsys.readouterr().out
    trained(tiny_dir, tmp_path / "run", "lmp", "mine")
