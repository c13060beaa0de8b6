"""What folders and files of an inbox may ask for themselves: keys, faults in words, and what wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from whisperd.config import InboxSettings, Settings, TranscriptionSettings
from whisperd.dispatcher.profiles import (
    ALLOWED,
    NO_SPEAKERS,
    OPTIONS,
    Profile,
    Profiles,
    ProfileUnusable,
    error_base,
    error_text,
    parse,
    places,
)
from whisperd.vocabulary import JobOptions
from whisperd.wire import ProfileFile

BASE = JobOptions(language="en", model="small", hotwords="base")


def profiles(**texts: str) -> Profiles:
    """Profiles by their folder, "_" standing for the inbox itself, or by their file."""
    found = Profiles()
    found.update([ProfileFile(path=place(name), text=text) for name, text in texts.items()])
    return found


def place(name: str) -> bytes:
    if name == "_":
        return b".whisperd.toml"
    return (name if "." in name else name + "/").encode() + b".whisperd.toml"


def put(found: Profiles, name: str, text: str | None, fault: str = "") -> None:
    found.update([ProfileFile(path=place(name), text=text, fault=fault)])


# --- keys and faults ---


def test_every_key_is_an_option_of_a_job_or_known_to_be_none() -> None:
    """The list of keys is closed, explained key by key, and each option's words are those of the configuration."""
    assert set(Profile.model_fields) == set(ALLOWED)
    assert set(OPTIONS) <= {field.name for field in structs.fields(JobOptions)}
    assert set(OPTIONS) - {"model", "formats"} <= set(TranscriptionSettings.model_fields)


def test_a_profile_may_name_all_keys() -> None:
    """All values reach the job's options; a track may be written as a number."""
    text = """
        language = "de"
        model = "large-v3-turbo"
        mode = "short_windows"
        task = "translate"
        formats = ["vtt", "json"]
        priority = "urgent"
        initial_prompt = "p"
        hotwords = "h"
        channels = "speakers"
        speakers = ["A", "B"]
        audio_track = 2
        word_timestamps = true
        skip = false
    """
    asked = profiles(_=text).asked(b"a/b.wav", BASE, 1)
    wanted = {
        "language": "de",
        "model": "large-v3-turbo",
        "mode": "short_windows",
        "task": "translate",
        "formats": ("vtt", "json"),
        "initial_prompt": "p",
        "hotwords": "h",
        "channels": "speakers",
        "speakers": ("A", "B"),
        "audio_track": "2",
        "word_timestamps": True,
    }
    assert asked.options == structs.replace(BASE, **wanted)
    assert (asked.priority, asked.skip) == (0, False)
    assert asked.sources == dict.fromkeys(ALLOWED, b".whisperd.toml")


@pytest.mark.parametrize(
    "text, words",
    [
        ('language = "EN"', ['language: "EN" cannot be used', '"auto", or a code of two or three small letters']),
        ('langauge = "en"', ["there is no key langauge", "language, model, mode"]),
        ('state_dir = "/x"', ["there is no key state_dir"]),
        ('[engine]\nmodel = "x"', ["there is no key engine"]),
        ('mode = "fast"', ['mode: "fast"', '"batched", "sequential" or "short_windows"']),
        ('formats = ["txt", "doc"]', ['formats: "doc"', "txt, srt, vtt, tsv, json"]),
        ('formats = ["txt", "txt"]', ["each once"]),
        ("formats = []", ["formats: []"]),
        ('formats = "txt"', ['formats: "txt"']),
        ("audio_track = 0", ["audio_track: ", "1 to 99"]),
        ("audio_track = true", ["audio_track: true"]),
        ("skip = 3", ["skip: 3", "true or false"]),
        ('priority = "high"', ['"urgent", "normal" or "low"']),
        ('model = "/srv/models/mine"', ["model: ", "in the configuration only"]),
        ('model = "somebody/hostile"', ["model: ", "in the configuration only"]),
        ('model = ".."', ["model: "]),
        (f'hotwords = "{"x" * 2001}"', ["hotwords: ", "2000 characters", "…"]),
        ("language", ["not valid TOML"]),
        ('language = "de"\nlanguage = "en"', ["not valid TOML"]),
        ("skip = " + "9" * 5000, ["not valid TOML"]),
        ("skip = " + "[" * 5000, ["not valid TOML", "too deeply nested"]),
        ('language = "EN"\nskip = 3', ['language: "EN"', "skip: 3"]),
        ('"a\\nb\\u001b" = 1', [r"there is no key a\x0ab\x1b"]),
        ('mode = "a\\nb\\u001b\\u202e"', ["mode: "]),
    ],
)
def test_a_fault_is_told_in_plain_words(text: str, words: list[str]) -> None:
    """What was found and what is allowed, in one printable line, whatever was written; every fault at once."""
    with pytest.raises(ProfileUnusable) as caught:
        parse(text)
    assert all(word in caught.value.what for word in words), caught.value.what
    assert caught.value.what.isprintable() and len(caught.value.what) < 1000


