"""Labels: what a lock session says of itself."""

import pytest

from celery_pglock import labels
from celery_pglock.keys import key
from celery_pglock.labels import Holding, Label, Owner

NASTY = [
    "plain",
    "a b:c=d",
    "*/ SELECT 1 --",
    "50% %s %(x)s",
    "'; DROP TABLE x; --",
    "é🔒",
    "line\nbreak",
    "nul\x00",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_label_survives_writing_and_reading(text):
    owner = Owner(text, text, text)
    holding = Holding(key(text), 1700000000.123)
    assert labels.read(labels.comment(owner, [holding], show_names=True) + " SELECT 1") == Label(
        owner, (holding,)
    )
    assert labels.read(labels.comment(owner, [holding], show_names=True)).holdings[0].key.name == text


@pytest.mark.parametrize("text", NASTY)
def test_nothing_in_a_label_ends_its_comment(text):
    comment = labels.comment(Owner(text, text, text), [Holding(key(text), 0)], show_names=True)
    assert comment.count("*/") == comment.count("/*") == 1
    assert "\n" not in comment


def test_a_name_is_cut_at_200_bytes_of_whole_characters():
    comment = labels.comment(Owner(), [Holding(key("ü" * 500), 0)], show_names=True)
    assert labels.read(comment).holdings[0].key.name == "ü" * 100


def test_without_show_names_a_label_keeps_key_texts_to_itself():
    comment = labels.comment(Owner("task"), [Holding(key("secret"), 0)], show_names=False)
    assert "secret" not in comment
    assert labels.read(comment).holdings[0].key == key("secret")


def test_a_label_that_was_cut_off_is_read_as_far_as_it_goes():
    holdings = [Holding(key(f"key {number}"), 1.0) for number in range(3)]
    comment = labels.comment(Owner("task", "id", "worker"), holdings, show_names=True)
    cut = labels.read(comment[:-20])
    assert cut.owner == Owner("task", "id", "worker")
    assert cut.holdings == tuple(holdings[:2])


@pytest.mark.parametrize(
    "query", ["", "SELECT 1", "/*pglock:2 task=x*/ SELECT 1", "SELECT '/*pglock:1 task=x*/'"]
)
def test_other_queries_have_no_label(query):
    assert labels.read(query) is None


@pytest.mark.parametrize("word", ["key=", "key=1:2", "key=a:b:c:d:e", "key=1:2:3:x:y", "x", "="])
def test_a_forged_label_is_read_without_harm(word):
    assert labels.read(f"/*pglock:1 {word} task=t*/") == Label(Owner("t"), ())


def test_an_application_name_is_what_postgresql_keeps_of_it():
    assert labels.application_name("pglock", "abc") == "pglock:abc"
    assert labels.application_name("pglock", "") == "pglock"
    assert labels.application_name("pglock", "ü" + "x" * 100) == "pglock:?" + "x" * 55


def test_the_task_id_is_read_from_our_names_alone():
    assert labels.task_id_of("pglock:abc") == labels.task_id_of("celery:abc") == "abc"
    assert labels.task_id_of("psql:abc") == labels.task_id_of("pglock") == ""
