"""Settings: the order of the four places, conversion, and errors that name what is wrong."""

import math
from pathlib import Path

import pytest

from inhouse.core.errors import UsageError
from inhouse.core.settings import Settings, load_settings, parse_size

pytestmark = pytest.mark.null


def test_each_place_overrides_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('port = 1\nthreads = 1\nhost = "a"\nprefix_cache = false\n')
    got = load_settings({"host": "c", "port": None}, environ={"INHOUSE_THREADS": "2", "INHOUSE_HOST": "b"}, path=file)
    assert (got.port, got.threads, got.host, got.prefix_cache) == (1, 2, "c", False)
    assert got.max_queue == Settings().max_queue


@pytest.mark.parametrize(
    ("environ", "content", "says"),
    [
        ({"INHOUSE_PROT": "1"}, "", "INHOUSE_PORT"),
        ({"INHOUSE_PORT": "many"}, "", "port from $INHOUSE_PORT is 'many'"),
        ({"INHOUSE_QUANTIZE": "q9"}, "", "'q8'"),
        ({}, "treads = 2", "threads"),
        ({}, "port = true", "expected int"),
        ({}, "port = -1", "0 to 65535"),
        ({}, "port = 99999", "0 to 65535"),
        ({}, "max_queue = 0", "1 or more"),
        ({}, "port = ", "cannot read"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, environ: dict[str, str], content: str, says: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_settings(environ=environ, path=file)
    assert says in str(caught.value)


def test_variables_of_other_rooms_are_let_pass(tmp_path: Path) -> None:
    assert load_settings(environ={"INHOUSE_HOME": "/x", "PATH": "/bin", "HOME": str(tmp_path)}) == Settings()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512MB", 512 * 10**6), ("2GiB", 2 * 1024**3), ("1.5k", 1500), ("1KiB", 1024), ("0", 0),
     ("3e9", 3 * 10**9), (" 800 mb ", 8 * 10**8), (12345, 12345), (1.5e9, 1_500_000_000)],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1XB", "-1", "nan", "1e30", "5i", -1, True, None, math.inf])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(UsageError, match="here: .* is no size"):
        parse_size(text, "here")
