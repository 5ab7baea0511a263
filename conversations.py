"""Conversations in the layouts that people have → the messages of tokenizer and processor.

    [{"role": "user", "content": [{"type": "image", "image": source}, …]}, …]

is the form that comes out. What is read beside it, for images and likewise for videos:

| layout | written by |
|---|---|
| `{"messages": […], "images": [source, …]}`, each at an `<image>` | ms-swift, LLaMA-Factory |
| the same with an item `{"type": "image"}` without a source for each | TRL |
| `{"conversations": [{"from": "human", "value": "<image>…"}], "image": source}` | ShareGPT, LLaVA |
| `{"role": "user", "content": "…", "images": [source or base64, …]}` | Ollama |
| `{"type": "image_url" or "input_image", "image_url": …}`, `video_url` | OpenAI, vLLM |
| `{"type": "image", "source": {"type": "base64", "media_type": …, "data": …}}` | Anthropic |

A value of null means that the key is absent. No image may be lost silently: a key that could carry
media and is not read is an error, as is a number of images that does not match the number of their
places.
"""

import re
import warnings
from typing import Any

MARKERS = {"image": "<image>", "video": "<video>"}
SOURCE_KEYS = {"image": ("image", "image_url", "url", "path"), "video": ("video", "url", "path")}
OPTION_KEYS = {"min_pixels", "max_pixels", "resized_height", "resized_width", "total_pixels", "fps"}
OPTION_KEYS |= {"nframes", "min_frames", "max_frames", "video_start", "video_end"}
LINE_KEYS = {"messages", "conversations", "images", "image", "videos", "video"}
MESSAGE_KEYS = {"role", "content", "images", "image", "videos", "video"}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
ROLES |= {"observation": "tool", "function_call": "assistant"}

# A key that could carry media: one of these words in its name, such as "image_path", "inputAudio"
# or "video2". What only describes media, such as "image_id" and "file_size", is harmless.
MEDIA_WORD = re.compile(
    r"(?:^|[^a-z])(?:input)?"
    r"(?:image|img|picture|pic|photo|screenshot|thumbnail|video|movie|clip|audio|sound|speech|"
    r"frame|file|media|attachment|url|uri|path|pixel_values|inline_data|b64|base64|bytes|"
    r"gif|png|jpe?g|webp|mp4)"
    r"(?:s|url|path|name|data|file)*"
    r"(?![a-z])"
)
DESCRIPTION = re.compile(
    r"(?:^|_)(?:ids?|sizes?|width|height|count|hash|caption|license|type|format)$"
)


def content_kind(item: dict) -> str:
    """Return what one item of a message's content list is: "image", "video" or "text".

    The rule is that of the published template: the type `image` or a key `image` or
    `image_url` makes an image, else the type `video` or a key `video` makes a video, else it
    must carry `text`. A key whose value is None is absent, as data sets fill their rows with
    null. Raises ValueError for anything else.
    """
    if not isinstance(item, dict):
        raise ValueError(f"a content item must be a dict, not {type(item).__name__}: {item!r:.80}")
    if item.get("type") == "image" or has_value(item, "image") or has_value(item, "image_url"):
        return "image"
    if item.get("type") == "video" or has_value(item, "video"):
        return "video"
    if isinstance(item.get("text"), str):
        return "text"
    raise ValueError(f"a content item is neither image, video nor text: {item!r:.80}")


def has_value(item: dict, key: str) -> bool:
    """Return whether an item has a key with a value other than None."""
    return item.get(key) is not None


def content_items(message: dict, number: int) -> list[dict]:
    """Return the content of the message at index `number` as a list of items.

    Raises ValueError for a message without role or content.
    """
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} must be a dict with role and content, not {type(message).__name__}"
        )
    if not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} needs a role, but has only {list(message)}")
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"the content of message {number} must be text or a list, not {type(content).__name__}"
        )
    return list(content)


