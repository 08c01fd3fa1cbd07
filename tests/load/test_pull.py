"""Pulling from a hub on loopback: what is chosen, resumed, checked, refused. The real client is the fake's oracle."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from inhouse.core.errors import CapacityError, FormatError, InhouseError, NetworkError, NotFoundError, UsageError
from inhouse.load.choose import choose_files, gguf_models
from inhouse.load.pull import HubReference, parse_hub_reference, pull
from inhouse.store import http as transport
from inhouse.store import lock
from inhouse.store.hub import RemoteFile
from inhouse.store.store import Store
from tests.load.hub_server import COMMIT, TOKEN, FakeHub, serve

pytestmark = [pytest.mark.server, pytest.mark.realdata]
REPO = "owner/stories"


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def hub(stories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = {path.name: path.read_bytes() for path in (stories / "hf").iterdir()}
    folder |= {"pytorch_model.bin": b"pickle" * 9999, ".gitattributes": b"*", "README.md": b"---\nlicense: mit\n---\n"}
    ggufs = {path.name: path.read_bytes() for path in stories.glob("*.gguf")}
    with serve({REPO: folder, "owner/stories-GGUF": ggufs | {"README.md": b"#"}}) as hub:
        monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.001)
        yield hub


def env(hub: FakeHub, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.endpoint, "MODELSCOPE_ENDPOINT": hub.endpoint, **more}


def weights(store: Store, name: str) -> bytes:
    return (store.folder(store.catalog.resolve(name)) / "model.safetensors").read_bytes()


def test_the_real_client_accepts_the_fake_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="the real client is not installed")
    info = huggingface_hub.HfApi(endpoint=hub.endpoint).model_info(REPO, files_metadata=True)
    assert info.sha == COMMIT
    sizes = {file.rfilename: file.size for file in info.siblings}
    assert sizes["model.safetensors"] == len(hub.repos[REPO]["model.safetensors"])
    for name in ("config.json", "model.safetensors"):
        path = huggingface_hub.hf_hub_download(REPO, name, endpoint=hub.endpoint, cache_dir=tmp_path)
        assert Path(path).read_bytes() == hub.repos[REPO][name]


def test_a_repository_comes_in_by_its_safetensors(store: Store, hub: FakeHub) -> None:
    reports: list[tuple[str, int, int]] = []
    pulled = pull(REPO, store=store, environ=env(hub), progress=lambda *report: reports.append(report))
    version = pulled.version
    assert (version.ref, version.format, version.origin) == ("stories:1", "safetensors", f"hf:{REPO}@{COMMIT}")
    assert (pulled.new, pulled.left_out, version.summary.licence) == (True, ("pytorch_model.bin",), "mit")
    assert weights(store, "stories") == hub.repos[REPO]["model.safetensors"]
    assert not hub.asked("pytorch_model.bin")
    size = len(hub.repos[REPO]["model.safetensors"])
    assert ("pull model.safetensors", size, size) in reports
    assert list(store.home.downloads.iterdir()) == []
    assert store.check(deep=True) == []


def test_the_same_revision_is_not_fetched_twice(store: Store, hub: FakeHub) -> None:
    first = pull(REPO, store=store, environ=env(hub))
    hub.requests.clear()
    again = pull(f"{REPO}@v1", store=store, environ=env(hub))
    assert (again.version, again.new) == (first.version, False)
    assert not hub.asked("/resolve/")


@pytest.mark.parametrize("tag", ["Q4_0", "q4_0", "stories260K-Q4_0", "stories260K-Q4_0.gguf"])
def test_a_gguf_is_chosen_by_its_tag(store: Store, hub: FakeHub, tag: str) -> None:
    pulled = pull(f"owner/stories-GGUF:{tag}", store=store, environ=env(hub))
    assert (pulled.version.ref, pulled.version.summary.dtype) == ("stories260K-Q4_0:1", "Q4_0")
    assert len(hub.asked("/cdn/")) == 1


def test_several_ggufs_ask_for_a_choice(store: Store, hub: FakeHub) -> None:
    with pytest.raises(UsageError, match=r"8 GGUF models.*BF16, F16, F32, Q4_0"):
        pull("owner/stories-GGUF", store=store, environ=env(hub))
    with pytest.raises(NotFoundError, match="no GGUF 'Q3_K'. Did you mean Q"):
        pull("owner/stories-GGUF:Q3_K", store=store, environ=env(hub))


def test_modelscope(store: Store, hub: FakeHub) -> None:
    pulled = pull(f"modelscope:{REPO}", "from-ms", store=store, environ=env(hub, MODELSCOPE_API_TOKEN="t"))
    assert pulled.version.origin.startswith(f"modelscope:{REPO}@master~")
    assert weights(store, "from-ms") == hub.repos[REPO]["model.safetensors"]
    assert hub.asked("/repo/files")[0]["cookie"] == "m_session_id=t"
    assert pull(f"ms:{REPO}", "from-ms", store=store, environ=env(hub)).new is False


def test_broken_connections_are_resumed_where_they_broke(store: Store, hub: FakeHub) -> None:
    hub.faults.drop_after = [300_000, 300_000, 100]
    pull(REPO, store=store, environ=env(hub))
    ranges = [headers.get("range") for headers in hub.asked("/cdn/")]
    assert ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=600100-"]
    assert weights(store, "stories") == hub.repos[REPO]["model.safetensors"]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(store: Store, hub: FakeHub) -> None:
    hub.faults.drop_after = [400_000] + [0] * 20
    with pytest.raises(NetworkError, match="5 attempts") as caught:
        pull(REPO, store=store, environ=env(hub))
    assert "resumed" in caught.value.remedy
    assert store.catalog.versions() == []
    hub.faults.drop_after, hub.requests[:] = [], []
    pull(REPO, store=store, environ=env(hub))
    assert [headers.get("range") for headers in hub.asked("/cdn/")] == ["bytes=400000-"]
    assert not hub.asked("config.json"), "what was whole is not fetched again"
    assert weights(store, "stories") == hub.repos[REPO]["model.safetensors"]


def test_a_partial_of_another_content_is_not_used(store: Store, hub: FakeHub) -> None:
    hub.faults.drop_after = [400_000] + [0] * 20
    with pytest.raises(NetworkError):
        pull(REPO, store=store, environ=env(hub))
    partial = next(store.home.downloads.rglob("*.partial"))
    partial.write_bytes(b"?" * 400_000)
    hub.faults.drop_after = []
    pull(REPO, store=store, environ=env(hub))
    assert weights(store, "stories") == hub.repos[REPO]["model.safetensors"]


@pytest.mark.parametrize("fault", ["ignore_ranges", "wrong_range"])
def test_servers_that_do_ranges_wrongly_are_started_over(store: Store, hub: FakeHub, fault: str) -> None:
    hub.faults.drop_after = [500_000]
    setattr(hub.faults, fault, True)
    pull(REPO, store=store, environ=env(hub))
    assert weights(store, "stories") == hub.repos[REPO]["model.safetensors"]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_wrong_checksum_is_an_error_and_nothing_is_imported(store: Store, hub: FakeHub, path: str) -> None:
    hub.faults.flip = path
    with pytest.raises(FormatError, match=f"{path} hashes to .* the hub announced"):
        pull(REPO, store=store, environ=env(hub))
    assert store.catalog.versions() == []
    assert list(store.blobs) == []
    assert not list(store.home.downloads.rglob(f"{path}*"))
    hub.faults.flip = ""
    assert pull(REPO, store=store, environ=env(hub)).new


def test_a_file_longer_than_announced_is_cut_off(store: Store, hub: FakeHub) -> None:
    hub.faults.grow = "model.safetensors"
    with pytest.raises(NetworkError, match="were announced"):
        pull(REPO, store=store, environ=env(hub))


def test_busy_answers_are_retried_and_the_wait_is_honoured(
    store: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transport.Patience, "failed", _recording(transport.Patience.failed, waits))
    hub.faults.statuses, hub.faults.retry_after = [429, 503], "0.01"
    assert pull(REPO, store=store, environ=env(hub)).new
    assert waits == [0.01, 0.01]
    hub.faults.statuses = [500] * 20
    with pytest.raises(NetworkError, match=r"answered 500 \(5 attempts\)"):
        pull(f"{REPO}@main", "again", store=store, environ=env(hub))


Failed = Callable[[transport.Patience, transport.Transient], None]


def _recording(original: Failed, waits: list[float]) -> Failed:
    def failed(self: transport.Patience, error: transport.Transient) -> None:
        waits.append(error.wait_s)
        original(self, error)

    return failed


def test_tokens_open_private_models_and_go_to_the_hub_alone(store: Store, hub: FakeHub) -> None:
    hub.faults.private = True
    with pytest.raises(NetworkError, match="401.*HF_TOKEN"):
        pull(REPO, store=store, environ=env(hub))
    hub.requests.clear()
    pull(REPO, store=store, environ=env(hub, HF_TOKEN=TOKEN))
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in hub.asked("/resolve/"))
    assert [headers.get("authorization") for headers in hub.asked("/cdn/")] == [None]


def test_unknown_repositories_and_revisions(store: Store, hub: FakeHub) -> None:
    for reference in ("owner/absent", f"{REPO}@absent"):
        with pytest.raises(NotFoundError, match="does not exist"):
            pull(reference, store=store, environ=env(hub))
    assert list(store.home.downloads.iterdir()) == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_honoured_before_any_request(store: Store, hub: FakeHub, variable: str) -> None:
    with pytest.raises(NetworkError, match=f"{variable} is set"):
        pull(REPO, store=store, environ=env(hub, **{variable: "1"}))
    assert hub.requests == []
    assert pull(REPO, store=store, environ=env(hub, **{variable: "0"})).new


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x", "//", "http://"])
def test_redirects_lead_to_http_alone(store: Store, hub: FakeHub, target: str) -> None:
    hub.faults.redirect = target
    with pytest.raises(NetworkError):
        pull(REPO, store=store, environ=env(hub))
    assert store.catalog.versions() == []


def test_redirects_end(store: Store, hub: FakeHub) -> None:
    hub.faults.redirect = f"{hub.endpoint}/{REPO}/resolve/{COMMIT}/model.safetensors"
    with pytest.raises(NetworkError, match="more than 5 redirects"):
        pull(REPO, store=store, environ=env(hub))


def test_https_is_never_left() -> None:
    response = httpx.Response(302, headers={"location": "http://127.0.0.1/x"})
    with pytest.raises(NetworkError, match="refused"):
        transport._next("https://127.0.0.1/a", response)
    assert transport._next("http://127.0.0.1/a", response) == "http://127.0.0.1/x"


@pytest.mark.parametrize("path", ["../../etc/model.safetensors", "/model.safetensors", "a/../../tokenizer.json"])
def test_paths_that_leave_the_folder_are_refused(store: Store, hub: FakeHub, path: str) -> None:
    files = [RemoteFile("config.json", 1), RemoteFile("model.safetensors", 1), RemoteFile(path, 1)]
    assert path not in [file.path for file in choose_files(files).files]
    hub.repos["owner/evil"] = {"../x-Q4_0.gguf": b"GGUF" + bytes(100)}
    with pytest.raises(FormatError, match="cannot be the path"):
        pull("owner/evil", store=store, environ=env(hub))
    assert not list(store.home.downloads.rglob("*Q4_0*"))


def test_an_unknown_family_is_said_before_the_weights_are_fetched(store: Store, hub: FakeHub) -> None:
    hub.repos[REPO]["config.json"] = b'{"architectures": ["NovelForCausalLM"]}'
    with pytest.raises(InhouseError, match="NovelForCausalLM"):
        pull(REPO, store=store, environ=env(hub))
    assert not hub.asked("/cdn/")


def test_two_pulls_of_one_model_do_not_write_the_same_files(store: Store, hub: FakeHub) -> None:
    hub.faults.drop_after = [10] + [0] * 20
    with pytest.raises(NetworkError):
        pull(REPO, store=store, environ=env(hub))
    folder = next(store.home.downloads.iterdir())
    with lock.exclusive(folder / ".lock", 0), pytest.raises(CapacityError):
        pull(REPO, store=store, environ=env(hub))


def test_nonsense_from_a_hub_is_an_error(store: Store, hub: FakeHub) -> None:
    with pytest.raises(NetworkError, match="JSON"):
        pull(REPO, store=store, environ={"HF_ENDPOINT": f"{hub.endpoint}/{REPO}/resolve/main/README.md?x="})
    for endpoint in ("ftp://x", "not an address"):
        with pytest.raises(UsageError, match="not an http"):
            pull(REPO, store=store, environ={"HF_ENDPOINT": endpoint})
    with pytest.raises(NetworkError, match="attempts"):
        pull(REPO, store=store, environ={"HF_ENDPOINT": "http://127.0.0.1:9"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", HubReference("hf", "gpt2")),
        ("Qwen/Qwen2.5-0.5B-Instruct", HubReference("hf", "Qwen/Qwen2.5-0.5B-Instruct")),
        ("hf:a/b:Q4_K_M@v2", HubReference("hf", "a/b", "Q4_K_M", "v2")),
        ("ms:a/b@refs/pr/1", HubReference("modelscope", "a/b", None, "refs/pr/1")),
    ],
)
def test_references(text: str, expected: HubReference) -> None:
    assert parse_hub_reference(text) == expected


@pytest.mark.parametrize("text", ["", "a/b/c", "../x", "a/..b", "a/b@../x", "a b", "http://x/y"])
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="no model of a hub"):
        parse_hub_reference(text)


def remote(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1) for path in paths]


def test_shards_come_with_their_index_and_without_other_forms() -> None:
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = remote("config.json", "model.safetensors.index.json", *shards, "consolidated.safetensors", "x-Q4_0.gguf",
                   "pytorch_model.bin", "tokenizer.json", "modeling.py")  # fmt: skip
    choice = choose_files(files)
    assert {file.path for file in choice.files} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        *shards,
    }
    assert choice.left_out == ("consolidated.safetensors", "modeling.py", "pytorch_model.bin", "x-Q4_0.gguf")
    assert choice.entry == "."


def test_pickles_only_where_nothing_else_is() -> None:
    assert choose_files(remote("config.json", "pytorch_model.bin")).files[-1].path == "pytorch_model.bin"
    assert choose_files(remote("pytorch_model.bin", "only-Q8_0.gguf")).entry == "only-Q8_0.gguf"
    with pytest.raises(NotFoundError, match="no weights"):
        choose_files(remote("config.json", "model.onnx"))


def test_split_and_nested_ggufs_are_one_model_each() -> None:
    split = [f"Q8_0/m-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    models = gguf_models([*split, "m-Q4_K_M.gguf", "m-IQ4_XS.gguf", "mmproj-F16.gguf", "m-UD-Q2_K_XL.gguf"])
    assert set(models) == {"Q8_0", "Q4_K_M", "IQ4_XS", "UD-Q2_K_XL"}
    choice = choose_files(remote(*split, "m-Q4_K_M.gguf"), "Q8_0")
    assert (choice.entry, [file.path for file in choice.files]) == (split[0], split)
