"""Bodies of the routes that answer with vectors and scores: OpenAI's embeddings, Jina's and Cohere's rerank, vLLM's
classify and score. A field that is not here is an error. Knows JSON shapes and their limits alone.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from inhouse.core.errors import UnsupportedError
from inhouse.serve.schema import Prompt, Strict

MAX_INPUTS = 2048  # of one call, as OpenAI has it

Truncate = Annotated[int, Field(ge=-1)]
Texts = str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]


class VectorFields(Strict):
    """What these requests share."""

    model: str | None = Field(
        None, description="name, name:version or alias of a model that this server holds; left out: the only one"
    )
    user: str | None = Field(None, description="accepted; nothing is stored about it")
    truncate: bool | None = Field(None, description="cut what is too long, at its end; default: an error")
    truncate_prompt_tokens: Truncate | None = Field(
        None, description="tokens to keep at most; -1: what the model takes"
    )

    @model_validator(mode="after")
    def _one_truncation(self) -> "VectorFields":
        if self.truncate is False and self.truncate_prompt_tokens is not None:
            raise ValueError("truncate is false and truncate_prompt_tokens is given")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens 0 keeps nothing")
        return self

    def cut(self) -> int | None:
        """Tokens to keep of an input: 0: what the model takes; None: nothing is cut."""
        if self.truncate_prompt_tokens is not None:
            return max(self.truncate_prompt_tokens, 0)
        return 0 if self.truncate else None


class InputFields(VectorFields):
    """Requests with one list of inputs."""

    input: Prompt = Field(description="text, several texts, token ids, or several lists of token ids; 2048 at most")

    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs as a list."""
        given = self.input
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [given]
        return given

    @model_validator(mode="after")
    def _few_inputs(self) -> "InputFields":
        if len(self.inputs()) > MAX_INPUTS:
            raise ValueError(f"input holds more than {MAX_INPUTS} inputs; send several calls")
        return self


class EmbeddingRequest(InputFields):
    """Body of `POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = Field(None, description="default float")
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="shorter vectors, of models that were trained for them"
    )
    prompt_name: str | None = Field(None, description="which of the model's own prompts stands before each text")


class ClassifyRequest(InputFields):
    """Body of `POST /classify`."""


class Document(Strict):
    """A document as an object."""

    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        if isinstance(body, dict) and "text" not in body and body:
            raise UnsupportedError("a document without text cannot be honoured: models here read text only",
                                   param="documents")  # fmt: skip
        return body


class RerankRequest(VectorFields):
    """Body of `POST /v1/rerank`."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_INPUTS - 1)]
    top_n: Annotated[int, Field(ge=1)] | None = Field(None, description="results to give; default: all")
    return_documents: bool | None = Field(None, description="give each document's text back; default true")

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class ScoreRequest(VectorFields):
    """Body of `POST /v1/score`: one text against each of several, or texts in pairs."""

    text_1: Texts
    text_2: Texts

    @model_validator(mode="after")
    def _pairs(self) -> "ScoreRequest":
        if isinstance(self.text_1, list) and len(self.text_1) not in (1, len(self._second())):
            raise ValueError("text_1 has to be one text, or as many as text_2")
        return self

    def _second(self) -> list[str]:
        return [self.text_2] if isinstance(self.text_2, str) else self.text_2

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs to score."""
        second = self._second()
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        return list(zip(first if len(first) == len(second) else first * len(second), second, strict=True))