def read_conversation(line: list | dict) -> list[dict]:
    """Return the messages of a conversation in any of the layouts above, each content a list of
    items.

    line: a list of messages, or an object with such a list under `messages` (or `conversations`).
    Sources of media stay as they are given; none is opened. What this function has returned, it
    returns unchanged.

    Raises ValueError for a malformed message, for media that nothing here reads, and where the
    images (or videos) are not as many as their markers. Without any marker they are located in
    front of the first user message.
    """
    top = line if isinstance(line, dict) else {"messages": line}
    check_keys(top, LINE_KEYS, "the line")
    given = top.get("messages")
    if given is None:
        given = top.get("conversations")
    if not isinstance(given, list | tuple):
        expected = "a list of messages, or an object with such a list under messages"
        raise ValueError(f"expected {expected}, got {type(given).__name__}")
    messages = []
    for number, message in enumerate(given):
        messages.append(read_message(message, number))
    system = top.get("system")
    if isinstance(system, str) and system and (not messages or messages[0]["role"] != "system"):
        content = [{"type": "text", "text": system}]
        messages.insert(0, {"role": "system", "content": content})
    for kind in MARKERS:
        sources = listed_sources(top, kind, "the line")
        if sources is not None:
            place_media(messages, kind, sources, "the line")
    warn_about_markers(messages)
    return messages


def read_message(message: Any, number: int) -> dict:
    """Return one message with its content as a list of items, its own `images` and `videos` among
    them.
    """
    if isinstance(message, dict) and "from" in message and "role" not in message:
        message = from_sharegpt(message, number)
    where = f"message {number}"
    items = []
    for item in content_items(message, number):
        items.append(read_item(item, where))
    check_keys(message, MESSAGE_KEYS, where)
    result = {key: value for key, value in message.items() if key not in LINE_KEYS}
    result["content"] = items
    for kind in MARKERS:
        sources = listed_sources(message, kind, where)
        if sources is not None:
            place_media([result], kind, sources, where)
    return result


def from_sharegpt(message: dict, number: int) -> dict:
    """Return `{"from": …, "value": …}` as `{"role": …, "content": …}`."""
    role = message["from"]
    result = {key: value for key, value in message.items() if key not in ("from", "value")}
    result["role"] = ROLES.get(role, role) if isinstance(role, str) else role
    result["content"] = message.get("value")
    if not isinstance(result["content"], str):
        found = type(result["content"]).__name__
        raise ValueError(f"message {number}: expected text under value, got {found}")
    return result


def read_item(item: Any, where: str) -> dict:
    """Return one content item as image, video or text, with foreign spellings translated."""
    if not isinstance(item, dict):
        content_kind(item)  # raises
    result = {key: value for key, value in item.items() if value is not None}
    if "video_url" in result:
        result["video"] = media_source(result.pop("video_url"))
        result["type"] = "video"
    if isinstance(result.get("source"), dict):
        result["image"] = anthropic_source(result.pop("source"), result.get("type"), where)
    kind = content_kind(result)
    if kind == "text":
        check_keys(result, {"type", "text"}, f"{where}: a text item")
        return result
    check_keys(result, {"type", *SOURCE_KEYS[kind], *OPTION_KEYS}, f"{where}: an {kind} item")
    item_source(result, kind)
    if result.get("text"):
        warnings.warn(f"{where}: the text of an item with {kind} is not used", stacklevel=2)
    return result


def anthropic_source(source: dict, item_type: object, where: str) -> str:
    """Return the URL that a `source` object of an image item specifies, perhaps a `data:` URL."""
    if item_type == "image" and source.get("type") == "base64":
        return f"data:{source.get('media_type') or ''};base64,{source.get('data') or ''}"
    if item_type == "image" and source.get("type") == "url" and source.get("url"):
        return source["url"]
    expected = "an image with a source of type base64 or url"
    raise ValueError(f"{where}: expected {expected}, got {item_type!r} with {source.get('type')!r}")


def item_source(item: dict, kind: str) -> Any:
    """Return what an image or video item names as its source, None if nothing. Raises ValueError
    for two.
    """
    named = [key for key in SOURCE_KEYS[kind] if item.get(key) is not None]
    if len(named) > 1:
        raise ValueError(f"expected one source of an {kind} item, got {' and '.join(named)}")
    if not named:
        return None
    return media_source(item[named[0]])


def media_source(value: Any) -> Any:
    """Return a source as it is, or that inside `{"url": …}` (OpenAI) or `{"bytes": …, "path": …}`
    (datasets).
    """
    if not isinstance(value, dict):
        return value
    for key in ("bytes", "url", "path"):
        if value.get(key) is not None:
            return value[key]
    return None


