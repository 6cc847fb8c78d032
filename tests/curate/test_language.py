"""Languages: of real pages by the country in their address, of sentences, of what is hardly a text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from danube_ray.curate.language import Language, identify
from tests.curate.real_texts import web_pages

SENTENCES = {
    "en": "The river rises in the hills to the north, where the snow lies until May.",
    "de": "Der Fluss entspringt in den Hügeln im Norden, wo der Schnee bis in den Mai liegt.",
    "fr": "La rivière prend sa source dans les collines du nord, où la neige reste jusqu'en mai.",
    "es": "El río nace en las colinas del norte, donde la nieve permanece hasta mayo.",
    "pl": "Rzeka wypływa ze wzgórz na północy, gdzie śnieg leży aż do maja.",
    "ru": "Река берёт начало в холмах на севере, где снег лежит до мая.",
    "zh": "这条河发源于北部的山丘，那里的雪一直到五月才融化。",  # noqa: RUF001
    "ja": "この川は北の丘に源を発し、そこでは雪が五月まで残っています。",
    "ar": "ينبع النهر من التلال في الشمال حيث يبقى الثلج حتى شهر مايو.",
}


@pytest.mark.parametrize("code", SENTENCES)
@pytest.mark.parametrize("times", [1, 200])
def test_a_sentence_and_a_long_text(code, times):
    found = identify("\n".join([SENTENCES[code]] * times))
    assert found.code == code
    assert 0.8 < found.score <= 1


@pytest.mark.parametrize("text", ["", " \n\t", "12:30 -- 45 %", "\0\0", "🙂", "\ud800"])
def test_without_letters_there_is_no_language(text):
    assert identify(text) == Language("und", 0.0)


@pytest.mark.parametrize("text", ["\0{}\r\n\x85", "{}\ud800", "{}\n" * 50, "\n\n{}"])
def test_line_breaks_nul_and_broken_unicode_change_nothing(text):
    assert identify(text.replace("{}", SENTENCES["de"])).code == "de"


def test_capitals_are_read_as_small_letters():
    assert identify("THIS IS AN ENGLISH SENTENCE ABOUT THE WEATHER IN LONDON.").code == "en"
    assert identify("ALL RIGHTS RESERVED") == identify("all rights reserved")


def test_a_menu_in_another_language_does_not_decide():
    assert identify("Home About Contact Sign in Terms of use Privacy\n" * 12 + SENTENCES["fr"] * 40).code == "fr"


def test_what_lies_between_the_passages_is_not_looked_at():
    text, inserted = SENTENCES["en"] * 200, SENTENCES["ru"] * 5
    mixed = text[:700] + inserted + text[700 + len(inserted) :]
    assert identify(mixed) == identify(text)
    assert identify(mixed[:2000]) != identify(text[:2000])


def test_threads_find_what_one_finds():
    texts = [text * times for text in SENTENCES.values() for times in range(1, 20)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(identify, texts)) == [identify(text) for text in texts]


def test_pages_are_in_the_language_of_their_country(shared_data):
    expected = {".de.": "de", ".fr.": "fr", ".pl.": "pl", ".at.": "de"}
    found = [
        (expected[country], identify(text).code)
        for name, text in web_pages(shared_data)
        for country in expected
        if country in name and len(text) > 1000
    ]
    assert len(found) > 200
    assert sum(country == code for country, code in found) > 0.95 * len(found)
