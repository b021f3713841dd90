"""Descriptions and dictionaries: real formats in miniature, and what is damaged is refused or skipped and counted."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pytest

from search_r3.data.io.line_reader import MissingSource
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import build_pairs
from search_r3.data.sources import debian, dictionaries
from search_r3.data.sources.debian import debian_pairs, parse_record
from search_r3.data.sources.dictionaries import dictd_pairs, parse_article, parse_synset, wordnet_pairs
from search_r3.data.sources.records import Records, clip
from search_r3.errors import InputError

LONG = " and more of it, one word after the other, until it is long enough to keep"
DESCRIPTIONS = f"""Package: 0ad
Description-md5: d943033bedada21853d2ae54a2578a7b
Description-en: Real-time strategy game of ancient warfare
 0 A.D. is a free, cross-platform strategy game{LONG}.
 It goes on  in a second line.
 .
 Items:
  * one item
  * another
 .
 The end.

Package: libfoo-dev
Description-md5: 1
Description-en: development files
 Short.

Package: oldname
Description-en: transitional package for newname
 This is a transitional package that can safely be removed{LONG}.

Package: copy
Description-en: Another name of the game
 0 A.D. is a free, cross-platform strategy game{LONG}.
 It goes on in a second line.
 .
 Items:
  * one item
  * another
 .
 The end.

