"""Renders conversations without the template engine where that is proven to give the same text.

A shape is the sequence of roles of a conversation of plain turns. Its texts are found once, with
marks in place of the contents; what the template looks at in a content is recorded meanwhile as a
guard ("contains </think>: no"). A conversation of the same shape whose contents pass the guards
takes the same way through the template, so its texts are the same pieces around its own contents.
Where a template looks at contents in another way, the texts are put together in the same manner
and held against one rendering. Either way a difference leads back to the template itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn, cast

from autotune.dataset.conversation import Conversation, Message
from autotune.dataset.lines import RowError
from autotune.dataset.template import ChatTemplate, Sample, Span

_MAX_SHAPES = 4096
# The first uses of a shape are rendered all the same.
_CHECKED_USES = 3

_OPEN, _CLOSE = "\ue000", "\ue001"
# Whatever a filter could escape or change, so that it does not go unnoticed.
_BODY = "\"\\<&'>{Zz\n"
_DIGITS = 4

_Key = tuple[tuple[str, bool, bool], ...]
_Steps = tuple[tuple[str, tuple[str | None, ...]], ...]


class _UntraceableError(BaseException):
    """The template looks at a content in a way that no guard can repeat.

    Some of jinja's own tests catch every Exception and take it for an answer.
    """


@dataclass(frozen=True, slots=True)
class _Hole:
    """Where the content of a turn goes, after the steps have been applied to it."""

    turn: int
    steps: _Steps

    def fill(self, contents: Sequence[str]) -> str:
        text = contents[self.turn]
        for name, args in self.steps:
            text = getattr(text, name)(*args)
        return text


@dataclass(frozen=True, slots=True)
class _Guard:
    """What a template asked of a content, and the answer that its way depended on."""

    hole: _Hole
    question: str
    argument: str
    answer: bool

    def holds(self, contents: Sequence[str]) -> bool:
        return _QUESTIONS[self.question](self.hole.fill(contents), self.argument) is self.answer


_QUESTIONS: dict[str, Callable[[str, str], bool]] = {
    "contains": lambda text, part: part in text,
    "startswith": lambda text, part: text.startswith(part),
    "endswith": lambda text, part: text.endswith(part),
    "equals": lambda text, other: text == other,
    "is true": lambda text, _: bool(text),
}


@dataclass(slots=True)
class Pieces:
    """A text in pieces, with its spans as (piece, characters into it).

    `anchors` is for who turns the text into tokens to keep what is the same for all contents.
    """

    pieces: tuple[str | _Hole, ...]
    trained: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    off: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    turns: int
    anchors: object = field(default=None, compare=False)

    def filled(self, contents: Sequence[str]) -> Sample:
        texts = [p if isinstance(p, str) else p.fill(contents) for p in self.pieces]
        starts = list(accumulate(map(len, texts), initial=0))
        trained, off = (
            tuple([(starts[a] + i, starts[b] + j) for (a, i), (b, j) in spans])
            for spans in (self.trained, self.off)
        )
        return Sample("".join(texts), trained, off, self.turns, self)


@dataclass(slots=True)
class _Shape:
    """The texts of a shape; without guards each is held against its rendering."""

    texts: list[Pieces]
    guards: list[_Guard] | None
    uses: int = 0


class ShapeCache:
    """Gives the samples of conversations, through shapes where it can."""

    def __init__(self, template: ChatTemplate, *, whole: bool) -> None:
        self._template = template
        self._whole = whole
        self._shapes: dict[_Key, _Shape | None] = {}

    def samples(self, conversation: Conversation) -> list[Sample]:
        """Return the texts of a fitted conversation.

        Raises:
            RowError: the template refuses the conversation, or hides where its turns are.
        """
        shape = self._shape_of(conversation)
        if shape is not None:
            contents = [turn.content for turn in conversation.messages]
            if shape.guards is None or all(guard.holds(contents) for guard in shape.guards):
                samples = [pieces.filled(contents) for pieces in shape.texts]
                if self._is_proven(shape, conversation, samples):
                    return samples
        return self._template.samples(conversation, whole=self._whole)

    def _shape_of(self, conversation: Conversation) -> _Shape | None:
        if not conversation.is_plain:
            return None
        key = tuple([(t.role, t.trained, t.switched_off) for t in conversation.messages])
        if key not in self._shapes:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = _find_shape(self._template, key, whole=self._whole)
        return self._shapes[key]

    def _is_proven(self, shape: _Shape, conversation: Conversation, samples: list[Sample]) -> bool:
        shape.uses += 1
        if shape.guards is not None and shape.uses > _CHECKED_USES:
            return True
        messages = [turn.to_json() for turn in conversation.messages]
        same = all(
            self._template.render(messages[: sample.turns]) == sample.text for sample in samples
        )
        if not same and shape.guards is not None:
            shape.guards = None
        return same


def _find_shape(template: ChatTemplate, key: _Key, *, whole: bool) -> _Shape | None:
    if len(key) >= 10**_DIGITS:
        return None
    messages = tuple(
        Message(role=role, content=_mark(turn, 0), trained=trained, switched_off=off)
        for turn, (role, trained, off) in enumerate(key)
    )
    conversation = Conversation(messages=messages)
    try:
        samples = template.samples(conversation, whole=whole)
    except RowError:
        return None
    traced = _trace(template, conversation, samples)
    if traced is not None:
        return traced
    holes = {_mark(turn, 0): _Hole(turn, ()) for turn in range(len(key))}
    texts = [_cut(sample, sample.text, holes) for sample in samples]
    return None if None in texts else _Shape(cast("list[Pieces]", texts), guards=None)


def _trace(
    template: ChatTemplate, conversation: Conversation, samples: list[Sample]
) -> _Shape | None:
    if not _writes_what_it_joins(template.source):
        return None
    trace = _Trace()
    texts = []
    for sample in samples:
        try:
            text = trace.render(template, conversation.messages[: sample.turns])
        except _UntraceableError:
            return None
        pieces = _cut(sample, text, trace.holes)
        if pieces is None or trace.unmarked(text) != sample.text:
            return None
        texts.append(pieces)
    return _Shape(texts, list(dict.fromkeys(trace.guards)))


def _mark(turn: int, steps: int) -> str:
    # Of one length, so that a place in one text of marks is the same place in another.
    return f"{_OPEN}{turn:0{_DIGITS}}{steps:0{_DIGITS}}{_BODY}{_CLOSE}"


_MARK_LENGTH = len(_mark(0, 0))


def _cut(sample: Sample, text: str, holes: dict[str, _Hole]) -> Pieces | None:
    """Cut a text at its marks, or return None where a mark was changed or a span ends inside."""
    pieces: list[str | _Hole] = []
    bounds = [0]
    at = 0
    while at < len(text):
        found = text.find(_OPEN, at)
        if found == at:
            hole = holes.get(text[at : at + _MARK_LENGTH])
            if hole is None:
                return None
            pieces.append(hole)
            at += _MARK_LENGTH
        else:
            end = len(text) if found < 0 else found
            pieces.append(text[at:end])
            at = end
        bounds.append(at)
    if any(_CLOSE in piece for piece in pieces if isinstance(piece, str)):
        return None
    try:
        trained, off = (
            tuple([_placed(span, pieces, bounds) for span in spans])
            for spans in (sample.trained, sample.off)
        )
    except ValueError:
        return None
    return Pieces(tuple(pieces), trained, off, sample.turns)


def _placed(
    span: Span, pieces: list[str | _Hole], bounds: list[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    start, end = (_place(position, pieces, bounds) for position in span)
    return start, end


def _place(position: int, pieces: list[str | _Hole], bounds: list[int]) -> tuple[int, int]:
    if position in bounds:
        return bounds.index(position), 0
    piece = next(i for i, bound in enumerate(bounds) if bound > position) - 1
    if not isinstance(pieces[piece], str):
        msg = "the span ends inside a content"
        raise ValueError(msg)  # noqa: TRY004 - a fact of the template, not of a type
    return piece, position - bounds[piece]


class _Trace:
    """Renders marks through the template, and records what it asks of them."""

    def __init__(self) -> None:
        self.holes: dict[str, _Hole] = {}
        self.guards: list[_Guard] = []
        self._steps: list[_Steps] = [()]

    def render(self, template: ChatTemplate, messages: Sequence[Message]) -> str:
        # transformers' own compiled template: only it leaves out the copying of messages into
        # plain strings, which would hide what is asked of them.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        chat = [
            {"role": turn.role, "content": self.content(_Hole(place, ()))}
            for place, turn in enumerate(messages)
        ]
        try:
            text: str = _compile_jinja_template(template.source).render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **template.variables,
            )
        except Exception as error:  # as in ChatTemplate.render
            raise _UntraceableError from error
        return text

    def content(self, hole: _Hole) -> "_Content":
        if hole.steps not in self._steps:
            self._steps.append(hole.steps)
        mark = _mark(hole.turn, self._steps.index(hole.steps))
        self.holes[mark] = hole
        return _Content.of(mark, hole, self)

    def unmarked(self, text: str) -> str:
        """Return the text with every mark as it is before any step."""
        for mark, hole in self.holes.items():
            text = text.replace(mark, _mark(hole.turn, 0))
        return text

    def ask(self, hole: _Hole, question: str, argument: object = "") -> bool:
        if type(argument) is not str:
            raise _UntraceableError
        answer = _QUESTIONS[question](_mark(hole.turn, 0), argument)
        self.guards.append(_Guard(hole, question, argument, answer))
        return answer


def _refuse(*_: object, **__: object) -> NoReturn:
    raise _UntraceableError


class _Joined(str):
    """A text that a content is part of: it can be written, and nothing else."""

    __slots__ = ()

    def __str__(self) -> str:
        return str.__str__(self)

    def __add__(self, other: object) -> "_Joined":
        return _Joined(str.__add__(self, _as_plain(other)))

    def __radd__(self, other: object) -> "_Joined":
        return _Joined(str.__add__(_as_plain(other), self))


class _Content(_Joined):
    """A content: every question that a template asks of it is recorded."""

    _hole: _Hole
    _trace: _Trace

    @classmethod
    def of(cls, mark: str, hole: _Hole, trace: _Trace) -> "_Content":
        content = cls(mark)
        content._hole, content._trace = hole, trace
        return content

    def __contains__(self, part: object) -> bool:
        return self._trace.ask(self._hole, "contains", part)

    def startswith(self, *parts: Any) -> bool:  # noqa: ANN401 - as str has it
        (part,) = parts
        return self._trace.ask(self._hole, "startswith", part)

    def endswith(self, *parts: Any) -> bool:  # noqa: ANN401 - as str has it
        (part,) = parts
        return self._trace.ask(self._hole, "endswith", part)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._trace.ask(self._hole, "equals", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = _refuse  # a lookup would compare unseen

    def __bool__(self) -> bool:
        return self._trace.ask(self._hole, "is true")

    def strip(self, chars: str | None = None) -> str:
        return self._step("strip", chars)

    def lstrip(self, chars: str | None = None) -> str:
        return self._step("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> str:
        return self._step("rstrip", chars)

    def _step(self, name: str, chars: str | None) -> "_Content":
        if chars is not None and (type(chars) is not str or set(chars) & {_OPEN, _CLOSE}):
            raise _UntraceableError
        hole = _Hole(self._hole.turn, (*self._hole.steps, (name, (chars,))))
        return self._trace.content(hole)


def _as_plain(value: object) -> str:
    if not isinstance(value, str):
        raise _UntraceableError
    return str.__str__(value)


_PLUMBING = {
    *("__new__", "__init__", "__class__", "__init_subclass__", "__subclasshook__", "__doc__"),
    *("__getattribute__", "__setattr__", "__delattr__", "__dir__", "__sizeof__"),
}
for _name in {*dir(str), "__bool__"} - _PLUMBING - vars(_Joined).keys():
    setattr(_Joined, _name, _refuse)

_FILTERS = {"trim", "length", "count", "string", "default", "d", "tojson", "items", "list"}
_FILTERS |= {"selectattr", "rejectattr", "first", "last", "join"}
_TESTS = {"string", "none", "defined", "undefined", "mapping", "iterable", "sequence", "boolean"}
_TESTS |= {"true", "false", "equalto", "eq", "==", "number", "ne", "in"}


def _writes_what_it_joins(source: str) -> bool:
    """Tell whether every text that a template joins in a way that cannot be traced is written.

    The operator ~, macros and the filter join make plain strings. A test on one of them could
    depend on a content unseen, so they may only be part of what is written.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(source).environment.parse(source)
    if tree.find((nodes.AssignBlock, nodes.FilterBlock, nodes.Include, nodes.ImportedName)):
        return False
    if tree.find((nodes.Import, nodes.FromImport, nodes.Extends)):
        return False
    macros = {macro.name for macro in tree.find_all(nodes.Macro)} | {"caller", "loop"}
    return _is_traceable(tree, macros, written=True)


