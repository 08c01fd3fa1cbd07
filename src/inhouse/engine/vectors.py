"""The text side of requests for vectors: texts and pairs to inputs, scores to answers; and the blocking calls of the
library over them.

Knows tokenizers, prompts and labels; nothing of protocols. What a model can do here is in `kinds`.
"""

import uuid
from array import array
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from inhouse.core.errors import ContextLengthError, UnsupportedError, UsageError
from inhouse.engine.engine import Engine
from inhouse.engine.request import F32, EmbedEvent, EmbedRequest, Failed, Input
from inhouse.load.model import LoadedModel
from inhouse.load.sentence import Sentence
from inhouse.model.encoder import ClassifierSpec, EncoderSpec
from inhouse.model.pooling import Pooling

GENERATE, EMBED, CLASSIFY, RERANK = "generate", "embed", "classify", "rerank"
Ids = Sequence[int]
_VERBS = {GENERATE: "generate text", EMBED: "embed", CLASSIFY: "classify", RERANK: "rerank"}


class Vectors:
    """What a model makes of texts besides text. Thread-safe.

    Args:
        model: loaded. engine: over it.
    """

    def __init__(self, model: LoadedModel, engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._sentence = model.sentence or Sentence(Pooling())
        spec = model.spec
        self.classifier: ClassifierSpec | None = spec.classifier if isinstance(spec, EncoderSpec) else None
        self.kinds: tuple[str, ...] = self._kinds()

    def _kinds(self) -> tuple[str, ...]:
        roles = self._engine.embeds.roles
        kinds = [GENERATE] if "step" in self._model.programs.programs else []
        if "pooled" in roles:
            kinds.append(EMBED)
            if isinstance(self._model.spec, EncoderSpec) or self._model.sentence is not None:
                kinds.append(RERANK)
        if "scores" in roles and self.classifier is not None:
            kinds.append(CLASSIFY)
            if not self.classifier.tokens and len(self.classifier.labels) == 1:
                kinds.append(RERANK)
        return tuple(kinds)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of a classifier; () for any other model."""
        return self.classifier.labels if self.classifier is not None else ()

    @property
    def limit(self) -> int:
        """Tokens of one input at most."""
        return self._engine.embeds.limit

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of the prompts that the model brings."""
        return tuple(self._sentence.prompts)

    def need(self, kind: str) -> None:
        """Raises UnsupportedError, saying what the model can do, unless `kind` is among it."""
        if kind not in self.kinds:
            can = ", ".join(_VERBS[k] for k in self.kinds) or "do nothing of the kind"
            raise UnsupportedError(
                f"the model {self._model.name!r} cannot {_VERBS[kind]}", remedy=f"It can {can}", param="model"
            )

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def text(self, text: str, prompt: str | None = None, truncate: int | None = None) -> Input:
        """One text, behind the prompt of that name (None: the model's default). `truncate`: tokens to keep at most,
        special ones included; 0: what the model takes. None: nothing is cut. Raises UsageError."""
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode(self._prompted(text, prompt), add_special=False)
        prefix, suffix = tokenizer.specials.prefix, tokenizer.specials.suffix
        if truncate is not None:
            room = self._room(truncate) - len(prefix) - len(suffix)
            ids = ids[: max(room, 0)]
        return self.ids([*prefix, *ids, *suffix])

    def pair(self, first: str, second: str, truncate: int | None = None) -> Input:
        """Two texts as one input; `truncate` as in `text`, the longer text is cut first."""
        most = None if truncate is None else self._room(truncate)
        ids, types = self._model.tokenizer.encode_pair(first, second, most)
        return Input(array("i", ids), array("i", types if self._knows_types() else [0] * len(ids)))

    def ids(self, ids: Ids, truncate: int | None = None) -> Input:
        """An input of ids; `truncate` keeps the first of them. Raises UsageError for what is no 32-bit integer."""
        try:
            kept = array("i", ids if truncate is None else ids[: self._room(truncate)])
        except (TypeError, OverflowError) as error:
            raise UsageError(f"the input holds something that is no token id ({error})", param="input") from error
        return Input(kept, array("i", bytes(4 * len(kept))))

    def _room(self, truncate: int) -> int:
        limit = self.limit
        if not 0 <= truncate <= limit:
            raise ContextLengthError(
                f"texts are to be cut to {truncate} tokens, this model takes {limit} at once",
                remedy=f"Ask for 1 to {limit}", param="truncate_prompt_tokens",
            )  # fmt: skip
        return truncate or limit

    def _prompted(self, text: str, prompt: str | None) -> str:
        name = self._sentence.default_prompt if prompt is None else prompt
        if not name:
            return text
        if name not in self._sentence.prompts:
            known = ", ".join(self.prompts) or "none"
            raise UsageError(f"the model has no prompt {name!r}", remedy=f"It has {known}", param="prompt_name")
        return self._sentence.prompts[name] + text

    def _knows_types(self) -> bool:
        spec = self._model.spec
        return isinstance(spec, EncoderSpec) and spec.types > 1

    def reranks_pairs(self) -> bool:
        """True if query and document go through the model together; else their vectors are compared."""
        return self.classifier is not None

    def rerank_inputs(self, query: str, documents: Sequence[str], truncate: int | None = None) -> list[Input]:
        """What to run: a pair a document; or, where vectors are compared, the query, then each document, behind the
        prompts `query` and `document` (or `passage`) where the model brings them."""
        self.need(RERANK)
        if self.reranks_pairs():
            return [self.pair(query, document, truncate) for document in documents]
        asked = "query" if "query" in self.prompts else None
        told = next((name for name in ("document", "passage") if name in self.prompts), None)
        return [self.text(query, asked, truncate), *(self.text(text, told, truncate) for text in documents)]

    def request(self, name: str, inputs: Sequence[Input], kind: str) -> EmbedRequest:
        """The engine's request for inputs of a kind (`embed`, `classify`, `rerank`)."""
        self.need(kind)
        role = "scores" if kind == CLASSIFY or kind == RERANK and self.reranks_pairs() else "pooled"
        return EmbedRequest(name, tuple(i.ids for i in inputs), tuple(i.types for i in inputs), role)

    # ---- answers --------------------------------------------------------------------------------------------------

    def relevance(self, values: Sequence[F32]) -> list[float]:
        """Relevance of each document, from what `rerank_inputs` gave: the classifier's answer, or the cosine."""
        if self.reranks_pairs():
            return [float(self.answers(scores)[0]) for scores in values]
        query = values[0].astype(np.float64)
        norms = [float(np.linalg.norm(query) * np.linalg.norm(v.astype(np.float64))) for v in values[1:]]
        return [float(query @ v.astype(np.float64)) / (n or 1.0) for v, n in zip(values[1:], norms, strict=True)]

    def answers(self, scores: F32) -> F32:
        """Scores [..., labels] as the model's head is to be read: probabilities, or the scores themselves."""
        how = self.classifier.answer if self.classifier is not None else "none"
        wide = scores.astype(np.float64)
        if how == "sigmoid":
            wide = 0.5 * (1.0 + np.tanh(0.5 * wide))
        elif how == "softmax":
            wide = np.exp(wide - wide.max(axis=-1, keepdims=True))
            wide /= wide.sum(axis=-1, keepdims=True)
        return wide.astype(np.float32)

    def shortened(self, vector: F32, dimensions: int | None) -> F32:
        """The first `dimensions` numbers, of length 1 again where the model's vectors are. Models that were not
        trained so (config key `matryoshka_dimensions` or `is_matryoshka`) raise UnsupportedError."""
        width = vector.shape[-1]
        if dimensions is None or dimensions == width:
            return vector
        config: Any = self._model.config
        allowed = config.get("matryoshka_dimensions")
        if not allowed and not config.get("is_matryoshka"):
            raise UnsupportedError(
                f"the model was not trained for shorter vectors than its {width} dimensions",
                remedy="Leave `dimensions` out", param="dimensions",
            )  # fmt: skip
        if not 1 <= dimensions <= width or isinstance(allowed, list) and dimensions not in allowed:
            few = ", ".join(map(str, allowed)) if isinstance(allowed, list) else f"1 to {width}"
            raise UsageError(f"{dimensions} dimensions are not offered", remedy=f"Ask for {few}", param="dimensions")
        short = vector[..., :dimensions]
        spec = self._model.spec
        if not getattr(getattr(spec, "pooling", None), "normalize", False):
            return short
        norm = np.linalg.norm(short, axis=-1, keepdims=True)
        return np.asarray(short / np.where(norm > 0, norm, 1), np.float32)

    # ---- blocking calls -------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Input], kind: str) -> list[F32]:
        """The rows of each input; raises what `Engine.embed` raises, and the error that ended the request."""
        if not inputs:
            return []
        events: SimpleQueue[list[EmbedEvent]] = SimpleQueue()
        name = f"local-{uuid.uuid4().hex}"
        found: list[F32 | None] = [None] * len(inputs)
        self._engine.embed(self.request(name, inputs, kind), events.put)
        try:
            while any(rows is None for rows in found):
                for event in events.get():
                    if isinstance(event, Failed):
                        raise event.error
                    found[event.index] = event.values
        finally:
            self._engine.cancel(name)
        return [rows for rows in found if rows is not None]

    def embed(
        self, texts: Sequence[str], *, prompt: str | None = None, dimensions: int | None = None, truncate: bool = False
    ) -> F32:
        """float32 [texts, width]: the vector of each text."""
        self.need(EMBED)
        rows = self.run([self.text(text, prompt, 0 if truncate else None) for text in texts], EMBED)
        if not rows:
            return np.zeros((0, 0), np.float32)
        return self.shortened(np.stack(rows), dimensions)

    def rerank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> list[float]:
        """The relevance of each document, in the order given."""
        if not documents:
            return []
        inputs = self.rerank_inputs(query, documents, 0 if truncate else None)
        return self.relevance(self.run(inputs, RERANK))

    def classify(self, texts: Sequence[str], *, truncate: bool = False) -> list[F32]:
        """The answers to each text: float32 [labels], or [tokens, labels] of a token classifier."""
        self.need(CLASSIFY)
        rows = self.run([self.text(text, None, 0 if truncate else None) for text in texts], CLASSIFY)
        return [self.answers(scores) for scores in rows]