def listed_sources(mapping: dict, kind: str, where: str) -> list | None:
    """Return the sources under `images` or `image` (`videos`, `video`) of a line or message; None
    without them.
    """
    named = [key for key in (f"{kind}s", kind) if mapping.get(key) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise ValueError(f"{where}: expected {named[0]} or {named[1]}, got both")
    values = mapping[named[0]]
    if not isinstance(values, list | tuple):
        values = [values]
    sources = [media_source(value) for value in values]
    for number, source in enumerate(sources):
        if source is None:
            found = f"{values[number]!r:.80}"
            raise ValueError(f"{where}: {named[0]}[{number}] names no {kind}: {found}")
    return sources


def place_media(messages: list[dict], kind: str, sources: list, where: str) -> None:
    """Give each source its place in the messages, in order: an item without a source, or a marker
    in the text.

    Without any place they are put in front of the first user message. Raises ValueError if the
    numbers differ.
    """
    items = [item for message in messages for item in message["content"]]
    empty = sum(is_place(item, kind) for item in items)
    texts = [item["text"] for item in items if content_kind(item) == "text"]
    marked = sum(text.count(MARKERS[kind]) for text in texts)
    if not empty and not marked:
        put_in_front(messages, kind, sources, where)
        return
    use_markers = len(sources) != empty or not empty
    places = empty + marked if use_markers else empty
    if len(sources) != places:
        found = f"{marked} markers {MARKERS[kind]}"
        if empty:
            found = f"{empty} {kind} items without a source and {found}"
        raise ValueError(f"{where}: {len(sources)} {kind}s are given for {found}")
    remaining = iter(sources)
    for message in messages:
        content = []
        for item in message["content"]:
            if use_markers and content_kind(item) == "text":
                content += split_at_markers(item, kind, remaining)
            elif is_place(item, kind):
                content.append(item | {"type": kind, kind: next(remaining)})
            else:
                content.append(item)
        message["content"] = content


def put_in_front(messages: list[dict], kind: str, sources: list, where: str) -> None:
    """Put media that have no place in front of the first user message, or of the first message
    without one.
    """
    if not sources:
        return
    if not messages:
        raise ValueError(f"{where}: {len(sources)} {kind}s are given, but no message")
    users = [message for message in messages if message["role"] == "user"]
    first = users[0] if users else messages[0]
    first["content"] = [{"type": kind, kind: source} for source in sources] + first["content"]


def is_place(item: dict, kind: str) -> bool:
    """Return whether an item is of this kind but names no source."""
    return content_kind(item) == kind and item_source(item, kind) is None


def split_at_markers(item: dict, kind: str, sources: Any) -> list[dict]:
    """Return a text item cut at its markers, each replaced by the next source."""
    first, *others = item["text"].split(MARKERS[kind])
    result = [item | {"text": first}]
    for text in others:
        result.append({"type": kind, kind: next(sources)})
        result.append(item | {"text": text})
    return [one for one in result if content_kind(one) != "text" or one["text"]]


def check_keys(mapping: dict, known: set[str], where: str) -> None:
    """Raise ValueError for a key that could carry media and is not among those that are read."""
    for key, value in mapping.items():
        if key in known or not could_be_media(value) or not names_media(str(key)):
            continue
        reason = "which could be media but is not read"
        readable = sorted(known & {"image", "images", "image_url", "video", "videos"})
        if readable:
            reason += f"; expected media under {', '.join(readable)}"
        raise ValueError(f"{where} has the key {key!r}, {reason}")


def could_be_media(value: Any) -> bool:
    """Return whether a value may hold media: numbers, null and what is empty do not."""
    if value is None or isinstance(value, bool | int | float):
        return False
    return not isinstance(value, str | list | tuple | dict | bytes) or len(value) > 0


def names_media(key: str) -> bool:
    """Return whether the name of a key lets expect an image, video, sound or file."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower().replace("-", "_")
    return MEDIA_WORD.search(words) is not None and DESCRIPTION.search(words) is None


def warn_about_markers(messages: list[dict]) -> None:
    """Warn of a marker in the text of a conversation without an image (or video)."""
    items = [item for message in messages for item in message["content"]]
    for kind, marker in MARKERS.items():
        texts = [item["text"] for item in items if content_kind(item) == "text"]
        if any(content_kind(item) == kind for item in items) or marker not in "".join(texts):
            continue
        warnings.warn(f"{marker} stays text, as the conversation has no {kind}", stacklevel=2)
