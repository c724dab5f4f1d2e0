"""The tour: its page is whole, shows the scripts as they are, and can be read in a browser of any width."""

import html.parser
import json
import re
import shutil
import subprocess
import time
from xml.etree import ElementTree

import pytest
import tour

import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "wbr"}
PROBE = """<script>
addEventListener("load", () => {
  const edge = one => one.getBoundingClientRect().right;
  const wide = [...document.querySelectorAll("body *")].filter(one => edge(one) > innerWidth + 1
    && !one.closest("pre, .scroll, .bar, math, .skip")).map(one => one.outerHTML.slice(0, 80));
  for (const one of document.querySelectorAll("math[display=block]"))
    if (one.scrollWidth > one.clientWidth) wide.push(one.textContent);
  const links = [...document.querySelectorAll("a")], lost = [];
  for (const one of links) {
    one.click();
    if (location.hash !== one.hash || !document.querySelector(one.hash)) lost.push(one.hash);
  }
  for (const key of "jjk") dispatchEvent(new KeyboardEvent("keydown", {key}));
  if (location.hash !== links.at(-1).hash) lost.push("after the keys j, j, k: " + location.hash);
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, wide, lost, links.length > 50,
    document.querySelector(".stop math mfrac").getBoundingClientRect().height > 15], "*");
});
</script>"""
FRAME = """<!DOCTYPE html><body><iframe src="probed.html" width="{}" height="900" style="border: 0"></iframe>
<script>
addEventListener("message", event => document.body.dataset.found = JSON.stringify(event.data));</script>"""


class Tree(html.parser.HTMLParser):
    """A page as nested lists [tag, attributes, child, child, ...]; a child is a list or a text."""

    def __init__(self, page):
        super().__init__()
        self.root = ["page", {}]
        self.open = [self.root]
        self.feed(page)
        assert self.open == [self.root], "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        node = [tag, dict(attributes)]
        self.open[-1].append(node)
        self.open += [node] if tag not in VOID else []

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, self.getpos()

    def handle_data(self, text):
        self.open[-1].append(text)


def find(node, **wanted):
    """All nodes below with a tag or attributes: find(node, tag="a"), find(node, id="row")."""
    found = []
    for child in node[2:]:
        if isinstance(child, list):
            own = {"tag": child[0]} | {key.replace("-", "_"): value for key, value in child[1].items()}
            found += [child] * all(value in (own.get(key) or "").split() for key, value in wanted.items())
            found += find(child, **wanted)
    return found


def text_of(node):
    return "".join(child if isinstance(child, str) else text_of(child) for child in node[2:])