def _is_traceable(node: Any, macros: set[str], *, written: bool) -> bool:  # noqa: ANN401 - a jinja node
    from jinja2 import nodes

    if _hides(node):
        return False
    joins = isinstance(node, nodes.Concat) or (
        isinstance(node, nodes.Filter) and node.name == "join"
    )
    calls = isinstance(node, nodes.Call) and (
        isinstance(node.node, nodes.Name) and node.node.name in macros
    )
    if (joins or calls) and not written:
        return False
    return all(
        _is_traceable(child, macros, written=_passes_on(node, child, written=written))
        for child in node.iter_child_nodes()
    )


def _hides(node: Any) -> bool:  # noqa: ANN401 - a jinja node
    """Tell whether a node may look at a content in a way that goes unnoticed."""
    from jinja2 import nodes

    match node:
        case nodes.Filter():
            return node.name not in _FILTERS
        case nodes.Test():
            return node.name not in _TESTS
        case nodes.Mod():
            # A text on the left is a format, and not every content on the right is asked.
            return isinstance(node.left, nodes.Const) or not isinstance(node.right, nodes.Const)
        case nodes.Compare():
            return not all(_is_seen(node.expr, operand) for operand in node.ops)
        case _:
            return False


def _is_seen(left: Any, operand: Any) -> bool:  # noqa: ANN401 - jinja nodes
    """Tell whether a comparison is one that a content notices: not `content in "a string"`."""
    from jinja2 import nodes

    if operand.op not in ("in", "notin"):
        return True
    if isinstance(left, (nodes.Getattr, nodes.Getitem)):
        named = getattr(left, "attr", None) or getattr(getattr(left, "arg", None), "value", None)
        if named == "role":
            return True
    return isinstance(left, nodes.Const) or isinstance(operand.expr, (nodes.List, nodes.Tuple))


def _passes_on(node: Any, child: Any, *, written: bool) -> bool:  # noqa: ANN401 - jinja nodes
    """Tell whether a child's value goes only into what is written."""
    from jinja2 import nodes

    if isinstance(node, nodes.Output):
        return True
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
        # What it is told with is the end of the rendering, and no text depends on it.
        return node.node.name == "raise_exception"
    if isinstance(node, nodes.CondExpr):
        return written and child is not node.test
    if isinstance(node, (nodes.Concat, nodes.Add)):
        return written
    # Statements below statements: what an expression among them is used for is seen further down.
    return isinstance(node, (nodes.CallBlock, nodes.ExprStmt)) and isinstance(child, nodes.Call)