"""
LICENSE_LINES = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
NOUN = (
    '00001740 03 n 01 entity 0 000 | that which is perceived or known or inferred; "it exists"; "so does that"  \n'
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a member of the genus Canis  \n"
    "00000001 05 n 01 short 0 000 | too short  \n"
)
ADJ = "00001741 00 a 02 galore(ip) 0 a_lot(a) 1 000 | existing in great abundance everywhere  \n"


@pytest.fixture
def descriptions(tmp_path: Path) -> Path:
    (tmp_path / "Translation-en").write_text(DESCRIPTIONS, encoding="utf-8")
    return tmp_path / "Translation-en"


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for part, text in {"noun": NOUN, "adj": ADJ, "verb": "", "adv": ""}.items():
        (tmp_path / f"data.{part}").write_text(LICENSE_LINES + text, encoding="utf-8")
    return tmp_path


def dictd(folder: Path, articles: list[tuple[list[str], bytes]], name: str = "foldoc", *, packed: bool = True) -> Path:
    """Write a dictd dictionary: each article with its headwords; returns its path without a suffix."""
    content, lines = b"", []
    for headwords, article in articles:
        lines += [f"{word}\t{base64(len(content))}\t{base64(len(article))}\n" for word in headwords]
        content += article
    (folder / f"{name}.index").write_text("".join(lines), encoding="utf-8")
    if packed:
        (folder / f"{name}.dict.dz").write_bytes(gzip.compress(content))
    else:
        (folder / f"{name}.dict").write_bytes(content)
    return folder / name


def base64(number: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    digits = alphabet[number % 64]
    while number := number // 64:
        digits = alphabet[number % 64] + digits
    return digits


ARTICLES = [
    (
        ["00-database-info"],
        b"about\n\nthis dictionary, in more words than a short article may have at the least, twelve\n",
    ),
    (
        ["A20 handler", "a20"],
        b"A20 handler\n\n   <software, storage> {IBM PC} memory manager software &amp; more,\n   providing"
        b" {HMA}.  Named after\n   the 21st address line.\n\n   It ended well.\n\n   (1996-01-10)\n\n",
    ),
    (["see other"], b"see other\n\n   {Other}\n\n"),
]

# ----------------------------------------------------------------------------------------------------------- Debian


def test_a_synopsis_asks_for_its_description(descriptions: Path) -> None:
    built = debian_pairs(str(descriptions))
    assert [(pair.id, pair.query, pair.source) for pair in built.pairs] == [
        ("debian:0ad", "Real-time strategy game of ancient warfare", "debian:packages")
    ]
    assert built.dropped == {"short": 1, "transitional, meta or debug package": 1, "duplicate": 1}
    assert "DFSG" in built.origin["license"]


def test_paragraphs_stay_apart_and_items_keep_their_lines() -> None:
    package, synopsis, text = parse_record(DESCRIPTIONS.split("\n\n")[0])
    assert (package, synopsis) == ("0ad", "Real-time strategy game of ancient warfare")
    lines = text.split("\n")
    assert lines[0].endswith("to keep. It goes on in a second line.")
    assert lines[1:] == ["Items:", "* one item", "* another", "The end."]


def test_compressed_lists_are_read_and_apt_s_own_is_found(descriptions: Path, monkeypatch) -> None:
    plain = debian_pairs(str(descriptions)).pairs
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress)):
        descriptions.with_suffix(suffix).write_bytes(pack(descriptions.read_bytes()))
        assert debian_pairs(str(descriptions.with_suffix(suffix))).pairs == plain
    monkeypatch.setattr(debian, "LISTS", descriptions.parent / "lists")
    with pytest.raises(MissingSource, match="Languages=en update"):
        debian_pairs()
    (descriptions.parent / "lists").mkdir()
    descriptions.rename(descriptions.parent / "lists/mirror_dists_stable_main_i18n_Translation-en")
    (descriptions.parent / "lists/mirror_dists_stable-updates_main_i18n_Translation-en").write_text("Package: few\n")
    assert debian_pairs().pairs == plain


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        (b"Package: x\nDescription-en: bad byte\n caf\xe9\n", "not UTF-8", "byte 0xe9 at 41"),
        (b"Package: x\nDescription-en: page\n <html><body>no</body></html>\n", "HTML", "HTML, expected plain text"),
        (b"Package: x\nDescription-en: nul\n \0\n", "binary", "binary data"),
        (b"Package: x\nDescription-en: long\n " + b"x" * 1_000_000, "record over 1 MB", "bytes in one record"),
        (b"Nothing: here\n", "no description", 'without "Package"'),
    ],
)
def test_a_damaged_record_is_refused_by_line_or_skipped_and_counted(descriptions: Path, record, reason, said) -> None:
    content = descriptions.read_bytes()
    descriptions.write_bytes(content + record)
    with pytest.raises(InputError, match=said) as caught:
        debian_pairs(str(descriptions))
    assert f"Translation-en, line {content.count(10) + 1}:" in str(caught.value)
    assert "damaged: skip" in str(caught.value)
    built = debian_pairs(str(descriptions), damaged="skip")
    assert len(built.pairs) == 1
    assert built.dropped[f"damaged: {reason}"] == 1


def test_what_is_no_list_of_descriptions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("<!DOCTYPE html>")
    with pytest.raises(InputError, match="must begin with"):
        debian_pairs(str(tmp_path / "page"))
    built = debian_pairs(str(tmp_path / "page"), damaged="skip")
    assert (built.pairs, built.dropped, built.damaged_places) == ([], {"damaged: HTML": 1}, {"HTML": ["page"]})
    with pytest.raises(InputError, match="decompress it first"):
        debian_pairs(str(tmp_path / "x.zst"))


def test_a_list_that_was_cut_off_gives_what_stands_before_the_cut(descriptions: Path) -> None:
    packed = descriptions.with_suffix(".gz")
    noise = "".join(f"Package: p{i}\nDescription-en: number {i * 7919}{LONG}\n {i}{LONG}.\n\n" for i in range(500))
    whole = gzip.compress((DESCRIPTIONS + noise).encode())
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot be read to its end .*download it again"):
        debian_pairs(str(packed))
    built = debian_pairs(str(packed), damaged="skip")
    assert 0 < len(built.pairs) < 500
    assert built.dropped["damaged: broken file"] == 1
    assert all(pair.positive.endswith("keep.") for pair in built.pairs[1:])  # no half of a record


def test_apt_s_own_compression_is_left_to_apt(descriptions: Path, monkeypatch) -> None:
    helper = descriptions.with_name("helper")
    helper.write_text('#!/bin/sh\n[ "$1" = cat-file ] && cat "$2"\necho complaint >&2\nexit $(grep -c POISON "$2")\n')
    helper.chmod(0o755)
    monkeypatch.setattr(debian, "APT_HELPER", helper)
    monkeypatch.setattr(debian, "LISTS", descriptions.parent)
    packed = descriptions.rename(descriptions.with_name("mirror_main_i18n_Translation-en.lz4"))
    assert len(debian_pairs().pairs) == 1
    packed.write_text("Package: POISON")
    with pytest.raises(InputError, match=r"cannot be read to its end \(complaint\)"):
        debian_pairs()
    with pytest.raises(MissingSource, match="does not exist"):
        debian_pairs(str(descriptions.with_name("none.lz4")))


def test_a_dictionary_that_blows_up_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dictionaries, "MAX_DICTIONARY", 200)
    base = dictd(tmp_path, ARTICLES)
    with pytest.raises(InputError, match=r"foldoc\.dict\.dz.*more than 200 bytes"):
        dictd_pairs(str(base))


# ---------------------------------------------------------------------------------------------------------- WordNet


def test_words_ask_for_the_gloss_and_the_definition_for_the_words(wordnet: Path) -> None:
    built = wordnet_pairs(str(wordnet))
    pairs = {pair.id: (pair.query, pair.positive) for pair in built.pairs}
    assert pairs == {
        "wordnet:noun:00001740:words": (
            "entity",
            'that which is perceived or known or inferred; "it exists"; "so does that"',
        ),
        "wordnet:noun:00001740:gloss": ("that which is perceived or known or inferred", "entity"),
        "wordnet:noun:02084071:words": ("dog, domestic dog, Canis familiaris", "a member of the genus Canis"),
        "wordnet:noun:02084071:gloss": ("a member of the genus Canis", "dog, domestic dog, Canis familiaris"),
        "wordnet:adj:00001741:words": ("galore, a lot", "existing in great abundance everywhere"),
        "wordnet:adj:00001741:gloss": ("existing in great abundance everywhere", "galore, a lot"),
    }
    assert built.dropped == {"short gloss": 1}
    assert {pair.id[-5:] for pair in wordnet_pairs(str(wordnet), direction="gloss").pairs} == {"gloss"}
    assert {pair.id[-5:] for pair in wordnet_pairs(str(wordnet), direction="words").pairs} == {"words"}


def test_the_count_of_words_is_hexadecimal() -> None:
    words = " ".join(f"w{i} 0" for i in range(10))
    parsed = parse_synset(f"00000001 03 n 0a {words} 000 | what ten words mean")
    assert parsed is not None
    assert len(parsed[1]) == 10


def test_a_word_of_many_senses_asks_for_none_of_them(wordnet: Path) -> None:
    senses = "".join(f"0000000{i} 03 n 01 run 0 000 | the sense of number {i}\n" for i in range(4))
    (wordnet / "data.noun").write_text(senses, encoding="utf-8")
    (wordnet / "data.adj").write_text(LICENSE_LINES, encoding="utf-8")
    built = wordnet_pairs(str(wordnet))
    assert {pair.id[-5:] for pair in built.pairs} == {"gloss"}
    assert built.dropped["query shared by too many"] == 4


def test_a_line_that_is_no_synset_and_a_missing_file_are_named(wordnet: Path) -> None:
    (wordnet / "data.verb").write_text("00000001 03 n xx run\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.verb, line 1: not a line of WordNet"):
        wordnet_pairs(str(wordnet))
    assert wordnet_pairs(str(wordnet), damaged="skip").dropped["damaged: no synset"] == 1
    (wordnet / "data.adv").unlink()
    with pytest.raises(MissingSource, match="install wordnet-base"):
        wordnet_pairs(str(wordnet), damaged="skip")


# ------------------------------------------------------------------------------------------------------------ dictd


@pytest.mark.parametrize("packed", [True, False])
def test_a_headword_asks_for_its_article(tmp_path: Path, packed: bool) -> None:
    built = dictd_pairs(str(dictd(tmp_path, ARTICLES, packed=packed)))
    (pair,) = built.pairs
    assert pair.query == "A20 handler"
    assert pair.positive == (
        "IBM PC memory manager software & more, providing HMA. Named after the 21st address line.\nIt ended well."
    )
    assert built.dropped == {"another name of an article": 1, "short article": 1}
    assert built.origin["license"].startswith("GFDL")


def test_what_is_known_of_a_word_s_kind_and_sound_is_not_its_article() -> None:
    assert parse_article("accumulator\n n. obs.\n\n    1. Archaic term\n    for a register.\n") == (
        "accumulator",
        "1. Archaic term for a register.",
    )


def test_another_dictionary_needs_its_license_told(tmp_path: Path) -> None:
    base = dictd(tmp_path, ARTICLES, "mine")
    with pytest.raises(InputError, match="set license"):
        dictd_pairs(str(base))
    assert dictd_pairs(str(base), license="CC0").origin["license"] == "CC0"


def test_a_broken_index_or_article_is_refused_or_skipped(tmp_path: Path) -> None:
    base = dictd(tmp_path, [*ARTICLES, (["bad"], b"bad\n\n  caf\xe9" + LONG.encode())])
    with pytest.raises(InputError, match=r"foldoc\.index, line 5 \(bad\): not UTF-8"):
        dictd_pairs(str(base))
    index = base.with_suffix(".index")
    index.write_text(index.read_text() + "beyond\tzzzz\tB\nno number\t!\tB\ntoo few\n", encoding="utf-8")
    dropped = dictd_pairs(str(base), damaged="skip").dropped
    assert (dropped["damaged: not UTF-8"], dropped["damaged: no entry"]) == (1, 3)
    index.unlink()
    with pytest.raises(MissingSource, match="install dict-foldoc"):
        dictd_pairs(str(base))


# ---------------------------------------------------------------------------------------------------- and all of them


def test_texts_are_cut_between_words() -> None:
    assert clip("one two three", 9) == "one two"
    assert clip("one two three", 7) == "one two"
    assert clip("onetwothree", 3) == "one"
    assert clip("one", 3) == "one"


def test_an_unknown_way_with_damage_is_refused() -> None:
    with pytest.raises(InputError, match='did you mean "skip"'):
        Records("skipp")


def test_a_recipe_reads_them_and_leaves_out_what_is_optional_and_missing(descriptions: Path, wordnet: Path) -> None:
    dictd(descriptions.parent, ARTICLES)
    recipe = descriptions.parent / "recipe.yaml"
    recipe.write_text(
        f"""
