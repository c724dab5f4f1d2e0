"""Two short rows of tests/chaos.py, of victims that no other test kills: a query, and a download."""

import multiprocessing
import os
import random
import shutil
import signal

import chaos

import infer


def test_a_query_that_is_killed_at_random_moments_ends_like_an_undisturbed_one(tiny_dir, tmp_path):
    """Forked, since the imports would take most of the time of a process of its own."""
    words = f"--method q0s --model {tiny_dir}/models/mistral --data_dir {tiny_dir}/goemotions --dtype fp32"

    def query(out):
        return infer.main([*words.split(), "--limit", "16", "--out", str(tmp_path / out)])

    assert query("whole") == 0
    rng, kills = random.Random(0), 0
    for _ in range(6):
        child = multiprocessing.get_context("fork").Process(target=query, args=("out",), daemon=True)
        child.start()
        child.join(rng.uniform(0.0, 0.3))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        else:  # finished: another one shall be killed
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        child.join()
        assert all(map(chaos.is_whole, tmp_path.rglob("*")))
    assert kills and query("out") == 0
    names = ("predictions_test.jsonl", "metrics_test.json")
    assert chaos.contents(tmp_path / "out", names) == chaos.contents(tmp_path / "whole", names)


def test_a_download_that_is_killed_at_random_moments_ends_whole(capsys):
    assert chaos.main(["--rows", "download", "--kills", "2", "--seconds", "60"]) == 0
    kills, runs, *lost = capsys.readouterr().out.splitlines()[1].split()[1:]
    assert int(kills) > 0 and int(runs) > 0 and set(lost) == {"0"}
