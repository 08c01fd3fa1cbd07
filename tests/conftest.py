"""What every test shares: the folder of real data, a private model home, and no network beyond loopback."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real models, tokenizers and texts; the test is skipped, saying why, where it is absent."""
    path = Path(os.environ.get("INHOUSE_REALDATA", ROOT.parent / "shared" / "realdata"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set INHOUSE_REALDATA")
    return path


@pytest.fixture(scope="session")
def stories(realdata: Path) -> Path:
    """The folder of the stories260K checkpoints."""
    return realdata / "models" / "stories260k"


@pytest.fixture(autouse=True)
def _private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own model home, so that none reads or writes the user's."""
    monkeypatch.setenv("INHOUSE_HOME", str(tmp_path / "inhouse-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return
