"""Where the model home is, what references mean, and that locks exclude."""

import stat
import threading
from pathlib import Path

import pytest

from inhouse.core.errors import CapacityError, UsageError
from inhouse.store import lock
from inhouse.store.home import Home
from inhouse.store.refs import Ref, check_name, hint, name_from, parse_ref

pytestmark = pytest.mark.null


@pytest.mark.parametrize(
    ("environ", "data", "cache"),
    [
        ({"INHOUSE_HOME": "/m", "XDG_DATA_HOME": "/x"}, "/m", "/m/cache"),
        ({"XDG_DATA_HOME": "/x", "XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/x/inhouse", "/c/inhouse"),
        ({"XDG_DATA_HOME": "relative", "HOME": "/h"}, "/h/.local/share/inhouse", "/h/.cache/inhouse"),
        ({"HOME": "/h"}, "/h/.local/share/inhouse", "/h/.cache/inhouse"),
    ],
)
def test_home_follows_the_environment(environ: dict[str, str], data: str, cache: str) -> None:
    assert Home.find(environ) == Home(Path(data), Path(cache))


def test_relative_home_is_refused() -> None:
    with pytest.raises(UsageError, match="not an absolute path"):
        Home.find({"INHOUSE_HOME": "models"})


def test_folders_are_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "b", tmp_path / "c")
    home.create()
    for folder in (home.data, home.blobs, home.views, home.tmp, home.downloads):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("qwen", Ref("qwen")),
        ("qwen:latest", Ref("qwen")),
        ("qwen:12", Ref("qwen", number=12)),
        ("Qwen/Qwen2.5-0.5B@prod", Ref("Qwen/Qwen2.5-0.5B", alias="prod")),
        ("qwen:prod", Ref("qwen", alias="prod")),
    ],
)
def test_references(text: str, ref: Ref) -> None:
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a:", "a:0", "a:-1", "a:99999999999999999999", "a@3", "../a", "a/../b", "a b", "a:1:2", ".a", "a/b/c/d"],
)
def test_ill_formed_references(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ref(text)


def test_names_are_made_from_any_text() -> None:
    assert name_from("stories260K-Q4_0") == "stories260K-Q4_0"
    assert name_from("My model (v2)") == "My-model-v2"
    for text in ("..", "", "///", "模型", "a" * 500, "x/y/z"):
        assert check_name(name_from(text))


def test_hint_names_the_near_one() -> None:
    assert "stories260K" in hint("stores260k", ["stories260K", "qwen"])
    assert "import" in hint("x", [])


def test_exclusive_waits_for_shared(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.shared(path), lock.shared(path), pytest.raises(CapacityError, match="held lock"):
        with lock.exclusive(path, 0):
            pass
    released, entered = threading.Event(), threading.Event()

    def wait() -> None:
        with lock.exclusive(path, 10):
            assert released.is_set()
            entered.set()

    with lock.shared(path):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.1)
        released.set()
    thread.join(10)
    assert entered.is_set()
