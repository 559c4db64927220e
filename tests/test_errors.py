"""Errors: what they say, and what survives of them."""

import json
import pickle

import pytest
from django.db.utils import OperationalError

from celery_pglock import LockError, LockLost, LockMisuse, LockNotAcquired, LockNotHeld

ERRORS = [
    LockNotAcquired("invoice:7", "lock_timeout ran out", 2.0, ["task a (pid 1)"]),
    LockLost("invoice:7"),
    LockNotHeld("invoice:7"),
    LockMisuse("Use something else."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickle_and_json(error):
    pickled = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    rebuilt = type(error)(*json.loads(json.dumps(error.args)))
    assert str(pickled) == str(rebuilt) == str(error)
    assert vars(pickled) == vars(rebuilt) == vars(error)


def test_not_acquired_tells_the_lock_the_wait_and_the_holders():
    assert str(ERRORS[0]) == (
        "lock 'invoice:7' was not acquired after waiting 2.00 s: lock_timeout ran out; held by task a (pid 1)"
    )
    assert repr(ERRORS[0]) == f"LockNotAcquired({str(ERRORS[0])!r})"
    assert str(LockNotAcquired("x")) == "lock 'x' was not acquired without waiting: it is taken"


def test_every_error_is_what_its_users_catch():
    assert all(isinstance(error, LockError) for error in ERRORS)
    assert issubclass(LockNotAcquired, OperationalError)
    assert issubclass(LockNotHeld, RuntimeError)
    assert issubclass(LockMisuse, ValueError)
    assert issubclass(LockMisuse, RuntimeError)
    assert LockLost.__bases__ == (LockError,)
