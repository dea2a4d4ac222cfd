"""Files of the Hub, without a Hub."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from resnet_bk.hub import HubError, hub_file


class Hub:
    """What the library would answer."""

    def __init__(self, monkeypatch, *, cached=False, failure=None):
        self.calls, self.cached, self.failure = [], cached, failure
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.metadata)

    def download(self, repository, name, *, local_files_only=False):
        self.calls.append(("cache" if local_files_only else "download", repository, name))
        if local_files_only and not self.cached:
            raise LocalEntryNotFoundError("not here")
        return f"/cache/{repository}/{name}"

    def metadata(self, url):
        self.calls.append(("ask", url))
        if self.failure is not None:
            raise self.failure


def test_a_copy_that_is_here_needs_no_network(monkeypatch):
    hub = Hub(monkeypatch, cached=True, failure=OSError("no network"))
    assert hub_file("gpt2", "config.json") == Path("/cache/gpt2/config.json")
    assert hub.calls == [("cache", "gpt2", "config.json")]


def test_what_is_not_here_is_asked_for_once_and_then_brought(monkeypatch):
    hub = Hub(monkeypatch)
    assert hub_file("org/name", "config.json") == Path("/cache/org/name/config.json")
    assert [call[0] for call in hub.calls] == ["cache", "ask", "download"]
    assert "org/name" in hub.calls[1][1] and hub.calls[1][1].endswith("config.json")


def test_without_a_network_nothing_is_tried_again(monkeypatch):
    hub = Hub(monkeypatch, failure=OSError("no route\nto the host"))
    with pytest.raises(HubError, match=r"the Hub cannot be reached \(no route to the host\)"):
        hub_file("org/name", "config.json")
    assert [call[0] for call in hub.calls] == ["cache", "ask"]


def test_a_repository_that_is_not_there_is_told_from_a_network_that_is_not(monkeypatch):
    class NotFoundError(HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "404")

    Hub(monkeypatch, failure=NotFoundError())
    with pytest.raises(HubError, match=r"the Hub has no config.json of org/name"):
        hub_file("org/name", "config.json")
