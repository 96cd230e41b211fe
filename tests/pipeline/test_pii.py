"""Personal data: what is replaced, what only looks like it, and that a second time changes nothing."""

from __future__ import annotations

import datetime
import itertools
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stdnum import iban, luhn
from stdnum.cn import ric

from pipeline.data.pii import PLACEHOLDERS, scrub
from pipeline.data.sources import python_documents

DIGITS = st.text("0123456789")


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("email", "mail zhang.san+x@mail.qq.com。", "mail [EMAIL]。"),
        ("email", "邮箱zhang@163.com请联系", "邮箱[EMAIL]请联系"),
        ("email", "<a_b@c-d.co.uk>, a@b.cn", "<[EMAIL]>, [EMAIL]"),
        ("email", "wang@qq.com(备用)", "[EMAIL](备用)"),
        ("phone", "手机13800138000或139-1234-5678", "手机[PHONE]或[PHONE]"),
        ("phone", "tel:+86 138 0013 8000,", "tel:[PHONE],"),
        ("phone", "8613800138000 008613800138000 +8613800138000", "[PHONE] [PHONE] [PHONE]"),
        ("phone", "电话010-62345678转8，（0755）26712345", "电话[PHONE]转8，[PHONE]"),
        ("phone", "Call (415) 555-2671 or 415-555-2671.", "Call [PHONE] or [PHONE]."),
        ("phone", "+1 415-555-2671, +44 20 7946 0958, +33 1 42 68 53 00", "[PHONE], [PHONE], [PHONE]"),
        ("card", "4111 1111 1111 1111, 5555-5555-5555-4444", "[CARD], [CARD]"),
        ("card", "卡号6212262201023557228。378282246310005", "卡号[CARD]。[CARD]"),
        ("card", "3782 822463 10005", "[CARD]"),
        ("cn_id", "身份证11010519491231002X。", "身份证[CN_ID]。"),
        ("cn_id", "440524188001010014x 11010519491231002x", "440524188001010014x [CN_ID]"),
        ("iban", "GB82 WEST 1234 5698 7654 32 AND DE89370400440532013000", "[IBAN] AND [IBAN]"),
        ("ip", "http://93.184.216.34:80/ and 203.208.60.1.", "http://[IP]:80/ and [IP]."),
        ("ip", "host 171.203.113.115 is up", "host [IP] is up"),
        ("ip", "at 2606:4700:4700::1111,", "at [IP],"),
    ],
)
def test_personal_data_is_replaced(kind: str, text: str, expected: str) -> None:
    scrubbed = scrub(text)
    assert scrubbed.text == expected
    assert scrubbed.counts == {kind: expected.count(PLACEHOLDERS[kind])}


