"""Keys: names for people, numbers for PostgreSQL."""

import pytest

from celery_pglock import LockMisuse, advisory_id
from celery_pglock.keys import canonical, key


def test_text_has_django_pglocks_key():
    assert advisory_id("hello") == (245608543, 3125670444)


@pytest.mark.parametrize(
    ("identifier", "printed"),
    [
        (0, (0, 0)),
        (-1, (4294967295, 4294967295)),
        (2**63 - 1, (2147483647, 4294967295)),
        (-(2**63), (2147483648, 0)),
        ((7, 9), (7, 9)),
        ((-1, -(2**31)), (4294967295, 2147483648)),
    ],
)
def test_numbers_are_printed_as_unsigned_halves(identifier, printed):
    assert advisory_id(identifier) == printed


@pytest.mark.parametrize(
    "identifier", ["hello", "ü" * 300, 0, -5, 2**63 - 1, -(2**63), (7, 9), (-1, -(2**31))]
)
def test_pg_locks_prints_advisory_id(rival, identifier):
    rival.take(identifier)
    row = rival.connection.execute(
        "SELECT classid::bigint, objid::bigint, objsubid FROM pg_locks"
        " WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    ).fetchone()
    assert row == (*advisory_id(identifier), 2 if isinstance(identifier, tuple) else 1)


def test_an_int8_and_a_pair_with_the_same_halves_are_two_locks(rival):
    assert advisory_id((7 << 32) | 9) == advisory_id((7, 9))
    rival.take((7, 9))
    assert rival.sees_held((7, 9))
    assert not rival.sees_held((7 << 32) | 9)


@pytest.mark.parametrize(
    "identifier",
    [
        "",
        None,
        True,
        False,
        1.5,
        2**63,
        -(2**63) - 1,
        (1, 2**31),
        (1, -(2**31) - 1),
        (1,),
        (1, 2, 3),
        (1, True),
        ("a", 1),
        b"a",
    ],
)
def test_what_is_no_lock_id_is_refused_by_name(identifier):
    with pytest.raises(LockMisuse) as refused:
        advisory_id(identifier)
    assert repr(identifier) in str(refused.value)


def test_several_keys_have_one_order_and_no_doubles():
    assert canonical(["b", "a", "b", 3, (1, 2)]) == canonical([(1, 2), 3, "a", "b"])
    assert len(canonical(["b", "a", "b"])) == 2


def test_the_first_slot_is_the_key_itself_and_the_others_are_not():
    slots = key("export").slots(3)
    assert slots[0] == key("export")
    assert len({*slots, *key("other").slots(3)}) == 6
    assert key(7).slots(2)[1] != key("7").slots(2)[1]


def test_a_lone_surrogate_has_a_key():
    assert advisory_id("\ud800") == advisory_id("\ud800")
