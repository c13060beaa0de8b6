"""Documents that cannot rot: what is generated is what is committed, and what the README names exists."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from whisperd import config

ROOT = Path(__file__).parent.parent.parent


def generator() -> object:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts/generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", ["docs/settings.md", "etc/whisperd.toml", "docs/design.md"])
def test_generated_pages_are_current(path: str) -> None:
    """The committed page is what the generator makes of the code today (`make docs` renews it)."""
    pages = generator().pages()  # type: ignore[attr-defined]
    assert (ROOT / path).read_text("utf-8") == pages[ROOT / path]


def test_every_setting_is_explained() -> None:
    """No setting without a sentence."""
    for name, model in generator().sections():  # type: ignore[attr-defined]
        for key, field in model.model_fields.items():
            assert field.description or name == "", f"{name}.{key} has no description"


def test_the_example_configuration_is_valid() -> None:
    """etc/whisperd.toml loads as it stands, and its defaults are the code's defaults."""
    settings = config.load(str(ROOT / "etc/whisperd.toml"))
    assert settings.engine == config.EngineSettings()
    assert settings.inbox[0].outbox_path == "/srv/whisperd/outbox"
