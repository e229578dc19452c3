"""Models of transformers, and a cache of the hub, that several files share."""

import shutil

import pytest
from model_files import CONFIG, EXACT
from torch_gpt2 import torch_gpt2


@pytest.fixture(scope="session")
def theirs():
    """A model of transformers with random weights."""
    return torch_gpt2(CONFIG)


@pytest.fixture(scope="session")
def theirs_exact():
    """The same with the exact GELU, as nanoGPT's models."""
    return torch_gpt2(EXACT)


@pytest.fixture(scope="session")
def saved(theirs, tmp_path_factory):
    """The directory that `save_pretrained` writes of `theirs`."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    theirs.save_pretrained(directory)
    return directory


@pytest.fixture
def add_to_hub_cache(tmp_path, monkeypatch):
    """Without a network, adds a directory under a name to huggingface_hub's cache: refs/main names a snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(name, directory):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(directory, repository / "snapshots" / ("0" * 40))

    return add
