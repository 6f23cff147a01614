"""Checks that all inputs make the same prompts and pixels of a request: templates, processors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tools import MergeError
from vllm_qoq.checkpoint import processor
from vllm_qoq.checkpoint.folder import check_link, read_json
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError, shown

_TEMPLATE_BYTES = 16 << 20
_TEMPLATE, _DEFAULT = "chat_template", "default"
_JINJA, _MORE_JINJA = f"{_TEMPLATE}.jinja", "additional_chat_templates"
# Where the settings of images and of videos may be: in a file, or in a part of the processor's.
_NESTED = {processor.NESTED_IMAGES: processor.IMAGE_PROCESSOR}
_NESTED |= {"video_processor": "video_preprocessor_config.json"}
# What names a class or says who wrote the file; versions of transformers differ in them.
_IGNORED = frozenset(
    {
        *("processor_class", "image_processor_type", "video_processor_type", "auto_map"),
        *("feature_extractor_type", "tokenizer_class", "transformers_version", "_name_or_path"),
        *("_processor_class", "_valid_processor_keys", "_commit_hash", _TEMPLATE),
    }
)
_SHOWN_BEFORE, _SHOWN = 20, 60


def check_present(sources: Sequence[StoredSet], prefill: StoredSet) -> None:
    """Raise MergeError if a model of images has no processor in any of the folders."""
    lacks = [processor.finding(x.checkpoint.path, x.checkpoint.config) for x in sources]
    if all(lacks):
        raise MergeError(f"{prefill.checkpoint.path}: {lacks[list(sources).index(prefill)]}")


def check(left: StoredSet, right: StoredSet) -> None:
    """Raise MergeError where a setting or a chat template that both have differs.

    What only one of them has is no difference: tools write defaults, or do without them.
    """
    _check_processors(left, right)
    _check_templates(left, right)


def _check_processors(left: StoredSet, right: StoredSet) -> None:
    ours, theirs = (_processor_parts(one.checkpoint.path) for one in (left, right))
    for part in sorted(ours.keys() & theirs.keys()):
        # The first is used; others are what older versions of transformers use.
        pairs = [(next(iter(ours[part])), next(iter(theirs[part])))]
        pairs += [(place, place) for place in ours[part] if place in theirs[part]]
        for our_place, their_place in pairs:
            found = _difference(ours[part][our_place], theirs[part][their_place])
            if found is None:
                continue
            key, *values = found
            also = "" if our_place == their_place else f" ({their_place})"
            raise MergeError(
                f"{our_place}: {key}: is {shown(values[0])} in {left.name} and "
                f"{shown(values[1])} in {right.name}{also}; {_remedy('processor')}"
            )


def _remedy(what: str) -> str:
    return (
        f"a merged checkpoint has one {what}, so copy the right file into the folders of all "
        "other sets"
    )


def _processor_parts(folder: Path) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Read the settings by part of the processor, and by their place: first what is used."""
    parts: dict[str, dict[str, Mapping[str, Any]]] = {}
    whole = _json(folder, processor.PROCESSOR)
    if whole is not None:
        for part in _NESTED:
            if isinstance(nested := whole.get(part), dict):
                parts.setdefault(part, {})[f"{processor.PROCESSOR}: {part}"] = nested
        rest = {key: value for key, value in whole.items() if key not in _NESTED}
        parts["processor"] = {processor.PROCESSOR: rest}
    for part, file in _NESTED.items():
        if (content := _json(folder, file)) is not None:
            parts.setdefault(part, {})[file] = content
    return parts


def _difference(ours: Any, theirs: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Find the first key, with dots, of which both have another value; null is no value."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted((ours.keys() & theirs.keys()) - _IGNORED):
            if found := _difference(ours[key], theirs[key], f"{place}.{key}" if place else key):
                return found
        return None
    if ours is None or theirs is None or ours == theirs:
        return None
    # Older files have one number for a size whose sides newer ones name.
    for number, sides in ((ours, theirs), (theirs, ours)):
        is_older = isinstance(number, int) and isinstance(sides, dict)
        if is_older and all(side in (None, number) for side in sides.values()):
            return None
    return place, ours, theirs


def _check_templates(left: StoredSet, right: StoredSet) -> None:
    ours, theirs = (_templates(one.checkpoint.path) for one in (left, right))
    for name in sorted(ours.keys() & theirs.keys()):
        (place, text), (their_place, their_text) = ours[name], theirs[name]
        if text == their_text:
            continue
        both = zip(text, their_text, strict=False)
        shorter = min(len(text), len(their_text))
        at = next((i for i, (a, b) in enumerate(both) if a != b), shorter)
        start = max(at - _SHOWN_BEFORE, 0)
        parts = [shown(one[start : start + _SHOWN]) for one in (text, their_text)]
        also = "" if place == their_place else f" ({their_place})"
        raise MergeError(
            f"{place}: differs from character {at} on: is {parts[0]} in {left.name} and "
            f"{parts[1]} in {right.name}{also}; {_remedy('chat template')}"
        )


def _templates(folder: Path) -> dict[str, tuple[str, str]]:
    """Read the chat templates that are used: name -> their place and their text.

    A file of its own comes before the same one in the processor's or the tokenizer's JSON.
    """
    found: dict[str, tuple[str, str]] = {}
    for place, name, text in _stored_templates(folder):
        found.setdefault(name, (place, text.rstrip("\n")))
    return found


def _stored_templates(folder: Path) -> Iterator[tuple[str, str, str]]:
    files = [folder / _JINJA, *sorted((folder / _MORE_JINJA).glob("*.jinja"))]
    for path in files:
        if path.is_file():
            name = _DEFAULT if path == files[0] else path.stem
            yield path.relative_to(folder).as_posix(), name, _text(folder, path)
    for file in (f"{_TEMPLATE}.json", processor.PROCESSOR, "tokenizer_config.json"):
        stored = (_json(folder, file) or {}).get(_TEMPLATE)
        place = f"{file}: {_TEMPLATE}"
        # A tokenizer may have several, as a list of objects or by name.
        if isinstance(stored, list):
            entries = [one for one in stored if isinstance(one, dict)]
            stored = {str(one.get("name")): one.get("template") for one in entries}
        named = stored if isinstance(stored, dict) else {_DEFAULT: stored}
        for name, text in named.items():
            if isinstance(text, str):
                yield place if name == _DEFAULT else f"{place}: {shown(name)}", name, text


def _json(folder: Path, file: str) -> dict[str, Any] | None:
    if not (folder / file).is_file():
        return None
    check_link(folder, folder / file)
    return read_json(folder / file, processor.JSON_BYTES)


def _text(folder: Path, path: Path) -> str:
    check_link(folder, path)
    file = path.relative_to(folder)
    if path.stat().st_size > _TEMPLATE_BYTES:
        raise FormatError(
            f"{file}: is larger than {_TEMPLATE_BYTES} bytes, so it is no chat template; remove it"
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: is no text in UTF-8 ({error}); mend the file") from None