@given(st.text())
def test_no_text_is_a_crash(text: str) -> None:
    """Whatever somebody writes is a profile or a sentence."""
    try:
        parse(text)
    except ProfileUnusable as error:
        assert error.what.isprintable()


# --- what wins ---


def test_the_nearest_wins_key_by_key() -> None:
    """From the inbox downward, the file's own last; what nobody names is the inbox's; each key knows who said it."""
    found = profiles(
        _='language = "de"\nhotwords = "root"\npriority = "low"',
        a='language = "fr"\nformats = ["srt"]',
        ab='language = "xx"',
        **{"a/b/c.wav": 'formats = ["vtt"]\npriority = "urgent"'},
    )
    asked = found.asked(b"a/b/c.wav", BASE, 1)
    assert asked.options == structs.replace(BASE, language="fr", hotwords="root", formats=("vtt",))
    assert asked.priority == 0
    assert asked.sources == {
        "language": b"a/.whisperd.toml",
        "hotwords": b".whisperd.toml",
        "formats": b"a/b/c.wav.whisperd.toml",
        "priority": b"a/b/c.wav.whisperd.toml",
    }
    assert found.asked(b"a/b/other.wav", BASE, 1).options.formats == ("srt",)
    assert found.asked(b"c.wav", BASE, 1)[:3] == (structs.replace(BASE, language="de", hotwords="root"), 2, False)


def test_without_profiles_nothing_changes() -> None:
    """The inbox's own options come back as they are."""
    assert Profiles().asked(b"a/b.wav", BASE, 2) == (BASE, 2, False, {})


def test_a_folder_may_be_left_alone_and_a_file_in_it_not() -> None:
    """`skip` is a key as any other: the nearest wins."""
    found = profiles(archive="skip = true", **{"archive/this.wav": "skip = false"})
    assert [found.asked(path, BASE, 1).skip for path in (b"archive/x/a.wav", b"archive/this.wav", b"a.wav")] == [True, False, False]


def test_a_bad_profile_is_ignored_as_a_whole() -> None:
    """What stands above it holds for its good keys too, and it is named until it is corrected or gone."""
    found = profiles(_='language = "de"', a='language = "fr"\nskip = 3')
    assert found.asked(b"a/x.wav", BASE, 1).options.language == "de"
    ((path, what),) = found.faults()
    assert path == b"a/.whisperd.toml" and "skip" in what
    put(found, "a", 'language = "fr"')
    assert (found.faults(), found.asked(b"a/x.wav", BASE, 1).options.language) == ([], "fr")
    put(found, "a", None, "cannot be read: Permission denied")
    assert (found.faults(), found.asked(b"a/x.wav", BASE, 1).options.language) == (
        [(b"a/.whisperd.toml", "cannot be read: Permission denied")],
        "de",
    )
    put(found, "a", None)
    assert (found.faults(), found.asked(b"a/x.wav", BASE, 1).options.language) == ([], "de")


