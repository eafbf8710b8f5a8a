"""Names of models: what is a path is told at once, what may be of the hub is asked of it once."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstore.errors import ModelError
from gradstore.training import model
from gradstore.training.model import load_model, load_tokenizer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that counts who asks; ``hub.fault`` is what it raises."""

    here = SimpleNamespace(asked=[], loaded=[], fault=None)

    def model_info(name: str, timeout: float) -> None:
        here.asked.append(name)
        if here.fault is not None:
            raise here.fault

    def load(name: str, **options: Any) -> str:
        here.loaded.append(options)
        if options.get("local_files_only"):
            raise OSError("It is not in the cache.")
        return name

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    return here


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(load: Any, hub: Any) -> None:
    Path("runs").mkdir()
    Path("file").touch()
    for name in ("/absent/model", "../model", "a/b/c", "runs/trainde", "file", "~/model"):
        with pytest.raises(ModelError, match=r"there is no such directory\. Give a directory"):
            load(Path(name))
    assert hub.asked == []


def test_a_name_of_the_hub_is_loaded_from_it(hub: Any) -> None:
    for name in ("gpt2", "EleutherAI/pythia-70m"):
        assert load_model(name) == load_tokenizer(name) == name
    assert hub.asked == ["gpt2", "gpt2", "EleutherAI/pythia-70m", "EleutherAI/pythia-70m"]
    assert not any("local_files_only" in options for options in hub.loaded)


def test_without_a_network_only_what_is_here_is_looked_for(hub: Any) -> None:
    library = HfHubHTTPError.__bases__[0]
    for fault in (library("no route to host"), OfflineModeIsEnabled("offline mode")):
        hub.fault = fault
        with pytest.raises(ModelError, match="trainde is not a model .* no such directory, and of"):
            load_model("trainde")
    assert [options["local_files_only"] for options in hub.loaded] == [True, True]
    assert model.tokenizer_of("trainde") is None


def test_an_error_that_is_no_missing_network_is_told(hub: Any) -> None:
    hub.fault = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        load_model("trainde")
    assert hub.loaded == []


class Harm:
    """What touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickled_checkpoint_is_refused_and_not_opened(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "ran")))
    with pytest.raises(ModelError, match="safetensors"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists(), "else this shows nothing"
