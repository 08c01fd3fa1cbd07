"""One loaded model with its engine: what the server, the terminal and library users share.

Knows how to open a model and how text becomes a request; knows nothing of protocols.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from inhouse.core.errors import NotFoundError, UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import Settings
from inhouse.engine.adapters import AdapterInfo
from inhouse.engine.engine import Engine, StepReport
from inhouse.engine.request import EngineConfig, Request, SamplingParams, make_request
from inhouse.engine.text import TextAssembler, TextEvent
from inhouse.engine.vectors import Vectors
from inhouse.load.adapter import read_adapter
from inhouse.load.model import LoadedModel, open_model
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.model.tokens.translate import language_codes, translate

# What a model's generation_config may set; anything else it says is for other programs.
_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class Session:
    """A model that answers. Thread-safe.

    Args:
        model: loaded; the session closes it.
        config: limits of the engine.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.tokenizer: Tokenizer = model.tokenizer
        self.reads = "encode" in model.programs.programs  # an encoder-decoder: prompts go to its encoder
        self.defaults = default_params(model.generation, self.reads)
        self._start = int(model.generation.get("decoder_start_token_id", getattr(model.spec, "start_token", 0)))
        self.on_step: Callable[[StepReport], None] | None = None  # whoever watches; called in the engine's thread
        self.engine = Engine(
            model.executor, config, self.tokenizer.eos_ids, model.digest, on_step=lambda step: self._stepped(step)
        )
        self.vectors = Vectors(model, self.engine)

    @classmethod
    def open(
        cls, reference: str, settings: Settings | None = None, progress: Progress = silent, *, cache: bool = True
    ) -> Self:
        """Opens a model of the store, a folder, a .gguf, or the embedded `demo`, as the settings say. `cache`: keep
        packed weights for the next start."""
        use = settings or Settings()
        model = open_model(
            reference,
            quantize=use.quantize or None,
            executor=use.executor,
            device=use.device,
            threads=use.threads or None,
            kv_dtype=use.kv_dtype,
            activations=use.activations,
            context=use.context or None,
            cache=cache,
            progress=progress,
        )
        return cls(model, engine_config(use))

    @property
    def name(self) -> str:
        """The model's name, without its version."""
        return self.model.name

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that means exactly this model."""
        return (self.model.name, f"{self.model.name}:{self.model.version}")

    def fingerprint(self, adapter: str | None = None) -> str:
        """What must be equal for equal bytes: weights, executor with its instruction set, cache, activations, and the
        content of the adapter of that name, if there is one."""
        executor = self.model.executor
        rounding = "float" if self.model.programs is self.model.plain_programs else "int8"
        plain = f"inhouse-{self.model.digest[:12]}-{executor.name.replace('/', '-')}-kv{executor.kv_dtype}-{rounding}"
        loaded = self.engine.adapters.table().get(adapter or "")
        return f"{plain}-lora{loaded.digest[:12]}" if loaded else plain

    def facts(self) -> dict[str, Any]:
        """What clients of `/v1/models` may want to know."""
        return {
            "root": self.model.name, "version": self.model.version, "max_model_len": self.engine.context_length,
            "executor": self.model.executor.name, "kv_dtype": self.model.executor.kv_dtype,
            "kinds": list(self.vectors.kinds),
        }  # fmt: skip

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt of a chat: the model's template rendered, special tokens read as such. For an encoder-decoder
        without a template of its own: the last message, which must be the user's, as it is.

        A template of the model's own writes its BOS itself; before our default one the tokenizer's is put.
        `template_kwargs` are further variables of the template; its own three may not be among them (UsageError).
        """
        if self.reads and self.model.chat_template.is_default:
            return self.prompt_ids(last_message(messages))
        extra = {"add_generation_prompt": add_generation_prompt} | dict(template_kwargs or {})
        taken = {"self", "messages", "tools"} & set(extra)
        if taken or not isinstance(extra["add_generation_prompt"], bool):
            names = ", ".join(sorted(taken or {"add_generation_prompt"}))
            raise UsageError(f"chat_template_kwargs may not set {names}", param="chat_template_kwargs")
        text = self.model.chat_template.render(list(messages), **extra)
        return self.tokenizer.encode(text, add_special=self.model.chat_template.is_default)

    def prompt_ids(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a plain prompt."""
        return self.tokenizer.encode(text, add_special=add_special)

    @cached_property
    def languages(self) -> dict[str, int]:
        """The languages that the model has tokens for: code -> id."""
        return language_codes(self.model.spec.family, self.tokenizer)

    def translate(
        self, text: str, source: str | None, target: str | None, params: SamplingParams
    ) -> tuple[list[int], SamplingParams, int | None]:
        """The prompt of a translation, `params` with what its output begins with, and the decoder's start where the
        language sets it. Raises UsageError and UnsupportedError for languages that the model lacks."""
        if not self.reads:
            raise UnsupportedError("only encoder-decoders take languages", param="target_language")
        found = translate(self.model.spec.family, self.tokenizer, self.languages, text, source, target)
        if found.first_token is not None:
            params = replace(params, first_token=found.first_token)
        return found.encoder, params, found.start_token

    def request(
        self,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int | None = None,
        prompt_logprobs: int | None = None,
        salt: str = "",
        start: int | None = None,
        adapter: int = 0,
    ) -> Request:
        """A request for a prompt: of an encoder-decoder its encoder reads it, and the decoder begins with `start`
        (None: with what the model says). Raises UsageError for ids out of range."""
        if not self.reads:
            return make_request(name, prompt, params, max_tokens, prompt_logprobs, salt=salt, adapter=adapter)
        first = [self._start if start is None else start]
        return make_request(
            name, first, params, max_tokens, prompt_logprobs, salt=salt, encoder=prompt, adapter=adapter
        )

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        start: int | None = None,
        adapter: str | None = None,
    ) -> Iterator[TextEvent]:
        """Runs one request and gives its text events; leaving the iteration early cancels it. `start`: see `request`.

        Raises what `Engine.submit` raises; a failed step is a TextFailed event.
        """
        self.vectors.need("generate")
        name, slot = f"local-{uuid.uuid4().hex}", self.adapter_slot(adapter)
        request = self.request(name, prompt, params or self.defaults, max_tokens, start=start, adapter=slot)
        assembler = TextAssembler(
            self.tokenizer, request.continued, stops, skip_special=skip_special,
            stop_choice=lambda choice: self.engine.cancel(name, choice),
        )  # fmt: skip
        with closing(self.engine.stream(request)) as events:
            for event in events:
                yield from assembler.feed([event])

    def need_decoder(self, what: str) -> None:
        """Raises UnsupportedError unless the model continues texts; `what` is what asks for it."""
        self.vectors.need("generate")
        if self.reads:
            raise UnsupportedError(f"{what} is of decoders; {self.name!r} is an encoder-decoder", param="model")

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Loads a LoRA adapter, a PEFT folder or GGUF file, under a name; requests may then ask for it. Answers that
        run meanwhile go on. Raises what reading it raises, ConflictError for a name that is taken."""
        if not name or name in self.names:
            raise UsageError(f"{name!r} cannot name an adapter", remedy="Choose another name", param="lora_name")
        model = self.model
        read = read_adapter(Path(path), model.family, model.spec, model.derived)
        return self.engine.adapters.load(name, read.adapter, read.digest, origin=str(path), rank=read.rank)

    def unload_adapter(self, name: str) -> AdapterInfo:
        """Forgets an adapter; answers that run with it end as they began. Raises NotFoundError."""
        return self.engine.adapters.unload(name)

    def adapter_slot(self, name: str | None) -> int:
        """The slot of an adapter by its name; raises NotFoundError for a name that is not loaded. None: no adapter."""
        slot = self.engine.adapters.slot(name)
        if name is not None and not slot:
            held = ", ".join(self.engine.adapters.table()) or "none"
            raise NotFoundError(f"no adapter {name!r} is loaded", remedy=f"Loaded: {held}", param="adapter")
        return slot

    def _stepped(self, step: StepReport) -> None:
        if self.on_step is not None:
            self.on_step(step)

    def close(self) -> None:
        """Ends what runs and frees the model."""
        self.engine.close()
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def engine_config(settings: Settings) -> EngineConfig:
    """The engine's limits out of the settings."""
    return EngineConfig(
        context_length=settings.context or None,
        max_running=settings.max_sequences,
        max_queue=settings.max_queue,
        step_tokens=settings.step_tokens,
        prefix_cache=settings.prefix_cache,
        kv_budget=settings.kv_memory or None,
    )


def last_message(messages: Sequence[Mapping[str, Any]]) -> str:
    """What an encoder-decoder reads of a chat: the text of the last message. Raises UnsupportedError for a system
    message, which it has no place for, and UsageError if the last message is not the user's."""
    if any(message.get("role") == "system" for message in messages):
        raise UnsupportedError("this model reads one text and has no place for a system message", param="messages")
    if not messages or messages[-1].get("role") != "user" or not isinstance(messages[-1].get("content"), str):
        raise UsageError("the last message must be the user's: it is what the model reads", param="messages")
    return str(messages[-1]["content"])


def default_params(generation: Mapping[str, Any], reads: bool = False) -> SamplingParams:
    """Sampling defaults out of a model's generation_config: greedy where it says `do_sample: false`, and for an
    encoder-decoder (`reads`) unless it says true, together with what its output begins and ends with."""
    given = {name: generation[name] for name in _DEFAULTS if generation.get(name) is not None}
    if generation.get("do_sample", not reads) is False:
        given["temperature"] = 0.0
    if reads:
        words = tuple(tuple(word) for word in generation.get("bad_words_ids", ()))
        given |= {
            "first_token": generation.get("forced_bos_token_id"), "last_token": generation.get("forced_eos_token_id"),
            "bad_words": words, "no_repeat_ngram": generation.get("no_repeat_ngram_size", 0),
            "min_tokens": max(generation.get("min_length", 0) - 1, 0),
        }  # fmt: skip
    return SamplingParams(**given)
