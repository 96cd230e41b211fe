"""Personal data replaced by typed placeholders: only what its form and its check digits make sure."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

PLACEHOLDERS: Mapping[str, str] = {
    "email": "[EMAIL]",
    "iban": "[IBAN]",
    "cn_id": "[CN_ID]",
    "card": "[CARD]",
    "phone": "[PHONE]",
    "ip": "[IP]",
}

# What beside a number makes it part of something longer: a letter or digit, also behind a sign such as - or +. A
# placeholder's end counts as what it replaced, so that whatever was left once is left again.
_BEFORE = r"(?<![0-9A-Za-z_@/])(?<![0-9A-Za-z_]-)(?<![0-9][./])(?<![0-9A-Za-z_][+*])(?<![A-Z]\])(?<![A-Z]\][-./+*])"
_AFTER = r"(?![0-9A-Za-z_@/]|\[[A-Z]|[-.+*](?:[0-9]|\[[A-Z]))"
_SPACED_BEFORE = _BEFORE + r"(?<![0-9] )(?<![A-Z]\] )"  # groups of digits, of which there might be more
_SPACED_AFTER = _AFTER + r"(?! (?:[0-9]|\[[A-Z]))"

_DOMAIN = re.compile(
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9_@-]|\.[A-Za-z0-9])"
)
_LOCAL_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-"
_LOCAL_MAX_CHARS = 64  # RFC 5321
_COMMON_TOP_LEVELS = frozenset(("com", "org", "net", "edu", "gov", "cn", "hk", "tw", "de", "uk", "fr", "jp", "io"))
# Domains that belong to nobody (RFC 2606, RFC 6761).
_RESERVED = re.compile(r"(?:.*\.)?(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)", re.IGNORECASE)

_LONG_NUMBER = re.compile(r"[0-9](?:[ ()）-]{0,2}[0-9]){6}")  # no card, phone or identity number is shorter
_ZONE_CHARS = 48  # an IBAN may begin 30 characters before its first long number, and end as far behind
_IBAN = re.compile(_BEFORE + r"[A-Z]{2}[0-9]{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?(?![0-9A-Za-z_@\[])")
_CHINESE_ID = re.compile(_BEFORE + r"[1-8][0-9]{5}(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]{4}[0-9Xx]" + _AFTER)
_CARD = re.compile(
    f"{_BEFORE}[0-9]{{14,19}}{_AFTER}"
    f"|{_SPACED_BEFORE}[0-9]{{4}}(?P<by>[ -])[0-9]{{4}}(?:(?P=by)[0-9]{{4}}){{2}}(?:(?P=by)[0-9]{{3}})?{_SPACED_AFTER}"
    f"|{_SPACED_BEFORE}[0-9]{{4}}(?P<sep>[ -])[0-9]{{6}}(?P=sep)[0-9]{{4,5}}{_SPACED_AFTER}"
)
# Visa, Mastercard, American Express, UnionPay, Discover, JCB, Diners Club: ISO/IEC 7812's ranges and lengths.
_ISSUER = re.compile(
    r"4[0-9]{15}|(?:5[1-5]|2[2-7])[0-9]{14}|3[47][0-9]{13}|62[0-9]{14,17}|6(?:011|5[0-9]{2})[0-9]{12}|35[0-9]{14}"
    r"|3(?:0[0-5]|[68][0-9])[0-9]{11}"
)
_MOBILE = r"1(?:3[0-9]|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])"  # MIIT's numbering plan
_AREA = r"0(?:10|2[0-9]|[3-9][0-9]{2})"
_NATIONAL_PHONE = re.compile(
    rf"{_BEFORE}(?:(?:\+|00)?86-?)?{_MOBILE}[0-9]{{8}}{_AFTER}"
    rf"|{_SPACED_BEFORE}(?:(?:\+|00)86[ -]?)?{_MOBILE}(?P<by>[ -])[0-9]{{4}}(?P=by)[0-9]{{4}}{_SPACED_AFTER}"
    rf"|{_SPACED_BEFORE}(?:[(（]{_AREA}[)）] ?|{_AREA}-)[2-8][0-9]{{6,7}}(?:-[0-9]{{1,5}})?{_SPACED_AFTER}"
    rf"|{_SPACED_BEFORE}(?:\+?1[ -])?(?:\([2-9][0-9]{{2}}\) ?|[2-9][0-9]{{2}}-)"  # North America
    rf"[2-9][0-9]{{2}}-[0-9]{{4}}{_SPACED_AFTER}"
)
_E164 = re.compile(rf"{_SPACED_BEFORE}(?<!\))\+[1-9](?:[ -]?\(?[0-9]\)?){{7,14}}{_SPACED_AFTER}")
# North America; Russia; other country codes with what may follow (ITU-T E.164).
_COUNTRY = re.compile(
    r"1[2-9][0-9]{2}[2-9][0-9]{6}|7[3-9][0-9]{9}|86(?:1[3-9][0-9]{9}|[1-9][0-9]{8,10})"
    r"|(?:2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[124]|9[0-58])[0-9]{7,12}|(?:2[1-69]|3[578]|42|5[09]|6[78]|85|88|9[679])[0-9]{7,12}"
)
_IPV4 = re.compile(r"[0-9](?<![0-9A-Za-z_.-][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|\.[0-9]|-[0-9A-Za-z])")
_DOTS = re.compile(r"\.[0-9]{1,3}\.[0-9]")  # any of the above has them, and they are found faster
_IPV6 = re.compile(r"(?<![0-9A-Za-z_:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![0-9A-Za-z_:]|\.[0-9])")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:")
_VERSION_PART = 20  # versions and sections seldom go beyond; addresses seldom stay below in three of four places


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """A text without personal data, and how many placeholders of each type it took."""

    text: str
    counts: dict[str, int]


def scrub(text: str) -> Scrubbed:
    """Replace personal data of a normalised text by placeholders such as ``[EMAIL]``.

    E-mail addresses, phone numbers (mainland China, North America, and E.164 with its plus sign), bank cards of known
    issuers whose Luhn digit is right, Chinese identity numbers whose date and check digit are right, IBANs, public
    IP addresses. Left alone: parts of longer numbers, words, versions and paths, reserved domains
    and addresses, and numbers whose check digit is wrong. Scrubbing the result again changes nothing; it is longer
    than the text by one character an e-mail address at most.

    Source: ISO/IEC 7812-1 (Luhn), GB 11643-1999 (identity numbers), ISO 13616 (IBAN), ITU-T E.164.
    """
    counts: dict[str, int] = {}
    if "@" in text:
        text = _replace_emails(text, counts)
    text = _replace_numbers(text, counts)
    if _DOTS.search(text):
        text = _replace(_IPV4, "ip", text, counts, _ipv4_part)
    if _COLONS.search(text):
        text = _replace(_IPV6, "ip", text, counts, _ipv6_part)
    return Scrubbed(text, counts)


def _replace_emails(text: str, counts: dict[str, int]) -> str:
    """Find the domains and walk back over the name: a pattern that starts with the name would try every word."""
    parts: list[str] = []
    done = 0
    for match in _DOMAIN.finditer(text):
        window = text[max(done, match.start() - _LOCAL_MAX_CHARS - 1) : match.start()]
        # A product of matrices calls a method where an address has its end: "(a@b.mean())".
        local = window[len(window.rstrip(_LOCAL_CHARS)) :].lstrip(".-+")
        called = text.startswith("(", match.end()) and match[1].rpartition(".")[2].lower() not in _COMMON_TOP_LEVELS
        if not local or len(local) > _LOCAL_MAX_CHARS or local == "git" or called or _RESERVED.fullmatch(match[1]):
            continue
        parts += text[done : match.start() - len(local)], PLACEHOLDERS["email"]
        done = match.end()
        counts["email"] = counts.get("email", 0) + 1
    return "".join(parts) + text[done:] if parts else text


def _replace_numbers(text: str, counts: dict[str, int]) -> str:
    """Look around long numbers only: the patterns below are slow, and most of a text has none."""
    parts: list[str] = []
    done = 0
    for start, end in _zones(text):
        parts += text[done:start], _replace_in_zone(text[start:end], counts)
        done = end
    return "".join(parts) + text[done:] if parts else text


def _zones(text: str) -> Iterator[tuple[int, int]]:
    """Half-open ranges around long numbers, apart from each other and in order."""
    zone: tuple[int, int] | None = None
    for number in _LONG_NUMBER.finditer(text):
        start, end = max(0, number.start() - _ZONE_CHARS), number.end() + _ZONE_CHARS
        if zone is not None and start > zone[1]:
            yield zone
            zone = None
        zone = (start if zone is None else zone[0], end)
    if zone is not None:
        yield zone


def _replace_in_zone(text: str, counts: dict[str, int]) -> str:
    text = _replace(_IBAN, "iban", text, counts, _iban_part)
    text = _replace(_CHINESE_ID, "cn_id", text, counts, _chinese_id_part)
    text = _replace(_CARD, "card", text, counts, _card_part)
    text = _replace(_NATIONAL_PHONE, "phone", text, counts, _whole)
    return _replace(_E164, "phone", text, counts, _e164_part) if "+" in text else text


def _replace(
    pattern: re.Pattern[str], kind: str, text: str, counts: dict[str, int], part: Callable[[str], str | None]
) -> str:
    """Replace what ``part`` makes sure of: the beginning of a match that it returns, if any."""

    def placeholder(match: re.Match[str]) -> str:
        sure = part(match[0])
        if sure is None:
            return match[0]
        counts[kind] = counts.get(kind, 0) + 1
        return PLACEHOLDERS[kind] + match[0][len(sure) :]

    return pattern.sub(placeholder, text)


def _whole(found: str) -> str | None:
    return found


def _iban_part(found: str) -> str | None:
    """A word in capitals may follow an IBAN: take groups away until the check digits are right."""
    from stdnum import iban

    while len(found) >= 15:  # Norway's, the shortest
        if iban.is_valid(found, check_country=False):
            return found
        found = found.rpartition(" ")[0]
    return None


def _chinese_id_part(found: str) -> str | None:
    from stdnum.cn import ric

    try:
        datetime.date(int(found[6:10]), int(found[10:12]), int(found[12:14]))
    except ValueError:
        return None
    return found if ric.calc_check_digit(found) == found[-1].upper() else None


def _card_part(found: str) -> str | None:
    from stdnum import luhn

    digits = found.replace(" ", "").replace("-", "")
    return found if _ISSUER.fullmatch(digits) and luhn.is_valid(digits) else None


def _e164_part(found: str) -> str | None:
    return found if _COUNTRY.fullmatch(re.sub("[^0-9]", "", found)) else None


def _ipv4_part(found: str) -> str | None:
    small = sum(int(part) < _VERSION_PART for part in found.split("."))
    return found if small <= 2 and _is_public(found) else None


def _ipv6_part(found: str) -> str | None:
    return found if _is_public(found) else None


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and (parsed.version == 4 or int(parsed) >> 125 == 1)  # 2000::/3; the rest are masks
