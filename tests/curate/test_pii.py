"""Masking: what is personal goes, what only looks like it stays, and a masked text is left alone."""

from __future__ import annotations

import random

import pytest

from danube_ray.curate.pii import mask
from tests.curate.real_texts import abstracts, novel_pages, web_pages

KINDS = ("email", "ip", "phone")
EMAIL, IPV4, IPV6, PHONE = "email@example.com", "192.0.2.1", "2001:db8::1", "555-0100"

PERSONAL = {
    "email": {
        "Write to jane.doe+lists@mail.example-firm.co.uk, please.": f"Write to {EMAIL}, please.",
        "<o'neill_99@uni-muenchen.de>": f"<{EMAIL}>",
        "a@b.io;c@d.museum.": f"{EMAIL};{EMAIL}.",
        "请联系foo@bar.cn谢谢": f"请联系{EMAIL}谢谢",
        "mailto:JANE@FIRM.COM?subject=x": f"mailto:{EMAIL}?subject=x",
    },
    "ip": {
        "from 9.9.9.120:53 to 172.217.16.206.": f"from {IPV4}:53 to {IPV4}.",
        "[2a00:1450:4001:81b::200e]:443": f"[{IPV6}]:443",
        "2606:2800:220:1:248:1893:25c8:1946 answered": f"{IPV6} answered",
        "http://93.184.216.34/a": f"http://{IPV4}/a",
        "::ffff:93.184.216.34": f"::ffff:{IPV4}",
        "93.184.216.0/24, 2a00::/12": f"{IPV4}/24, {IPV6}/12",
    },
    "phone": {
        "+49 (0)40-30030-1000": PHONE,
        "Call 212-306-6794 or (212) 306-6795": f"Call {PHONE} or {PHONE}",
        "Tel.: 069 / 920 77 00, Fax: 069/297 89 22": f"Tel.: {PHONE}, Fax: {PHONE}",
        "+41.31.322.55.11 | 0031 20 123 4567": f"{PHONE} | {PHONE}",
        "1-800-273-8255.": f"{PHONE}.",
    },
}
CASES = [(kind, text, masked) for kind, texts in PERSONAL.items() for text, masked in texts.items()]

NOT_PERSONAL = [
    "@jane and foo@bar, lodash@4.17.21, logo@2x.png, a @ b.com, one@two@three",
    "root@localhost user@sub.example.org me@host.test",
    "version 1.2.3.4, release 1.2.3.4.5, v1.2.3.4, Section 3.2.1.4, 1.121.319.953, 010.1.1.1, 1.2.3",
    "Version: 4.1.0.21, lz4>=1.7.4.2, Git 1.8.1.2, sections 2.3.3.1 and 12.10.1.2, 8.8.8.8",
    "10.0.0.1 192.168.1.1 172.16.5.4 127.0.0.1 224.0.0.1 169.254.1.1 0.0.0.0 198.51.100.7 255.255.255.0",
    "fe80::1 fd00::12 ::1 2001:db8::42 12:30:45 aa:bb:cc:dd:ee:ff 00:11:22:33:44:55:66:77 std::vector 2010:5",
    "2010-05-12, 12.05.2010, 1999-2003, 2003/04/05 12:30, 24/7, 10,000,000, 3.14159265358979, 100-200-3000",
    "ISBN 978-3-16-148410-0, ISSN 2049-3630, arXiv:2401.16818, doi:10.1000/182, 123-45-6789, 555-0142",
    "4111 1111 1111 1111, x+123456789012, 1234567890123456, 0000000000000",
]


@pytest.mark.parametrize(("kind", "text", "masked"), CASES)
def test_personal_data_goes(kind, text, masked):
    placeholders = sum(map(masked.count, (EMAIL, IPV4, IPV6, PHONE)))
    assert mask(text, [kind]) == (masked, {kind: placeholders})
    assert mask(text, [other for other in KINDS if other != kind]) == (text, {})


@pytest.mark.parametrize("text", NOT_PERSONAL)
def test_what_only_looks_personal_stays(text):
    assert mask(text, KINDS) == (text, {})


def test_kinds_are_counted_apart_and_only_those_asked_for_are_masked():
    text = "jane@firm.com from 93.184.216.34, +49 30 9599 8099; joe@firm.com"
    masked = f"{EMAIL} from {IPV4}, {PHONE}; {EMAIL}"
    assert mask(text, KINDS) == (masked, {"email": 2, "ip": 1, "phone": 1})
    assert mask(text, []) == (text, {})


@pytest.mark.parametrize("seed", range(30))
def test_masking_again_changes_nothing(seed):
    rng = random.Random(seed)
    pieces = [text for _, text, _ in CASES] + NOT_PERSONAL + list("@.:-+ (0195a\n") * 3 + ["Tel.: ", "030 ", "@mail.de"]
    for _ in range(200):
        masked, _ = mask("".join(rng.choices(pieces, k=rng.randint(1, 6))), KINDS)
        assert mask(masked, KINDS) == (masked, {})


@pytest.mark.parametrize("run", ["a", "a.", "1.", "1", "2001:", "a@", "+1 ", "tel.", "(2", ".-", "a@a."])
def test_a_long_line_takes_linear_time(run):
    """Quadratic patterns would take minutes here, and end at the suite's time limit."""
    line = run * (10**6 // len(run))
    assert mask(f"{line} jane@firm.com 93.184.216.34", ("email", "ip", "phone"))[1]["email"] >= 1


def test_prose_is_left_alone_and_pages_lose_their_addresses(shared_data):
    for text in [*abstracts(shared_data, 2000), *novel_pages(shared_data)[::8]]:
        assert mask(text, ("ip", "phone")) == (text, {}), text
    masked = [mask(text, KINDS) for _, text in web_pages(shared_data)]
    assert sum(counts.get("email", 0) for _, counts in masked) > 100
    assert sum(counts.get("phone", 0) for _, counts in masked) > 30
    assert all(mask(text, KINDS) == (text, {}) for text, _ in masked)
