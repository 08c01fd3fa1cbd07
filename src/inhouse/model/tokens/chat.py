"""Chat templates: messages in, the prompt's text out.

Knows which of a model's templates applies and what a template may see. Does not know Jinja2 until the first rendering
(`sandbox` is imported then, which takes 40 ms; plain completion never pays for it), nor ids.
"""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from inhouse.core.errors import UsageError

if TYPE_CHECKING:
    import jinja2

    from inhouse.model.tokens.sandbox import Sandbox

CHATML: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The template used for a model that brings none: ChatML, each turn `<|im_start|>role`, newline, text, `<|im_end|>`."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template, compiled at its first use; may be used from any thread.

    Args:
        source: the template, or several by name (`default`, `tool_use` ...); None or empty: `CHATML`.
        special_tokens: `bos_token`, `eos_token`, ... as the template sees them.
    """

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str | list[str]] | None = None,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self.is_default = not sources
        self.sources: Mapping[str, str] = sources or {"default": CHATML}
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, tuple[Sandbox, jinja2.Template]] = {}
        self._lock = Lock()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt's text.

        Args:
            messages: dicts with `role` and `content`, and whatever else the template reads.
            tools: JSON schemas of functions; a template named `tool_use` is preferred where the model has one.
            add_generation_prompt: end with the beginning of the assistant's turn.
            **kwargs: further names for the template (`documents`, `enable_thinking`, ...); `template` chooses one of
                several by name.

        Raises:
            UsageError: the template refuses the messages (its own words), fails, or runs past its budget.
        """
        sandbox, template = self._template(self._choose(kwargs.pop("template", None), bool(tools)))
        variables = {
            **self.special_tokens,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        return sandbox.run(template, variables)

    def _choose(self, wanted: str | None, with_tools: bool) -> str:
        if wanted is None and with_tools and "tool_use" in self.sources:
            return "tool_use"
        name = wanted or "default"
        if name not in self.sources:
            known = ", ".join(sorted(self.sources))
            raise UsageError(f"the model has no chat template {name!r}", remedy=f"It has: {known}.", param="template")
        return name

    def _template(self, name: str) -> "tuple[Sandbox, jinja2.Template]":
        # Here and not at the top: see the module's docstring.
        from inhouse.model.tokens.sandbox import Sandbox

        with self._lock:
            if name not in self._compiled:
                sandbox = Sandbox()
                self._compiled[name] = sandbox, sandbox.compile_template(self.sources[name])
            return self._compiled[name]
