"""Bytes as people write them."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.errors import UserError
from resnet_bk.memory.units import format_bytes, parse_bytes

SIZES = {
    "": 1,
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("12GB", 12 * 10**9),
        ("11.9 GiB", 12_777_527_705),
        ("500MB", 500 * 10**6),
        ("123", 123),
        ("  4 kib ", 4096),
        (".5TB", 5 * 10**11),
        ("1e3 MB", 10**9),
        ("+2GB", 2 * 10**9),
        ("1B", 1),
        ("1000000TB", 10**18),
    ],
)
def test_amounts_are_read_as_they_are_meant(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@settings(deadline=None)
@given(number=st.integers(1, 10**5), unit=st.sampled_from(list(SIZES)), spaces=st.sampled_from(["", " ", "  "]))
def test_whole_amounts_in_any_unit_and_any_case_are_exact(number, unit, spaces):
    expected = number * SIZES[unit]
    assert {parse_bytes(f"{number}{spaces}{way}") for way in (unit, unit.lower(), unit.upper())} == {expected}


@settings(deadline=None)
@given(number=st.decimals("0.01", "9999", places=3), unit=st.sampled_from([u for u in SIZES if SIZES[u] >= 1000]))
def test_broken_amounts_are_right_to_the_byte(number, unit):
    assert abs(parse_bytes(f"{number} {unit}") - number * Decimal(SIZES[unit])) <= 1


@pytest.mark.parametrize(
    "text", ["", " ", "GB", "12 apples", "12 GB 3", "1.2.3GB", "1,5GB", "nan", "inf GB", "1e", "."]
)
def test_what_is_no_amount_is_refused_with_an_example(text):
    check_refusal(text, "no amount of memory", "12GB")


@pytest.mark.parametrize("text", ["0", "0GB", "-1GB", "-0.5", "0.4B", "1e-12GB"])
def test_no_memory_at_all_is_refused(text):
    check_refusal(text, "no memory at all", "above 0")


@pytest.mark.parametrize("text", ["1000001TB", "1e30", "1e999GB"])
def test_more_than_an_exabyte_is_refused(text):
    check_refusal(text, "exabyte", "check the unit")


def check_refusal(text, what, mend):
    with pytest.raises(UserError) as caught:
        parse_bytes(text)
    message = str(caught.value)
    assert repr(text) in message and what in message and mend in message
    assert "\n" not in message


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_an_amount_or_one_line_of_complaint(text):
    try:
        assert 1 <= parse_bytes(text) <= 10**18
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@settings(deadline=None)
@given(st.integers(1, 10**18))
def test_what_is_printed_reads_back_within_its_digits(num_bytes):
    printed = format_bytes(num_bytes)
    assert abs(parse_bytes(printed.replace(",", "")) - num_bytes) <= 0.005 * num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "printed"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (16_448_512, "16.45 MB"),
        (123_456_789, "123 MB"),
        (11_900_000_000, "11.90 GB"),
        (1_104_000_000_000, "1.10 TB"),
        (-2_500_000_000, "-2.50 GB"),
    ],
)
def test_amounts_are_printed_in_decimal_units(num_bytes, printed):
    assert format_bytes(num_bytes) == printed
