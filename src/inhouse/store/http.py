"""HTTP as downloads need it: bounded, patient, and careful with whom it tells the token.

Knows redirects, statuses, retries; does not know any hub's paths. A token goes to the hub's own origin only; redirects
go to http(s) alone and never from https to http.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from inhouse.core.errors import FormatError, NetworkError, NotFoundError, UsageError

T = TypeVar("T")

MAX_REDIRECTS = 5
MAX_JSON_BYTES = 32 << 20
CHUNK = 1 << 20
RETRIES = 5  # attempts that fail one after another without a byte of progress
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
CONNECT_S, READ_S = 15.0, 60.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class Transient(Exception):
    """An attempt failed in a way that another may not; `wait_s` is what the server asked for, 0 if nothing."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(slots=True)
class Patience:
    """Counts failures and waits between them, twice as long each time."""

    sleep: Callable[[float], None] = time.sleep
    failures: int = 0

    def progress(self) -> None:
        """A byte came: the count starts anew."""
        self.failures = 0

    def failed(self, error: Transient) -> None:
        """Waits for the next attempt. Raises NetworkError after the last."""
        self.failures += 1
        if self.failures >= RETRIES:
            raise NetworkError(
                f"{error} ({self.failures} attempts)",
                remedy="Try again later: what was fetched so far is kept and resumed.",
            ) from None
        wait = max(error.wait_s, FIRST_WAIT_S * 2 ** (self.failures - 1))
        self.sleep(min(wait, LONGEST_WAIT_S))


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that is being read, and what the hub itself said of the file before it redirected."""

    response: httpx.Response
    linked_etag: str  # of the content, unquoted; "" if unknown


@dataclass(slots=True)
class Session:
    """Requests to one hub.

    Args:
        endpoint: its base URL, http or https, without a slash at the end.
        headers: sent to that origin only (the token).
        token_hint: what to set for access, named in the errors of 401 and 403.
    """

    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict)
    token_hint: str = ""
    sleep: Callable[[float], None] = time.sleep
    _client: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_url(self.endpoint)
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
            headers={"User-Agent": "inhouse", "Accept-Encoding": "identity"},
            follow_redirects=False,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def json(self, url: str) -> Any:
        """The JSON document at a URL, retried. Raises NotFoundError, NetworkError."""
        return self.retry(lambda: self._json(url))

    def retry(self, attempt: Callable[[], T]) -> T:
        """Calls until it succeeds. Raises NetworkError after the last attempt."""
        patience = Patience(self.sleep)
        while True:
            try:
                return attempt()
            except Transient as error:
                patience.failed(error)

    def _json(self, url: str) -> Any:
        with self.stream(url) as answer:
            body = bytearray()
            for chunk in answer.response.iter_raw(CHUNK):
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise NetworkError(f"{url} answered more than {MAX_JSON_BYTES} bytes of JSON")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise NetworkError(
                f"{url} did not answer with JSON", remedy="Check the endpoint: is it a hub of this kind?"
            ) from None

    @contextmanager
    def stream(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """The response at the end of the redirects, its body unread.

        Raises Transient for what may pass; NotFoundError, NetworkError for what will not. While the body is read,
        a broken connection raises Transient too.
        """
        try:
            etag = ""
            for _ in range(MAX_REDIRECTS + 1):
                request = self._client.build_request("GET", url, headers=self._headers_for(url) | dict(headers or {}))
                response = self._client.send(request, stream=True)
                try:
                    etag = etag or _etag(response)
                    if response.status_code not in _REDIRECTS:
                        self._check(response, url)
                        yield Answer(response, etag)
                        return
                    url = _next(url, response)
                finally:
                    response.close()
            raise NetworkError(f"more than {MAX_REDIRECTS} redirects, the last to {url[:200]}")
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Transient(f"{httpx.URL(url).host} broke off: {type(error).__name__} {error}") from None

    def _headers_for(self, url: str) -> dict[str, str]:
        return dict(self.headers) if _origin(url) == _origin(self.endpoint) else {}

    def _check(self, response: httpx.Response, url: str) -> None:
        status = response.status_code
        if status in (200, 206, 416):
            encoding = response.headers.get("content-encoding", "identity")
            if encoding != "identity":
                raise NetworkError(f"{url} answered with the encoding {encoding}, which was not asked for")
            return
        if status in _TRANSIENT:
            raise Transient(f"{url} answered {status}", _retry_after(response))
        if status in (401, 403):
            raise NetworkError(
                f"{url} answered {status}: it does not exist, or access is refused",
                remedy=self.token_hint,
                param="token",
            )
        if status == 404:
            raise NotFoundError(f"{url} does not exist", remedy="Check the name and the revision.")
        raise NetworkError(f"{url} answered {status}")


def check_url(url: str) -> str:
    """The URL itself, if it is an http(s) one with a host. Raises UsageError."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url[:120]!r} is not an http(s) address", param="endpoint")
    return url


def _next(url: str, response: httpx.Response) -> str:
    target = response.headers.get("location", "")
    try:
        following = httpx.URL(url).join(target)
    except httpx.InvalidURL:
        raise NetworkError(f"{url} redirects to {target[:120]!r}, which is no address") from None
    allowed = ("https",) if httpx.URL(url).scheme == "https" else ("http", "https")
    if not target or following.scheme not in allowed or not following.host:
        raise NetworkError(
            f"{url} redirects to {target[:120]!r}, refused", remedy="Only http(s) is followed, and https never to http."
        )
    return str(following)


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port


def _etag(response: httpx.Response) -> str:
    value = str(response.headers.get("x-linked-etag") or response.headers.get("etag") or "")
    return value.removeprefix("W/").strip('"')


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def require(condition: bool, what: str) -> None:
    """Raises NetworkError naming what a hub answered wrongly."""
    if not condition:
        raise NetworkError(f"the hub answered nonsense: {what}", remedy="Check the endpoint.")


def wrong_content(name: str, expected: str, actual: str) -> FormatError:
    """The error for a file that is not what the hub announced."""
    return FormatError(
        f"{name} hashes to {actual[:16]}..., the hub announced {expected[:16]}...",
        remedy="The transfer or the hub's copy is damaged; try again, or another hub.",
        param=name,
    )
