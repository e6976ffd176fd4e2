"""Where a folder keeps its chat templates: the places they have stood in over the years, read in one way. No torch."""

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
    """A checkpoint's chat templates by name, `default` first; empty where it has none.

    They stand in chat_template.jinja and additional_chat_templates/, or (older) in chat_template.json or under
    `chat_template` of tokenizer_config.json, as a text or as a list by name. Raises `UserError` for damaged ones.
    """
    if (folder / TEMPLATE).is_file():
        found = {"default": read_text(folder / TEMPLATE)}
        more = folder / MORE_TEMPLATES
        named = sorted(file for file in more.iterdir() if file.suffix == ".jinja") if more.is_dir() else []
        return found | {file.stem: read_text(file) for file in named}
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
    found = (
        {str(name): text for name, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}
    )
    if not isinstance(value, dict) or not found or len(found) < len(value):
        raise UserError(f"{where}: chat_template is neither a text nor a list of {{name, template}}")
    for name in found:
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise UserError(f"{where}: a chat template is called {name!r}, which cannot be a file's name")
    if "default" not in found:
        raise UserError(
            f"{where}: there are chat templates called {', '.join(sorted(found))} and none called default; name the "
            "one that is meant so"
        )
    return {"default": found["default"]} | found


def template_files(templates: Mapping[str, str]) -> dict[str, str]:
    """The files in which transformers keeps templates: path within a checkpoint folder → text."""
    return {
        TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja": text for name, text in templates.items()
    }
