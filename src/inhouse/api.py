"""The library's face, for those who want no server:

    import inhouse
    with inhouse.Engine.open("demo") as engine:
        print(engine.chat("What is Inhouse?").text)

Everything here is a thin cover over `engine.session`; the answers are those that the server gives.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnavailableError, UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import load_settings
from inhouse.engine.request import Beams, SamplingParams, Usage
from inhouse.engine.session import Session
from inhouse.engine.text import TextDelta, TextEnd, TextFailed

if TYPE_CHECKING:  # torch is not needed to answer
    from inhouse.compress.pipeline import Compressed

F32 = npt.NDArray[np.float32]
Chat = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its text, why it ended (`stop`, `length`), its token counts and the seed of its draws. With `n` the
    other choices; of beam search its score (sum of logprobs / length ** length_penalty), the others best first."""

    text: str
    finish_reason: str
    usage: Usage
    seed: int
    score: float | None = None
    others: "tuple[Answer, ...]" = ()

    def __str__(self) -> str:
        return self.text


class Engine:
    """A model that answers. Thread-safe; many threads may ask at once and share its batches."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    def open(cls, model: str, **settings: Any) -> Self:
        """Opens a model of the store, a folder, a .gguf, or the embedded `demo`.

        Args:
            model: name, name:version, name@alias or path.
            settings: any setting of docs/commands.md (`threads=2`, `quantize="q8"`, ...).

        Raises: NotFoundError, FormatError, UsageError, CapacityError.
        """
        return cls(Session.open(model, load_settings(settings)))

    def generate(
        self, prompt: str, *, max_tokens: int | None = None, stop: Sequence[str] = (), **sampling: Any
    ) -> Answer:
        """Continues a text; an encoder-decoder (T5, BART) reads it and answers.

        `sampling`: fields of `SamplingParams` (temperature, top_p, n, seed, ...), or for beam search `num_beams`, with
        `length_penalty` and `early_stopping`."""
        return self._run(self._session.prompt_ids(prompt), max_tokens, stop, self._params(sampling))

    def translate(
        self,
        text: str,
        *,
        source: str | None = None,
        target: str | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Answer:
        """Translates a text. Languages are named as in the model's vocabulary (NLLB `eng_Latn`, M2M100 `en`, mBART
        `en_XX`); T5 takes English names. Raises UsageError for a language that the model lacks."""
        ids, params, start = self._session.translate(text, source, target, self._params(sampling))
        return self._run(ids, max_tokens, stop, params, start)

    def chat(
        self,
        messages: Chat,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        adapter: str | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answers a chat: one message as a str, or messages as {"role", "content"}; `adapter`: as for `generate`."""
        return self._run(self._chat_ids(messages), max_tokens, stop, self._params(sampling), adapter=adapter)

    def stream(
        self, messages: Chat, *, max_tokens: int | None = None, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """Like `chat`, piece by piece as it comes; leaving the iteration early cancels the answer."""
        for event in self._session.stream(self._chat_ids(messages), self._params(sampling), max_tokens, stop):
            if isinstance(event, TextFailed):
                raise event.error
            if isinstance(event, TextDelta) and event.text:
                yield event.text

    def embed(self, texts: str | Sequence[str], *, prompt: str | None = None, dimensions: int | None = None) -> F32:
        """float32 [texts, width]: the vector of each text; of one str, [1, width].

        Args:
            prompt: the name of a prompt that the model brings; None: its default, if it has one.
            dimensions: shorter vectors, of models that were trained for them.

        Raises UnsupportedError, saying what the model can do, if it cannot embed; ContextLengthError.
        """
        many = [texts] if isinstance(texts, str) else list(texts)
        return self._session.vectors.embed(many, prompt=prompt, dimensions=dimensions)

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        """How well each document answers the query, in the order given: a cross-encoder's score, or the cosine of an
        embedding model's vectors. Raises as `embed`."""
        return self._session.vectors.rerank(query, list(documents))

    def classify(self, texts: str | Sequence[str]) -> list[dict[str, float]]:
        """Label -> probability (or score, where the model's labels are none), of each text; texts of token
        classifiers raise UnsupportedError: their answers are at `/classify`."""
        vectors = self._session.vectors
        if vectors.classifier is not None and vectors.classifier.tokens:
            raise UnsupportedError("this model classifies tokens, not texts")
        rows = vectors.classify([texts] if isinstance(texts, str) else list(texts))
        return [dict(zip(vectors.labels, map(float, row), strict=True)) for row in rows]

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Loads a LoRA adapter (a PEFT folder or a GGUF adapter file) under a name; the weights stay packed and nothing
        is merged. Raises NotFoundError, FormatError, UnsupportedError, ConflictError."""
        self._session.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; answers that run with it end as they began. Raises NotFoundError."""
        self._session.unload_adapter(name)

    def close(self) -> None:
        """Ends what runs and frees the model."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _chat_ids(self, messages: Chat) -> list[int]:
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return self._session.chat_ids(given)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        """The model's defaults with what is given; `num_beams` above 1 asks for beam search."""
        given = dict(sampling)
        searching = {name: given.pop(name) for name in ("length_penalty", "early_stopping") if name in given}
        width = given.pop("num_beams", 1)
        if width != 1:
            given["beams"] = Beams(width, **searching)
        elif searching:
            raise UsageError(f"{next(iter(searching))} is for beam search", remedy="Give num_beams", param="num_beams")
        return replace(self._session.defaults, **given)

    def _run(
        self,
        prompt: Sequence[int],
        max_tokens: int | None,
        stop: Sequence[str],
        params: SamplingParams,
        start: int | None = None,
        adapter: str | None = None,
    ) -> Answer:
        text: dict[int, list[str]] = {}
        found: dict[int, Answer] = {}
        for event in self._session.stream(prompt, params, max_tokens, stop, start=start, adapter=adapter):
            if isinstance(event, TextFailed):
                raise event.error
            if isinstance(event, TextDelta):
                text.setdefault(event.choice, []).append(event.text)
            elif isinstance(event, TextEnd):
                said = "".join(text.get(event.choice, ()))
                found[event.choice] = Answer(said, event.reason, event.usage, event.seed, event.score)
        return replace(found[0], others=tuple(found[choice] for choice in sorted(found) if choice))


def compress(
    model: str,
    name: str,
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    to: str | None = None,
    target_size: str | int | None = None,
    max_kld: float | None = None,
    calibration: Sequence[str | Path] = (),
    ram: str | int | None = None,
    threads: int | None = None,
    resume: bool | None = None,
    progress: Progress = silent,
) -> "Compressed":
    """Makes a compressed version `name` of a model, measured and gated, as `inhouse compress` does. Needs torch.

    Exactly one of `recipe`, `to`, `target_size` and `max_kld` says what is wanted:

    Args:
        model: name, name:version, name@alias, a folder or a .gguf. name: of the new model in the store.
        recipe: the path of a YAML recipe, or a recipe as a mapping (docs/compression.md); a short name does, too.
        to: a short name (`q8`, `q6`, `q5`, `q4`, `q3`, `q2`, `fp8`, `nf4`, ...).
        target_size: bytes of all tensors as stored, or `1.2GB`: whole recipes are measured, and the one of least
            divergence within the size is taken.
        max_kld: mean KL divergence from the model, nats a token: the smallest recipe within it is taken.
        calibration: text files or globs, in place of those that the recipe names; none: text that the model writes.
        ram: bytes that may be used, or `4GB`; None: not limited. threads: of torch and of what measures.
        resume: True: only go on with an unfinished run or search; False: begin anew; None: go on with one of the same
            recipe, data and machine, if there is one.
        progress: told (stage, weights or recipes done, in all).

    Returns:
        `ref` (the version), `failed` (the gate refused it; it is stored as failed), `result`: a mapping with `bytes`,
        `bits_per_weight` (over all tensors), `gate` (divergences in nats a token, perplexities, limits), `peak_memory`
        (bytes), `seconds`, `fallbacks`, `notes`, `report` (path of the page), `search` (what was measured).

    Raises:
        UsageError, UnsupportedError, NotFoundError, CapacityError: it cannot be done as asked, before anything is done;
        CapacityError also where no recipe keeps the limit, or the disk is full: what was finished is kept.
        ConflictError: an unfinished run of another recipe has the name. UnavailableError: torch is not installed.
    """
    try:
        from inhouse.compress.asked import asked_recipe, check_one, search_recipe
        from inhouse.compress.pipeline import compress as run
    except ModuleNotFoundError as error:
        raise UnavailableError(f"compression needs {error.name}", remedy="pip install inhouse[compress]") from None
    wish = check_one(recipe=recipe, to=to, target_size=target_size, max_kld=max_kld)
    if wish in ("recipe", "to"):
        return run(
            model, name, asked_recipe(recipe, to, calibration, ram, threads), resume=resume, progress=progress
        )  # fmt: skip
    found = search_recipe(model, name, target_size, max_kld, calibration, ram, threads, progress, resume)
    go_on = False if resume is False else None  # what was resumed may have been the search: then the run begins now
    return run(model, name, found.recipe, resume=go_on, searched=found.to_dict(), progress=progress)