@pytest.mark.parametrize(
    "text",
    [
        "4111111111111112 4111 1111 1111 1112 9111111111111111",  # Luhn's digit is wrong; nobody issues 9...
        "110105194912310021 110105194913310024",  # the check digit is wrong; there is no 13th month
        "GB82WEST12345698765433 DE00370400440532013000",
        "138001380001390013900 x13800138000 13800138000x _13800138000 1.13800138000 13800138000.5",
        "1234 4111 1111 1111 1111 and 4111 1111 1111 1111 1234",
        "12800138000 16300138000 1380013800",
        "1.2.3.4 v10.0.19041.1 2.5.29.15 version 12.3.4.5 1.3.6.1.4.1.311.21.20",
        "127.0.0.1 10.1.2.3 192.168.100.200 255.255.255.0 0.0.0.0 256.300.1.1 192.0.2.44",
        "fe80::1 ::1 12:34:56 a::b 00:1b:44:11:3a:b7 ffff:ffff:ffff:ffff:: std::vector::begin",
        "978-7-115-12345-6 9787115123456 ISBN 7-302-12345-8 0378-5955",
        "2024-01-31T12:34:56.789012+08:00 20240131123456 1706675696 1706675696123 1706675696123456789",
        "550e8400-e29b-41d4-a716-446655440000 d41d8cd98f00b204e9800998ecf8427e 0x4111111111111111",
        "3.141592653589793 1.1102230246251565e-16 +44.12345678 1e+15550123456 6.02214076e+23 x+13800138000",
        "@decorator.name @app.route a @ b user@host (a@b.mean()) git@github.com:a/b.git me@example.com x@y.test",
        "1,234,567,890 555-1234 100-200-3000 (1) 2-3",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert scrub(text).text == text
    assert scrub(text).counts == {}


@given(st.from_regex(r"4[0-9]{15}|62[0-9]{14,17}|3[47][0-9]{13}", fullmatch=True), st.sampled_from(["", "no. ", "卡"]))
def test_cards_are_those_that_luhn_confirms(number: str, before: str) -> None:
    assert scrub(before + number).counts.get("card", 0) == luhn.is_valid(number)
    right = number[:-1] + luhn.calc_check_digit(number[:-1])
    assert scrub(f"{before}{right}.").text == f"{before}[CARD]."


@given(st.sampled_from(["110105", "440106", "650101"]), st.dates(min_value=datetime.date(1900, 1, 1)), DIGITS)
def test_identity_numbers_are_those_with_their_check_digit(place: str, birth: datetime.date, order: str) -> None:
    body = f"{place}{birth:%Y%m%d}{order[:3]:0>3}"
    digit = ric.calc_check_digit(body + "0")
    valid = body[6:8] in ("19", "20")
    for last in "0123456789X":
        assert (scrub(body + last).counts.get("cn_id", 0) == 1) == (valid and last == digit)


@pytest.mark.parametrize("country", ["GB29NWBK60161331926819", "FR1420041010050500013M02606", "NO9386011117947"])
def test_ibans_are_those_that_their_digits_confirm(country: str) -> None:
    for digits in range(0, 98, 7):
        number = f"{country[:2]}{digits:02}{country[4:]}"
        expected = "[IBAN]" if iban.is_valid(number, check_country=False) else number
        assert scrub(number).text == expected
    assert scrub(iban.format(country) + " BANK").text == "[IBAN] BANK"


PIECES = (
    "13800138000", "+8613800138000", "4111111111111111", "4111 1111 1111 1111", "11010519491231002X", "a@b.cn",
    "93.184.216.34", "2606:4700:4700::1111", "010-62345678", "(415) 555-2671", "+44 20 7946 0958",
    "GB82 WEST 1234 5698 7654 32", " ", "-", ".", ",", ":", "/", "+", "@", "[", "]", "(", ")", "1", "x", "X", "_", "，",
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from((*PIECES, *PLACEHOLDERS.values())), max_size=9).map("".join))
@example("13800138000-4111111111111111")
@example("+44 20 7946 0958 13800138000")
def test_scrubbing_again_changes_nothing(text: str) -> None:
    once = scrub(text)
    assert scrub(once.text).counts == {} and scrub(once.text).text == once.text
    assert len(once.text) <= len(text) + once.counts.get("email", 0)


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.integers(0, 60), st.integers(0, 60))
def test_what_stands_far_away_changes_nothing(text: str, before: int, after: int) -> None:
    """Numbers are sought in zones; wherever a zone is cut, the same is found."""
    alone = scrub(f" is {text} is ")
    among = scrub("word " * before + f" is {text} is " + " word" * after)
    assert among.text == "word " * before + alone.text + " word" * after and among.counts == alone.counts


@given(st.text())
def test_any_text_can_be_scrubbed(text: str) -> None:
    once = scrub(text)
    assert once == scrub(text) and (once.text == text) is (once.counts == {})
    assert scrub(once.text).counts == {}


@given(DIGITS.filter(lambda digits: len(digits) > 22))
def test_no_part_of_a_long_number_is_taken(number: str) -> None:
    assert scrub(f"no. {number} end").counts == {}


def test_documentation_loses_addresses_alone() -> None:
    """No number of CPython's documentation is a phone, a card or an identity number."""
    found: dict[str, int] = {}
    for document in itertools.islice(python_documents(), 1_500):
        for kind, count in scrub(document.text).counts.items():
            found[kind] = found.get(kind, 0) + count
    assert set(found) <= {"email", "ip"} and found["email"] < 40


@pytest.mark.parametrize(
    "piece", ["a", "1", " ", "@", "1 ", "1-", "a@", "a.", "@a.", "4111 ", "A", "AA11 ", "1.", "a:", "(1)", "+1", "["]
)
def test_a_long_line_of_one_piece_takes_no_longer_than_reading_it(piece: str) -> None:
    text = piece * (1_000_000 // len(piece)) + "x"
    started = time.process_time()
    scrub(text)
    assert time.process_time() - started < 5, "a second where two cores are shared; a quadratic walk takes minutes"
