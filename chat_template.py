"""A checkpoint's own chat template, rendered with Jinja as the reference does.

Most checkpoints have the published template of Qwen2-VL, which `tokenizer.py` implements in Python.
Source: transformers 5.23.0, `utils/chat_template_utils.py`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import first_line
from json_files import has_file, read_optional_json, read_text

# sha256 of the templates that `render_published_template` implements: the published one, and the
# one in the bundled model's directory, which renders the same without a literal line break.
BUILT_IN_TEMPLATES = (
    "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb",
    "d7fe15d51af6e26129a24b55cc8854b5808f9efe68d19961b6c47fc1c7e2b519",
)

# A template may repeat anything any number of times. The prompt that it renders is bounded, and so
# is the sum of the lengths of all `range(...)` that it loops over, the steps of all loops, what
# `+`, `~`, `*` and `**` may make, and the text of a macro or of a block that is set.
# (A template can still fill memory by other means, such as wide formats. The reference has no
# bounds.)
MAX_PROMPT_CHARACTERS = 2**26
MAX_RANGE_STEPS = 1_000_000
MAX_LOOP_STEPS = 1_000_000  # of all loops and macro calls together
MAX_PRODUCT = 2**20  # of two numbers, or of the length of a text or list and a number
MAX_TEMPLATE_BYTES = 2**20  # 50 times the longest known one; Jinja compiles it to Python


def is_built_in_template(text: str) -> bool:
    """Return whether `render_published_template` renders what the Jinja template `text` does.

    Jinja reads CR LF as a line feed and drops up to two line feeds after a final block.
    """
    text = text.replace("\r\n", "\n").removesuffix("\n").removesuffix("\n")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() in BUILT_IN_TEMPLATES


def _template_data(value: object) -> Any:
    """Return `value` as plain JSON types; an image or any other object becomes a mere name.

    So a template can neither call methods of foreign objects nor print an image into the prompt.
    Source: transformers 5.23.0, `_plain_template_data`.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {_template_data(key): _template_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_template_data(entry) for entry in value]
    return f"<{type(value).__name__}>"


def _template_message(message: dict) -> dict:
    """Return a message as the reference gives it to a template (`_normalize_conversations`).

    Keys without a value are left out, and an item {"type": "image_url", ...} becomes an image.
    """
    data = {key: _template_data(value) for key, value in message.items() if value is not None}
    if isinstance(data["content"], list):
        for number, item in enumerate(data["content"]):
            if item.get("type") == "image_url" and "image_url" in item:
                url = item["image_url"]
                url = url.get("url", "") if isinstance(url, dict) else url
                data["content"][number] = {"type": "image", "url": url}
    return data


class _BoundedRange:
    """`range` for templates; raises OverflowError once all ranges together exceed the bound."""

    def __init__(self) -> None:
        self._remaining = MAX_RANGE_STEPS
        self._remaining_loops = MAX_LOOP_STEPS

    def __call__(self, *arguments: int) -> range:
        steps = range(*arguments)
        self._remaining -= len(steps)
        if self._remaining < 0:
            raise OverflowError(f"its ranges exceed {MAX_RANGE_STEPS:,} steps in total")
        return steps

    def count_loop_step(self) -> None:
        """Count one step of a loop or one call of a macro, over whatever the loop is."""
        self._remaining_loops -= 1
        if self._remaining_loops < 0:
            raise OverflowError(f"its loops exceed {MAX_LOOP_STEPS:,} steps in total")


def _count_step(context: Any) -> None:
    """Count one step of a loop, in the rendering that the context belongs to."""
    context.parent["range"].count_loop_step()


def _bounded_sum(left: Any, right: Any) -> Any:
    """Return left + right; raise OverflowError for texts or lists beyond MAX_PROMPT_CHARACTERS."""
    if hasattr(left, "__len__") and hasattr(right, "__len__"):
        if len(left) + len(right) > MAX_PROMPT_CHARACTERS:
            raise OverflowError(f"a text exceeds {MAX_PROMPT_CHARACTERS:,} characters")
    return left + right


def _bounded_join(pieces: Iterable[str]) -> str:
    """Return the text of a macro or of a block that is set, within the same bound."""
    pieces = list(pieces)
    if sum(len(piece) for piece in pieces) > MAX_PROMPT_CHARACTERS:
        raise OverflowError(f"a text exceeds {MAX_PROMPT_CHARACTERS:,} characters")
    return "".join(pieces)


def _bounded_concat(*values: Any) -> str:
    """Return the texts of all values joined, as the operator `~` does, within the same bound."""
    return _bounded_join(str(value) for value in values)


