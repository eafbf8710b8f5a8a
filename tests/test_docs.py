"""The documentation's code runs, its figures are marked, its links lead somewhere."""

import re
from collections import Counter, defaultdict
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
from tiny import Tiny
from tiny import run as gradstore
from transformers import AutoModelForCausalLM, GPT2Config

from gradstore import Store
from gradstore.unlearn.match import Match, Thresholds, record_matches

pytest_plugins = ["tiny"]
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


def run(page: Path, **names: object) -> dict[str, object]:
    for language, code in blocks(page, "python", "sql"):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        else:
            columns, rows = Store.open("store").query(code)
            assert columns, code
            assert rows, code
    return names


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs" / "guide.md")
    assert names["outcome"].verdict in ("forgotten", "partly")  # type: ignore[attr-defined]
    assert (tmp_path / "forgotten" / "model.safetensors").exists()
    run(ROOT / "docs" / "store-format.md")


def test_the_twenty_questions_have_answers(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = ["forget", "p-01", "-s", "store", "--model", copied.model]
    gradstore(*request, "--out", "one", "--dose", 4, "--max-holdout-increase", 9, code=None)
    gradstore(*request, "--out", "two", "--dose", 0.01, code=3)
    for id in ("p-01", "p-02"):
        gradstore("top", "--id", id, "-s", "store")
    store = Store.open("store")
    record_matches(store, [Match("p-03", "p-02", 0.6, 0.8, 0.5, ("jaccard",))], Thresholds())

    page = tmp_path / "sql.md"
    text = (
        (ROOT / "docs" / "sql.md").read_text().replace("p-0001", "p-01").replace("p-0048", "p-02")
    )
    page.write_text(text)
    run(page)
    asked = re.findall(r"^\*\*(\d+)\..*?^```sql\n(.*?)^```\n\n```\n(.*?)\n", text, re.DOTALL | re.M)
    assert [int(number) for number, _, _ in asked] == list(range(1, 21))
    answers = {}
    for number, query, heading in asked:
        columns, answers[int(number)] = store.query(query)
        assert heading.split() == columns

    numbers = [number for (number,) in store.rows("SELECT sample_id FROM samples")]
    records = list(store.records(numbers, 1))
    losses = defaultdict[int, list[float]](list)
    for record in records:
        losses[record.exposure.epoch].append(record.exposure.loss or 0.0)
    assert [row[:2] for row in answers[1]] == [
        (epoch, pytest.approx(sum(some) / len(some))) for epoch, some in sorted(losses.items())
    ]
    norms = {
        r.exposure.id: r.gradient(store.model).norm() for r in records if r.exposure.epoch == 1
    }
    largest = sorted(norms, key=norms.__getitem__)[:-4:-1]
    assert [row[0] for row in answers[7]] == largest
    assert [row[1] for row in answers[7]] == pytest.approx([norms[id] for id in largest])
    assert answers[11][0][3] == pytest.approx(1)
    influences = dict(store.query("SELECT id, score FROM influence('p-01', 'dot', 1000)")[1])
    best = sorted(influences.values(), reverse=True)[:3]  # each of these short ids is a source
    assert [row[3] for row in answers[8]] == pytest.approx(best)
    assert [row[2] for row in answers[8]] == [1, 1, 1]
    answered = store.rows("SELECT id FROM influential WHERE rank <= 5")
    often = sorted(Counter(id for (id,) in answered).values(), reverse=True)
    assert len(answered) == 10
    assert [row[1] for row in answers[13]] == often[:3]
    assert [row[:2] for row in answers[14]] == [("p-03", "p-02")]
    assert {row[:2] for row in answers[15]} == {(1, "p-01"), (2, "p-01")}
    assert [(id, verdict, late) for id, _, verdict, late in answers[19]] == [
        ("p-01", "partly", False)
    ]


def test_the_readmes_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 50, (4, 10))
    loader = [{"inputs": {"input_ids": ids, "labels": ids}, "ids": ["a", "b", "c", "d"]}]
    optimizer = torch.optim.AdamW(model.parameters())
    names = run(ROOT / "README.md", model=model, loader=loader, optimizer=optimizer)
    assert isinstance(names["recorder"], object)
    assert Store.open("store").rows("SELECT count(*), max(epoch) FROM gradients") == [(4, 1)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)", page.read_text()):
        name, _, section = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if section:
            titles = re.findall("^#+ (.*)", file.read_text(), re.MULTILINE)
            anchors = [re.sub("[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert section in anchors, target


def test_the_picture_of_the_factors_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "factors.py"
    assert script.with_suffix(".svg").read_text() == run_path(str(script))["drawing"]()


def test_every_command_is_in_the_readme() -> None:
    from importlib import import_module

    readme = (ROOT / "README.md").read_text()
    commands = SimpleNamespace(**vars(import_module("gradstore.cli.main"))).cli.commands
    assert commands
    for name in commands:
        assert f"gradstore {name}" in readme or f"`{name}`" in readme, name