def test_a_whole_report_forgets_all_others() -> None:
    """A watcher that begins anew tells all there are."""
    found = profiles(_='language = "de"', a="nonsense")
    found.update([ProfileFile(path=place("b"), text='language = "fr"')], whole=True)
    assert (found.faults(), found.asked(b"a.wav", BASE, 1)) == ([], (BASE, 1, False, {}))
    assert found.asked(b"b/a.wav", BASE, 1).options.language == "fr"


def test_what_cannot_go_together_is_the_fault_of_the_nearest_that_asks_for_it() -> None:
    """Sequential with speakers: the profile that made it so is left out as a whole, and named once a file asked."""
    found = profiles(_='mode = "sequential"', a='channels = "speakers"\nlanguage = "fr"', b='channels = "speakers"\nmode = "batched"')
    assert found.faults() == []
    assert found.asked(b"a/x.wav", BASE, 1).options == structs.replace(BASE, mode="sequential")
    assert found.faults() == [(b"a/.whisperd.toml", NO_SPEAKERS)]
    assert found.asked(b"b/x.wav", BASE, 1).options == structs.replace(BASE, mode="batched", channels="speakers")
    found.settings_changed()
    assert found.faults() == []


def test_what_clashes_with_the_inbox_itself_is_left_out_until_it_fits() -> None:
    """Also when several profiles would each make it impossible."""
    base = structs.replace(BASE, channels="speakers")
    found = profiles(_='mode = "sequential"', **{"a.wav": 'mode = "sequential"\nlanguage = "fr"'})
    assert found.asked(b"a.wav", base, 1).options == base
    assert [path for path, _ in found.faults()] == [b".whisperd.toml", b"a.wav.whisperd.toml"]


@given(st.lists(st.binary(min_size=1, max_size=5).filter(lambda name: b"/" not in name), min_size=1, max_size=5))
def test_every_folder_above_a_file_is_asked_once(names: list[bytes]) -> None:
    """From the inbox downward, whatever bytes the names are of, the file's own last."""
    path = b"/".join(names)
    found = list(places(path))
    assert found[0] == b".whisperd.toml" and found[-1] == path + b".whisperd.toml"
    assert found[1:-1] == [b"/".join(names[:depth]) + b"/.whisperd.toml" for depth in range(1, len(names))]


# --- how it is told ---


def test_a_profile_means_what_the_same_words_mean_in_the_configuration() -> None:
    """The options of a file below a profile are those of an inbox with these settings."""
    said = {"language": "de", "mode": "sequential", "formats": ["srt"], "initial_prompt": "p", "model": "small", "task": "translate"}
    inbox = InboxSettings(path="/in", **said)  # type: ignore[arg-type]
    settings = Settings(inbox=(inbox, InboxSettings(path="/other")))
    text = "\n".join(
        f"{key} = {str(value).replace(chr(39), chr(34)) if isinstance(value, list) else repr(value)}" for key, value in said.items()
    )
    assert profiles(_=text).asked(b"a.wav", settings.options(settings.inbox[1]), 1).options == settings.options(inbox)


def test_a_fault_is_published_where_people_see_it() -> None:
    """In the mirrored folder under a name that is not hidden; its name is shown escaped, and all keys are explained."""
    assert [error_base(path) for path in (b".whisperd.toml", b"a/b/.whisperd.toml", b"a/t.wav.whisperd.toml", b"a/.x.whisperd.toml")] == [
        b"whisperd.toml",
        b"a/b/whisperd.toml",
        b"a/t.wav.whisperd.toml",
        b"a/x.whisperd.toml",
    ]
    text = error_text(b"a/t\n\xff.whisperd.toml", "skip: 3 cannot be used")
    assert r"t\x0a\xff.whisperd.toml is not used" in text and "skip: 3 cannot be used" in text
    assert all(f"  {key} " in text for key in ALLOWED)
