import os
import tempfile

import pytest

# Before anything imports `datasets`: no test reads or fills the user's own cache, or asks the Hub.
CACHE = tempfile.TemporaryDirectory(prefix="rhea-tests-")
os.environ["HF_HOME"] = CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that runs/ never lands in the project."""
    monkeypatch.chdir(tmp_path)
