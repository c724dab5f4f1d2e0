"""What `make reproduce` ends with: tables that fit a screen, figures, and texts on which two users differ."""

import json

import pytest
import show
import tiny
from test_metrics import LABELS, row, write_run

import metrics
import train


def some_runs(directory):
    """Two methods of two models beside the paper's values, and a synthetic query without a log."""
    for model in ("mistral", "phi-2"):
        for method, flip in (("lm", 0.3), ("lmp", 0.2), ("cls", 0.3), ("clsp", 0.1)):
            write_run(directory / model / method, method, model, flip)
    write_run(directory / "tiny", "q0s", "/tiny/phi", 0.2, note="synthetic, tiny")
    (directory / "tiny" / "log.jsonl").unlink()


def test_the_tables_fit_a_screen_of_100_columns_and_every_digit_stays_in_the_files(tmp_path, capsys):
    some_runs(tmp_path)
    assert show.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = lines[: next(k for k, line in enumerate(lines) if line.startswith("- "))]
    assert max(map(len, shown)) <= 100
    report = json.loads((tmp_path / "tables.json").read_text())
    for title in report:
        assert (title in shown) == (title.startswith(("Table", "The person")) and bool(report[title])), title
    cell = report["Table III. goemotions"]["mistral"]["clsp"]
    low, high = cell["interval"]
    words = f"{cell['value']:.1f} ±{(high - low) / 2:.1f} (paper 43.9)"
    assert any(line.startswith("mistral") and words in line for line in shown)
    assert f"{cell['value']:.2f} [{low:.2f}, {high:.2f}]" in (tmp_path / "tables.md").read_text()


def test_a_cell_is_brief():
    assert show.brief({"value": 17.64, "interval": [17.0, 18.1]}) == "17.6 ±0.6"
    gain = {"value": 57.65, "interval": [5.25, 156.02], "paper": 64.14}
    assert show.brief(gain, "+") == "+57.6 [+5, +156] (paper +64.1)"
    assert show.brief({"value": 1.26, "interval": [-0.31, 2.8], "unit": "points"}, "+") == "+1.3 [-0.3, +2.8]"
    assert show.brief({"paper": 26.74}) == "- (paper 26.7)" and show.brief({}) == "-"


def test_figures_are_drawn_for_every_data_set_800_pixels_wide(tmp_path):
    some_runs(tmp_path)
    metrics.tables(tmp_path)
    names = ["figures_goemotions.png", "figures_goemotions_synthetic_tiny.png"]
    assert show.figures(tmp_path) == [tmp_path / name for name in names]
    for name in names:
        start = (tmp_path / name).read_bytes()[:24]
        assert start[1:4] == b"PNG" and int.from_bytes(start[16:20], "big") == 800


@pytest.mark.parametrize("line", [
    '"loss"', '{"loss": 1}', '{"step": 1, "loss": "x"}', '{"step": {}, "loss": 1}'])
def test_a_damaged_log_is_one_line(tmp_path, capsys, line):
    write_run(tmp_path / "run", "cls", "mistral", 0.3)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    assert show.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log.jsonl is damaged" in error


def test_the_surest_pairs_are_of_different_texts_and_users_right_and_wrong():
    rows = [row("a", 1, ["joy"], [], [0.1, 0.9, 0.1]), row("a", 2, [], [], [0.1, 0.2, 0.1]),
            row("a", 3, ["love"], [], [0.1, 0.3, 0.3]), row("b", 1, ["anger"], [], [0.4, 0.1, 0.1]),
            row("b", 2, [], [], [0.6, 0.1, 0.1]), row("b", 2, ["love"], [], [0.6, 0.1, 0.9]),
            row("c", 1, ["joy"], [], [0.1, 0.5, 0.1]), row("c", 2, [], [], [0.1, 0.4, 0.1])]
    right, wrong = show.surest_pairs(metrics.to_arrays(rows, LABELS))
    # a: joy .9 over .2; b: love .9 over .1; c: joy .5 over .4; b: anger .4 below .6
    assert [own[1:] for own in right] == [(5, 3), (0, 1), (6, 7)]
    assert [own[0] for own in right] == pytest.approx([0.8, 0.7, 0.1])
    assert wrong == [(pytest.approx(-0.2), 3, 4)]


def test_people_are_shown_with_their_texts_labels_and_probabilities(tmp_path, capsys):
    tiny.write_corpora(tmp_path, 0, "mini")
    tiny.write_model(tmp_path / "model", "mistral")
    out = tmp_path / "runs" / "clsp"
    arguments = (f"--method clsp --model {tmp_path}/model --data_dir {tmp_path}/goemotions --dtype fp32 "
                 f"--max_steps 2 --out {out}")
    assert train.main(arguments.split()) == 0
    capsys.readouterr()
    assert show.main([str(tmp_path / "runs"), "--people"]) == 0
    text = capsys.readouterr().out
    world = tiny.draw_world("goemotions", 0, "mini")
    of_test = {own for own, _, splits in world.texts if "test" in splits}
    quoted = [line[2:] for line in text.splitlines() if line.startswith("> ")]
    assert quoted and set(quoted) <= of_test
    assert text.count("- user ") == 2 * len(quoted)
    chosen = {(world.texts[k][0], user): labels for k, user, labels in world.annotations}
    for line in text.splitlines():
        if line.startswith("> "):
            own = line[2:]
        if line.startswith("- user "):
            user, _, rest = line[7:].partition(" chose ")
            assert chosen[own, user] == rest.split("; ")[0].split(", ")
