"""The documentation's code runs, its figures are marked, its links lead somewhere."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from gradstore import Store

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
    for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_command_is_in_the_readme() -> None:
    from importlib import import_module

    readme = (ROOT / "README.md").read_text()
    commands = SimpleNamespace(**vars(import_module("gradstore.cli.main"))).cli.commands
    assert commands
    for name in commands:
        assert f"gradstore {name}" in readme or f"`{name}`" in readme, name
