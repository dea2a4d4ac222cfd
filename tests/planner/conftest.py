import pytest


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch, tmp_path_factory):
    """What somebody has measured on this machine is not there."""
    monkeypatch.setenv("RESNET_BK_CACHE", str(tmp_path_factory.mktemp("cache")))
