"""Personal data in texts: e-mail addresses, public IP addresses and phone numbers give way to fixed placeholders.

The placeholders belong to nobody (a domain of RFC 2606, networks of RFC 5737 and RFC 3849, a number kept for fiction),
and are not masked again: masking a masked text changes nothing and counts nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Literal

Kind = Literal["email", "ip", "phone"]

EMAIL_PLACEHOLDER = "email@example.com"  # FineWeb's
IPV4_PLACEHOLDER = "192.0.2.1"
IPV6_PLACEHOLDER = "2001:db8::1"
PHONE_PLACEHOLDER = "555-0100"

# Each pattern tries a run of its characters from the run's start alone, so that any text takes linear time.
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+'-])[A-Za-z0-9_][A-Za-z0-9._%+'-]{0,63}"
    r"@(?P<domain>(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9@-])"
)
# Domains of RFC 2606, and pictures for sharp screens: logo@2x.png.
NO_MAIL = re.compile(r"(?:.*\.)?(?:example(?:\.com|\.net|\.org)?|test|invalid|localhost)|\d+x\.\w+", re.IGNORECASE)
# Global unicast of IPv6 is 2000::/3: times, hardware addresses and C++ names lie outside. Four numbers under 100 are
# versions and sections (380 of 476 hits in 78 MB of manuals and pages), and of public addresses one in 40; five none.
IP = re.compile(
    r"(?<![\w.:])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![\w:])"
    r"|(?<![\w.])(?=(?:[0-9]{1,2}\.){0,3}[0-9]{3})(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])"
)
# A number with its country's code, or in North America's form, or any after "Tel.:". Dates, ISBNs and identifiers have
# none of these.
PHONE = re.compile(
    r"(?<![\w+.,/-])(?P<cue>(?i:tel|telefon|telephone|téléphone|phone|fax|mobile?|mob|cell)[.:]{1,2} ?)?"
    r"(?P<number>(?(cue)\+?\(?[0-9](?:[ .()/-]{0,3}[0-9]){6,13}"
    r"|(?:(?:\+|00)[1-9](?:[ .()/-]{0,2}[0-9]){8,13}"
    r"|(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[ .-][0-9]{4})))(?![\w+]|[.,/-][0-9])"
)
# What a text must have for the dear pattern to be tried at all.
HINTS: dict[Kind, re.Pattern[str]] = {
    "email": re.compile("@"),
    "ip": re.compile(r"[0-9](?:\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[0-9A-Fa-f]{3}:[0-9A-Fa-f:])"),
    "phone": re.compile(r"[0-9]{2}"),
}


def mask(text: str, kinds: Sequence[Kind]) -> tuple[str, dict[str, int]]:
    """The text with placeholders, and how many of each kind were put in (kinds without any are left out).

    Private, reserved and documentation IP addresses stay. Phone numbers are found where their form leaves little doubt;
    local ones without a word before them stay.
    """
    counts: dict[str, int] = {}
    for kind in kinds:
        if HINTS[kind].search(text):
            pattern, replacement = _MASKS[kind]
            text, number = _replace(text, pattern, replacement)
            if number:
                counts[kind] = number
    return text, counts


def _replace(text: str, pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str]) -> tuple[str, int]:
    number = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal number
        new = replacement(match)
        number += new != match[0]
        return new

    return pattern.sub(replace, text), number


def _email(match: re.Match[str]) -> str:
    return match[0] if NO_MAIL.fullmatch(match["domain"]) else EMAIL_PLACEHOLDER


def _ip(match: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    if not address.is_global or address.is_multicast:
        return match[0]
    return IPV4_PLACEHOLDER if address.version == 4 else IPV6_PLACEHOLDER


def _phone(match: re.Match[str]) -> str:
    return match[0] if PHONE_PLACEHOLDER in match["number"] else (match["cue"] or "") + PHONE_PLACEHOLDER


_MASKS: dict[Kind, tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = {
    "email": (EMAIL, _email),
    "ip": (IP, _ip),
    "phone": (PHONE, _phone),
}