@pytest.fixture(scope="module")
def runs(tiny_dir, tmp_path_factory):
    """Three runs of two steps, where `make tour` has them."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "inputs").symlink_to(tiny_dir)
    for method in tour.METHODS:
        out = runs / "unhealthy" / "mistral" / method / "1"
        assert train.main([
            "--method", method, "--dataset", "unhealthy", "--data_dir", f"{tiny_dir}/unhealthy", "--model",
            f"{tiny_dir}/models/mistral", "--dtype", "fp32", "--max_steps", "2", "--batch_size", "16",
            "--validations", "2", "--out", str(out)]) == 0
    return runs


@pytest.fixture(scope="module")
def page(runs):
    started, out = time.process_time(), runs / "tour.html"
    assert tour.main(["--runs", str(runs), "--out", str(out)]) == 0
    assert time.process_time() - started < 25
    return out


@pytest.fixture(scope="module")
def root(page):
    return Tree(page.read_text(encoding="utf-8")).root


def test_every_link_leads_to_a_place_on_the_page_and_nothing_comes_from_elsewhere(page, root):
    ids = [node[1]["id"] for node in find(root) if "id" in node[1]]
    links = [node[1]["href"] for node in find(root, tag="a")]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} == set(ids)
    assert all(link.startswith("#") for link in links)
    assert not find(root, tag="link") and not find(root, tag="img") and not find(root, tag="iframe")
    assert not any("src" in node[1] for node in find(root))
    assert not re.search(r"https?://|url\(|@import|fetch\(", page.read_text(encoding="utf-8"))


def test_every_stop_has_its_four_parts(root):
    stops, tests = find(root, tag="section"), tour.test_places()
    assert 14 <= len(stops) <= 18 and [stop[1]["id"] for stop in stops] == [
        show.__name__.removeprefix("show_") for show in tour.SHOWN]
    for stop in stops:
        paper, source, example, checks = (find(stop, **{"class": name})[0]
                                          for name in ("paper", "source", "example", "checks"))
        assert re.match(r"The paper, (section|sections|appendix) [IVX]+|Not in the paper", text_of(paper))
        assert len(text_of(paper)) > 200 and find(source, tag="figure") and re.search(r"\d", text_of(example))
        names = re.findall(r"test_\w+(?= tests/)", text_of(checks))
        assert names and all(f"{name} {tests[name]}" in text_of(checks) for name in names), stop[1]["id"]


def test_the_lines_shown_are_those_of_the_scripts(root):
    figures, n_lines = find(root, tag="figure"), 0
    for figure in figures:
        lines = (tour.ROOT / figure[1]["data-script"]).read_text().splitlines()
        for n, node in enumerate(find(figure, **{"class": "line"}), start=int(figure[1]["data-first"])):
            assert (node[1]["data-n"], text_of(node)) == (str(n), lines[n - 1] + "\n")
            n_lines += 1
    assert 500 < n_lines < 700 and f"The {n_lines} lines" in text_of(find(root, tag="header")[0])


def test_the_example_is_the_text_of_the_files_and_its_numbers_are_those_of_the_runs(root, runs):
    example = tour.Example(runs)
    rows = [line for line in (runs / "inputs" / "unhealthy" / "unhealthy_full.csv").read_text().splitlines()
            if example.text in line]
    assert all(any(f",{user}," in row for row in rows) for user in example.users)
    shown = text_of(find(root, id="top")[0])
    assert example.text in shown and all(f"User {user} says" in shown for user in example.users)
    assert f"{example.results['clsp']['f1_macro']:.3f}" in text_of(find(root, id="f1")[0])
    tokens, terms, _ = example.answers("trained")
    loss = example.objective("lmp", "trained").mean_loss(example.encoded["lmp"]["pair"], 0)
    assert len(tokens) == len(terms) and abs(-terms.mean().item() - loss) < 1e-5
    assert f"{loss:.3f}" in text_of(find(root, id="loss")[0])


def test_each_audit_row_that_a_stop_asks_for_is_there():
    rows = tour.audit_rows()
    for stop in tour.read_words()[1]:
        assert set(stop.rows) <= rows.keys(), (stop.anchor, stop.rows)
    assert "1,224 test annotations instead of 1,257" in rows["D1"] and rows["P4"] == rows["P6"]


def test_what_is_gone_from_the_scripts_is_named():
    for place in ("data.py: no_such_function", "data.py: clean / no statement", "lora.py: LoRALinear.none"):
        with pytest.raises(ValueError, match=re.escape(repr(place))):
            tour.cut(place)
    part = tour.cut("prompts.py: METHODS")
    assert tour.parsed("prompts.py")[0][part.first - 1] == "METHODS = {"
    decorated = tour.cut("train.py: Objective.mean_loss")
    assert tour.parsed("train.py")[0][decorated.first - 1].strip().startswith("@")


def test_formulas_become_mathml(root, page):
    assert tour.mathml(r"\hat{Y}_u = \frac{1}{2}") == (
        '<math display="inline"><mrow><msub><mover accent="true"><mrow><mi>Y</mi></mrow><mo>^</mo></mover>'
        "<mi>u</mi></msub><mo>=</mo><mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac></mrow></math>")
    formulas = re.findall(r"<math.*?</math>", page.read_text(encoding="utf-8"))
    assert len(formulas) > 40
    for formula in formulas:
        ElementTree.fromstring(formula)
    assert not re.search(r"\$|\\[a-z]", "".join(text_of(node) for kind in ("paper", "what", "checks")
                                                for node in find(root, **{"class": kind})))


def test_a_run_that_is_missing_is_one_line_with_status_2(tmp_path, capsys):
    assert tour.main(["--runs", str(tmp_path), "--out", str(tmp_path / "tour.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "tour.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_follows_every_link_and_nothing_is_wider_than_its_window(page, tmp_path, width):
    probed = page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width))  # a window is 500 pixels wide at least
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                           f"--user-data-dir={tmp_path}/profile", "--window-size=1400,900", "--dump-dom",
                           "--virtual-time-budget=5000", (tmp_path / "frame.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-1000:]
    assert json.loads(html.unescape(found[1])) == [width, width, [], [], True, True]