sources:
  - {{kind: debian, path: {descriptions}, max_chars: 60}}
  - {{kind: wordnet, path: {wordnet}, direction: words, limit: 2}}
  - {{kind: dictd, path: {descriptions.parent}/foldoc, damaged: skip}}
  - {{kind: dictd, path: {descriptions.parent}/jargon, optional: true}}
""",
        encoding="utf-8",
    )
    manifest = build_pairs(recipe, recipe.with_name("out.jsonl"))
    assert [source["count"] for source in manifest["sources"]] == [1, 2, 1, 0]
    assert "jargon.index does not exist" in manifest["sources"][3]["missing"]
    assert all("license" in source for source in manifest["sources"][:3])
    by_id = {pair.id: pair for pair in read_pairs(recipe.with_name("out.jsonl"))}
    assert 50 <= len(by_id["debian:0ad"].positive) <= 60
    assert json.loads(recipe.with_name("out.jsonl.manifest.json").read_text(encoding="utf-8")) == manifest
    recipe.write_text(f"sources: [{{kind: wordnet, path: {descriptions.parent}/none}}]", encoding="utf-8")
    with pytest.raises(InputError, match=r'source 1 \(wordnet\).*install wordnet-base.*"optional: true"'):
        build_pairs(recipe, recipe.with_name("out.jsonl"))
    recipe.write_text("sources: [{kind: dictd}]", encoding="utf-8")
    with pytest.raises(InputError, match='"path" is missing'):
        build_pairs(recipe, recipe.with_name("out.jsonl"))
