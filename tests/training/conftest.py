"""What the tests of training share: a text file, a token cache of their own, one thread."""

import pytest
import torch
from small_training import TEXT


@pytest.fixture(scope="session")
def shared_token_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("token-cache")


@pytest.fixture(autouse=True)
def own_token_cache(shared_token_cache, monkeypatch):
    monkeypatch.setenv("RESNET_BK_CACHE", str(shared_token_cache))


@pytest.fixture(autouse=True)
def one_thread():
    """More would only wait for each other on tensors this small. Runs set the number too: it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text(TEXT)
    return path
