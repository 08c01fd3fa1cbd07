"""Chat templates run here: Jinja2's immutable sandbox with the words that model templates use, and a budget.

Knows Jinja2 (importing this module imports it; `chat` does so when the first template is rendered). Does not know
messages or models.

A template comes with a model, so it may be hostile. Besides the sandbox, every loop pass, call, list and piece of text
is paid from a budget, so that no template runs for ever or fills the memory.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from inhouse.core.errors import UsageError

MAX_STEPS: Final = 1_000_000
"""Loop passes, calls and list items of one rendering. A thousand messages with the longest template take 30,000."""

MAX_TEXT: Final = 64 * 2**20
"""Characters that one rendering may make, intermediate strings included."""

MAX_WIDTH: Final = 9_999
"""Largest width, indent or count that may be given to what lays out text."""

_T = TypeVar("_T")

_LAYOUT: Final = frozenset({"center", "indent", "wordwrap", "batch", "slice", "truncate", "tojson"})
_TEXTUAL: Final = frozenset(
    {"string", "pprint", "join", "format", "escape", "e", "forceescape", "xmlattr", "urlencode"}
)
_MANY_DIGITS: Final = re.compile(r"\d{5}|\*")


class _Exhausted(Exception):
    """The budget is used up."""


class _Budget(threading.local):
    """What the rendering of this thread may still use."""

    steps = 0
    text = 0

    def reset(self) -> None:
        self.steps, self.text = MAX_STEPS, MAX_TEXT

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise _Exhausted(f"the chat template takes more than {MAX_STEPS} steps")

    def spend(self, size: int) -> None:
        self.text -= size
        if self.text < 0:
            raise _Exhausted(f"the chat template makes more than {MAX_TEXT} characters of text")

    def print(self, value: Any) -> None:
        """Pays for the text of any value; lists that hold one another many times count as often as they print."""
        self.spend(len(value) if isinstance(value, str) else self._weight(value, {}))

    def _weight(self, value: Any, known: dict[int, int]) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if not isinstance(value, list | tuple | dict):
            return 1
        if id(value) not in known:
            self.step(1 + len(value))
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] = 2 + sum(self._weight(part, known) for part in parts)
        return known[id(value)]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it prints its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Makes loop bodies, macros, `~` and list literals pay.

    They call attributes of the environment, which a template cannot name and so cannot replace.
    """

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_own("tick", [nodes.Const(constant)], node)))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _own("joined", node.nodes, node)

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.iter_child_nodes())
        return node if constant or getattr(node, "ctx", "load") != "load" else _own("held", [node], node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _own(name: str, args: list[nodes.Expr], near: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=near.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of a template; may be used from any thread."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.budget = _Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self._printed,
        )
        self._own_calls = (self.tick, self.joined, self.held)
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._tojson
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}

    def compile_template(self, source: str) -> jinja2.Template:
        """Raises UsageError where the source is not a template."""
        self.budget.reset()
        return self._explained(lambda: self.from_string(source))

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Renders; whatever goes wrong is a UsageError with the template's own words."""
        self.budget.reset()
        return self._explained(lambda: template.render(variables))

    @staticmethod
    def _explained(work: Callable[[], _T]) -> _T:
        try:
            return work()
        except _Exhausted as error:
            raise UsageError(str(error), remedy="Use another chat template.", param="chat_template") from None
        except RecursionError:
            raise UsageError("the chat template nests without end", param="chat_template") from None
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"the chat template is wrong in line {error.lineno}: {error.message}") from error
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template says: {error.message}", param="messages") from error
        except Exception as error:
            raise UsageError(f"the chat template failed: {type(error).__name__}: {error}", param="messages") from error

    def tick(self, constant: int) -> str:
        """One pass of a loop or macro whose body holds so many characters of constant text."""
        self.budget.step()
        self.budget.spend(constant)
        return ""

    def joined(self, *parts: Any) -> str:
        """The operator `~`."""
        for part in parts:
            self.budget.print(part)
        return "".join(map(str, parts))

    def held(self, value: Any) -> Any:
        """A list, tuple or dict literal."""
        self.budget.print(value)
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if size := _size_of_binop(operator, left, right):
            self.budget.step()
            self.budget.spend(size)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if obj in self._own_calls:
            return obj(*args)
        self.budget.step()
        method = getattr(obj, "__wrapped__", obj)
        if isinstance(owner := getattr(method, "__self__", None), str):
            self._pay_method(owner, getattr(method, "__name__", ""), [*args, *kwargs.values()])
        elif obj is dict:
            self.budget.print([args, kwargs])
        return super().call(context, obj, *args, **kwargs)

    def _pay_method(self, text: str, name: str, args: list[Any]) -> None:
        """A string's method: its result is no longer than the text times its longest argument."""
        _check_widths(args)
        if name.startswith("format"):
            _check_format(text)
            self.budget.print(args)
        sizes = [len(arg) + 1 for arg in args if isinstance(arg, str | list | tuple)]
        self.budget.spend((len(text) + 1) * max(sizes, default=1) if name in ("join", "replace") else len(text))

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays first; it keeps the marks by which Jinja2 knows what to pass."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            plain = [a for a in args if not isinstance(a, jinja2.Environment | Context | nodes.EvalContext)]
            self._pay_filter(name, [*plain, *kwargs.values()])
            return function(*args, **kwargs)

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(metered, mark, getattr(function, mark))
        return metered

    def _pay_filter(self, name: str, args: list[Any]) -> None:
        value = args[0] if args else None
        if name in _LAYOUT:
            _check_widths(args[1:])
        if name == "format" and isinstance(value, str):
            _check_format(value)
        if name in _TEXTUAL:
            self.budget.print(value)
        texts = [len(arg) + 1 for arg in args if isinstance(arg, str)]
        if name == "replace":
            self.budget.spend(texts[0] * max(texts[1:], default=1) if texts else 0)
        elif name == "join" and texts and isinstance(value, str | list | tuple | dict):
            self.budget.spend(len(value) * max(texts))
        else:
            self.budget.spend(sum(texts) * (10 if name in ("indent", "escape", "e") else 1))

    def _printed(self, value: Any) -> Any:
        self.budget.print(value)
        return value

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it: no HTML escapes, ASCII only where asked."""
        self.budget.step()
        _check_widths([indent])
        self.budget.print(value)
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.budget.spend(len(text))
        return text


def _raise(message: Any = "") -> Any:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _size_of_binop(operator: str, left: Any, right: Any) -> int:
    """How many characters or items the result will have; everyday arithmetic is free."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        return bits if bits > 1024 else 0
    if operator == "*":
        sequence, times = (left, right) if hasattr(left, "__len__") else (right, left)
        return len(sequence) * max(0, times) if hasattr(sequence, "__len__") and isinstance(times, int) else 0
    if operator == "%" and isinstance(left, str):
        _check_format(left)
        return len(left)
    return sum(len(value) for value in (left, right) if isinstance(value, str | list | tuple))


def _check_format(text: str) -> None:
    """Widths stand inside the format: none of five digits, none that comes from an argument."""
    if _MANY_DIGITS.search(text):
        raise _Exhausted(f"the chat template formats with a width of more than {MAX_WIDTH}")


def _check_widths(args: Iterable[Any]) -> None:
    for value in args:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise _Exhausted(f"the chat template lays out text with the width {value}, more than {MAX_WIDTH}")
