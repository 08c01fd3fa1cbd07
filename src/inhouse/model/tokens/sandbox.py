"""Chat templates run here: Jinja2's immutable sandbox with the words that model templates use, and a budget.

Knows Jinja2 (importing this module imports it; `chat` does so when the first template is rendered). Does not know
messages or models.

A template comes with a model, so it may be hostile. Besides the sandbox, every loop pass, call, list and piece of text
is paid from a budget (comparisons and keys by the deep size of their sides), so that no template runs for ever or
fills the memory.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, TypeVar, cast

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from inhouse.core.errors import UsageError
from inhouse.model.tokens.budget import MAX_BITS, Budget, Exhausted

MAX_WIDTH: Final = 9_999
"""Largest width, indent or count that may be given to what lays out text."""

_T = TypeVar("_T")

_LAYOUT: Final = frozenset({"center", "indent", "wordwrap", "batch", "slice", "truncate", "tojson"})
_TEXTUAL: Final = frozenset(
    {"string", "pprint", "join", "format", "escape", "e", "forceescape", "xmlattr", "urlencode"}
)
_ORDERING: Final = frozenset({"sort", "unique", "min", "max", "groupby", "dictsort"})
_DRAWN: Final = _ORDERING | _TEXTUAL | {"tojson", "sum", "list"}
_BANNED: Final = frozenset({"encode", "to_bytes", "translate", "maketrans"})
"""Methods of strings and numbers that no chat template needs and whose results have no bound."""

_OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge,
}  # fmt: skip
_COMPARING: Final = frozenset(
    {"==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le"}
)
_MANY_DIGITS: Final = re.compile(r"\d{5}|\*")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it prints its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Makes loop bodies, macros, `~`, list literals, comparisons, keys and slices pay.

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

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _own("keyed", [node.key], node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Every operand is worked out, also those that a chain would skip."""
        self.generic_visit(node)
        last = node.ops[0]
        if len(node.ops) == 1 and last.op in _OPERATORS and nodes.Const in (type(node.expr), type(last.expr)):
            return node  # one side is as long as it stands in the source
        parts = [part for operand in node.ops for part in (nodes.Const(operand.op), operand.expr)]
        return _own("compared", [node.expr, *parts], node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return _own("cut", [node.node, *bounds], node)


def _own(name: str, args: list[nodes.Expr], near: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=near.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of a template; may be used from any thread."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self._printed,
        )
        self._own_calls = (self.tick, self.joined, self.held, self.keyed, self.compared, self.cut)
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": self._tojson, "sum": jinja2.pass_environment(_sum)}
        every = cast(dict[str, Callable[..., Any]], self.tests)
        self.tests = {name: self._metered_test(name, function) for name, function in every.items()}
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
        except Exhausted as error:
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

    def keyed(self, key: Any) -> Any:
        """A key in a dict literal."""
        self.budget.hash(key)
        return key

    def compared(self, left: Any, *rest: Any) -> bool:
        """`left op right op right ...` by Jinja2's names of operators."""
        for name, right in zip(rest[::2], rest[1::2], strict=True):
            if name in _OPERATORS:
                self.budget.compare(left, right)
                holds = _OPERATORS[name](left, right)
            else:
                holds = self.budget.contains(left, right) == (name == "in")
            if not holds:
                return False
            left = right
        return True

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        if isinstance(value, str | list | tuple):
            self.budget.spend(len(range(*slice(start, stop, step).indices(len(value)))))
        return value[start:stop:step]

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`; tuples as keys are paid."""
        self.budget.hash(argument)
        return super().getitem(obj, argument)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._pay_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _pay_binop(self, operator: str, left: Any, right: Any) -> None:
        """By the size of the result, with tuples and repeated lists by their deep size; everyday arithmetic is free."""
        if isinstance(left, int) and isinstance(right, int):
            self.budget.spend(_bits(operator, left, right))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            sequence, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if isinstance(times, int) and times > 0:
                self.budget.step()
                self.budget.print(sequence, times)
        elif operator == "%" and isinstance(left, str):
            self._pay_format(left, "%", right)
        elif isinstance(left, tuple):
            self.budget.print([left, right])
        elif size := sum(len(value) for value in (left, right) if isinstance(value, str | list)):
            self.budget.step()
            self.budget.spend(size)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if obj in self._own_calls:
            return obj(*args)
        self.budget.step()
        self.budget.hash(*args)
        self.budget.spend(sum(len(arg) for arg in args if isinstance(arg, str | list | tuple | dict)) + len(args))
        method = getattr(obj, "__wrapped__", obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | int | bytes):
            if name in _BANNED:
                raise jinja2.TemplateError(f"the method {name} is not for a chat template")
            args = tuple(self.budget.drawn(arg) if isinstance(arg, Iterator) else arg for arg in args)
            self._pay_method(str(owner), name, [*args, *kwargs.values()])
        elif isinstance(owner, list | tuple):
            for item in owner if name in ("count", "index") else ():
                self.budget.step()
                self.budget.compare(args[0] if args else None, item)
        elif isinstance(owner, LoopContext):
            self.budget.print(args)  # loop.changed compares them with the last ones
        elif obj is dict:
            self.budget.print([args, kwargs])
        return super().call(context, obj, *args, **kwargs)

    def _pay_method(self, text: str, name: str, args: list[Any]) -> None:
        """A string's method: its result is no longer than the text times its longest argument."""
        _check_widths(args)
        if name.startswith("format"):
            self._pay_format(text, "{", args)
        if name == "join":
            self.budget.print(args)
        sizes = [len(arg) + 1 for arg in args if isinstance(arg, str | list | tuple)]
        factor = max(sizes, default=1) if name in ("join", "replace") else 1
        if name == "expandtabs":
            factor = 1 + max([8, *(arg for arg in args if isinstance(arg, int))])
        self.budget.spend((len(text) + 1) * factor)
        if name in ("split", "rsplit") and args and isinstance(args[0], str) and args[0]:
            self.budget.step(text.count(args[0]))
        elif name in ("split", "rsplit", "splitlines"):
            self.budget.spend(8 * len(text))  # a list of up to one item a character

    def _pay_format(self, form: str, mark: str, args: Any) -> None:
        """Widths stand inside the format: none of five digits, none that comes from an argument. Each field may print
        all there is."""
        if _MANY_DIGITS.search(form):
            raise Exhausted(f"the chat template formats with a width of more than {MAX_WIDTH}")
        self.budget.step()
        self.budget.spend(len(form))
        self.budget.print(args, form.count(mark))

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays first; it keeps the marks by which Jinja2 knows what to pass."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            if name in _DRAWN:
                args = tuple(self.budget.drawn(arg) if isinstance(arg, Iterator) else arg for arg in args)
            plain = [a for a in args if not isinstance(a, jinja2.Environment | Context | nodes.EvalContext)]
            self._pay_filter(name, [*plain, *kwargs.values()])
            return function(*args, **kwargs)

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(metered, mark, getattr(function, mark))
        return metered

    def _metered_test(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A test (`is x`) that pays first."""
        if name == "in":
            return self.budget.contains

        def metered(*args: Any) -> Any:
            plain = [a for a in args if not isinstance(a, jinja2.Environment | Context | nodes.EvalContext)]
            if name in _COMPARING:
                self.budget.compare(*plain[:2])
            elif name == "divisibleby":
                self.call_binop(None, "%", *plain[:2])  # type: ignore[arg-type]  # no context is looked at
            elif plain and isinstance(plain[0], str):
                self.budget.spend(len(plain[0]))
            return function(*args)

        if hasattr(function, "jinja_pass_arg"):
            metered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return metered

    def _pay_filter(self, name: str, args: list[Any]) -> None:
        value = args[0] if args else None
        if name in _LAYOUT:
            _check_widths(args[1:])
        if name in _ORDERING and isinstance(value, list | tuple | dict):
            self.budget.order([*value.items()] if isinstance(value, dict) else [*value])
        if name in _TEXTUAL:
            self.budget.print(value)
        if name == "format":
            self._pay_format(str(value), "%", args[1:])
        texts = [len(arg) + 1 for arg in args if isinstance(arg, str)]
        if name == "replace":
            self.budget.spend(texts[0] * max(texts[1:], default=1) if texts else 0)
        elif name == "join" and texts and isinstance(value, str | list | tuple | dict):
            self.budget.spend(len(value) * max(texts))
        elif name == "indent" and isinstance(value, str):
            width = max([4, *(arg if isinstance(arg, int) else len(arg) for arg in args[1:] if _sized(arg))])
            self.budget.spend(len(value) + width * (1 + value.count("\n")))
        elif name == "wordwrap":
            self.budget.spend(math.prod(texts))
        else:
            items = sum(len(arg) for arg in args if isinstance(arg, list | tuple | dict))
            self.budget.spend(sum(texts) * (10 if name in ("escape", "e") else 1) + items)

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
        self.budget.print(value, 1 + (indent or 0))
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.budget.spend(len(text))
        return text


def _raise(message: Any = "") -> Any:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _sum(sandbox: Sandbox, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """The filter `sum`, its additions paid one by one: lists can be added up too."""
    read = None if attribute is None else jinja2.filters.make_attrgetter(sandbox, attribute)
    for value in values:
        sandbox.budget.step()
        start = sandbox.call_binop(None, "+", start, read(value) if read else value)  # type: ignore[arg-type]
    return start


def _bits(operator: str, left: int, right: int) -> int:
    """What arithmetic on whole numbers costs: nothing where the result is short. Raises Exhausted where it is long."""
    size = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
    if size > MAX_BITS and operator != "+" or size > 2 * MAX_BITS:
        raise Exhausted(f"the chat template reckons with numbers of more than {MAX_BITS} bits")
    return size if size > 1024 else 0


def _sized(value: Any) -> bool:
    return isinstance(value, str | int)


def _check_widths(args: Iterable[Any]) -> None:
    for value in args:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise Exhausted(f"the chat template lays out text with the width {value}, more than {MAX_WIDTH}")
