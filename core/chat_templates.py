"""Reads a checkpoint's chat templates from all the places that libraries have stored them in. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import UserError
from .files import read_json_if_there, read_text

TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
TOKENIZER_CONFIG = "tokenizer_config.json"


def chat_templates(folder: Path) -> dict[str, str]:
    """A checkpoint's chat templates by name, `default` first; empty if it has none.

    They are in chat_template.jinja and additional_chat_templates/, or (older) in chat_template.json or under
    `chat_template` in tokenizer_config.json, as a text or as a list with names. Raises `UserError` for damaged ones.
    """
    if (folder / TEMPLATE).is_file():
        templates = {"default": read_text(folder / TEMPLATE)}
        more = folder / MORE_TEMPLATES
        named = sorted(file for file in more.iterdir() if file.suffix == ".jinja") if more.is_dir() else []
        return templates | {file.stem: read_text(file) for file in named}
    for name in (OLD_TEMPLATE, TOKENIZER_CONFIG):
        value = read_json_if_there(folder / name).get("chat_template")
        if value is not None:
            return _named(value, folder / name)
    return {}


def _named(value: object, where: Path) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict) and "name" in entry]
        value = {str(entry.get("name")): entry.get("template") for entry in entries}
    templates = (
        {str(name): text for name, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}
    )
    if not isinstance(value, dict) or not templates or len(templates) < len(value):
        raise UserError(f"{where}: chat_template is neither a text nor a list of {{name, template}}")
    for name in templates:
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise UserError(f"{where}: a chat template is called {name!r}, which cannot be a file's name")
    if "default" not in templates:
        raise UserError(
            f"{where}: there are chat templates called {', '.join(sorted(templates))} and none called default; rename "
            "one of them to default"
        )
    return {"default": templates["default"]} | templates


def template_files(templates: Mapping[str, str]) -> dict[str, str]:
    """The files in which transformers keeps templates: path within a checkpoint folder → text."""
    return {
        TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja": text for name, text in templates.items()
    }
