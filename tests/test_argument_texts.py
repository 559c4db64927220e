"""The one text that an argument has in a key."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from uuid import UUID

import pytest
from django.utils.functional import lazystr
from kombu.utils.json import dumps, loads
from pydantic import BaseModel

from celery_pglock.argument_texts import UnstableText, canonical_text, plain
from tests.models import Entry


class Colour(Enum):
    RED = "red"


class Size(IntEnum):
    BIG = 3


@dataclass(frozen=True)
class Box:
    items: frozenset[str]


class Order(BaseModel):
    number: int
    lines: list[str] = []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", '"a"'),
        ('say "a"', '"say \\"a\\""'),
        ("é", '"é"'),
        (1, "1"),
        (True, "True"),
        (None, "None"),
        (1.0, "1.0"),
        (Decimal("1.50"), "Decimal(1.5)"),
        (Decimal("-0.0"), "Decimal(0)"),
        (UUID(int=5), "UUID(00000000-0000-0000-0000-000000000005)"),
        (date(2026, 1, 2), "date(2026-01-02)"),
        (time(3, 4), "time(03:04:00)"),
        (datetime(2026, 1, 2, 3), "datetime(2026-01-02T03:00:00)"),
        (timedelta(hours=1), "timedelta(1:00:00)"),
        (b"\x01", "bytes(01)"),
        ([1, "a"], '[1, "a"]'),
        ({"b": 1, "a": 2}, '{"a": 2, "b": 1}'),
        ({2, 1}, "set(1, 2)"),
        (Colour.RED, '"red"'),
        (Size.BIG, "3"),
        (Entry(pk=7), "tests.Entry(7)"),
        (lazystr("later"), '"later"'),
        (Order(number=1), '{"lines": [], "number": 1}'),
        (complex(1, 2), "(1+2j)"),
        (Box(frozenset("ba")), 'Box({"items": set("a", "b")})'),
        (Decimal("123456789.123456789123456789123456789"), "Decimal(123456789.123456789123456789123456789)"),
        (Decimal("NaN"), "Decimal(NaN)"),
    ],
)
def test_the_canonical_text_of_a_value(value, text):
    assert canonical_text(value) == text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        ({"a": 1, "b": [1]}, OrderedDict([("b", (1,)), ("a", 1)])),
        (Decimal("1.0"), Decimal("1.00")),
        (
            datetime(2026, 1, 1, 12, tzinfo=timezone.utc),
            datetime(2026, 1, 1, 14, tzinfo=timezone(timedelta(hours=2))),
        ),
        ({1: "a", None: "b"}, {"1": "a", "null": "b"}),
        ({True: "c"}, {"true": "c"}),
        ({Colour.RED: 1}, {"red": 1}),
        (Order(number=1), {"number": 1, "lines": []}),
    ],
)
def test_equal_arguments_have_equal_texts(one, other):
    assert canonical_text(one) == canonical_text(other)


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        {1: Decimal("1.10")},
        UUID(int=5),
        datetime(2026, 1, 1, tzinfo=timezone.utc),
        date(2026, 1, 2),
        time(1, 2),
        b"bytes",
        Size.BIG,
        {"a": [None, True, 1.5]},
        "\ud800",
    ],
)
def test_a_text_is_the_same_before_and_after_the_broker(value):
    assert canonical_text(loads(dumps(value))) == canonical_text(value)


@pytest.mark.parametrize(
    ("one", "other"), [(1, "1"), (1, True), (1, 1.0), (None, "None"), (["a", "b"], ["a, b"]), (b"a", "a")]
)
def test_different_values_have_different_texts(one, other):
    assert canonical_text(one) != canonical_text(other)


@pytest.mark.parametrize("value", [object(), lambda: 1, [object()], {"a": object()}])
def test_a_text_with_a_memory_address_is_refused(value):
    with pytest.raises(UnstableText, match="memory address"):
        canonical_text(value)


def test_a_model_instance_that_was_not_saved_is_refused():
    with pytest.raises(UnstableText, match="not been saved"):
        canonical_text(Entry())


def test_a_template_renders_plain_text():
    values = [1, "1", Colour.RED, {2, 1}, lazystr("x"), UUID(int=5)]
    assert [str(plain(value)) for value in values] == ["1", "1", "red", "set(1, 2)", "x", str(UUID(int=5))]