def _bounded_tree(template: Any) -> Any:
    """Return a parsed template that counts its loops and macro calls, and joins within a bound.

    Jinja bounds no loop but `range`, and calls nothing that could be replaced for `~`.
    """
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Bounds(NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            concat = nodes.EnvironmentAttribute("bounded_concat")
            return nodes.Call(concat, node.nodes, [], None, None, lineno=node.lineno)

    template = Bounds().visit(template)
    for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        count = nodes.EnvironmentAttribute("count_step")
        call = nodes.Call(count, [nodes.ContextReference()], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
    return template


def _bounded_product(left: Any, right: Any) -> Any:
    """Return left * right; raise OverflowError beyond MAX_PRODUCT."""
    sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
    if sizes[0] * sizes[1] > MAX_PRODUCT:
        raise OverflowError(f"a product exceeds {MAX_PRODUCT:,}")
    return left * right


def _bounded_power(left: Any, right: Any) -> Any:
    """Return left ** right; raise OverflowError beyond MAX_PRODUCT."""
    if abs(right) * math.log2(abs(left) + 1) > math.log2(MAX_PRODUCT) + 1:
        raise OverflowError(f"a power exceeds {MAX_PRODUCT:,}")
    return left**right


class ChatTemplate:
    """A checkpoint's own chat template in Jinja, rendered as in transformers 5.23.0.

    `source` names the file in error messages; `special_tokens` are variables of the template.
    """

    def __init__(self, text: str, source: str, special_tokens: dict[str, str] | None = None):
        self.text = text
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            text.encode()  # a lone surrogate could not be encoded as tokens
            environment = _jinja_environment()
            self._compiled = environment.from_string(_bounded_tree(environment.parse(text)))
        except Exception as error:  # Jinja compiles to Python: more than TemplateError can arise
            raise self._error("cannot be used", error) from error

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        now: datetime | None = None,
    ) -> str:
        """Return the prompt. Raises ValueError naming the file for whatever the template raises.

        now: what the template function `strftime_now` formats.
        """
        now = now or datetime.now()
        variables = self.special_tokens | {
            "messages": [_template_message(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "add_vision_id": add_vision_id,
            "strftime_now": now.strftime,
            "range": _BoundedRange(),
        }
        pieces = []
        length = 0
        try:
            for piece in self._compiled.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT_CHARACTERS:
                    raise OverflowError(f"the prompt exceeds {MAX_PROMPT_CHARACTERS:,} characters")
        except Exception as error:  # a template is foreign code
            raise self._error("cannot be rendered", error) from error
        return "".join(pieces)

    def __reduce__(self) -> tuple:
        # A compiled template cannot be pickled or copied.
        return ChatTemplate, (self.text, self.source, self.special_tokens)

    def _error(self, what: str, error: Exception) -> ValueError:
        reason = first_line(error)
        return ValueError(f"the chat template in {self.source} {what}: {reason:.300}")


def _jinja_environment() -> Any:
    """Return the sandbox that renders chat templates, with the reference's additions to Jinja.

    Source: transformers 5.23.0, `_cached_compile_jinja_template`.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class GenerationTag(jinja2.ext.Extension):
        """{% generation %}…{% endgeneration %} marks what a loss counts; the text is its body."""

        tags = {"generation"}  # noqa: RUF012 (the attribute that Jinja documents)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes characters of HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """A sandbox in which the operators that make large values are bounded."""

        intercepted_binops = frozenset(("+", "*", "**"))
        count_step = staticmethod(_count_step)
        bounded_concat = staticmethod(_bounded_concat)
        concat = staticmethod(_bounded_join)  # Jinja's name for what joins the output of a block

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                return _bounded_sum(left, right)
            return _bounded_product(left, right) if operator == "*" else _bounded_power(left, right)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _default_template(value: object, source: str) -> str | None:
    """Return the template text from a field `chat_template`: text, or several templates by name.

    Several are a list of {"name": ..., "template": ...} or an object; the one named default counts.
    """
    if value is None or isinstance(value, str):
        return value
    by_name = value
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        by_name = {entry.get("name"): entry.get("template") for entry in entries}
    text = by_name.get("default") if isinstance(by_name, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{source}: expected a chat template as text, or several with one named default, "
            f"got {type(value).__name__}"
        )
    return text


def find_chat_template(folder: Path, config: dict) -> tuple[str, str] | None:
    """Return (text, source) of the chat template in a checkpoint directory, None if it has none.

    Order of transformers 5.23.0, first the processor's (`get_processor_dict`), then the
    tokenizer's: processor_config.json, chat_template.json, chat_template.jinja,
    chat_templates/default.jinja, tokenizer_config.json (given as `config`).
    """
    for name in ("processor_config.json", "chat_template.json"):
        path = folder / name
        text = _default_template(read_optional_json(path).get("chat_template"), str(path))
        if text is not None:
            return text, str(path)
    for path in (folder / "chat_template.jinja", folder / "chat_templates" / "default.jinja"):
        if has_file(path):
            return read_text(path, MAX_TEMPLATE_BYTES), str(path)
    source = str(folder / "tokenizer_config.json")
    text = _default_template(config.get("chat_template"), source)
    return None if text is None else (text, source)
